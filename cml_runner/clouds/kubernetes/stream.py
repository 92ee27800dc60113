"""A command in a pod, with its input and its output as files, however long they are."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cml_runner.clouds.kubernetes.session import Session

STDIN, STDOUT, STDERR, RESULT, CLOSE = 0, 1, 2, 3, 255  # channels
BINARY, END = 2, 8  # kinds of frames
FRAME = 256 * 1024  # bytes to send at a time
LONGEST = 2000  # characters of what a command says of its troubles
CODE = re.compile(r"exit code (\d+)")


class Running:
    """A command; write to it, end its input, read from it until it is done."""

    def __init__(self, session: Session, pod: str, container: str, command: Sequence[str]) -> None:
        self._socket: Any = session.run(pod, container, command)
        self._rest, self._said, self._result = b"", "", b""
        self._over = False

    def write(self, content: bytes | memoryview) -> int:
        """Send a part of its input."""
        view = memoryview(content)
        for start in range(0, len(view), FRAME):
            self._send(bytes([STDIN]) + view[start : start + FRAME])
        return len(view)

    def end(self) -> None:
        """Say that there is no more input."""
        self._send(bytes([CLOSE, STDIN]))

    def read(self, size: int) -> bytes:
        """Return so much of its output, less only at its end."""
        parts, missing = [], size
        while missing:
            if not self._rest and not self._receive():
                break
            parts.append(self._rest[:missing])
            self._rest = self._rest[missing:]
            missing -= len(parts[-1])
        return b"".join(parts)

    def close(self, accepted: Sequence[int] = (0,)) -> None:
        """Wait for its end. Raises RunnerError if that isn't a good one."""
        while self._receive():
            self._rest = b""
        self.drop()
        code = self._code()
        if code not in accepted:
            msg = f"data can't be moved: {self._said.strip() or f'exit code {code}'}"
            raise RunnerError(msg)

    def drop(self) -> None:
        """Have nothing more to do with it."""
        with suppress(Exception):
            self._socket.shutdown()

    def _code(self) -> int:
        """Return its exit code; -1 if it didn't come to an end."""
        with suppress(ValueError, AttributeError):
            found = json.loads(self._result)
            if found.get("status") == "Success":
                return 0
            self._said += f" {found.get('message', '')}"
            if match := CODE.search(found.get("message", "")):
                return int(match[1])
        return -1

    def _receive(self) -> bool:
        """Take what comes next; False if nothing ever will."""
        while not self._over:
            with _translated():
                kind, frame = self._socket.recv_data_frame(control_frame=True)
            content = frame.data if kind <= BINARY else b""
            self._over = kind == END
            channel = content[0] if content else CLOSE
            if channel == STDOUT and len(content) > 1:
                self._rest += content[1:]
                return True
            if channel == STDERR:
                self._said = (self._said + content[1:].decode(errors="replace"))[:LONGEST]
            elif channel == RESULT:
                self._result += content[1:]
        return False

    def _send(self, frame: bytes) -> None:
        with _translated():
            self._socket.send(frame, opcode=BINARY)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.startswith("websocket"):
            msg = f"the connection to a pod is broken: {error}"
            raise RunnerError(msg) from error
        raise
