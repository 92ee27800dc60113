"""GitHub: github.com, *.ghe.com and Enterprise Server."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from cml_runner.errors import (
    AgentFailed,
    AlreadyExists,
    ConfigurationError,
    CredentialsError,
    JobRunning,
    NotFound,
    RunnerError,
)
from cml_runner.forges.github import address, answers, checks, interruptions
from cml_runner.forges.github.agent import SYSTEM_LABELS, Agent
from cml_runner.forges.github.api import Api
from cml_runner.model import Job, Package, Registration, Runner, stands_for
from cml_runner.web import Passing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from cml_runner.model import Check, Credential, Interruption

__all__ = ["Agent", "Forge"]

log = logging.getLogger(__name__)

RELEASES = address.Address(address.DEFAULT, "actions/runner")
PACKAGE = re.compile(r"actions-runner-linux-(x64|arm64)-(\d+(?:\.\d+)+)\.tar\.gz")
DEFAULT_GROUP = 1  # https://docs.github.com/en/rest/actions/self-hosted-runner-groups
MARGIN = timedelta(days=2)  # a version that GitHub will refuse so soon is refused already
ATTEMPTS = 3  # to register, while others take the same name
RECENT = 20  # runs that failed, and how long ago, to be looked at for jobs that were lost
LATELY = timedelta(hours=6)


class Forge:
    """The self-hosted runners of one repository, organisation or enterprise."""

    job_limit: ClassVar = 432_000.0  # five days
    one_time: ClassVar = True

    def __init__(self, url: str, credential: Credential, group: str = "") -> None:
        """Take an address; send nothing. Raises ConfigurationError."""
        self._address = address.Address.parse(url)
        self._api = Api(self._address, credential)
        self._group = group
        if self._address.kind == "repository" and group.lower() not in {"", "default"}:
            msg = f"runner group {group!r}: only an organisation or an enterprise has groups"
            raise ConfigurationError(msg)

    @property
    def url(self) -> str:
        """The full address of the repository, organisation or enterprise."""
        return self._address.url

    @staticmethod
    def detect(url: str, environment: Mapping[str, str]) -> str:
        """Return the address to use if it is one on GitHub, else "".

        An empty url stands for the repository whose workflow the environment describes.
        """
        return address.detect(url, environment)

    def check(self, labels: Sequence[str] = ()) -> None:
        """Make sure that our credential may register runners here; any labels will do.

        It asks for a registration token and throws it away: nothing less proves it, since reading
        the list of runners takes a lesser permission. Whether jobs may be re-run isn't checked.
        """
        del labels
        self._api.ask("POST", self._path("registration-token"), answers.Token)

    def checks(self, labels: Sequence[str] = ()) -> Iterator[Check]:
        """Look at login, permissions, group and agent; any labels will do."""
        del labels
        group = self._find_group if self._group else None
        return checks.checks(self._api, self._address, self._path(), group, self.packages)

    def runners(self) -> list[Runner]:
        """List every runner that is registered."""
        pages = self._api.pages(self._path(), answers.Runners)
        return [_runner(item) for page in pages for item in page.runners]

    def register(
        self,
        name: str,
        labels: Sequence[str],
        *,
        single: bool,
        arch: str,
        expires: datetime | None = None,
    ) -> Registration:
        """Make room for one more runner; an offline one of the same name is replaced.

        Raises AlreadyExists if a runner of this name is online, or if GitHub has yet to notice
        that an offline one no longer runs its job. With `single` the runner is registered at once;
        any other has an hour to register itself.
        """
        del expires
        group, number = self._find_group()
        labels = _unique([*SYSTEM_LABELS, arch.upper(), *labels])
        self._make_room(name)
        if single:
            secret = self._register_single(name, labels, number)
        else:
            secret = self._api.ask("POST", self._path("registration-token"), answers.Token).token
        return Registration(
            url=self.url, name=name, labels=labels, single=single, secret=secret, group=group
        )

    def unregister(self, runner: Runner) -> None:
        """Remove a runner; absent is removed already. Raises JobRunning when it is busy."""
        with suppress(NotFound):
            self._api.ask("DELETE", self._path(runner.id), object)

    def drain(self, name: str) -> None:
        """Do nothing: GitHub can't be told."""

    def job(self, seen: Job) -> Job:
        """Add nothing: the agent's own hook knows all."""
        return seen

    def retry(self, job: Job) -> bool:
        """Run this job again, and only it (with the jobs that wait for it).

        True once that is so, or if it succeeded after all. False while its run goes on, since
        GitHub accepts a re-run only afterwards. Raises RunnerError when it never will.
        """
        root = self._find_run(job)
        try:
            return self._retry(root, job)
        except JobRunning:
            return False
        except Passing as error:
            log.warning("%s", error)
            return False

    def better_lost(self, job: Job) -> bool:
        """Say if others of its run are under way: GitHub takes no re-run before they have ended."""
        if self._address.kind != "repository":
            return False
        jobs = interruptions.jobs(self._api, self._find_run(job), job.attempt)
        return sum(one.status != "completed" for one in jobs) > 1

    def lost(self, name: str) -> list[Job]:
        """List what still seems to run on this runner, or what GitHub says was lost with it.

        GitHub waits some minutes for its return. Only a repository can be asked about its runs.
        """
        if self._address.kind != "repository":
            return []
        path = f"{self._address.prefix}/actions/runs"
        return [
            Job(
                name=job.name,
                id=str(job.id),
                pipeline=f"{self._address.path}/actions/runs/{run.id}",
                attempt=run.run_attempt,
                runner=job.runner_name or name,
                url=f"{self.url}/actions/runs/{run.id}/job/{job.id}",
            )
            for run in (*self._runs("in_progress"), *islice(self._runs("failure"), RECENT))
            for job in interruptions.jobs(self._api, f"{path}/{run.id}", run.run_attempt)
            if stands_for(job.runner_name or "", name) and self._is_lost(job)
        ]

    def interrupted(self, pipeline: str, ours: Callable[[str], bool]) -> list[Interruption]:
        """List the jobs of a run that failed since their runner was taken away, or was lost.

        Raises JobRunning while it goes on, and ConfigurationError if it is the address of no run.
        """
        path = interruptions.pipeline(pipeline)
        root = self._find_run(Job(name=path, pipeline=path, attempt=1))
        checks = f"{root.partition('/actions/')[0]}/check-runs"
        server = self.url.removesuffix(f"/{self._address.path}")
        return interruptions.find(self._api, root, server, ours, checks=checks)

    def retry_together(self, jobs: Sequence[Job]) -> bool:
        """Run all that failed in their run again, if that is what these jobs are."""
        try:
            return interruptions.together(self._api, self._find_run(jobs[0]), jobs)
        except Passing as error:
            log.warning("%s", error)
            return False

    def packages(self) -> list[Package]:
        """The releases to install: what GitHub offers here, unless it is about to refuse them.

        Raises AgentFailed if it is about to refuse all.
        """
        refused = ""
        for find in (self._offered, self._newest):
            found = find()
            if found and not self._outdated(found[0].version):
                return found
            refused = found[0].version if found else refused
        reason = f"it is about to refuse version {refused}" if refused else "it offers none"
        msg = f"there is no runner program that {self._address.host} accepts: {reason}"
        raise AgentFailed(msg)

    def _path(self, rest: str = "") -> str:
        return f"{self._address.prefix}/actions/runners/{rest}".removesuffix("/")

    # Registration

    def _find_group(self) -> tuple[str, int]:
        """Translate the group's name. Raises ConfigurationError if there is no such group."""
        if self._group.lower() in {"", "default"}:
            return "", DEFAULT_GROUP
        pages = self._api.pages(f"{self._address.prefix}/actions/runner-groups", answers.Groups)
        groups = [group for page in pages for group in page.runner_groups]
        for group in groups:
            if group.name.lower() == self._group.lower():
                return group.name, group.id
        names = ", ".join(group.name for group in groups)
        msg = f"there is no runner group {self._group!r} at {self.url}; there are: {names}"
        raise ConfigurationError(msg)

    def _make_room(self, name: str) -> None:
        """See to it that no runner has this name. Raises AlreadyExists if one is online."""
        pages = self._api.pages(self._path(), answers.Runners, name=name)
        for item in [item for page in pages for item in page.runners]:
            if item.name.lower() != name.lower():  # older servers ignore the filter
                continue
            if item.status == "online":
                msg = f"a runner called {name} is online at {self.url}: choose another --name"
                raise AlreadyExists(msg)
            log.info("replacing the offline runner %s", name)
            try:
                self.unregister(_runner(item))
            except JobRunning as error:
                msg = f"a runner called {name} was lost, but GitHub waits for its job: {error}"
                raise AlreadyExists(msg) from error

    def _register_single(self, name: str, labels: Sequence[str], group: int) -> str:
        """Register a runner whose name, if it is taken, is taken by one of which nobody knows.

        That is one whose registration succeeded while GitHub's answer got lost.
        """
        body = {"name": name, "labels": labels, "runner_group_id": group, "work_folder": "_work"}
        path = self._path("generate-jitconfig")
        for _ in range(ATTEMPTS - 1):
            with suppress(AlreadyExists):
                return self._api.ask("POST", path, answers.JustInTime, body).encoded_jit_config
            self._make_room(name)
        return self._api.ask("POST", path, answers.JustInTime, body).encoded_jit_config

    # Running a job again

    def _find_run(self, job: Job) -> str:
        """Find the path of a job's run, which must be ours: a job can lie about where it ran."""
        match = re.fullmatch(r"(([\w-]+)/[\w.-]+)/actions/runs/\d+", job.pipeline)
        if not match or job.attempt < 1:
            msg = f"nobody knows which run {job.name!r} was part of: run it again by hand"
            raise RunnerError(msg)
        ours = {"organization": match[2], "repository": match[1]}.get(self._address.kind)
        if ours and ours.lower() != self._address.path.lower():
            msg = f"{job.name!r} claims to be a job of {match[1]}, which isn't in {self.url}"
            raise RunnerError(msg)
        return f"/repos/{job.pipeline}"

    def _retry(self, root: str, job: Job) -> bool:
        run = self._api.ask("GET", root, answers.Run, needs="job")
        last = ran = _executed(interruptions.jobs(self._api, root, job.attempt), job)
        if ran.conclusion == "success":
            return True
        if run.run_attempt > job.attempt:
            namesakes = [
                one
                for one in interruptions.jobs(self._api, root, run.run_attempt)
                if one.name == ran.name
            ]
            carried = [one for one in namesakes if ran.is_carried(one)]
            if namesakes and not carried:
                return True
            last = (carried or [ran])[0]  # only jobs of the latest attempt can be run again
        if run.status != "completed":
            return False
        path = root.replace(root[root.index("/runs/") :], f"/jobs/{last.id}/rerun")
        self._api.ask("POST", path, object, needs="job")
        return True

    def _runs(self, status: str) -> Iterator[answers.Run]:
        path = f"{self._address.prefix}/actions/runs"
        for page in self._api.pages(path, answers.Runs, needs="job", status=status):
            yield from page.workflow_runs

    def _is_lost(self, job: answers.Job) -> bool:
        """Say if a job of a runner that is no more still goes on, or why it failed."""
        if job.status != "completed":
            return True
        if not job.ended or datetime.now(timezone.utc) - job.ended > LATELY:
            return False  # this name had another life then
        checks = f"{self._address.prefix}/check-runs"  # a job is a check
        with suppress(CredentialsError, NotFound):  # some tokens may read jobs, but no checks
            return interruptions.is_cut_off(self._api, checks, job.id, lost=True)
        return False

    # The runner program

    def _offered(self) -> list[Package]:
        found = self._api.ask("GET", self._path("downloads"), list[answers.Download])
        return _packages((one.filename, one.download_url, one.sha256_checksum) for one in found)

    def _newest(self) -> list[Package]:
        path = "/repos/actions/runner/releases/latest"
        try:  # a server of one's own may have a copy
            release = self._api.ask("GET", path, answers.Release)
        except (NotFound, CredentialsError):  # its credential is none of github.com's business
            release = Api(RELEASES).ask("GET", path, answers.Release)
        sums = release.checksums
        return _packages(
            (one.name, one.browser_download_url, sums.get(one.platform, ""))
            for one in release.assets
        )

    def _outdated(self, version: str) -> bool:
        """Ask if a version will soon be refused; servers which don't know never refuse any."""
        try:
            path = self._path(f"deprecations/{version}")
            end = self._api.ask("GET", path, answers.Deprecation).soonest
        except (NotFound, CredentialsError):
            return False
        return bool(end and end - datetime.now(timezone.utc) < MARGIN)


def _runner(item: answers.Runner) -> Runner:
    return Runner(
        id=str(item.id),
        name=item.name,
        labels=frozenset(label.name for label in item.labels),
        online=item.status == "online",
        busy=item.busy,
    )


def _unique(labels: Sequence[str]) -> tuple[str, ...]:
    """Drop what is there already; to GitHub labels are the same in any case."""
    found: dict[str, str] = {}
    for label in labels:
        found.setdefault(label.lower(), label)
    return tuple(found.values())


def _executed(jobs: Sequence[answers.Job], job: Job) -> answers.Job:
    """Find the job among those of its attempt: by its runner, and by name if that ran several.

    Raises RunnerError if it isn't there.
    """
    on_runner = [one for one in jobs if job.runner and one.runner_name == job.runner]
    named = [one for one in on_runner or jobs if one.name == job.name]
    found = named or on_runner
    if not found:
        msg = f"attempt {job.attempt} of {job.pipeline} has no job {job.name!r}"
        raise RunnerError(msg)
    return max(found, key=lambda one: one.started_at or "")


def _packages(files: Iterable[tuple[str, str, str]]) -> list[Package]:
    """Choose what is for Linux; none at all if one of them has no checksum."""
    found = [(match, url, sha) for name, url, sha in files if (match := PACKAGE.fullmatch(name))]
    if not all(sha for _, _, sha in found):
        return []
    return [
        Package(
            version=match[2],
            arch=cast("Literal['x64', 'arm64']", match[1]),
            url=url,
            sha256=sha.lower(),
        )
        for match, url, sha in found
    ]
