"""The files of the embedded cloud: private, whole, and changed by one at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, TypeVar

import msgspec

from cml_runner.errors import CredentialsError, NoCapacity, RunnerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

T = TypeVar("T")

ERRORS: Mapping[int, tuple[type[RunnerError], str]] = {
    errno.ENOSPC: (NoCapacity, "free some space, or let CML_RUNNER_HOME be on another disk"),
    errno.EDQUOT: (NoCapacity, "free some space, or let CML_RUNNER_HOME be on another disk"),
    errno.EAGAIN: (NoCapacity, "this computer allows no more processes now: launch fewer"),
    errno.ENOMEM: (NoCapacity, "this computer has no more memory: launch fewer machines"),
    errno.EMFILE: (NoCapacity, "too many open files: raise `ulimit -n`"),
    errno.EACCES: (CredentialsError, "make it yours, or set CML_RUNNER_HOME to what is"),
    errno.EPERM: (CredentialsError, "make it yours, or set CML_RUNNER_HOME to what is"),
    errno.EROFS: (CredentialsError, "set CML_RUNNER_HOME to a directory that can be written"),
}


@contextmanager
def translated() -> Iterator[None]:
    """Turn what the operating system refuses into errors of ours."""
    try:
        yield
    except OSError as error:
        kind, hint = ERRORS.get(error.errno or 0, (RunnerError, "look at it, and try again"))
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        msg = f"local cloud: {what}; {hint}"
        raise kind(msg) from error


def now() -> datetime:
    """Tell the time."""
    return datetime.now(timezone.utc)


def make(directory: Path) -> None:
    """Create a directory that nobody else may read, with those above it."""
    if not directory.is_dir():
        make(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)


def remove(path: Path) -> None:
    """Delete it with all that is in it, write-protected directories of ours included."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    for parent, names, _ in os.walk(path):
        for name in names:
            inner = os.path.join(parent, name)
            if not os.path.islink(inner):
                with suppress(PermissionError):
                    os.chmod(inner, stat.S_IRWXU)
    shutil.rmtree(path)


def read(path: Path, kind: type[T]) -> T | None:
    """Return a dataclass that was saved; None if there is no such file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None


def save(path: Path, value: object) -> None:
    """Keep a dataclass."""
    write(path, msgspec.json.encode(value))


def write(path: Path, content: bytes) -> None:
    """Put a file there at once as a whole, for its owner's eyes only."""
    number, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def locked(region: Path) -> Iterator[None]:
    """Be the only one who changes what is in a region, for a moment."""
    number = os.open(region / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def lock(path: Path) -> int | None:
    """Hold a lock for as long as the descriptor is open; None if somebody holds it."""
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(number), os.stat(path)):  # else its holder has deleted it
            return number
    os.close(number)
    return None


def held(path: Path) -> bool:
    """Say if somebody holds a lock."""
    try:
        number = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(number)
