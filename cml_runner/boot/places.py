"""Which of a group's machines is which, where the cloud doesn't say: they agree in the bucket.

A launch of three machines has three places, with a runner's name each. A machine takes a free
place by creating an object, which only one can do; else that of a dead machine, by the object of
the place's next generation. A place whose machine has left is taken last, by a machine
that the cloud sent although nobody needs it; it has to leave at once.
"""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from cml_runner.boot import objects

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.boot import Objects

STALE = timedelta(seconds=45)  # without a sign of life, which comes every ten seconds
PAUSE = 5  # seconds between two looks
OVER = ("interrupted", "ended", "failed")  # states of a machine that is no more


def take(
    bucket: Objects, count: int, machine: str, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Return the number of this machine's place; wait as long as others hold all of them."""
    while True:
        rank = try_take(bucket, count, machine)
        if rank is not None:
            return rank
        sleep(PAUSE)


def try_take(bucket: Objects, count: int, machine: str) -> int | None:
    """Return the number of this machine's place; None if others hold all of them."""
    gone = left(bucket)
    held: dict[int, list[str]] = {rank: [] for rank in range(count)}
    for key in bucket.keys(objects.PLACE):
        held[int(key.split("-")[1])].append(key)
    holders = {rank: _load(bucket, keys[-1]) for rank, keys in held.items() if keys}
    for rank, holder in holders.items():
        if holder.get("machine") == machine:
            return rank
    for rank in sorted(held, key=lambda rank: (rank in gone, rank in holders)):
        free = rank not in holders or _dead(bucket, rank, holders[rank])
        if free and _claim(bucket, rank, len(held[rank]), machine):
            return rank
    return None


def leave(bucket: Objects, rank: int, count: int) -> bool:
    """Say that nobody is needed in this place any more; True if all places have been left."""
    bucket.write(objects.left(rank), b"")
    return len(left(bucket)) >= count


def left(bucket: Objects) -> set[int]:
    """List the places where nobody is needed any more."""
    return {int(key.rpartition("-")[2]) for key in bucket.keys(objects.LEFT)}


def moment(record: dict[str, Any]) -> datetime:
    """Read when something was written; what doesn't say so is older than all else."""
    with suppress(ValueError):
        text = re.sub(r"(\.\d{1,6})\d*", lambda part: part[1].ljust(7, "0"), str(record.get("at")))
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
        return found if found.tzinfo else found.replace(tzinfo=timezone.utc)
    return datetime.min.replace(tzinfo=timezone.utc)


def _claim(bucket: Objects, rank: int, generation: int, machine: str) -> bool:
    place = {"machine": machine, "at": datetime.now(timezone.utc).isoformat()}
    return bucket.claim(objects.place(rank, generation), json.dumps(place).encode())


def _dead(bucket: Objects, rank: int, holder: dict[str, Any]) -> bool:
    """Tell from the last words in this place, if they are not older than its holder."""
    now, since = datetime.now(timezone.utc), moment(holder)
    status = _load(bucket, objects.status(rank))
    if moment(status) < since:
        return now - since > STALE
    return status.get("state") in OVER or now - moment(status) > STALE


def _load(bucket: Objects, key: str) -> dict[str, Any]:
    """Read a record; one that makes no sense says nothing."""
    content = bucket.read(key)
    with suppress(ValueError):
        found = json.loads(content or b"{}")
        if isinstance(found, dict):
            return found
    return {}
