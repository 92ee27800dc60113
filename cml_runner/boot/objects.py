"""The names of what launchers and machines tell each other through a task's bucket.

What is in these objects is described in `cml_runner.store`, which reads and writes most of them.
"""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cml_runner.boot import web

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cml_runner.boot import Objects

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"  # model.Settings; secret; gone once the task is over
PRICE = "price.json"  # model.Bill, where a price is known
LEFT = "left-"
PLACE = "place-"
DATA = "data"  # folder of a task's snapshots: transfer.History
RECALL = "recall"  # an empty object: machines stop, and keep their data
RESUME = "resume.json"  # with what a task can be started again; secret; gone once it is over
PROGRAMS = "programs"  # the part of an account's bucket that holds wheels, SHA256.whl


def status(rank: int) -> str:
    """Name the object that holds a machine's model.Status."""
    return f"status-{rank:03}.json"


def log(rank: int, number: int | None = None) -> str:
    """Name a piece of a machine's log, or what the names of all pieces begin with."""
    return f"log-{rank:03}-" + ("" if number is None else f"{number:06}.txt")


def place(rank: int, generation: int | None = None) -> str:
    """Name the object that says whose a place is, or what the names of all generations begin with.

    It is JSON: the machine's name (`machine`), and since when (`at`).
    """
    return f"{PLACE}{rank:03}-" + ("" if generation is None else f"{generation:04}")


def failed(rank: int, number: int | None = None) -> str:
    """Name the mark of a machine that couldn't be prepared, or what the names of all begin with.

    Marks count the failures in a row of one place: a machine that starts removes them.
    """
    return f"failed-{rank:03}-" + ("" if number is None else f"{number:02}")


def left(rank: int) -> str:
    """Name the empty object which says that nobody is needed in a place any more."""
    return f"{LEFT}{rank:03}"


def kept(key: str) -> bool:
    """Say if an object remains when its task is over: what people may still want to read."""
    words = ("log-", "status-", "events", "result-", PRICE, RECALL, RESUME, f"{DATA}/")
    return key.startswith(words)


def clear(objects: Objects) -> None:
    """Delete the settings, then all else that nobody wants to read when the task is over."""
    with _as_far_as_allowed():
        objects.remove([SETTINGS])
        objects.remove([key for key in objects.keys("") if not kept(key)])


def finish(leases: Objects, identifier: str) -> None:
    """Delete a task's lease; one that keeps its data stays, without an end."""
    key = f"{identifier}.json"
    with _as_far_as_allowed():
        content = leases.read(key)
        claim = json.loads(content) if content else {}
        if claim.get("keeps") and claim.get("launched"):
            leases.write(key, json.dumps({**claim, "expires": None}).encode())
        else:
            leases.remove([key])


@contextmanager
def _as_far_as_allowed() -> Iterator[None]:
    """Don't let a machine that may not use its bucket live on, and be paid for, because of that."""
    try:
        yield
    except web.Refused as error:
        if not error.denied:
            raise
        logger.warning("this stays in the bucket: %s", error)
