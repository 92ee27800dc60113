"""The directory in which an agent lives."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cml_runner.errors import AlreadyExists

if TYPE_CHECKING:
    from cml_runner.model import Settings

LOCK = ".cml-runner-lock"  # in a directory where one of us lives
MARKER = ".cml-runner"  # in a directory that we made, so that we may delete it


class Workdir:
    """One agent's directory, which nobody else uses, and which goes with it if we made it."""

    def __init__(self, settings: Settings, name: str, home: Path | None = None) -> None:
        """Choose it, in somebody's home; machines which share a disk mustn't share it."""
        alone = settings.workdir and len(settings.names) == 1
        directory = Path(settings.workdir or "work")
        if home and directory.parts[0] == "~":
            directory = directory.relative_to("~")
        directory = (home / directory if home else directory.expanduser()).absolute()
        self.path = directory if alone else directory / name
        self._lock: IO[str] | None = None
        self._ours = False

    def create(self) -> None:
        """Make it, or take what a dead one of us has left. Raises AlreadyExists."""
        ours = not self.path.exists() or (self.path / MARKER).exists()
        for parent in reversed(self.path.parents):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                parent.chmod(0o755)  # an agent under another account has to get through
        self.path.mkdir(exist_ok=True)
        lock = (self.path / LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            msg = f"another runner lives in {self.path}: use another --name or --workdir"
            raise AlreadyExists(msg) from error
        self._lock, self._ours = lock, ours
        if ours:
            (self.path / MARKER).touch()

    def delete(self) -> None:
        """Delete it, but never one that was there before us."""
        if not self._lock:
            return
        (self.path / LOCK).unlink(missing_ok=True)
        if self._ours:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
        self._lock = None
