"""What a snapshot says: everything in a directory, and in which blobs its content is."""

from __future__ import annotations

import zlib
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

VERSION = 1
BATCH = 5000  # entries that are packed or unpacked at a time: memory is short on small machines
FILE, DIRECTORY, LINK = 0, 1, 2


class Blob(NamedTuple):
    """Some content in the bucket; its key, below the data of all machines, ends with its hash."""

    key: str
    size: int

    @property
    def digest(self) -> str:
        """What its content hashes to."""
        return self.key.rpartition("/")[2]


class Piece(NamedTuple):
    """A part of a file: so many bytes of a blob, from an offset on."""

    blob: Blob
    offset: int
    length: int


class Entry(NamedTuple):
    """One file, directory or symbolic link; its content is its pieces, in order."""

    path: bytes  # relative, with slashes, as the system has it
    kind: int
    mode: int  # permissions
    mtime: int  # nanoseconds
    size: int = 0  # bytes
    target: bytes = b""  # of a link
    pieces: tuple[Piece, ...] = ()


class Manifest(NamedTuple):
    """One snapshot."""

    entries: list[Entry]
    machine: str = ""  # that made it
    at: datetime = datetime.fromtimestamp(0, timezone.utc)


def pack(manifest: Manifest) -> bytes:
    """Write it, compressed."""
    numbers: dict[Blob, int] = {}
    for entry in manifest.entries:
        for piece in entry.pieces:
            numbers.setdefault(piece.blob, len(numbers))
    head = (VERSION, manifest.machine, manifest.at.isoformat(), list(numbers))
    press = zlib.compressobj(1)
    parts = [press.compress(_framed(head))]
    for start in range(0, len(manifest.entries), BATCH):
        batch = manifest.entries[start : start + BATCH]
        parts.append(press.compress(_framed([_flat(entry, numbers) for entry in batch])))
    return b"".join((*parts, press.flush()))


def unpack(content: bytes) -> Manifest:
    """Read it back. Raises RunnerError if it was damaged, or written by another version."""
    try:
        frames = _frames(content)
        version, machine, at, blobs = next(frames)
        if version != VERSION:
            msg = f"a snapshot was written by another version of cml-runner ({version})"
            raise RunnerError(msg)
        named = [Blob(key, size) for key, size in blobs]
        entries = [_full(flat, named) for frame in frames for flat in frame]
        return Manifest(entries, machine, datetime.fromisoformat(at))
    except (zlib.error, msgspec.MsgspecError, TypeError, ValueError, IndexError) as error:
        msg = f"a snapshot was damaged: {error}"
        raise RunnerError(msg) from error


def _flat(entry: Entry, numbers: dict[Blob, int]) -> tuple[Any, ...]:
    pieces = [(numbers[piece.blob], piece.offset, piece.length) for piece in entry.pieces]
    return (*entry[:6], pieces)


def _full(flat: Any, blobs: list[Blob]) -> Entry:
    path, kind, mode, mtime, size, target, pieces = flat
    if not path or any(part in (b"", b".", b"..") for part in path.split(b"/")):
        msg = f"it names {path!r}"  # who reads it may not be who wrote it
        raise ValueError(msg)
    found = tuple(Piece(blobs[number], offset, length) for number, offset, length in pieces)
    return Entry(path, kind, mode & 0o7777, mtime, size, target, found)


def _framed(value: Any) -> bytes:
    content = msgspec.msgpack.encode(value)
    return len(content).to_bytes(4, "big") + content


def _frames(content: bytes) -> Iterator[Any]:
    press = zlib.decompressobj()
    buffer = b""
    for part in _inflated(press, content):
        buffer += part
        while len(buffer) >= 4 and len(buffer) >= (end := 4 + int.from_bytes(buffer[:4], "big")):
            yield msgspec.msgpack.decode(buffer[4:end])
            buffer = buffer[end:]
    if buffer or not press.eof:
        msg = "its end is missing"
        raise ValueError(msg)


def _inflated(press: Any, content: bytes) -> Iterable[bytes]:
    step = 1 << 20
    for start in range(0, len(content), step):
        yield press.decompress(content[start : start + step])
    yield press.flush()
