"""What is in a directory, and content that doesn't change while it is being read."""

from __future__ import annotations

import os
import stat
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from cml_runner.transfer.manifest import DIRECTORY, FILE, LINK, Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Nanoseconds within which a file may change twice and bear one time stamp: design 39
RACE = 20_000_000


class Changing(Exception):
    """A file changed, or vanished, while it was being read."""


class Found(NamedTuple):
    """Something that is there; its stamp is another one whenever it has changed."""

    path: bytes
    kind: int
    mode: int
    mtime: int
    size: int
    stamp: int

    def entry(self) -> Entry:
        """Describe it, without any content."""
        size = self.size if self.kind == FILE else 0
        return Entry(self.path, self.kind, self.mode, self.mtime, size)


KINDS = {stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: LINK}


def walk(
    root: bytes, wanted: Callable[[bytes, bool], bool], complain: Callable[[bytes, OSError], None]
) -> Iterator[Found]:
    """Find everything in a directory but sockets, pipes and devices; links are not followed.

    What can't be read is complained of; what vanishes meanwhile isn't there.
    """
    todo = [b""]
    while todo:
        directory = todo.pop()
        try:
            entries = os.scandir(os.path.join(root, directory))
        except FileNotFoundError:
            continue
        except OSError as error:
            complain(directory, error)
            continue
        with entries:
            for one in entries:
                path = directory + one.name
                try:
                    status = one.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                kind = KINDS.get(stat.S_IFMT(status.st_mode))
                if kind is None or not wanted(path, kind == DIRECTORY):
                    continue
                yield found(path, kind, status)
                if kind == DIRECTORY:
                    todo.append(path + b"/")


def found(path: bytes, kind: int, status: os.stat_result) -> Found:
    """Describe what was found."""
    mode, mtime = stat.S_IMODE(status.st_mode), status.st_mtime_ns
    if kind != FILE:  # a directory's times change with what is in it, and say nothing
        return Found(path, kind, mode, mtime, 0, hash((status.st_mode, mtime, status.st_ino)))
    stamp = hash((status.st_mode, status.st_size, mtime, status.st_ctime_ns, status.st_ino))
    return Found(path, kind, mode, mtime, status.st_size, stamp)


@contextmanager
def steady(root: bytes, path: bytes) -> Iterator[tuple[int, Found]]:
    """Open a file to read it; raise Changing at the end if it wasn't the same all the time."""
    name = os.path.join(root, path)
    try:
        number = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Changing from error
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise Changing
        if 0 <= (age := time.time_ns() - status.st_ctime_ns) < RACE:
            time.sleep((RACE - age) / 1e9)
            status = os.fstat(number)
        before = found(path, FILE, status)
        yield number, before
        if found(path, FILE, os.fstat(number)).stamp != before.stamp:
            raise Changing
    finally:
        os.close(number)


def content(number: int, length: int, offset: int = 0) -> bytes:
    """Read so many bytes of a file. Raises Changing if there are fewer."""
    parts = []
    while length:
        part = os.pread(number, length, offset)
        if not part:
            raise Changing
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
