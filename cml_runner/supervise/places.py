"""Who of a group's machines is which, where the cloud doesn't say: they agree on it in the bucket.

A launch of three machines has three places, with a runner's name each. A machine takes a free
place by creating an object, which only one can do; or that of a machine which is dead: the next
generation's object of the same place. A place whose machine has left is taken last, by a machine
that the cloud sent although nobody needs it; it has to leave at once.
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from cml_runner import store
from cml_runner.errors import RunnerError
from cml_runner.model import Place, Status

if TYPE_CHECKING:
    from collections.abc import Callable

STALE = timedelta(seconds=45)  # without a sign of life, which comes every ten seconds
PAUSE = 5  # seconds between two looks


def take(
    bucket: store.Store, count: int, machine: str, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Return the number of this machine's place; wait as long as others hold all of them."""
    while True:
        gone = left(bucket)
        for rank in sorted(range(count), key=lambda rank: rank in gone):
            if _take(bucket, rank, machine):
                return rank
        sleep(PAUSE)


def leave(bucket: store.Store, rank: int, count: int) -> bool:
    """Say that nobody is needed in this place any more; True if all places have been left."""
    bucket.write(store.left(rank), b"")
    return len(left(bucket)) >= count


def left(bucket: store.Store) -> set[int]:
    """List the places where nobody is needed any more."""
    return {int(key.rpartition("-")[2]) for key in bucket.keys(store.LEFT)}


def _take(bucket: store.Store, rank: int, machine: str) -> bool:
    held = bucket.keys(store.place(rank))
    if held:
        holder = bucket.load(held[-1], Place)
        if holder and holder.machine == machine:
            return True
        if holder and not _dead(bucket, rank, holder):
            return False
    place = Place(machine=machine, at=datetime.now(timezone.utc))
    return bucket.claim(store.place(rank, len(held)), store.encoded(place))


def _dead(bucket: store.Store, rank: int, holder: Place) -> bool:
    """Tell from the last words in this place, if they are not older than its holder."""
    try:
        status = bucket.load(store.status(rank), Status)
    except RunnerError:
        status = None
    if status is None or status.at < holder.at:
        return datetime.now(timezone.utc) - holder.at > STALE
    over = status.state in ("interrupted", "ended", "failed")
    return over or datetime.now(timezone.utc) - status.at > STALE
