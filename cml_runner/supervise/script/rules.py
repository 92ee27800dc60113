"""When a script ends, and what is to be done then: nothing but decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cml_runner.model import Exited, Notice, Recalled, Signalled, Superseded, Tick

if TYPE_CHECKING:
    from datetime import datetime

    from cml_runner.model import Event

TIMED_OUT = 124  # exit code of a script that had no more time, as timeout(1) has it
LONGEST = 60.0  # seconds for a script to end once it was asked to …
HASTE = 4.0  # … and if nobody says how much time there is


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The decision to end the script.

    Then this machine leaves (the script is done with), vanishes (another one may go on), or waits
    to be ended.
    """

    reason: str
    then: Literal["leave", "vanish", "wait"]
    code: int | None = None  # with which the script is done
    until: datetime | None = None  # all must be safe by then
    grace: float = LONGEST  # seconds for the script to end
    save: bool = True  # what it has made counts
    failed: bool = False  # not the script, but we


def step(event: Event, now: datetime, deadline: datetime | None) -> Stop | None:
    """Decide what an event means."""
    match event:
        case Exited(code=code):
            return ended(code)
        case Notice(reason=reason, deadline=until) if until:
            grace = min(LONGEST, max(0.0, (until - now).total_seconds() / 2))
            return Stop(reason=reason, then="vanish", until=until, grace=grace)
        case Signalled(name=name):
            return Stop(reason=name, then="vanish", grace=HASTE)
        case Recalled():
            return Stop(reason="it was told to stop", then="wait")
        case Superseded():
            reason = "another machine has taken over"
            return Stop(reason=reason, then="vanish", grace=0, save=False)
        case Tick() if deadline and deadline <= now:
            return Stop(reason="the deadline has come", then="leave", code=TIMED_OUT)
    return None


def ended(code: int) -> Stop:
    """Say what a script's own end means; a signal counts as a shell has it."""
    known = 128 - code if code < 0 else code
    reason = f"the script ended with exit code {known}"
    return Stop(reason=reason, then="leave", code=known, grace=0)
