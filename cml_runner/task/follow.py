"""What the machines of a task say, as they say it, and how it ends."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cml_runner import store
from cml_runner.errors import NotReady
from cml_runner.launch import hindrance
from cml_runner.model import Result
from cml_runner.reports import Tail, statuses
from cml_runner.wait import Pacer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from cml_runner.clouds import Plan
    from cml_runner.store import Store

PAUSE = 0.5  # seconds between two looks at the bucket …
LONGEST = 3  # … and when it has been quiet for a while
ASK = 5  # … and at the cloud, which counts our calls
LAST = 15  # seconds for the last lines, once it is known how a script ended
SILENCE = 180  # seconds after which we ask if there is still a machine that could say anything
SCRIPT = re.compile(r"\d\d:\d\d:\d\d \| ?(.*)")  # what isn't the supervisor's own


@dataclass(frozen=True)
class Line:
    """A line of a machine's log: the script's, or about it."""

    rank: int
    text: str
    script: bool


def lines(tail: Tail, *, last: bool = False) -> list[Line]:
    """Return what is new in a log; at the last, also a line without an end."""
    text = tail.text(last=last)
    return [_line(tail.rank, one) for one in text.removesuffix("\n").split("\n")] if text else []


def _line(rank: int, text: str) -> Line:
    match = SCRIPT.fullmatch(text)
    return Line(rank, match[1] if match else text, bool(match))


def results(bucket: Store, count: int) -> dict[int, Result]:
    """Read how scripts have ended, by rank."""
    there = set(bucket.keys("result-"))
    found = {}
    for rank in range(count):
        name = store.result(rank)
        if name in there and (result := bucket.load(name, Result)):
            found[rank] = result
    return found


@dataclass
class Follow:
    """A task, watched until it is over."""

    plan: Plan
    count: int
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    pacer: Pacer = field(init=False)
    heard: float = field(init=False)  # the last sign of life, by our clock …
    last: datetime | None = None  # … and by that of its machine
    found: dict[int, Result] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pacer, self.heard = Pacer(ASK, clock=self.clock), self.clock()

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
                for line in lines(tail):
                    pause = PAUSE
                    yield line
            if len(self.found) == self.count:
                break
            self._look(bucket)
            self.sleep(pause)
        end = self.clock() + LAST
        while self.clock() < end and not self._silent(bucket):
            self.sleep(PAUSE)
        for tail in tails:
            yield from lines(tail, last=True)

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
        if not self.pacer.due():
            return
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
            self.last, self.heard = last, self.clock()
        if not said:
            hindrance.look(self.plan, self.count)
        elif self.clock() > self.heard + SILENCE and not self.plan.group.instances():
            msg = "no machine is left, and none has said how its script ended"
            raise NotReady(msg)
