"""Run again what was interrupted, from afar: for machines on which nobody may do it."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cml_runner.errors import CredentialsError, JobRunning, NotFound, RunnerError
from cml_runner.model import TIMES, Interruption, made_up, stands_for
from cml_runner.wait import ASKED, lasting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cml_runner.forges import Forge
    from cml_runner.model import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an interrupted job.

    "interrupted": it could be run again; "queued": it is; "waiting": it can't be before others
    have ended; "spent": it was often enough; "refused": it can't be.
    """

    job: Job
    state: Literal["interrupted", "queued", "waiting", "spent", "refused"]
    reason: str = ""


class Patience:
    """Pauses between questions, until so many seconds are over."""

    def __init__(
        self,
        seconds: float,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sleep, self._clock = sleep, clock
        self._end = clock() + seconds
        self._pauses = lasting(ASKED)

    def pause(self) -> bool:
        """Sleep for a while; False, at once, if there is no time left."""
        left = self._end - self._clock()
        if left <= 0:
            return False
        self._sleep(min(next(self._pauses), left))
        return True


def ours(names: Sequence[str]) -> Callable[[str], bool]:
    """Know our runners: by names that were given to launches, or that only we make up."""

    def known(name: str) -> bool:
        whole = re.sub(r"-\d{1,3}(-[0-9a-f]{4})?$", "", name)  # of several that were launched
        return made_up(name) or any(stands_for(name, one) or whole == one for one in names)

    return known


def find(
    forge: Forge, pipeline: str, names: Sequence[str], patience: Patience
) -> list[Interruption]:
    """List what was interrupted in a pipeline, as soon as it is over.

    Raises JobRunning if it isn't when the patience has come to its end.
    """
    while True:
        try:
            return forge.interrupted(pipeline, ours(names))
        except JobRunning as error:
            log.info("%s", error)
            if not patience.pause():
                raise


def judge(found: Sequence[Interruption]) -> list[Outcome]:
    """Say which jobs deserve to be run again: not those that were interrupted too often."""
    spent = f"it was interrupted more than {TIMES} times"
    return [
        Outcome(job=one.job, state="interrupted")
        if one.times <= TIMES
        else Outcome(job=one.job, state="spent", reason=spent)
        for one in found
    ]


def again(forge: Forge, judged: Sequence[Outcome], patience: Patience) -> list[Outcome]:
    """Have the forge run again what can be, all at once if it can, each job once.

    Asking twice does no harm. Raises CredentialsError if we may not.
    """
    ends = {one.job.id: one for one in judged}
    left = [one.job for one in judged if one.state == "interrupted"]
    if len(left) > 1 and forge.retry_together(left):
        return [_queued(one.job) if one.job in left else one for one in judged]
    while left:
        ends |= {job.id: _ask(forge, job) for job in left}
        left = [job for job in left if ends[job.id].state == "waiting"]
        if left and not patience.pause():
            break
    return [ends[one.job.id] for one in judged]


def _ask(forge: Forge, job: Job) -> Outcome:
    try:
        if forge.retry(job):
            return _queued(job)
    except (CredentialsError, NotFound):
        raise
    except RunnerError as error:
        log.warning("%s can't be run again: %s", job.name, error)
        return Outcome(job=job, state="refused", reason=str(error))
    return Outcome(job=job, state="waiting", reason="others of its pipeline go on")


def _queued(job: Job) -> Outcome:
    return Outcome(job=job, state="queued")
