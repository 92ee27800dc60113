"""Bitbucket Cloud."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from cml_runner import checkup, forges
from cml_runner.errors import (
    ConfigurationError,
    CredentialsError,
    JobRunning,
    NotFound,
    RunnerError,
)
from cml_runner.forges.bitbucket import address, answers
from cml_runner.forges.bitbucket.agent import Agent, package, runtime
from cml_runner.forges.bitbucket.api import NEEDS, RUN, VARIABLES, WRITE, Api
from cml_runner.model import Check, Job, Registration, Runner, stands_for
from cml_runner.web import Passing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime

    from cml_runner.model import Credential, Package

__all__ = ["Agent", "Forge"]

log = logging.getLogger(__name__)

# https://support.atlassian.com/bitbucket-cloud/docs/configure-your-runner-in-bitbucket-pipelines-yml/
LABEL = re.compile(r"[a-z0-9.]{1,50}")
MOST_LABELS = 10
DOCKER_LABELS = {"x64": "linux", "arm64": "linux.arm64"}
SHELL_LABEL = "linux.shell"
KEPT = ("type", "ref_type", "ref_name", "selector", "source", "destination", "pullrequest")
RECENT = 100  # pipelines to look at for one that is a repetition already


class Forge:
    """The self-hosted runners of one repository or workspace."""

    job_limit: ClassVar = float("inf")  # steps have limits of their own, which fail them
    one_time: ClassVar = False  # only its owner's credential can remove a runner

    def __init__(self, url: str, credential: Credential, group: str = "") -> None:
        """Take an address; send nothing. Raises ConfigurationError."""
        self._address = address.Address.parse(url)
        self._api = Api(self._address, credential)
        if group:
            msg = f"--runner-group {group}: Bitbucket has none"
            raise ConfigurationError(msg)

    @property
    def url(self) -> str:
        """The full address of the repository or workspace."""
        return self._address.url

    @staticmethod
    def detect(url: str, environment: Mapping[str, str]) -> str:
        """Return the address to use if it is one on Bitbucket, else "".

        An empty url stands for the repository whose pipeline the environment describes.
        """
        return address.detect(url, environment)

    def check(self, labels: Sequence[str] = ()) -> None:
        """Make sure that our credential may register runners here, as far as can be told.

        Raises ConfigurationError if Bitbucket takes no such labels.
        """
        _must_fit(labels)
        self._must_list()

    def checks(self, labels: Sequence[str] = ()) -> Iterator[Check]:
        """Look at login, scopes, labels and agent; when a credential expires isn't told."""
        needs = f"set {VARIABLES} to {NEEDS}"
        found, well = checkup.login(self._login, self._api.clock, needs)
        yield from found
        looks: tuple[tuple[str, Callable[[], str | Check], str], ...] = (
            ("permission to register runners", self._must_list, needs),
            ("permission to run jobs again", self._rerun, needs),
            ("labels", lambda: _must_fit(labels), "use other --labels"),
        )
        probes = [checkup.Probe(what=what, look=look, hint=hint) for what, look, hint in looks]
        yield from checkup.made(probes if well else ())

    def _login(self) -> str:
        """Who is told their scopes has logged in, whatever they may not see."""
        try:
            self._api.ask("GET", self._address.scope, object)
        except CredentialsError:
            if not self._api.scopes:
                raise
        return self._api.who

    def _must_list(self) -> str:
        self.runners()
        scopes = self._api.scopes
        if scopes and not scopes & {*WRITE}:
            msg = f"this credential may only list the runners of {self.url}: it takes {NEEDS}"
            raise CredentialsError(msg)
        return ", ".join(sorted(scopes)) or "its scopes aren't told"

    def _rerun(self) -> str | Check:
        if not self._address.repository:
            return "each repository has its own"
        self._api.ask("GET", f"{self._address.scope}/pipelines/?pagelen=1", answers.Pipelines)
        scopes = self._api.scopes
        if scopes and not scopes & {*RUN}:
            message = "this credential may only read pipelines: interrupted jobs can't run again"
            hint = f"give it {RUN[0]}, or launch with --no-retry"
            what = "permission to run jobs again"
            return Check(what=what, state="warning", message=message, hint=hint)
        return ", ".join(sorted(scopes & {*RUN})) or "its scopes aren't told"

    def runners(self) -> list[Runner]:
        """List every runner that is registered."""
        return [_runner(one) for one in self._api.runners(self._path())]

    def register(
        self,
        name: str,
        labels: Sequence[str],
        *,
        single: bool,
        arch: str,
        expires: datetime | None = None,
    ) -> Registration:
        """Make a runner, on the machine where it will be: its labels say what that can do.

        Bitbucket may not mind several of one name, but we do: raises AlreadyExists if one is
        online.
        """
        del expires
        forges.make_room(self, name)
        labels = _labels(labels, arch)
        made = self._create({"name": name, "labels": list(labels)})
        client = made.oauth_client or answers.Client(id="")
        return Registration(
            url=self.url,
            name=name,
            labels=labels,
            single=single,
            secret=client.secret,
            details={"runner": made.uuid, "client": client.id, **self._owners()},
        )

    def unregister(self, runner: Runner) -> None:
        """Remove a runner; absent is removed already. Raises JobRunning when it is busy.

        It is cordoned first, and given up if it has a step.
        """
        with suppress(NotFound):
            if runner.online:
                self._cordon(runner, cordoned=True)
                if self._api.ask("GET", self._path(runner.id), answers.Runner).state.step:
                    self._cordon(runner, cordoned=False)
                    msg = f"the runner {runner.name} is running a step: wait until it has ended"
                    raise JobRunning(msg)
            self._api.ask("DELETE", self._path(runner.id), object)

    def drain(self, name: str) -> None:
        """Cordon the runner; its step goes on."""
        for runner in self.runners():
            if runner.name == name:
                self._cordon(runner, cordoned=True)

    def job(self, seen: Job) -> Job:
        """Look up the step that an agent only knows by its numbers.

        What stays the same when a pipeline is run again identifies it: commit and selector.
        """
        root, pipeline_id, step_id = self._find(seen)
        pipeline = self._api.ask("GET", pipeline_id, answers.Pipeline)
        step = self._api.ask("GET", step_id, answers.Step)
        number, web = pipeline.build_number, root.removeprefix("/repositories")
        return Job(
            name=step.name or "a step",
            id=seen.id,
            pipeline=f"{root} {_identity(pipeline)}",
            attempt=number,
            runner=seen.runner,
            url=f"{self._address.server}{web}/pipelines/results/{number}",
        )

    def retry(self, job: Job) -> bool:
        """Run the whole pipeline of this step again: Bitbucket can't do less.

        True once that is so, or if the step succeeded after all. False while its pipeline runs; it
        is stopped if the runner is lost.
        """
        root, pipeline_id, step_id = self._find(job)
        try:
            pipeline = self._api.ask("GET", pipeline_id, answers.Pipeline)
            step = self._api.ask("GET", step_id, answers.Step)
            if step.state.is_good or self._repeated(root, pipeline):
                return True
            if not pipeline.state.is_over:
                if not step.state.is_over and self._is_lost(job.runner):
                    log.info("%s was lost with its runner: stopping its pipeline", job.name)
                    self._api.ask("POST", f"{pipeline_id}/stopPipeline", object)
                return False
            log.warning(
                "%s: its whole pipeline runs again, as a new one without the artifacts of the old",
                job.name,
            )
            body = {"target": _target(pipeline)}
            self._api.ask("POST", f"{root}/pipelines/", object, body)
        except Passing as error:
            log.warning("%s", error)
            return False
        return True

    def better_lost(self, job: Job) -> bool:
        """Say if another step of its pipeline runs at the same time."""
        _, pipeline, _ = self._find(job)
        running = sum(one.state.is_running for one in self._steps(pipeline))
        return bool(self._address.repository) and running > 1

    def lost(self, name: str) -> list[Job]:
        """List the steps which offline runners of this name seem to run.

        Only a repository can be asked which of its pipelines go on.
        """
        path = f"{self._address.scope}/pipelines/?sort=-created_on&pagelen={RECENT}"
        had = self._had(name) if self._address.repository else {}
        recent = self._api.ask("GET", path, answers.Pipelines).values if had else []
        return [
            self.job(Job(name=one.name, id=f"-/{pipeline.uuid}/{one.uuid}", runner=had[one.uuid]))
            for pipeline in recent
            if not pipeline.state.is_over
            for one in self._steps(f"{self._address.scope}/pipelines/{quote(pipeline.uuid, '')}")
            if one.uuid in had
        ]

    def packages(self) -> list[Package]:
        """The one for machines without Docker."""
        return package()

    # Inside

    def _path(self, uuid: str = "") -> str:
        rest = f"/{quote(uuid, '')}" if uuid else ""
        return f"{self._address.scope}/pipelines-config/runners{rest}"

    def _create(self, body: object) -> answers.Runner:
        try:
            return self._api.ask("POST", self._path(), answers.Runner, body)
        except (CredentialsError, NotFound, Passing):
            raise
        except RunnerError as error:
            hint = "if there are too many runners, remove those of cml-runner with: cml-runner gc"
            msg = f"{error}; {hint}"
            raise RunnerError(msg) from error

    def _cordon(self, runner: Runner, *, cordoned: bool) -> None:
        body = {
            "name": runner.name,
            "labels": sorted(runner.labels),
            "state": {"status": "ONLINE", "cordoned": cordoned},
        }
        self._api.ask("PUT", self._path(runner.id), object, body)

    def _owners(self) -> dict[str, str]:
        """Say who the runner works for: a workspace always, and perhaps one repository in it."""
        if self._address.repository:
            found = self._api.ask("GET", self._address.scope, answers.Repository)
            return {"workspace": found.workspace.uuid, "repository": found.uuid}
        return {"workspace": self._api.ask("GET", self._address.scope, answers.Owner).uuid}

    def _find(self, job: Job) -> tuple[str, str, str]:
        """Find the paths of a step's repository, of its pipeline and of itself."""
        parts = job.id.split("/")
        if len(parts) != 3 or not all(parts):
            msg = f"nobody knows which pipeline {job.name!r} was part of: run it again by hand"
            raise RunnerError(msg)
        repository, pipeline, step = (quote(part, "") for part in parts)
        if self._address.repository:
            root = self._address.scope
        else:
            root = f"/repositories/{quote(self._address.workspace)}/{repository}"
        path = f"{root}/pipelines/{pipeline}"
        return root, path, f"{path}/steps/{step}"

    def _repeated(self, root: str, pipeline: answers.Pipeline) -> bool:
        """Say whether the same was run later on, by us or by somebody else."""
        path = f"{root}/pipelines/?sort=-created_on&pagelen={RECENT}"
        later = self._api.ask("GET", path, answers.Pipelines).values
        return any(
            one.build_number > pipeline.build_number and _identity(one) == _identity(pipeline)
            for one in later
        )

    def _steps(self, pipeline: str) -> list[answers.Step]:
        return self._api.ask("GET", f"{pipeline}/steps/?pagelen={RECENT}", answers.Steps).values

    def _had(self, name: str) -> dict[str, str]:
        """Say which offline runner of this name has which step, as far as Bitbucket tells."""
        return {
            item.state.step["uuid"]: item.name
            for item in self._api.runners(self._path())
            if stands_for(item.name, name)
            and item.state.status != "ONLINE"
            and isinstance(item.state.step, dict)
            and "uuid" in item.state.step
        }

    def _is_lost(self, name: str) -> bool:
        return bool(name) and not any(one.name == name and one.online for one in self.runners())


def _must_fit(labels: Sequence[str]) -> str:
    mistakes = [one for one in labels if not LABEL.fullmatch(one)]
    if mistakes:
        wrong = ",".join(mistakes)
        msg = f"--labels {wrong}: Bitbucket takes up to 50 of a to z, 0 to 9 and dots"
        raise ConfigurationError(msg)
    if len(_labels(labels, "x64")) > MOST_LABELS:
        msg = f"--labels: Bitbucket takes {MOST_LABELS}, of which two are its own"
        raise ConfigurationError(msg)
    return ", ".join(labels) or "none"


def _labels(labels: Sequence[str], arch: str) -> tuple[str, ...]:
    system = DOCKER_LABELS[arch] if runtime() == "docker" else SHELL_LABEL
    return tuple(dict.fromkeys(("self.hosted", system, *labels)))


def _runner(item: answers.Runner) -> Runner:
    return Runner(
        id=item.uuid,
        name=item.name,
        labels=frozenset(item.labels),
        online=item.state.status == "ONLINE",
        busy=bool(item.state.step),
        seen=item.state.updated_on or item.created_on,
    )


def _commit(pipeline: answers.Pipeline) -> str:
    return str((pipeline.target.get("commit") or {}).get("hash", ""))


def _identity(pipeline: answers.Pipeline) -> str:
    target = pipeline.target
    selector = target.get("selector") or {}
    parts = (selector.get("type"), selector.get("pattern"), target.get("ref_name"))
    return " ".join([_commit(pipeline), *(str(one or "") for one in parts)])


def _target(pipeline: answers.Pipeline) -> dict[str, Any]:
    """Write the target for another run; links and the like are left out."""
    target = {name: pipeline.target[name] for name in KEPT if pipeline.target.get(name)}
    if commit := _commit(pipeline):
        target["commit"] = {"type": "commit", "hash": commit}
    if "pullrequest" in target:
        target["pullrequest"] = {"id": target["pullrequest"].get("id")}
        hash_ = (pipeline.target.get("destination_commit") or {}).get("hash")
        target["destination_commit"] = {"hash": hash_}
    return target
