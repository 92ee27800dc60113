"""Wait until the forge says that new runners are online, or until it's clear that they won't be."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from cml_runner import errors, reports, store, times
from cml_runner.errors import NotReady
from cml_runner.launch import hindrance
from cml_runner.wait import Pacer

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.clouds import Plan
    from cml_runner.forges import Forge
    from cml_runner.launch.options import Order
    from cml_runner.model import Status

log = logging.getLogger(__name__)

PAUSE = 0.2  # seconds between two looks at the bucket …
ASK = 3  # … and between two questions to the forge or to the cloud, which count our calls
AFTER = (PAUSE, 0.5, 1, 2, ASK)  # a machine that is ready is online on the forge in a moment


def wait(
    order: Order, plan: Plan, forge: Forge, tell: Callable[[str], None], *, guest: bool = False
) -> None:
    """Return when all runners are online. Raises NotReady, or the reason why they never will be.

    A guest waits for somebody else's launch, which may be given up.
    """
    Wait(order, plan, forge, tell, guest=guest).run()


class Wait:
    """One launch, from the last call to the cloud until its runners are online."""

    def __init__(
        self,
        order: Order,
        plan: Plan,
        forge: Forge,
        tell: Callable[[str], None],
        *,
        guest: bool = False,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.order, self.plan, self.forge, self.tell = order, plan, forge, tell
        self.guest = guest
        self.bucket = plan.bucket.store
        self.sleep, self.clock = sleep, clock
        self.cloud_pacer = Pacer(ASK, clock=clock)
        self.forge_pacer = Pacer(*AFTER, clock=clock)
        self.spent = 0.0
        self.seen: set[str] = set()  # what happened, in words
        self.last = ""  # of them

    def run(self) -> None:
        """Look again and again."""
        end = self.clock() + self.order.wait_timeout
        while True:
            last = self.clock() > end
            if self._ready(last=last):
                return
            if last:
                state = self._progress(self._statuses())
                patience = times.text(self.order.wait_timeout)
                tail = self._tail() or (f"\n  {self.last}" if self.last else "")
                msg = f"no runner was online within {patience} ({state}){tail}"
                raise NotReady(msg)
            self.sleep(max(PAUSE, self.spent))  # a far bucket isn't asked all the time

    def _ready(self, *, last: bool) -> bool:
        """Look once; the last time, ask the forge in any case."""
        start = self.clock()
        statuses = self._statuses()
        self.spent = self.clock() - start
        self.tell(self._progress(statuses))
        for one in statuses:
            if one and one.state == "failed":
                raise errors.by_code(one.code)(f"{one.runner}: {one.reason}{self._tail()}")
        if self.cloud_pacer.due():
            self._events()
        running = [one.runner for one in statuses if one and one.state in ("ready", "busy")]
        over = [one for one in statuses if one and one.state == "ended"]
        if len(running) + len(over) < self.order.count:
            self.forge_pacer.restart()
            self._given_up()
            return False
        # Only now: a name that is online while our machine still boots is somebody else's.
        return (self.forge_pacer.due() or last) and set(running) <= self._online()

    def _online(self) -> set[str]:
        return {one.name for one in self.forge.runners() if one.online}

    def _given_up(self) -> None:
        if self.guest and self.bucket.read(store.SETTINGS) is None:
            msg = f"the launch of {self.order.name} was given up by who began it: try again"
            raise NotReady(msg)

    def _statuses(self) -> list[Status | None]:
        said = reports.statuses(self.bucket, self.order.count)
        return [said.get(rank) for rank in range(self.order.count)]

    def _progress(self, statuses: list[Status | None]) -> str:
        states = [one.state if one else "booting" for one in statuses]
        parts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
        return states[0] if self.order.count == 1 else ", ".join(parts)

    def _events(self) -> None:
        events = hindrance.look(self.plan, self.order.count)
        for event in events:
            if event.message not in self.seen:
                log.info("%s", event.message)
                self.last = event.message
        self.seen |= {event.message for event in events}

    def _tail(self) -> str:
        return hindrance.last_lines(self.plan, self.order.count)
