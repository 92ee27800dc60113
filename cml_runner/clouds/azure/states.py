"""What machines' states and Azure's activity log tell; nothing here is sent."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from cml_runner.clouds.azure import arm
from cml_runner.model import Happening

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

EVICTED = re.compile(r"evict|preempt", re.IGNORECASE)
STATUS: Mapping[str, Literal["running", "stopping"]] = {
    "PowerState/running": "running",
    "PowerState/stopping": "stopping",
    "PowerState/stopped": "stopping",
    "PowerState/deallocating": "stopping",
    "PowerState/deallocated": "stopping",
}
STOPPED = ("PowerState/stopped", "PowerState/deallocated")


def status(machine: Mapping[str, Any]) -> Literal["starting", "running", "stopping"]:
    """Say how a machine is; one that only costs money is about to be deleted by somebody."""
    if machine["properties"].get("provisioningState") in ("Deleting", "Failed"):
        return "stopping"
    codes = [one["code"] for one in _codes(machine)]
    return next((STATUS[code] for code in codes if code in STATUS), "starting")


def happenings(machine: Mapping[str, Any]) -> list[Happening]:
    """Say what a machine's own state tells."""
    found, name = [], machine["name"]
    created = arm.moment(machine["properties"].get("timeCreated"))
    for one in _codes(machine):
        code, at = one["code"], arm.moment(one.get("time"), created)
        if code.startswith("ProvisioningState/failed"):
            text = one.get("message") or one.get("displayStatus") or code
            found.append(failed(at, code.rpartition("/")[2], f"{name}: {text}"))
        elif code in STOPPED:
            text = f"{name} ended by itself: {code.rpartition('/')[2]}"
            found.append(Happening(at=at, kind="error", message=text))
    found.append(Happening(at=created, kind="info", message=f"{name} was made"))
    return found


def failed(at: datetime, code: str, text: str) -> Happening:
    """Say what an error is about."""
    return Happening(at=at, kind=arm.kind(code, text), message=f"{text} ({code})")


def activity(entry: Mapping[str, Any]) -> Happening | None:
    """Understand an entry of the activity log; None for what is of no interest."""
    name = entry.get("operationName", {}).get("value", "")
    at, machine = arm.moment(entry.get("eventTimestamp")), entry["resourceId"].rpartition("/")[2]
    if EVICTED.search(name):
        return Happening(at=at, kind="interruption", message=f"{machine} was evicted")
    if entry.get("status", {}).get("value") != "Failed":
        return None
    text = entry.get("properties", {}).get("statusMessage", "")
    with suppress(ValueError):
        code, said = arm.details(json.loads(text))
        return failed(at, code, said)
    return Happening(at=at, kind="error", message=f"{name} failed: {text}".rstrip(": "))


def _codes(machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    view = machine["properties"].get("instanceView") or {}
    found: list[dict[str, Any]] = view.get("statuses", [])
    return found
