"""A shell in a pod, on the user's terminal, through the API server; kubectl isn't needed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import termios
import threading
import tty
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cml_runner import signals
from cml_runner.clouds.kubernetes.pod import CONTAINER
from cml_runner.clouds.kubernetes.stream import STDERR, Running
from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cml_runner.clouds.kubernetes.session import Session

LOGIN = ("/bin/sh", "-c", "command -v bash >/dev/null && exec bash || exec sh")
PIECE = 4096  # bytes of input at a time


@dataclass(frozen=True)
class Shell:
    """A command that is yet to be started; with a terminal if we have one."""

    session: Session
    pod: str
    command: Sequence[str]

    def run(self) -> int:
        """Run it until it ends; return its exit code."""
        live = sys.stdin.isatty() and sys.stdout.isatty()
        command = self.command or LOGIN
        running = Running(self.session, self.pod, CONTAINER, command, terminal=live, patient=True)
        try:
            threading.Thread(target=_feed, args=(running, live), daemon=True).start()
            with _raw() if live else contextlib.nullcontext(), _measured(running, live):
                while piece := running.piece():
                    _write(piece)
            code = running.code()
        finally:
            running.drop()
        if code < 0:
            msg = f"the shell on {self.pod} broke off: {running.said.strip()}".rstrip(": ")
            raise RunnerError(msg)
        return code


def _feed(running: Running, live: bool) -> None:
    """Send what is typed, or what comes from a file or another program, and its end."""
    with suppress(RunnerError, OSError):
        while piece := os.read(sys.stdin.fileno(), PIECE):
            running.write(piece)
        if not live:
            running.end()


def _write(piece: tuple[int, bytes]) -> None:
    channel, content = piece
    stream = sys.stderr if channel == STDERR else sys.stdout
    stream.buffer.write(content)
    stream.buffer.flush()


@contextmanager
def _raw() -> Iterator[None]:
    """Have each key go to the pod, Ctrl-C too."""
    before = termios.tcgetattr(sys.stdin)
    tty.setraw(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@contextmanager
def _measured(running: Running, live: bool) -> Iterator[None]:
    """Tell the pod how large the terminal is, now and whenever that changes."""
    if not live:
        yield
        return

    def tell(*_: Any) -> None:
        width, height = shutil.get_terminal_size()
        running.resize(json.dumps({"Width": width, "Height": height}))

    tell()
    with signals.handled((signal.SIGWINCH,), tell):
        yield
