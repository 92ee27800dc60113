"""What Compute Engine says about a group and its machines, in our terms."""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

from cml_runner.clouds.gcp import session as sessions
from cml_runner.model import Happening

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

OWN = "events.json"  # in the bucket: what we did to machines
CHANCES = 12  # failures for want of capacity, wherever, until it's hopeless
# https://cloud.google.com/compute/docs/instances/view-system-events
INTERRUPTIONS = {
    "compute.instances.preempted": "was preempted",
    "compute.instances.terminateOnHostMaintenance": "was ended for its host's maintenance",
}
FAILURES = {
    "compute.instances.guestTerminate": "ended by itself",
    "compute.instances.hostError": "lost its host",
}
NEWS = {
    "insert": "is being created",
    "delete": "is being deleted",
    "compute.instances.repair.recreateInstance": "is being created again",
}


def of_group(errors: Iterable[Any], zones: Collection[str]) -> list[Happening]:
    """Say what a group could not do.

    One that is out of capacity in one zone tries another; it is for want of capacity that nothing
    comes once all zones have failed, or some have failed often.
    """
    found: list[Happening] = []
    exhausted: set[str] = set()
    number = 0
    for one in sorted(errors, key=lambda one: str(one.timestamp)):
        code, text = one.error.code, one.error.message
        kind: Any = sessions.kind(code, text)
        zone = _part(one.instance_action_details.instance, "zones")
        if kind == "capacity":
            number += 1
            exhausted.add(zone)
            kind = "capacity" if number >= CHANCES or exhausted >= set(zones) else "info"
        message = f"{zone}: {sessions.told(code, text)}" if zone else sessions.told(code, text)
        found.append(Happening(at=_time(one.timestamp), kind=kind, message=message))
    return found


def of_machines(
    operations: Iterable[Any], since: datetime | None, own: Sequence[Happening]
) -> list[Happening]:
    """Say what befell machines, from the beginning of this task on."""
    found = []
    for one in operations:
        at, kind = _time(one.insert_time), str(one.operation_type)
        name, zone = sessions.last(one.target_link), _part(one.target_link, "zones")
        if (since and at < since) or one.error.errors:  # which the group tells as well
            continue
        if text := INTERRUPTIONS.get(kind):
            found.append(Happening(at=at, kind="interruption", message=f"{name} {text}"))
        elif text := FAILURES.get(kind):
            told = any(mark.at < at and mark.message.startswith(name) for mark in own)
            found.append(
                Happening(at=at, kind="info" if told else "error", message=f"{name} {text}")
            )
        elif text := NEWS.get(kind):
            found.append(Happening(at=at, kind="info", message=f"{name} {text} in {zone}"))
    return found


def _part(url: str, what: str) -> str:
    """Return what follows a word in an address."""
    return url.rpartition(f"/{what}/")[2].partition("/")[0] if f"/{what}/" in url else ""


def _time(text: str) -> datetime:
    exact = re.sub(r"\.(\d{1,6})\d*", lambda found: f".{found[1]:0<6}", text)
    return datetime.fromisoformat(exact.replace("Z", "+00:00"))
