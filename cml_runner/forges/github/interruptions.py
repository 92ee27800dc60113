"""What was interrupted in a run: by what its jobs' annotations say, since nothing else tells.

A job whose machine is taken away fails like any other. What makes the difference is what people
read beside it: our own words, if its supervisor had time for them, else GitHub's.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING

from cml_runner.errors import ConfigurationError, JobRunning
from cml_runner.forges.github import answers
from cml_runner.model import Interruption, Job

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cml_runner.forges.github.api import Api

LOST = "lost communication with the server"  # what GitHub says of a job whose runner vanished
INTERRUPTED = "cml-runner: this job was interrupted"  # what we say, and then why
RUN = re.compile(r"(?:^|/)([\w-]+/[\w.-]+/actions/runs/\d+)(?:[/?#]|$)")
GOOD = frozenset({"success", "skipped", "neutral"})


def pipeline(url: str) -> str:
    """Read the address of a run. Raises ConfigurationError."""
    if match := RUN.search(url):
        return match[1]
    msg = f"{url!r} is no run of a workflow: give https://github.com/OWNER/REPO/actions/runs/NUMBER"
    raise ConfigurationError(msg)


def find(
    api: Api, root: str, server: str, ours: Callable[[str], bool], *, checks: str
) -> list[Interruption]:
    """List what was interrupted in the latest attempt of a run, a cancelled one left alone.

    Raises JobRunning while it goes on.
    """
    run = api.ask("GET", root, answers.Run, needs="job")
    path = root.removeprefix("/repos/")
    if run.status != "completed":
        msg = f"{server}/{path} is {run.status}: GitHub runs nothing of it again before its end"
        raise JobRunning(msg)
    if run.conclusion == "cancelled":
        return []
    attempts = [jobs(api, root, number) for number in range(1, run.run_attempt + 1)]
    every = [job for several in attempts for job in several]
    return [
        Interruption(job=_told(job, path, run.run_attempt, server), times=_begun(job, every))
        for job in attempts[-1]
        if job.conclusion == "failure"
        and any(
            is_cut_off(api, checks, one.id, lost=ours(job.runner_name or ""))
            for one in every
            if one.runner_name and one.name == job.name and one.is_carried(job)
        )
    ]


def together(api: Api, root: str, several: Sequence[Job]) -> bool:
    """Run all that failed in a run again, if that is what these jobs are.

    One by one each would have to wait for an attempt of its own.
    """
    run = api.ask("GET", root, answers.Run, needs="job")
    attempt = several[0].attempt
    if run.status != "completed" or run.run_attempt != attempt:
        return False
    failed = {str(job.id) for job in jobs(api, root, attempt) if job.conclusion not in GOOD}
    if failed != {job.id for job in several}:
        return False
    with suppress(JobRunning):  # somebody else was faster, or we were and the answer got lost
        api.ask("POST", f"{root}/rerun-failed-jobs", object, needs="job")
        return True
    return False


def jobs(api: Api, root: str, attempt: int) -> list[answers.Job]:
    """List the jobs of one attempt."""
    pages = api.pages(f"{root}/attempts/{attempt}/jobs", answers.Jobs, needs="job")
    return [job for page in pages for job in page.jobs]


def is_cut_off(api: Api, checks: str, job: int, *, lost: bool) -> bool:
    """Say if we wrote beside a job that it was interrupted or, if `lost` counts, GitHub did.

    Raises CredentialsError or NotFound for a token that may read jobs, but no checks.
    """
    words = (INTERRUPTED, LOST) if lost else (INTERRUPTED,)
    notes = api.ask("GET", f"{checks}/{job}/annotations", list[answers.Annotation], needs="checks")
    return any(word in (one.message or "") for one in notes for word in words)


def _begun(job: answers.Job, every: Sequence[answers.Job]) -> int:
    """Count how often it was begun: attempts in which it wasn't run again only copy it."""
    alike = (one for one in every if one.name == job.name and one.runner_name)
    return len({(one.runner_name, one.started_at) for one in alike})


def _told(job: answers.Job, path: str, attempt: int, server: str) -> Job:
    return Job(
        name=job.name,
        id=str(job.id),
        pipeline=path,
        attempt=attempt,
        runner=job.runner_name or "",
        url=f"{server}/{path}/job/{job.id}",
    )
