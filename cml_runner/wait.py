"""Wait for something to become true, or to succeed."""

from __future__ import annotations

import logging
import time
from itertools import chain, repeat
from typing import TYPE_CHECKING, TypeVar

from cml_runner.errors import NotReady, RunnerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

log = logging.getLogger(__name__)

PAUSES = (1, 2, 5, 10, 30)  # seconds after an attempt to leave; the last one for ever
ASKED = (1, 2, 4, 8, 15)  # seconds between two questions to a forge; likewise


def until(condition: Callable[[], T], what: str, timeout: float, every: float = 1) -> T:
    """Return the condition's value once it is true; raise NotReady after the timeout, in seconds.

    What the condition itself raises ends the wait at once.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        left = deadline - time.monotonic()
        if left <= 0:
            msg = f"gave up after {timeout:.0f} s waiting for {what}"
            raise NotReady(msg)
        time.sleep(min(every, left))
    return value


class Pacer:
    """Says when it is time for the next of some calls that are counted; for the first, at once."""

    def __init__(self, *pauses: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the seconds between calls; the last ones are for ever."""
        self._pauses, self._clock = pauses, clock
        self._left = lasting(pauses)
        self._next: float | None = None

    def due(self) -> bool:
        """Say if it is time, and count from now."""
        now = self._clock()
        if self._next is not None and now < self._next:
            return False
        self._next = now + next(self._left)
        return True

    def restart(self) -> None:
        """Let the next call be a first one."""
        self._left, self._next = lasting(self._pauses), None


def lasting(pauses: Sequence[float]) -> Iterator[float]:
    """Go through pauses, and stay with the last one for ever."""
    return chain(pauses, repeat(pauses[-1]))


def insist(action: Callable[[], T], sleep: Callable[[float], None] = time.sleep) -> T:
    """Do what a machine must do to leave, whatever it takes: its deadline ends it otherwise."""
    pauses = lasting(PAUSES)
    while True:
        try:
            return action()
        except (RunnerError, OSError) as error:
            log.warning("can't leave yet: %s", error)
            sleep(next(pauses))
