"""What the machines of a task say, as they say it, and how it ends."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cml_runner import store
from cml_runner.boot import failing
from cml_runner.errors import NotReady, RunnerError
from cml_runner.launch.readiness import CRASHES, FATAL
from cml_runner.model import Result, Status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from cml_runner.clouds import Plan
    from cml_runner.store import Store

PAUSE = 0.5  # seconds between two looks at the bucket …
LONGEST = 3  # … and when it has been quiet for a while
ASK = 5  # … and at the cloud, which counts our calls
LAST = 15  # seconds for the last lines, once it is known how a script ended
SILENCE = 180  # seconds after which we ask if there is still a machine that could say anything
AT_ONCE = 16  # reads under way
SCRIPT = re.compile(r"\d\d:\d\d:\d\d \| ?(.*)")  # what isn't the supervisor's own


@dataclass(frozen=True)
class Line:
    """A line of a machine's log: the script's, or about it."""

    rank: int
    text: str
    script: bool


@dataclass
class Tail:
    """A log that grows: only its end is read again."""

    bucket: Store
    rank: int
    key: str = ""  # of the object that is read up to …
    read: int = 0  # … this byte
    rest: bytes = b""  # a line that isn't complete

    def lines(self, *, last: bool = False) -> list[Line]:
        """Return what is new; at the last, also a line without an end."""
        text = self.rest
        for key in self.bucket.keys(f"log-{self.rank:03}-"):
            if key < self.key:
                continue
            content = self.bucket.read(key) or b""
            text += content[self.read if key == self.key else 0 :]
            self.key, self.read = key, len(content)
        whole, _, self.rest = text.rpartition(b"\n")
        if last and self.rest:
            whole, self.rest = text, b""
        decoded = whole.decode(errors="replace")
        return [self._line(one) for one in decoded.split("\n")] if whole else []

    def _line(self, text: str) -> Line:
        match = SCRIPT.fullmatch(text)
        return Line(self.rank, match[1] if match else text, bool(match))


def results(bucket: Store, count: int) -> dict[int, Result]:
    """Read how scripts have ended, by rank."""
    there = set(bucket.keys("result-"))
    found = {}
    for rank in range(count):
        name = store.result(rank)
        if name in there and (result := bucket.load(name, Result)):
            found[rank] = result
    return found


def statuses(bucket: Store, count: int) -> dict[int, Status]:
    """Read what machines said last, by rank."""
    there = set(bucket.keys("status-"))
    ranks = [rank for rank in range(count) if store.status(rank) in there]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda rank: bucket.load(store.status(rank), Status), ranks)
        return {rank: one for rank, one in zip(ranks, found, strict=True) if one}


@dataclass
class Follow:
    """A task, watched until it is over."""

    plan: Plan
    count: int
    asked: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)  # the last sign of life, by our clock …
    last: datetime | None = None  # … and by that of its machine
    found: dict[int, Result] = field(default_factory=dict)

    def lines(self) -> Iterator[Line]:
        """Yield all that is said until it is over; then `found` says how it ended.

        Raises what hinders machines from coming, and NotReady if it is over without an end.
        """
        bucket = self.plan.bucket.store
        tails = [Tail(bucket, rank) for rank in range(self.count)]
        pause = PAUSE
        while True:
            self.found = results(bucket, self.count)
            pause = min(LONGEST, 1.2 * pause)
            for tail in tails:
                for line in tail.lines():
                    pause = PAUSE
                    yield line
            if len(self.found) == self.count:
                break
            self._look(bucket)
            time.sleep(pause)
        end = time.monotonic() + LAST
        while time.monotonic() < end and not self._silent(bucket):
            time.sleep(PAUSE)
        for tail in tails:
            yield from tail.lines(last=True)

    @property
    def code(self) -> int:
        """The exit code of all scripts together: that of the first that failed."""
        return next(
            (self.found[rank].code for rank in sorted(self.found) if self.found[rank].code), 0
        )

    def _silent(self, bucket: Store) -> bool:
        states = [one.state for one in statuses(bucket, self.count).values()]
        return all(state in ("ended", "failed") for state in states)

    def _look(self, bucket: Store) -> None:
        """See from time to time if there is still something to wait for."""
        if time.monotonic() < self.asked + ASK:
            return
        self.asked = time.monotonic()
        if bucket.read(store.RECALL) is not None:
            msg = "the task was stopped; cml-runner task start has it go on"
            raise NotReady(msg)
        if bucket.read(store.SETTINGS) is None:
            self.found = results(bucket, self.count)
            if len(self.found) < self.count:
                failures = [one for one in statuses(bucket, self.count).values() if one.reason]
                why = "".join(f"\n  {one.runner}: {one.reason}" for one in failures)
                msg = f"the task is over, but not all of its scripts have ended{why}"
                raise NotReady(msg)
        said = statuses(bucket, self.count)
        last = max((one.at for one in said.values()), default=None)
        if last != self.last:
            self.last, self.heard = last, time.monotonic()
        if not said:
            self._hindrance()
        elif time.monotonic() > self.heard + SILENCE and not self.plan.group.instances():
            msg = "no machine is left, and none has said how its script ended"
            raise NotReady(msg)

    def _hindrance(self) -> None:
        """Say why no machine comes, if the cloud says so."""
        events = self.plan.group.events()
        for event in events:
            if event.kind in FATAL:
                raise FATAL[event.kind](event.message)
        crashes = [event for event in events if event.kind == "error"]
        console = self._console() if crashes else ""
        if len(crashes) >= CRASHES or failing.FAILED in console:
            _, found, after = console.rpartition(failing.FAILED)
            msg = f"machines die as they start: {crashes[-1].message}\n{found}{after}".rstrip()
            raise NotReady(msg)

    def _console(self) -> str:
        with suppress(RunnerError):
            return self.plan.group.console()
        return ""
