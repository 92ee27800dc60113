"""Why machines don't come: what the cloud says, and what those said that died as they started."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from cml_runner.boot import failing
from cml_runner.errors import CredentialsError, NoCapacity, NotReady, RunnerError

if TYPE_CHECKING:
    from cml_runner.clouds import Plan
    from cml_runner.model import Happening

FATAL: dict[str, type[RunnerError]] = {
    "capacity": NoCapacity,
    "quota": NoCapacity,
    "permission": CredentialsError,
    "image": NotReady,
}
CRASHES = 2  # of new machines, before we give up
LINES = 10  # of a machine's log to show


def look(plan: Plan, count: int) -> list[Happening]:
    """Return what has happened to so many machines.

    Raises what the cloud can't do, and NotReady if it makes no sense to wait for more machines.
    """
    events = plan.group.events()
    for event in events:
        if event.kind in FATAL:
            raise FATAL[event.kind](event.message)
    if crashes := [event.message for event in events if event.kind == "error"]:
        _judge(plan, count, crashes)
    return events


def _judge(plan: Plan, count: int, crashes: list[str]) -> None:
    console = _console(plan)  # once: the next look may be at another machine
    if failing.FAILED in console:
        msg = f"the machine can't be prepared{last_lines(plan, count, console)}"
        raise NotReady(msg)
    if len(crashes) >= CRASHES:
        msg = f"machines die as they start: {crashes[-1]}{last_lines(plan, count, console)}"
        raise NotReady(msg)


def last_lines(plan: Plan, count: int, console: str | None = None) -> str:
    """Return, indented, the end of the first log that has any lines; else of a console."""
    logs = (plan.bucket.store.log(rank) for rank in range(count))
    lines = next(filter(None, logs), "").splitlines()[-LINES:]
    if not lines:
        text = _console(plan) if console is None else console
        _, found, after = text.rpartition(failing.FAILED)
        lines = f"{found}{after}".splitlines()[:LINES] if found else after.splitlines()[-LINES:]
    return "".join(f"\n  {line}" for line in lines)


def _console(plan: Plan) -> str:
    with suppress(RunnerError):  # it is what we have to tell, not what went wrong
        return plan.group.console()
    return ""
