"""The autoscale setting: how many machines Azure keeps, and until when. Nothing here is sent.

It holds a scale set at its size, so that evicted machines are replaced, until the deadline, and
takes it to zero then. https://learn.microsoft.com/azure/azure-monitor/autoscale/autoscale-common-scale-patterns
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from cml_runner.boot.azure import RUN
from cml_runner.clouds.azure import arm

KIND = "Insights/autoscalesettings"
EARLIER = timedelta(minutes=5)  # clocks may differ
OVER = "over"  # the profile after the deadline


def setting(
    region: str,
    target: str,
    bounds: tuple[int, int],
    end: datetime | None,
    tags: dict[str, str],
) -> dict[str, Any]:
    """Describe it, for that many machines at least and at most; one of the tags must be COUNT."""
    profiles = [_profile(RUN, *bounds)]
    if end:
        start = datetime.now(timezone.utc) - EARLIER
        window = {"timeZone": "UTC", "start": _text(min(start, end)), "end": _text(end)}
        profiles = [{**profiles[0], "fixedDate": window}, _profile(OVER, 0, 0)]
    return {
        "location": region,
        "tags": tags,
        "properties": {"enabled": True, "targetResourceUri": target, "profiles": profiles},
    }


def moved(found: dict[str, Any], end: datetime | None) -> dict[str, Any]:
    """Give it another end, and nothing else."""
    target = found["properties"]["targetResourceUri"]
    return setting(found["location"], target, _bounds(found), end, found["tags"])


def until(found: dict[str, Any]) -> datetime | None:
    """Read its end."""
    window = _run(found).get("fixedDate")
    return arm.moment(window["end"]) if window else None


def _bounds(found: dict[str, Any]) -> tuple[int, int]:
    capacity = _run(found)["capacity"]
    return int(capacity["minimum"]), int(capacity["maximum"])


def _run(found: dict[str, Any]) -> dict[str, Any]:
    profiles: list[dict[str, Any]] = found["properties"]["profiles"]
    return next(one for one in profiles if one["name"] == RUN)


def _profile(name: str, least: int, most: int) -> dict[str, Any]:
    capacity = {"minimum": str(least), "maximum": str(most), "default": str(least)}
    return {"name": name, "capacity": capacity, "rules": []}


def _text(at: datetime) -> str:
    plain = at.astimezone(timezone.utc).replace(tzinfo=None)
    return f"{plain.isoformat(timespec='milliseconds')}Z"
