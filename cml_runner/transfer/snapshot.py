"""Make snapshots of a directory, one after the other; of what didn't change nothing is read."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from cml_runner.transfer.manifest import DIRECTORY, FILE, LINK, Blob, Entry, Manifest, Piece
from cml_runner.transfer.rules import Rules
from cml_runner.transfer.tree import Changing, Found, content, steady, walk
from cml_runner.transfer.upload import CHUNK, Upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from cml_runner.transfer.history import History
    from cml_runner.transfer.upload import Progress


SMALL = 1 << 20  # bytes; smaller files share blobs
ROUNDS = 5  # looks at a directory that changes all the time
GRACE = 3600  # seconds that a blob stays after the last snapshot which needs it
SCRAPS = 64  # blobs that hold but a few small files, before they are put together


@dataclass(frozen=True)
class Outcome:
    """What became of a snapshot; without changes there is none."""

    changed: bool
    steady: bool = True  # it is what was there at one moment
    left_out: tuple[tuple[str, str], ...] = ()  # what can't be read, and why


class Record:
    """What we know of a path: what is in the next snapshot, and its stamp if that is all there."""

    __slots__ = ("entry", "seen", "stamp")

    def __init__(self, entry: Entry, stamp: int | None, seen: int) -> None:
        self.entry, self.stamp, self.seen = entry, stamp, seen


class Writer:
    """Makes the snapshots of a directory, in an epoch that its history has taken.

    A snapshot is what was there at one moment if the directory holds still for as long as it takes
    to look at it; where it doesn't, each file of it is whole all the same.
    """

    def __init__(
        self,
        history: History,
        directory: Path,
        rules: Rules | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.history, self.root, self.rules = history, os.fsencode(directory), rules or Rules()
        self._clock = clock
        self._records: dict[bytes, Record] = {}
        self._walks = 0
        self._dirty = True  # the records are not what the last snapshot has
        self._problems: dict[bytes, str] = {}
        self._known: dict[str, Blob] = {}  # that the last snapshot needs, or the next one will
        self._needed: Counter[Blob] = Counter()  # how much of each the last snapshot needs
        self._garbage: deque[tuple[float, Blob]] = deque()

    def adopt(self, manifest: Manifest) -> None:
        """Begin with what was restored: all that is still as it says needn't be read."""
        self._walks += 1
        entries = {entry.path: entry for entry in manifest.entries}
        for one in self._walk():
            entry = entries.get(one.path)
            if entry and entry[:5] == one.entry()[:5]:
                self._records[one.path] = Record(entry, one.stamp, self._walks)
        self._dirty = len(self._records) != len(entries)
        self._know(manifest.entries)
        known = {blob.key for blob in self._needed}
        now = self._clock()
        self._garbage.extend((now, one) for one in self.history.blobs() if one.key not in known)

    def snapshot(self, progress: Progress | None = None) -> Outcome:
        """Make a snapshot if anything has changed; it is safe when this returns.

        Raises Fenced if another machine has taken over.
        """
        calm = False
        for _ in range(ROUNDS):
            self._problems = {}
            changed = self._look()
            if calm := not changed:
                break
            self._take(changed, progress or (lambda _done, _total: None))
        changes = self._dirty
        if changes:
            self._commit()
        else:
            self.history.check()
        left_out = tuple((os.fsdecode(path), why) for path, why in self._problems.items())
        return Outcome(changes, calm, left_out)

    # What is there

    def _walk(self) -> Iterable[Found]:
        return walk(self.root, self._wanted, self._complain)

    def _wanted(self, path: bytes, directory: bool) -> bool:
        return path in self._records or not self.rules.exclude(path, directory=directory)

    def _complain(self, path: bytes, error: OSError) -> None:
        self._problems[path] = error.strerror or str(error)

    def _look(self) -> list[Found]:
        """Find what is new or has changed, and forget what is gone."""
        self._walks += 1
        walks, records = self._walks, self._records
        changed = []
        for one in self._walk():
            record = records.get(one.path)
            if record is not None:
                record.seen = walks
                if record.stamp == one.stamp and record.entry.kind == one.kind:
                    continue
            changed.append(one)
        gone = [path for path, record in records.items() if record.seen != walks]
        for path in gone:
            del records[path]
            self._dirty = True
        return changed

    # What is new

    def _take(self, changed: list[Found], progress: Progress) -> None:
        """Bring into the bucket what isn't there yet."""
        files = sorted(one for one in changed if one.kind == FILE)
        for one in changed:
            if one.kind != FILE:
                self._take_other(one)
        total = sum(one.size for one in files)
        with Upload(self.history, self._known, total, progress) as upload:
            large = [
                upload.file(self._take_large, one, upload) for one in files if one.size >= SMALL
            ]
            self._take_small((one for one in files if one.size < SMALL), upload)
            for future in large:
                future.result()

    def _take_other(self, one: Found) -> None:
        entry = one.entry()
        if one.kind == LINK:
            try:
                target = os.readlink(os.path.join(self.root, one.path))
            except OSError:
                return  # the next look will tell
            entry = entry._replace(target=target)
        self._keep(entry, one.stamp)

    def _take_large(self, one: Found, upload: Upload) -> None:
        with self._told(one.path), steady(self.root, one.path) as (number, now):
            pieces = upload.pieces(number, now.size)
            self._keep(now.entry()._replace(pieces=pieces), now.stamp)

    def _take_small(self, files: Iterable[Found], upload: Upload) -> None:
        packs: list[tuple[Future[Blob], list[Found]]] = []
        parts: list[tuple[Found, bytes]] = []
        size = 0

        def close() -> None:
            nonlocal size
            if parts:
                packs.append(
                    (upload.send(b"".join(part for _, part in parts)), [one for one, _ in parts])
                )
            parts.clear()
            size = 0

        for one in files:
            with self._told(one.path):
                with steady(self.root, one.path) as (number, now):
                    whole = content(number, now.size)
                if size + len(whole) > CHUNK:
                    close()
                parts.append((now, whole))
                size += len(whole)
        close()
        for future, those in packs:
            self._keep_packed(those, future.result())

    def _keep_packed(self, files: Iterable[Found], blob: Blob) -> None:
        offset = 0
        for one in files:
            pieces = (Piece(blob, offset, one.size),) if one.size else ()
            self._keep(one.entry()._replace(pieces=pieces), one.stamp)
            offset += one.size

    @contextmanager
    def _told(self, path: bytes) -> Iterator[None]:
        """Leave a file as it was in the last snapshot if it can't be read, and say why."""
        try:
            yield
        except Changing:
            self._problems[path] = "it changes all the time"
        except OSError as error:
            self._complain(path, error)

    def _keep(self, entry: Entry, stamp: int) -> None:
        old = self._records.get(entry.path)
        if old is None or _differ(old.entry, entry):
            self._dirty = True
        self._records[entry.path] = Record(entry, stamp, self._walks)

    # What is safe

    def _commit(self) -> None:
        records = [self._records[path] for path in sorted(self._records)]
        now = datetime.now(timezone.utc)
        entries = [record.entry for record in records]
        self.history.commit(Manifest(entries, self.history.machine, now))
        self._dirty = False
        before = self._known
        self._know(entries)
        self._tidy(blob for digest, blob in before.items() if digest not in self._known)
        self._mark(records)

    def _know(self, entries: Iterable[Entry]) -> None:
        """Take stock of the blobs that a snapshot needs."""
        self._needed = Counter()
        self._known = {}
        for entry in entries:
            for blob, _, length in entry.pieces:
                self._needed[blob] += length
                self._known[blob.digest] = blob

    def _tidy(self, gone: Iterable[Blob]) -> None:
        """Delete what hasn't been needed for long."""
        now = self._clock()
        self._garbage.extend((now, blob) for blob in gone)
        old = []
        while self._garbage and self._garbage[0][0] <= now - GRACE:
            old.append(self._garbage.popleft()[1])
        needed = {blob.key for blob in self._needed}
        self.history.forget(blob for blob in old if blob.key not in needed)

    def _mark(self, records: list[Record]) -> None:
        """Have small files read again whose blobs are scraps, or hold little else than waste."""
        packs = {
            piece.blob
            for record in records
            if record.entry.size < SMALL
            for piece in record.entry.pieces
        }
        worn = {blob for blob in packs if 2 * self._needed[blob] < blob.size}
        scraps = {blob for blob in packs if blob.size < SMALL}
        worn |= scraps if len(scraps) > SCRAPS else set()
        for record in records if worn else ():
            if record.entry.size < SMALL and any(one.blob in worn for one in record.entry.pieces):
                record.stamp = None


def _differ(one: Entry, other: Entry) -> bool:
    """Say if there is something new to tell; a directory's time says nothing."""
    if one.kind == other.kind == DIRECTORY:
        return one.mode != other.mode
    return one != other
