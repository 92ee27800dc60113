"""Bring a snapshot onto a disk: as a whole, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cml_runner.errors import RunnerError
from cml_runner.transfer.manifest import DIRECTORY, FILE, LINK, Blob, Entry, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from cml_runner.transfer.history import History

    Progress = Callable[[int, int], None]  # bytes that are done, of how many

PART = ".cml-runner-part-"  # begins the name of a directory with what has been fetched
AT_ONCE = 6  # blobs under way
WHOLE = 0.5  # of a blob: who needs more than that had better read all of it, and verify it


def restore(
    history: History, manifest: Manifest, directory: Path, progress: Progress | None = None
) -> None:
    """Make a directory what it was; it must not exist yet, or be empty.

    It is there only once it is complete. Raises FileNotFoundError if the snapshot has been
    superseded for so long that some of it is gone, RunnerError for whatever else goes wrong.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{directory.name}.part-"
    for old in directory.parent.glob(f"{prefix}*"):  # of one that was killed
        _remove(old)
    beside = directory.parent / f"{prefix}{secrets.token_hex(4)}"
    try:
        _fill(history, manifest.entries, os.fsencode(beside), progress)
        os.replace(beside, directory)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not error.filename:
            raise
        msg = f"{directory} can't be restored: {error.strerror or error}"
        raise RunnerError(msg) from error
    finally:
        _remove(beside)


def merge(
    history: History, entries: Sequence[Entry], directory: Path, progress: Progress | None = None
) -> list[Entry]:
    """Bring files into a directory that is in use; return what was new or had changed.

    Everything is fetched beside it first, so that what can't be fetched changes nothing. Files
    that are not in the snapshot stay as they are. Raises as `restore` does.
    """
    new = [_writable(entry) for entry in entries if not _there(directory, entry)]
    beside = directory / f"{PART}{secrets.token_hex(4)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob(f"{PART}*"):
            _remove(old)
        _fill(history, new, os.fsencode(beside), progress)
        _move(os.fsencode(beside), os.fsencode(directory), new)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not error.filename:
            raise
        msg = f"{directory}: {os.fsdecode(error.filename or '')}: {error.strerror or error}"
        raise RunnerError(msg) from error
    finally:
        _remove(beside)
    return new


def _there(directory: Path, entry: Entry) -> bool:
    """Say if a file is there already, as it should be."""
    path = os.path.join(os.fsencode(directory), entry.path)
    try:
        status = os.lstat(path)
    except OSError:
        return False
    if entry.kind == DIRECTORY:
        return stat.S_ISDIR(status.st_mode)
    if entry.kind == LINK:
        return stat.S_ISLNK(status.st_mode) and os.readlink(path) == entry.target
    same = (status.st_size, status.st_mtime_ns) == (entry.size, entry.mtime)
    return stat.S_ISREG(status.st_mode) and same


def _writable(entry: Entry) -> Entry:
    """Let a directory be changed by its owner, who has to move files out of it."""
    return entry._replace(mode=entry.mode | stat.S_IRWXU) if entry.kind == DIRECTORY else entry


def _move(beside: bytes, directory: bytes, entries: Iterable[Entry]) -> None:
    """Put in place what has been fetched: directories first, links to them last."""
    kinds = {DIRECTORY: 0, FILE: 1, LINK: 2}
    for entry in sorted(entries, key=lambda one: (kinds[one.kind], one.path)):
        path = os.path.join(directory, entry.path)
        _make_way(directory, entry.path)
        if entry.kind != DIRECTORY:
            os.replace(os.path.join(beside, entry.path), path)
            continue
        if not os.path.isdir(path) or os.path.islink(path):
            with suppress(FileNotFoundError):
                os.unlink(path)
            os.mkdir(path)
        os.chmod(path, entry.mode)


def _make_way(directory: bytes, path: bytes) -> None:
    """Have real directories above a path: through a link, it might lead anywhere."""
    above = b""
    for part in path.split(b"/")[:-1]:
        above = os.path.join(above, part)
        found = os.path.join(directory, above)
        if os.path.islink(found):
            os.unlink(found)
        os.makedirs(found, exist_ok=True)


def _fill(
    history: History, entries: Sequence[Entry], root: bytes, progress: Progress | None
) -> None:
    """Write everything: links at the end, so that nothing is written through one."""
    os.mkdir(root, 0o700)
    directories = [entry for entry in entries if entry.kind == DIRECTORY]
    above = {entry.path.rpartition(b"/")[0] for entry in entries}
    for path in sorted(above | {entry.path for entry in directories}):
        os.makedirs(os.path.join(root, path), 0o700, exist_ok=True)
    _Files(history, root, progress).write([entry for entry in entries if entry.kind == FILE])
    for entry in entries:
        if entry.kind == LINK:
            path = os.path.join(root, entry.path)
            os.symlink(entry.target, path)
            os.utime(path, ns=(entry.mtime, entry.mtime), follow_symlinks=False)
    for entry in sorted(directories, key=lambda one: one.path, reverse=True):
        path = os.path.join(root, entry.path)
        os.chmod(path, entry.mode)
        os.utime(path, ns=(entry.mtime, entry.mtime))


@dataclass
class _Open:
    """A file that is being written by several threads."""

    entry: Entry
    left: int  # pieces
    number: int = -1  # of the descriptor
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class _Part:
    """Where a part of a blob goes."""

    file: _Open
    at: int  # offset in the file
    offset: int  # in the blob
    length: int


class _Files:
    """Writes files, blob after blob, several at the same time."""

    def __init__(self, history: History, root: bytes, progress: Progress | None) -> None:
        self._history, self._root = history, root
        self._progress = progress or (lambda _done, _total: None)
        self._total = self._done = 0
        self._lock = threading.Lock()
        self._failed = threading.Event()

    def write(self, entries: Sequence[Entry]) -> None:
        """Write them all, the largest first: it takes longest."""
        self._total = sum(entry.size for entry in entries)
        plan: dict[Blob, list[_Part]] = {}
        opened = []
        for entry in sorted(entries, key=lambda one: -one.size):
            opened.append(file := _Open(entry, max(1, len(entry.pieces))))
            at = 0
            for blob, offset, length in entry.pieces:
                plan.setdefault(blob, []).append(_Part(file, at, offset, length))
                at += length
            if not entry.pieces:
                self._put(_Part(file, 0, 0, 0), b"")
        self._history.expect(plan)
        try:
            with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="download") as pool:
                for future in [pool.submit(self._blob, *one) for one in plan.items()]:
                    future.result()
        finally:
            for file in opened:
                if file.number >= 0:
                    os.close(file.number)

    def _blob(self, blob: Blob, parts: list[_Part]) -> None:
        """Fetch a blob, or what is needed of it, and write all that is in it."""
        if self._failed.is_set():
            return
        try:
            start = min(part.offset for part in parts)
            end = max(part.offset + part.length for part in parts)
            if end - start > WHOLE * blob.size:
                start, end = 0, blob.size
            content = self._history.get(blob, start, end)
            for part in parts:
                self._put(part, content[part.offset - start :][: part.length])
        except BaseException:
            self._failed.set()
            raise
        with self._lock:
            self._done += sum(part.length for part in parts)
            self._progress(self._done, self._total)

    def _put(self, part: _Part, content: memoryview | bytes) -> None:
        """Write a part of a file; the last one makes it complete."""
        if len(content) != part.length:
            msg = "a snapshot was damaged: some content is too short"
            raise RunnerError(msg)
        file = part.file
        with file.lock:
            if file.number < 0:
                path = os.path.join(self._root, file.entry.path)
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                file.number = os.open(path, flags, 0o600)
        at = part.at
        while len(content):
            written = os.pwrite(file.number, content, at)
            at, content = at + written, content[written:]
        with file.lock:
            file.left -= 1
            if not file.left:
                os.fchmod(file.number, file.entry.mode)
                os.utime(file.number, ns=(file.entry.mtime, file.entry.mtime))
                number, file.number = file.number, -1
                os.close(number)


def _remove(path: Path) -> None:
    """Delete a directory of ours, write-protected ones in it included."""
    if not os.path.lexists(path):
        return
    for parent, names, _ in os.walk(os.fsencode(path)):
        for name in names:
            inner = os.path.join(parent, name)
            if not os.path.islink(inner):
                with suppress(OSError):
                    os.chmod(inner, stat.S_IRWXU)
    with suppress(OSError):
        shutil.rmtree(os.fsencode(path))
