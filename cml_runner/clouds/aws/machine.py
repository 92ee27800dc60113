"""What a machine learns of an interruption from its metadata service; it needs no SDK."""

from __future__ import annotations

import json
from datetime import datetime

from cml_runner.boot.aws import metadata
from cml_runner.model import Notice

INTERRUPT = "cml-runner-interrupt"  # tag of an instance: when it has to be gone


def notice() -> Notice | None:
    """Ask whether this instance will be taken away.

    There are two minutes' notice of an interruption; a rebalance recommendation, without a
    deadline, may come earlier; and `cml-runner interrupt` leaves a tag.
    """
    if text := metadata().get("spot/instance-action"):
        action = json.loads(text)
        return Notice(reason="spot interruption", deadline=_time(action["time"]))
    if text := metadata().get(f"tags/instance/{INTERRUPT}"):
        return Notice(reason="interruption on demand", deadline=_time(text))
    if metadata().get("events/recommendations/rebalance"):
        return Notice(reason="elevated risk of a spot interruption")
    return None


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
