"""What machines report in their task's bucket, as others read it: statuses, and growing logs."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cml_runner import store
from cml_runner.boot.objects import log as log_of
from cml_runner.errors import RunnerError
from cml_runner.model import Status

if TYPE_CHECKING:
    from cml_runner.store import Store

log = logging.getLogger(__name__)

AT_ONCE = 16  # reads under way


def statuses(bucket: Store, count: int = 0, *, tolerant: bool = False) -> dict[int, Status]:
    """Read what machines said last, by rank: of so many, or of all that have said anything.

    Raises RunnerError for one that can't be read; if tolerant, it warns and goes on.
    """

    def read(name: str) -> Status | None:
        try:
            return bucket.load(name, Status)
        except RunnerError as error:
            if not tolerant:
                raise
            log.warning("%s", error)
            return None

    # Of several, most come at about one time: only those are read that are there.
    ranks = [0] if count == 1 else _ranks(bucket)
    wanted = [rank for rank in ranks if not count or rank < count]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        said = pool.map(read, [store.status(rank) for rank in wanted])
        return {rank: status for rank, status in zip(wanted, said, strict=True) if status}


def _ranks(bucket: Store) -> list[int]:
    return [int(key.split("-")[1].split(".")[0]) for key in bucket.keys("status-")]


@dataclass
class Tail:
    """A machine's log, while it grows: only the object at its end is read again."""

    bucket: Store
    rank: int
    key: str = ""  # of the object that was read last …
    content: bytes = b""  # … and what it held
    rest: bytes = b""  # what wasn't returned yet

    def text(self, *, last: bool = False) -> str:
        """Return the whole lines that are new; at the last, also a line without an end.

        Raises RunnerError; what was read before that is returned the next time.
        """
        for key in self.bucket.keys(log_of(self.rank)):
            if key >= self.key and (content := self.bucket.read(key)):
                self._take(key, content)
        end = len(self.rest) if last else self.rest.rfind(b"\n") + 1
        lines, self.rest = self.rest[:end], self.rest[end:]
        return lines.decode(errors="replace")

    def _take(self, key: str, content: bytes) -> None:
        if key != self.key:
            self.rest += content
        elif content.startswith(self.content):
            self.rest += content[len(self.content) :]
        else:  # nothing remembers its machine: the log of another one begins
            self.rest = content
        self.key, self.content = key, content
