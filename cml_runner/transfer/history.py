"""The snapshots of one directory, in a bucket: which there are, which is the newest, whose turn."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cml_runner.errors import RunnerError
from cml_runner.transfer import manifest as manifests
from cml_runner.transfer.manifest import Blob

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cml_runner.store import Store
    from cml_runner.transfer.manifest import Manifest

KEPT = 3  # heads of an epoch; older ones are deleted, however new


class Fenced(Exception):
    """Another machine has taken over: what this one writes doesn't count any more."""


@dataclass(frozen=True, order=True)
class Head:
    """The name of a snapshot; the greatest is the newest. Number 0 only says who is at work."""

    epoch: int = 0
    number: int = 0


class History:
    """The snapshots below a prefix. An epoch of 0 only reads."""

    def __init__(self, store: Store, data: str, name: str, machine: str = "") -> None:
        """Open those of one name ("000"), beside which others may be, whose blobs it may use."""
        self.store, self.data, self.name, self.machine = store, data, name, machine
        self.head = Head()

    @property
    def epoch(self) -> int:
        """How many machines there have been, with this one."""
        return self.head.epoch

    def take(self) -> None:
        """Begin the next epoch: from now on nobody else's work counts."""
        while True:
            found = self.heads()
            head = Head(max((one.epoch for one in found), default=0) + 1)
            if self.store.claim(self._key(head), self.machine.encode()):
                self.head = head
                return

    def latest(self) -> Manifest | None:
        """Read the newest snapshot; None if there is none yet."""
        missing = None
        while (head := max((one for one in self.heads() if one.number), default=None)) != missing:
            assert head
            if (content := self.store.read(self._key(head))) is not None:
                return manifests.unpack(content)
            missing = head  # it is an old one by now, or somebody has deleted everything
        return None

    def commit(self, manifest: Manifest) -> None:
        """Make this the newest snapshot; it is safe when this returns. Raises Fenced."""
        head = replace(self.head, number=self.head.number + 1)
        content = manifests.pack(manifest)
        key = self._key(head)
        if not self.store.claim(key, content) and self.store.read(key) != content:
            raise Fenced
        self.head = head
        self.check()  # after it was written: design 38

    def check(self) -> None:
        """Raise Fenced if somebody else has taken over; forget old heads."""
        found = self.heads()
        if max(found, default=self.head).epoch > self.head.epoch:
            raise Fenced
        if old := [one for one in sorted(found) if one.number][:-KEPT]:
            self.store.remove([self._key(one) for one in old])

    def heads(self) -> list[Head]:
        """List those which are there."""
        prefix = f"{self.data}/{self.name}/h/"
        names = (key.removeprefix(prefix).split("-") for key in self.store.keys(prefix))
        return [Head(int(epoch), int(number)) for epoch, number in names]

    def put(self, content: bytes, digest: str) -> Blob:
        """Keep some content, whose hash this is."""
        blob = Blob(f"{self.name}/b/{self.epoch:08}/{digest}", len(content))
        self.store.write(f"{self.data}/{blob.key}", content)
        return blob

    def get(self, blob: Blob, start: int = 0, end: int = 0) -> memoryview:
        """Read content, all of it or from one offset to another.

        Raises FileNotFoundError if it has been deleted, RunnerError if it was damaged.
        """
        key = f"{self.data}/{blob.key}"
        whole = not end or (start, end) == (0, blob.size)
        content = self.store.view(key) if whole else self.store.view(key, start, end)
        if content is None:
            raise FileNotFoundError(blob.key)
        if whole and hashlib.sha256(content).hexdigest() != blob.digest:
            msg = f"{blob.key} was damaged: its content isn't what was written"
            raise RunnerError(msg)
        return content

    def expect(self, blobs: Iterable[Blob]) -> None:
        """Say which content will be read next, so that it may come at once."""
        self.store.expect([f"{self.data}/{blob.key}" for blob in blobs])

    def forget(self, blobs: Iterable[Blob]) -> None:
        """Delete blobs which no snapshot needs, but for those of others."""
        ours = [one.key for one in blobs if one.key.startswith(f"{self.name}/")]
        for start in range(0, len(ours), 1000):
            self.store.remove([f"{self.data}/{key}" for key in ours[start : start + 1000]])

    def blobs(self) -> list[Blob]:
        """List all that are there of this name, needed or not."""
        prefix = f"{self.data}/"
        keys = self.store.keys(f"{prefix}{self.name}/b/")
        return [Blob(key.removeprefix(prefix), 0) for key in keys]

    def _key(self, head: Head) -> str:
        return f"{self.data}/{self.name}/h/{head.epoch:08}-{head.number:08}"
