"""Jobs that were interrupted: remembered in the bucket, run again once the forge allows it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from cml_runner import store, wait
from cml_runner.errors import RunnerError
from cml_runner.model import TIMES, Interruption, Retried

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.forges import Forge
    from cml_runner.model import Event, Job

log = logging.getLogger(__name__)


def remember(bucket: store.Store, job: Job, *, forgetful: bool = False) -> Interruption:
    """Write down that a job was interrupted, before anything else can go wrong.

    Remembering one interruption twice does no harm. In a forgetful bucket there is nothing of
    earlier ones: every earlier attempt counts as one.
    """
    before = bucket.load(store.interruption(job), Interruption)
    if before and before.job.attempt == job.attempt:
        return before
    times = before.times + 1 if before else max(1, job.attempt if forgetful else 1)
    found = Interruption(job=job, times=times, pending=times <= TIMES)
    bucket.save(store.interruption(job), found)
    if not found.pending:
        log.error("%s was interrupted %d times: not run again", job.name, times)
    return found


def pending(bucket: store.Store) -> list[Interruption]:
    """List the jobs which still have to be run again."""
    found = (bucket.load(key, Interruption) for key in bucket.keys("interrupted-"))
    return [one for one in found if one and one.pending]


class Recovery:
    """Asks the forge to run interrupted jobs again, in a thread of its own, until it does."""

    def __init__(self, bucket: store.Store, forge: Forge, events: queue.Queue[Event]) -> None:
        self._bucket, self._forge, self._events = bucket, forge, events
        self._waiting: queue.Queue[Interruption] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="recovery", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def add(self, interruption: Interruption) -> None:
        """Take one more job."""
        self._waiting.put(interruption)

    def _run(self) -> None:
        while True:
            one = self._waiting.get()
            try:
                given_up = insist(self._bucket, self._forge, one)
            except Exception as error:  # a runner that waits for ever would cost money for ever
                log.exception("%s can't be run again", one.job.name)
                given_up = str(error)
            self._events.put(Retried(job=one.job, given_up=given_up))


def insist(
    bucket: store.Store,
    forge: Forge,
    one: Interruption,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Ask until the forge has queued the job again; return why it never will, or ""."""
    log.info("%s was interrupted: waiting until it can be run again", one.job.name)
    pauses = wait.lasting(wait.ASKED)
    given_up = ""
    try:
        while not forge.retry(one.job):
            sleep(next(pauses))
        log.info("%s will run again (%d of %d)", one.job.name, one.times, TIMES)
    except RunnerError as error:
        log.warning("%s can't be run again: %s", one.job.name, error)
        given_up = str(error)
    with suppress(RunnerError):  # then it is asked for again, which does no harm
        bucket.save(store.interruption(one.job), replace(one, pending=False))
    return given_up
