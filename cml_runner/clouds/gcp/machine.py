"""What a machine learns from its metadata server of the end that awaits it; it needs no SDK."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from cml_runner.boot.gcp import metadata
from cml_runner.model import Notice

SOFT_OFF = 30  # seconds from the notice of a preemption until the power is off
NOTICE = "cml-runner-notice"  # key of our own: seconds of notice before that, if there are any
EARLY = 60  # seconds before an end that was moved
INTERRUPT, DEADLINE = "cml-runner-interrupt", "cml-runner-deadline"  # keys of our own


def notice() -> Notice | None:
    """Ask whether this instance will be taken away.

    There are 120 seconds' notice of a preemption, or 30, and of a host's maintenance some without
    a deadline; `cml-runner interrupt` leaves a mark, and so does who moves the end.
    """
    found = metadata().news()
    now = datetime.now(timezone.utc)
    marks = found.get("attributes", {})
    if found.get("preempted") == "TRUE":
        left = int(marks.get(NOTICE) or SOFT_OFF)  # after a long one those 30 aren't promised
        return Notice(reason="preemption", deadline=now + timedelta(seconds=left))
    if text := marks.get(INTERRUPT):
        return Notice(reason="interruption on demand", deadline=datetime.fromisoformat(text))
    if text := marks.get(DEADLINE):
        at = datetime.fromisoformat(text)
        if at - timedelta(seconds=EARLY) < now:
            return Notice(reason="the end of its life", deadline=at)
    if found.get("maintenanceEvent") == "TERMINATE_ON_HOST_MAINTENANCE":
        return Notice(reason="maintenance of the host")
    return None
