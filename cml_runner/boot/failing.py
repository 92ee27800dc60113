"""The one way out for a machine that can't be prepared: it says why, and ends.

The reason goes into the task's bucket, where the launcher sees it within seconds and `logs` finds
it later, and onto the console. Then the cloud ends the machine. Another one comes in its place,
once: after the second failure in a row nobody is needed there any more, and the task ends with
its last place.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cml_runner import wait
from cml_runner.boot import objects, places, web
from cml_runner.errors import NotReady, RunnerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.boot import Machine, Objects

FAILED = "cml-runner: bootstrap failed"  # what the console says then, and the reason
CONSOLES = ("/dev/console", "/dev/ttyS0")
FAILURES = 2  # in a row, of one place, before it is given up
ATTEMPTS = 8  # to say it in the bucket

log = logging.getLogger(__name__)


class Failure:
    """Why a machine can't be prepared."""

    def __init__(self, reason: str, program: str, tail: str = "") -> None:
        """Take the reason, the program's digest, and the last lines of what was done."""
        self.reason, self.program, self.tail = reason, program, tail

    @property
    def text(self) -> str:
        """All of it, for people."""
        return f"{FAILED}: {self.reason}\n{self.tail}".rstrip() + "\n"


def fail(
    machine: Machine,
    count: int,
    failure: Failure,
    *,
    sleep: Callable[[float], None] = time.sleep,
    consoles: tuple[str, ...] = CONSOLES,
) -> None:
    """Say why this machine, one of so many, can't be prepared, and end it; return when it ends."""
    log.error("%s", failure.text)
    end = _told(machine, count, failure, sleep)
    for console in consoles:
        with suppress(OSError):
            Path(console).write_text(failure.text)
    wait.insist(end, sleep)


def forget(bucket: Objects, rank: int) -> None:
    """Forget the failures of a place: a machine has started there."""
    bucket.remove(bucket.keys(objects.failed(rank)))


def _told(
    machine: Machine, count: int, failure: Failure, sleep: Callable[[float], None]
) -> Callable[[], None]:
    """Say it in the bucket, and return how this machine must end.

    If it has no right to say it, nobody will: rights don't come by themselves.
    """
    for pause in islice(wait.lasting(wait.PAUSES), ATTEMPTS):
        try:
            return _tell(machine, count, failure)
        except (RunnerError, OSError) as error:
            log.warning("can't say so in the bucket: %s", error)
            if isinstance(error, web.Refused) and error.denied:
                return machine.finish
            sleep(pause)
    return machine.replace


def _tell(machine: Machine, count: int, failure: Failure) -> Callable[[], None]:
    bucket, name = machine.objects, machine.name()
    rank = places.try_take(bucket, count, name) if count > 1 else 0
    if rank is None:  # the others do without this one
        return machine.replace
    now = datetime.now(timezone.utc).isoformat()
    bucket.write(_next_piece(bucket, rank), f"{now[:19]}Z {failure.text}".encode())
    number = _mark(bucket, rank, name)
    status = {
        "state": "failed",
        "at": now,
        "since": now,
        "runner": name,
        "reason": failure.reason,
        "code": NotReady.exit_code,
        "program": failure.program[:12],
    }
    bucket.write(objects.status(rank), json.dumps(status).encode())
    if number < FAILURES:
        return machine.replace
    return machine.finish if places.leave(bucket, rank, count) else machine.dismiss


def _next_piece(bucket: Objects, rank: int) -> str:
    """Name a piece of a log that comes after all others, and before those of the next machine."""
    pieces = bucket.keys(objects.log(rank))
    return f"{pieces[-1]}~" if pieces else objects.log(rank, 0)


def _mark(bucket: Objects, rank: int, name: str) -> int:
    """Count this machine's failure, once however often it is tried; return its number, from 1."""
    marks = bucket.keys(objects.failed(rank))
    for number, mark in enumerate(marks, 1):
        if bucket.read(mark) == name.encode():
            return number
    if not bucket.claim(objects.failed(rank, len(marks)), name.encode()):
        msg = "another machine has failed in this place just now"
        raise RunnerError(msg)
    return len(marks) + 1
