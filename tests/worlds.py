"""A forge with a repository, for the scenes of a runner's whole life: one class for each forge."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cml_runner.forges.local import Forge
from cml_runner.wait import until
from tests.lab.bitbucket import Bitbucket
from tests.lab.github import GitHub, WorkflowJob
from tests.lab.gitlab import GitLab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path


PYTHON = "/usr/bin/python3"  # of the lab's machines


@dataclass(frozen=True)
class Seen:
    """A job in its latest attempt."""

    state: str  # queued, running, succeeded, failed, cancelled
    attempt: int
    runner: str
    log: str


class World(Protocol):
    """What a scene needs of a forge."""

    @property
    def repo(self) -> str: ...
    @property
    def environment(self) -> Mapping[str, str]:
        """For the launcher: the token."""

    @property
    def secrets(self) -> tuple[str, ...]: ...
    def submit(self, name: str, script: str, label: str = "cml") -> None: ...
    def job(self, name: str) -> Seen: ...
    def runners(self) -> dict[str, bool]:
        """Names of all registered runners, and whether they are online."""

    def leave_alone(self) -> None:
        """End."""

    def move_out(self, host: str) -> Mapping[str, Any]:
        """Get the names that it has in the world, or this one; say what to serve for each.

        It is the same application for people as for machines, whose Python is another.
        """


def wait(condition: Callable[[], object], what: str, timeout: float = 60) -> None:
    until(condition, what, timeout, 0.05)


def below(application: Any, prefix: str) -> Any:
    """Serve what an application has below a path."""

    def found(environ: dict[str, Any], start: Any) -> Any:
        path = prefix + environ["PATH_INFO"]
        return application({**environ, "PATH_INFO": path, "RAW_URI": path}, start)

    return found


class Local:
    """A directory."""

    environment: Mapping[str, str] = {"REPO_TOKEN": "not-a-real-t0ken"}
    secrets = ("not-a-real-t0ken",)

    def __init__(self, root: Path) -> None:
        (root / "forge").mkdir(exist_ok=True)
        self.forge = Forge(str(root / "forge"))
        self.repo = self.forge.url

    def submit(self, name: str, script: str, label: str = "cml") -> None:
        self.forge.submit(name, f"#!/bin/sh\n{script}", (label,))

    def job(self, name: str) -> Seen:
        found = next(one for one in self.forge.jobs() if one.job.name == name)
        log = ""
        with suppress(FileNotFoundError):  # not there yet, or just being moved
            log = found.log.read_text()
        return Seen(found.state, found.attempt, found.runner, log)

    def runners(self) -> dict[str, bool]:
        return {one.name: one.online for one in self.forge.runners()}

    def leave_alone(self) -> None:
        return

    def move_out(self, host: str) -> Mapping[str, Any]:
        raise NotImplementedError


class OnGitHub:
    """The fake of tests/lab."""

    STATES: Mapping[str | None, str] = {
        None: "failed",
        "success": "succeeded",
        "failure": "failed",
        "cancelled": "cancelled",
    }

    def __init__(self) -> None:
        self.github = GitHub().__enter__()
        self.github.poll, self.github.offline_after, self.github.lost_after = 0.5, 2, 3
        self.github.add_repository("acme/model")
        token = self.github.add_token("repo", "workflow")
        self.repo = f"{self.github.url}/acme/model"
        self.environment = {"REPO_TOKEN": token, "CML_RUNNER_DRIVER": "github"}

    @property
    def secrets(self) -> tuple[str, ...]:
        return (self.environment["REPO_TOKEN"], *self.github.registrations)

    def submit(self, name: str, script: str, label: str = "cml") -> None:
        self.github.add_run("acme/model", [WorkflowJob(name, ("self-hosted", label), script)])

    def job(self, name: str) -> Seen:
        found = self.github.job(name)
        state = {"completed": self.STATES[found.conclusion], "in_progress": "running"}
        return Seen(
            state.get(found.status, "queued"), found.attempt, found.runner_name or "", found.log
        )

    def runners(self) -> dict[str, bool]:
        return {one.name: one.online for one in self.github.runners()}

    def leave_alone(self) -> None:
        self.github.__exit__()

    def move_out(self, host: str) -> Mapping[str, Any]:
        self.github.address = f"https://{host}"
        self.github.python = PYTHON
        self.repo = f"https://{host}/acme/model"
        return {host: None}


class OnGitLab:
    """The fake of tests/lab."""

    STATES: Mapping[str, str] = {
        "pending": "queued",
        "success": "succeeded",
        "canceled": "cancelled",
    }

    def __init__(self) -> None:
        self.gitlab = GitLab(haste=60).__enter__()
        self.gitlab.add("acme/model")
        token = self.gitlab.add_token("api")
        self.repo = f"{self.gitlab.url}/acme/model"
        self.environment = {
            "REPO_TOKEN": token,
            "CML_RUNNER_DRIVER": "gitlab",
            "GITLAB_RUNNER_DOWNLOADS": self.gitlab.downloads,
        }

    @property
    def secrets(self) -> tuple[str, ...]:
        return (self.environment["REPO_TOKEN"], *self.gitlab.secrets)

    def submit(self, name: str, script: str, label: str = "cml") -> None:
        self.gitlab.add_job("acme/model", name, script, (label,))

    def job(self, name: str) -> Seen:
        attempts = [one for one in self.gitlab.jobs if one.name == name]
        last = attempts[-1]
        started = [one for one in attempts if one.status != "pending"]
        state = self.STATES.get(last.status, last.status)
        return Seen(state, len(started), last.ran_on, last.trace.decode())

    def runners(self) -> dict[str, bool]:
        found = list(self.gitlab.runners.values())
        return {one.description: self.gitlab.online(one) for one in found}

    def leave_alone(self) -> None:
        self.gitlab.__exit__()

    def move_out(self, host: str) -> Mapping[str, Any]:
        self.gitlab.address, self.gitlab.python = "https://gitlab.com", PYTHON
        self.repo = "acme/model"
        self.environment = {
            "REPO_TOKEN": self.environment["REPO_TOKEN"],
            "CML_RUNNER_DRIVER": "gitlab",
        }
        app = self.gitlab.app
        return {
            "gitlab.com": app,
            "gitlab-runner-downloads.s3.amazonaws.com": below(app, "/_downloads"),
        }


class OnBitbucket:
    """The fake of tests/lab."""

    STATES: Mapping[str, str] = {"SUCCESSFUL": "succeeded", "STOPPED": "cancelled"}

    def __init__(self, root: Path) -> None:
        self.bitbucket = Bitbucket(offline_after=2).__enter__()
        self.bitbucket.add("acme/model")
        self.repo = f"{self.bitbucket.url}/acme/model"
        self.environment = {
            "REPO_TOKEN": self.bitbucket.add_token(),
            "CML_RUNNER_DRIVER": "bitbucket",
            **self.bitbucket.environment(root / "java"),
        }

    @property
    def secrets(self) -> tuple[str, ...]:
        token = self.environment["REPO_TOKEN"]
        return (token, token.partition(":")[2], *self.bitbucket.secrets)

    def submit(self, name: str, script: str, label: str = "cml") -> None:
        self.bitbucket.add_pipeline("acme/model", name, script, (label,))

    def job(self, name: str) -> Seen:
        runs = [one for one in self.bitbucket.pipelines if one.step.name == name]
        self.bitbucket.sweep()
        step = runs[-1].step
        started = [one for one in runs if one.step.state != "PENDING"]
        state = {"PENDING": "queued", "IN_PROGRESS": "running"}.get(step.state, "failed")
        return Seen(self.STATES.get(step.result, state), len(started), step.runner, step.log)

    def runners(self) -> dict[str, bool]:
        found = list(self.bitbucket.runners.values())
        return {one.name: self.bitbucket.status(one) == "ONLINE" for one in found}

    def leave_alone(self) -> None:
        self.bitbucket.__exit__()

    def move_out(self, host: str) -> Mapping[str, Any]:
        self.bitbucket.address = "https://api.bitbucket.org"
        self.repo = "https://bitbucket.org/acme/model"
        self.environment = {"REPO_TOKEN": self.environment["REPO_TOKEN"]}
        app = self.bitbucket.app
        return {
            "bitbucket.org": app,
            "product-downloads.atlassian.com": below(app, "/_downloads"),
        }


WORLDS: Mapping[str, Callable[[Path], World]] = {
    "local": Local,
    "github": lambda _: OnGitHub(),
    "gitlab": lambda _: OnGitLab(),
    "bitbucket": OnBitbucket,
}


def worlds(name: str, root: Path) -> Iterator[World]:
    """Open one, and close it."""
    world = WORLDS[name](root)
    yield world
    world.leave_alone()
