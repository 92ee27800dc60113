"""What a machine learns of its end from its metadata service; it needs no SDK."""

from __future__ import annotations

from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from cml_runner.boot.azure import compute, metadata, tags
from cml_runner.model import Notice

EVENTS = "2020-07-01"  # version of what the metadata service says of them
INTERRUPT = "cml-runner-interrupt"  # tag of a machine: when it has to be gone


def notice() -> Notice | None:
    """Ask whether this machine will be taken away.

    There are at least 30 seconds' notice of an eviction, once the service has been asked for the
    first time; and `cml-runner interrupt` leaves a tag. Raises OSError.
    """
    me = compute()
    if text := tags(me).get(INTERRUPT):
        return Notice(reason="interruption on demand", deadline=datetime.fromisoformat(text))
    found = metadata("scheduledevents", **{"api-version": EVENTS})
    for event in found.get("Events", []):
        if event["EventType"] == "Preempt" and me["name"] in event["Resources"]:
            return Notice(reason="spot eviction", deadline=_time(event.get("NotBefore", "")))
    return None


def _time(text: str) -> datetime:
    """Read when an event begins; one that has begun doesn't say it any more."""
    if not text:
        return datetime.now(timezone.utc)
    return parsedate_to_datetime(text).replace(tzinfo=timezone.utc)
