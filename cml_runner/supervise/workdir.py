"""The directory in which an agent lives."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cml_runner.boot.prepare import WORK
from cml_runner.errors import AgentFailed, AlreadyExists

if TYPE_CHECKING:
    from cml_runner.model import Settings
    from cml_runner.supervise.user import Account

LOCK = ".cml-runner-lock"  # in a directory where one of us lives
MARKER = ".cml-runner"  # in a directory that we made, so that we may delete it
COMMON = WORK  # for accounts: in its home, one could exchange directories


class Workdir:
    """One agent's directory, which nobody else uses, and which goes with it if we made it."""

    def __init__(self, settings: Settings, name: str, account: Account | None = None) -> None:
        """Choose it, for an agent with an account; machines which share a disk mustn't share it."""
        alone = settings.workdir and len(settings.names) == 1
        directory = Path(settings.workdir or (COMMON if account else "work"))
        if account and directory.parts[:1] == ("~",):
            directory = directory.relative_to("~")
        directory = (account.home / directory if account else directory.expanduser()).absolute()
        self.path = directory if alone else directory / name
        self._account = account
        self._lock: IO[str] | None = None
        self._ours = False

    def create(self) -> None:
        """Make it, or take what a dead one of us has left. Raises AlreadyExists, AgentFailed."""
        ours = not self.path.exists() or (self.path / MARKER).exists()
        if ours and self._is_spoilt():  # a job has restarted the machine
            shutil.rmtree(self.path, ignore_errors=True)
        for parent in reversed(self.path.parents):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                parent.chmod(0o755)  # an agent under another account has to get through
        self.path.mkdir(exist_ok=True)
        if self._is_spoilt():
            msg = f"jobs could change the agent in {self.path} while it is installed there"
            raise AgentFailed(f"{msg}: use another --workdir")
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

    def renew(self) -> None:
        """Make it fit for another installation. Raises AgentFailed."""
        if self._is_spoilt():
            self.delete()
            self.create()

    def delete(self) -> None:
        """Delete it, but never one that was there before us."""
        if not self._lock:
            return
        (self.path / LOCK).unlink(missing_ok=True)
        if self._ours:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
        self._lock = None

    def _is_spoilt(self) -> bool:
        """Say if jobs that must not become root may have left there what root is about to run."""
        account = self._account
        if not account or account.sudo:
            return False
        way = {self.path, *self.path.parents, *self.path.resolve().parents}
        return any(account.owns(one) or _is_open(one) for one in way if os.path.lexists(one))


def _is_open(path: Path) -> bool:
    """Say if anybody may exchange what is in a directory."""
    mode = path.lstat().st_mode
    return stat.S_ISDIR(mode) and bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX
