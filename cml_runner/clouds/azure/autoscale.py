"""The autoscale setting: how many machines Azure keeps, and until when. Nothing here is sent.

It holds a scale set at its size, so that evicted machines are replaced, until the deadline, and
takes it to zero then. https://learn.microsoft.com/azure/azure-monitor/autoscale/autoscale-common-scale-patterns
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from cml_runner.clouds.azure import arm

KIND = "Insights/autoscalesettings"
COUNT = "cml-runner-count"  # tag: how many machines are wanted, and have left already
GONE = "gone-"  # what the names of objects begin with by which machines say that they leave
EARLIER = timedelta(minutes=5)  # clocks may differ
RUN, OVER = "run", "over"  # profiles


def setting(
    region: str,
    target: str,
    bounds: tuple[int, int],
    until: datetime | None,
    tags: dict[str, str],
) -> dict[str, Any]:
    """Describe it, for that many machines at least and at most; the tags must have a COUNT."""
    profiles = [_profile(RUN, *bounds)]
    if until:
        start = datetime.now(timezone.utc) - EARLIER
        window = {"timeZone": "UTC", "start": _text(min(start, until)), "end": _text(until)}
        profiles = [{**profiles[0], "fixedDate": window}, _profile(OVER, 0, 0)]
    return {
        "location": region,
        "tags": tags,
        "properties": {"enabled": True, "targetResourceUri": target, "profiles": profiles},
    }


def lowered(found: dict[str, Any], gone: int) -> dict[str, Any] | None:
    """Lower how many machines there must be at least; None if it is low enough.

    The most that there may be stays: by that, Azure would end machines of its own choice.
    """
    least = max(0, int(found["tags"][COUNT]) - gone)
    profiles = found["properties"]["profiles"]
    (run,) = (one for one in profiles if one["name"] == RUN)
    if int(run["capacity"]["minimum"]) <= least:
        return None
    capacity = {**run["capacity"], "minimum": str(least), "default": str(least)}
    others = [one for one in profiles if one is not run]
    properties = {name: found["properties"][name] for name in ("enabled", "targetResourceUri")}
    return {
        "location": found["location"],
        "tags": found["tags"],
        "properties": {**properties, "profiles": [{**run, "capacity": capacity}, *others]},
    }


def wanted(found: dict[str, Any]) -> tuple[int, datetime | None]:
    """Read for how many machines it was made, those that have left included, and until when."""
    (run,) = (one for one in found["properties"]["profiles"] if one["name"] == RUN)
    window = run.get("fixedDate")
    until = arm.moment(window["end"]) if window else None
    return int(found["tags"][COUNT]), until


def _profile(name: str, least: int, most: int) -> dict[str, Any]:
    capacity = {"minimum": str(least), "maximum": str(most), "default": str(least)}
    return {"name": name, "capacity": capacity, "rules": []}


def _text(at: datetime) -> str:
    plain = at.astimezone(timezone.utc).replace(tzinfo=None)
    return f"{plain.isoformat(timespec='milliseconds')}Z"
