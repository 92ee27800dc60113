"""Wait until the forge says that new runners are online, or until it's clear that they won't be."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from cml_runner import errors, store, times
from cml_runner.boot import failing
from cml_runner.errors import CredentialsError, NoCapacity, NotReady, RunnerError
from cml_runner.model import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.clouds import Plan
    from cml_runner.forges import Forge
    from cml_runner.launch.options import Order

log = logging.getLogger(__name__)

PAUSE = 0.2  # seconds between two looks at the bucket …
ASK = 3  # … and between two questions to the forge and to the cloud, which count our calls
FATAL: dict[str, type[RunnerError]] = {
    "capacity": NoCapacity,
    "quota": NoCapacity,
    "permission": CredentialsError,
    "image": NotReady,
}
CRASHES = 2  # of new machines, before we give up
AT_ONCE = 16  # reads under way
TAIL = 10  # lines of the machine's log to show on trouble


def wait(
    order: Order, plan: Plan, forge: Forge, tell: Callable[[str], None], *, guest: bool = False
) -> None:
    """Return when all runners are online. Raises NotReady, or the reason why they never will be.

    A guest waits for somebody else's launch, which may be given up.
    """
    Wait(order, plan, forge, tell, guest).run()


class Wait:
    """One launch, from the last call to the cloud until its runners are online."""

    def __init__(
        self, order: Order, plan: Plan, forge: Forge, tell: Callable[[str], None], guest: bool
    ) -> None:
        self.order, self.plan, self.forge, self.tell = order, plan, forge, tell
        self.guest = guest
        self.bucket = plan.bucket.store
        self.asked = self.spent = 0.0
        self.seen: set[str] = set()  # what happened, in words
        self.last = ""  # of them

    def run(self) -> None:
        """Look again and again."""
        end = time.monotonic() + self.order.wait_timeout
        while not self._ready():
            if time.monotonic() > end:
                state = self._progress(self._statuses())
                patience = times.text(self.order.wait_timeout)
                tail = self._tail() or (f"\n  {self.last}" if self.last else "")
                msg = f"no runner was online within {patience} ({state}){tail}"
                raise NotReady(msg)
            time.sleep(max(PAUSE, self.spent))  # a far bucket isn't asked all the time

    def _ready(self) -> bool:
        start = time.monotonic()
        statuses = self._statuses()
        self.spent = time.monotonic() - start
        self.tell(self._progress(statuses))
        for one in statuses:
            if one and one.state == "failed":
                raise errors.by_code(one.code)(f"{one.runner}: {one.reason}{self._tail()}")
        if time.monotonic() > self.asked + ASK:
            self.asked = time.monotonic()
            self._events()
        running = [one.runner for one in statuses if one and one.state in ("ready", "busy")]
        over = [one for one in statuses if one and one.state == "ended"]
        if len(running) + len(over) < self.order.count:
            self._given_up()
            return False
        # Only now: a name that is online while our machine still boots is somebody else's.
        online = {one.name for one in self.forge.runners() if one.online}
        return set(running) <= online

    def _given_up(self) -> None:
        if self.guest and self.bucket.read(store.SETTINGS) is None:
            msg = f"the launch of {self.order.name} was given up by who began it: try again"
            raise NotReady(msg)

    def _statuses(self) -> list[Status | None]:
        """Read what is there; of several, only what is, since most will come at about one time."""
        count = self.order.count
        there = set(self.bucket.keys("status-")) if count > 1 else {store.status(0)}
        names = [store.status(rank) for rank in range(count)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            load = pool.map(
                lambda name: self.bucket.load(name, Status) if name in there else None, names
            )
            return list(load)

    def _progress(self, statuses: list[Status | None]) -> str:
        states = [one.state if one else "booting" for one in statuses]
        parts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
        return states[0] if self.order.count == 1 else ", ".join(parts)

    def _events(self) -> None:
        events = self.plan.group.events()
        for event in events:
            if event.kind in FATAL:
                raise FATAL[event.kind](event.message)
        if crashes := [event.message for event in events if event.kind == "error"]:
            self._crashed(crashes)
        for event in events:
            if event.message not in self.seen:
                log.info("%s", event.message)
                self.last = event.message
        self.seen |= {event.message for event in events}

    def _crashed(self, crashes: list[str]) -> None:
        """Give up if it makes no sense to wait for the machines in their place."""
        console = self._console()  # once: the next look may be at another machine
        if failing.FAILED in console:
            msg = f"the machine can't be prepared{self._tail(console)}"
            raise NotReady(msg)
        if len(crashes) >= CRASHES:
            msg = f"machines die as they start: {crashes[-1]}{self._tail(console)}"
            raise NotReady(msg)

    def _tail(self, console: str | None = None) -> str:
        """The last lines of the first machine that has any to show; else of a console."""
        logs = (self.bucket.log(rank) for rank in range(self.order.count))
        lines = next(filter(None, logs), "").splitlines()[-TAIL:]
        if not lines:
            text = self._console() if console is None else console
            _, found, after = text.rpartition(failing.FAILED)
            lines = f"{found}{after}".splitlines()[:TAIL] if found else after.splitlines()[-TAIL:]
        return "".join(f"\n  {line}" for line in lines)

    def _console(self) -> str:
        with suppress(RunnerError):  # it is what we have to tell, not what went wrong
            return self.plan.group.console()
        return ""
