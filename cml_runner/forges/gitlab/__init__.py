"""GitLab: gitlab.com and servers of one's own, also below a path of their host."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, time, timedelta, timezone
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import quote, urlsplit

from cml_runner import checkup, forges
from cml_runner.errors import (
    AgentFailed,
    ConfigurationError,
    CredentialsError,
    JobRunning,
    NotFound,
    RunnerError,
)
from cml_runner.forges.gitlab import address, answers
from cml_runner.forges.gitlab.agent import RELEASES, Agent
from cml_runner.forges.gitlab.api import ENOUGH, MAINTAINER, NEEDS, VARIABLES, Api, Place
from cml_runner.model import Interruption, Job, Package, Registration, Runner, stands_for
from cml_runner.web import Passing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from cml_runner.model import Check, Credential

__all__ = ["Agent", "Forge"]

log = logging.getLogger(__name__)

# A runner asks for jobs every three seconds, and reports on its job at least every minute; GitLab
# itself says "online" for two hours after the last word of one that was killed.
LOST = timedelta(minutes=3)  # design 29
SHORTEST = 600  # seconds; GitLab refuses a lesser limit for the jobs of a runner
NOTE = "Launched by cml-runner; it removes itself when it is done."

# REST tells neither the tags nor the last contact of more than one runner at a time.
FIELDS = """
(type: {type}, first: 100, after: $after{more}) {{
  nodes {{ id description tagList contactedAt jobExecutionStatus createdAt maintenanceNote }}
  pageInfo {{ hasNextPage endCursor }}
}}"""
QUERIES = {
    "project": "query($path: ID!, $after: String) { scope: project(fullPath: $path) { runners"
    + FIELDS.format(type="PROJECT_TYPE", more="")
    + "}}",
    "group": "query($path: ID!, $after: String) { scope: group(fullPath: $path) { runners"
    + FIELDS.format(type="GROUP_TYPE", more=", membership: DIRECT")
    + "}}",
    "instance": "query($after: String) { runners"
    + FIELDS.format(type="INSTANCE_TYPE", more="")
    + "}",
}
UNFINISHED = ("created", "waiting_for_resource", "preparing", "pending", "scheduled")
RUNNING = ("running", "canceling")
# https://docs.gitlab.com/ci/yaml/#retrywhen: what the runner says, and what GitLab says after it
CUT_OFF = ("runner_system_failure", "stuck_or_timeout_failure")


class Forge:
    """The runners of one project, group or server."""

    job_limit: ClassVar = float("inf")  # projects have limits of their own, which fail a job
    one_time: ClassVar = True

    def __init__(self, url: str, credential: Credential, group: str = "") -> None:
        """Take an address; send nothing. Raises ConfigurationError."""
        self._address = address.Address.parse(url)
        self._api = Api(self._address, credential)
        if group:
            msg = f"--runner-group {group}: GitLab has none; use --repo with the address of a group"
            raise ConfigurationError(msg)

    @property
    def url(self) -> str:
        """The full address of the project, group or server."""
        return self._address.url

    @staticmethod
    def detect(url: str, environment: Mapping[str, str]) -> str:
        """Return the address to use if it is one on GitLab, else "".

        An empty url stands for the project whose job the environment describes.
        """
        return address.detect(url, environment)

    def check(self, labels: Sequence[str] = ()) -> None:
        """Make sure that our credential may register runners here.

        It looks at what the token may do and at the role of its owner, where GitLab tells them.
        Raises ConfigurationError for a label of over 255 characters.
        """
        _must_fit(labels)
        self._must_suffice(self._token())
        self._must_be_maintained()
        next(self._listed(self._api.place))

    def checks(self, labels: Sequence[str] = ()) -> Iterator[Check]:
        """Look at login, scopes, role, labels and agent."""
        hint = f"set {VARIABLES} to an access token with the scope api"
        found, well = checkup.login(self._login, self._api.clock, hint)
        yield from found
        if not well:
            return
        token = self._token()
        if token and token.expires_at:
            at = datetime.combine(token.expires_at, time(), timezone.utc)  # the beginning of a day
            yield checkup.expiry(at, datetime.now(timezone.utc))
        yield from checkup.made(self._probes(labels, token))

    def _login(self) -> str:
        """See if the token is good for anything: one that isn't may not even ask for a version."""
        token = self._token()
        version = self._api.ask("GET", "/version", answers.Version).version
        name = f"the token {token.name}" if token else "a login"
        return f"{name} at {self._api.base}, version {version}"

    def _probes(
        self, labels: Sequence[str], token: answers.Token | None
    ) -> Iterator[checkup.Probe]:
        """Name what is looked at."""
        place = f"is {self.url} right, and may this login see it?"
        needs = f"set {VARIABLES} to {NEEDS['project']}; of a group, its Owner"
        looks: tuple[tuple[str, Callable[[], str], str], ...] = (
            ("scopes", lambda: self._must_suffice(token), needs),
            ("place", lambda: f"a {self._api.place.kind}", place),
            ("role", self._must_be_maintained, needs),
            ("runners", lambda: f"{len(next(self._listed(self._api.place)).nodes)} here", needs),
            ("labels", lambda: _must_fit(labels), "use other --labels"),
            (
                "agent",
                lambda: f"version {self.packages()[0].version}",
                "see GITLAB_RUNNER_DOWNLOADS",
            ),
        )
        for what, look, hint in looks:
            yield checkup.Probe(what=what, look=look, hint=hint)

    def runners(self) -> list[Runner]:
        """List every runner that is registered here; those of its groups aren't ours."""
        place = self._api.place
        return [self._runner(node) for page in self._listed(place) for node in page.nodes]

    def register(
        self,
        name: str,
        labels: Sequence[str],
        *,
        single: bool,
        arch: str,
        expires: datetime | None = None,
    ) -> Registration:
        """Make a runner; its jobs may take as long as it will be there.

        GitLab doesn't mind several of one name, but we do: raises AlreadyExists if one is online.
        """
        del arch
        place = self._api.place
        forges.make_room(self, name)
        body: dict[str, object] = {
            "runner_type": f"{place.kind}_type",
            "description": name,
            "maintenance_note": NOTE,
            "tag_list": list(labels),
            "run_untagged": True,
            "access_level": "not_protected",
        }
        if place.kind == "project":
            body["locked"] = True
        if place.id:
            body[f"{place.kind}_id"] = place.id
        if expires:
            left = (expires - self._api.now).total_seconds()
            body["maximum_timeout"] = max(SHORTEST, int(left))
        made = self._create(body)
        return Registration(
            url=self.url,
            name=name,
            labels=tuple(labels),
            single=single,
            secret=made.token,
            details={"server": self._api.base},
        )

    def unregister(self, runner: Runner) -> None:
        """Remove a runner; absent is removed already. Raises JobRunning when it is busy.

        GitLab would remove a busy one, too: so it is paused first, and given up if it has a job.
        """
        path = f"/runners/{runner.id}"
        with suppress(NotFound):
            if runner.online:
                self._api.ask("PUT", path, object, {"paused": True})
                if next(self._api.pages(f"{path}/jobs", answers.Job, status="running"), None):
                    self._api.ask("PUT", path, object, {"paused": False})
                    msg = f"the runner {runner.name} is running a job: wait until it has ended"
                    raise JobRunning(msg)
            self._api.ask("DELETE", path, object)

    def drain(self, name: str) -> None:
        """Do nothing: the agent can be told."""

    def job(self, seen: Job) -> Job:
        """Look up the job that an agent only knows by its number."""
        project = self._project(seen)
        found = self._api.ask("GET", f"{_project(project)}/jobs/{seen.id}", answers.Job)
        told = _told(project, found, self._attempts(project, found))
        return replace(told, runner=told.runner or seen.runner, url=told.url or seen.url)

    def retry(self, job: Job) -> bool:
        """Run this job again, and only it.

        True once that is so, or if it succeeded after all. False while it runs; if its runner is
        lost it is cancelled first, since GitLab would wait for half an hour.
        """
        project = self._project(job)
        path = f"{_project(project)}/jobs/{job.id}"
        try:
            found = self._api.ask("GET", path, answers.Job)
            last = max(self._attempts(project, found), key=lambda one: one.id, default=found)
            if found.status == "success" or last.id > found.id or found.status in UNFINISHED:
                return True
            if found.status in RUNNING:
                self._cancel_if_lost(path, found)
                return False
            self._api.ask("POST", f"{path}/retry", object)
        except Passing as error:
            log.warning("%s", error)
            return False
        return True

    def better_lost(self, job: Job) -> bool:
        """Say no: GitLab retries any job at any time."""
        return not job

    def lost(self, name: str) -> list[Job]:
        """List what still seems to run on offline runners of this name."""
        return [
            self.job(Job(name=job.name, id=str(job.id), runner=runner.name, url=job.web_url))
            for runner in self.runners()
            if stands_for(runner.name, name) and not runner.online
            for job in self._api.pages(f"/runners/{runner.id}/jobs", answers.Job, status="running")
        ]

    def interrupted(self, pipeline: str, ours: Callable[[str], bool]) -> list[Interruption]:
        """List the jobs that failed with the runner, not by themselves, or are lost with it.

        A runner that has removed itself, as ours do, is one that GitLab knows no more.
        """
        project, number = self._pipeline(pipeline)
        path = f"{_project(project)}/pipelines/{number}/jobs"
        every = list(self._api.pages(path, answers.Job, include_retried="true"))
        noted = {runner.id for runner in self.runners() if runner.ours}
        latest = {job.name: job for job in sorted(every, key=lambda one: one.id)}
        return [
            Interruption(job=_told(project, job, every), times=_begun(job, every))
            for job in latest.values()
            if not job.runner or str(job.runner.id) in noted or ours(job.runner.description or "")
            if self._is_cut_off(job)
        ]

    def retry_together(self, jobs: Sequence[Job]) -> bool:
        """Say no: GitLab retries any job at any time."""
        return not jobs

    def packages(self) -> list[Package]:
        """The agent of the server's own version, or the newest if there is none (yet)."""
        version = self._api.ask("GET", "/version", answers.Version).version
        if not (match := re.match(r"(\d+\.\d+)\.", version)):
            msg = f"{self._api.base} is of version {version!r}, which tells nothing"
            raise AgentFailed(msg)
        return RELEASES.packages(f"v{match[1]}.0") or RELEASES.packages("latest")

    # Inside

    def _token(self) -> answers.Token | None:
        """Ask what the credential is; None if it is of a kind which doesn't say."""
        with suppress(NotFound, CredentialsError):
            return self._api.ask("GET", "/personal_access_tokens/self", answers.Token)
        return None

    def _must_suffice(self, token: answers.Token | None) -> str:
        if token is None:
            return "not told of this kind of login"
        listed = ", ".join(sorted(token.scopes)) or "none"
        if "api" not in token.scopes and not {*token.scopes} >= ENOUGH:
            self._refuse(f"its scopes are {listed}")
        return listed

    def _must_be_maintained(self) -> str:
        role = self._api.place.role
        if role is not None and role < MAINTAINER:
            self._refuse("its owner has a lesser role")
        return "not told here" if role is None else "Maintainer, or more"

    def _refuse(self, reason: str) -> None:
        needs = NEEDS[self._api.place.kind]
        msg = (
            f"this credential may not manage the runners of {self.url}: {reason}; it takes {needs}"
        )
        raise CredentialsError(msg)

    def _create(self, body: object) -> answers.Created:
        try:
            return self._api.ask("POST", "/user/runners", answers.Created, body)
        except RunnerError as error:
            if "exceeded" in str(error):  # https://docs.gitlab.com/administration/instance_limits/
                msg = f"{error}. Remove some, those of cml-runner with: cml-runner gc"
                raise RunnerError(msg) from error
            raise

    def _listed(self, place: Place) -> Iterator[answers.Runners]:
        after: str | None = None
        more = True
        while more:
            path = {"path": place.path} if place.path else {}
            data = self._api.query(QUERIES[place.kind], **path, after=after)
            page = data.scope.runners if data.scope else data.runners
            if page is None:
                self._refuse("it can't list them")
                raise AssertionError
            yield page
            after, more = page.pageInfo.endCursor, page.pageInfo.hasNextPage

    def _runner(self, node: answers.Node) -> Runner:
        online = bool(node.contactedAt and self._api.now - node.contactedAt < LOST)
        return Runner(
            id=node.id.rpartition("/")[2],
            name=node.description or "",
            labels=frozenset(node.tagList or ()),
            online=online,
            busy=online and node.jobExecutionStatus == "ACTIVE",
            ours=node.maintenanceNote == NOTE,
            seen=node.contactedAt or node.createdAt,
        )

    def _project(self, job: Job) -> str:
        """Find a job's project, which must be ours, by its pipeline or its address."""
        path = urlsplit(job.url).path.removeprefix(urlsplit(self._api.base).path).strip("/")
        project = (job.pipeline or path).partition("/-/")[0]
        place = self._api.place
        inside = {
            "project": project == place.path,
            "group": project.startswith(f"{place.path}/"),
            "instance": bool(project),
        }
        if not inside[place.kind] or not job.id:
            msg = f"{job.name!r} is no job of {self.url}"
            raise RunnerError(msg)
        return project

    def _pipeline(self, url: str) -> tuple[str, str]:
        """Read the address of a pipeline, which must be ours. Raises ConfigurationError."""
        match = re.search(r"/-/pipelines/(\d+)", url)
        if not match:
            msg = f"{url!r} is no pipeline: give https://gitlab.com/PROJECT/-/pipelines/NUMBER"
            raise ConfigurationError(msg)
        return self._project(Job(name=url, id=match[1], url=url)), match[1]

    def _is_cut_off(self, job: answers.Job) -> bool:
        """Say if a job was begun, and its runner was what failed."""
        if job.status in RUNNING:
            return not job.runner or self._is_lost(job.runner.id)
        return job.status == "failed" and job.failure_reason in CUT_OFF and bool(job.started_at)

    def _attempts(self, project: str, job: answers.Job) -> list[answers.Job]:
        path = f"{_project(project)}/pipelines/{job.pipeline.id}/jobs"
        found = self._api.pages(path, answers.Job, include_retried="true")
        return [one for one in found if one.name == job.name]

    def _cancel_if_lost(self, path: str, job: answers.Job) -> None:
        if job.runner and not self._is_lost(job.runner.id):
            return
        log.info("%s was lost with its runner: cancelling it", job.name)
        force = {"force": True} if job.status == "canceling" else None  # nobody is left to agree
        self._api.ask("POST", f"{path}/cancel", object, force)

    def _is_lost(self, runner: int) -> bool:
        try:
            last = self._api.ask("GET", f"/runners/{runner}", answers.Details).contacted_at
        except NotFound:
            return True
        return not last or self._api.now - last > LOST


def _told(project: str, job: answers.Job, attempts: Sequence[answers.Job]) -> Job:
    return Job(
        name=job.name,
        id=str(job.id),
        pipeline=f"{project}/-/pipelines/{job.pipeline.id}",
        attempt=sum(one.id <= job.id for one in attempts if one.name == job.name),
        runner=(job.runner and job.runner.description) or "",
        url=job.web_url,
    )


def _begun(job: answers.Job, every: Sequence[answers.Job]) -> int:
    return sum(one.name == job.name and bool(one.started_at) for one in every)


def _must_fit(labels: Sequence[str]) -> str:
    for label in labels:
        if not 0 < len(label) <= 255:
            msg = f"--labels: a tag of GitLab has 1 to 255 characters, unlike {label[:20]!r}…"
            raise ConfigurationError(msg)
    return ", ".join(labels) or "none"


def _project(path: str) -> str:
    return f"/projects/{quote(path, '')}"
