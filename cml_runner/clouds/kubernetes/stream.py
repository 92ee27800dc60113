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

STDIN, STDOUT, STDERR, RESULT, SIZE, CLOSE = 0, 1, 2, 3, 4, 255  # channels
BINARY, END = 2, 8  # kinds of frames
FRAME = 256 * 1024  # bytes to send at a time
QUIET = 30  # seconds after which a shell is asked if it is still there, as proxies do, too
LONGEST = 2000  # characters of what a command says of its troubles
CODE = re.compile(r"exit code (\d+)")


class Running:
    """A command; write to it, end its input, read from it until it is done."""

    def __init__(
        self,
        session: Session,
        pod: str,
        container: str,
        command: Sequence[str],
        *,
        terminal: bool = False,
        patient: bool = False,
    ) -> None:
        self._patient = patient
        self._socket: Any = session.run(pod, container, command, terminal=terminal)
        if patient:
            self._socket.settimeout(QUIET)
        self._rest, self.said, self._result = b"", "", b""
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
        code = self.code()
        if code not in accepted:
            msg = f"data can't be moved: {self.said.strip() or f'exit code {code}'}"
            raise RunnerError(msg)

    def piece(self) -> tuple[int, bytes] | None:
        """Return the next part of what it says, and whether that is an error; None at its end."""
        while not self._over:
            channel, content = self._next()
            if channel in (STDOUT, STDERR) and content:
                return channel, content
        return None

    def resize(self, size: str) -> None:
        """Tell its terminal how large it is, as JSON."""
        self._send(bytes([SIZE]) + size.encode())

    def drop(self) -> None:
        """Have nothing more to do with it."""
        with suppress(Exception):
            self._socket.shutdown()

    def code(self) -> int:
        """Return its exit code; -1 if it didn't come to an end."""
        with suppress(ValueError, AttributeError):
            found = json.loads(self._result)
            if found.get("status") == "Success":
                return 0
            self.said += f" {found.get('message', '')}"
            if match := CODE.search(found.get("message", "")):
                return int(match[1])
        return -1

    def _receive(self) -> bool:
        """Take what comes next; False if nothing ever will."""
        while not self._over:
            channel, content = self._next()
            if channel == STDOUT and content:
                self._rest += content
                return True
            if channel == STDERR:
                self.said = (self.said + content.decode(errors="replace"))[:LONGEST]
        return False

    def _next(self) -> tuple[int, bytes]:
        """Take one frame; its channel and what is in it. The result is kept."""
        with _translated():
            kind, frame = self._frame()
        content = frame.data if kind <= BINARY else b""
        self._over = kind == END
        channel = content[0] if content else CLOSE
        if channel == RESULT:
            self._result += content[1:]
        return channel, content[1:]

    def _frame(self) -> tuple[int, Any]:
        while True:
            try:
                found: tuple[int, Any] = self._socket.recv_data_frame(control_frame=True)
            except Exception as error:
                if not self._patient or "Timeout" not in type(error).__name__:
                    raise
                self._socket.ping()  # what is silent may be there all the same
            else:
                return found

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
