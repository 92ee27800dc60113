"""What Bitbucket answers: of each object, the fields that we need.

https://developer.atlassian.com/cloud/bitbucket/rest/api-group-pipelines/
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime  # noqa: TC003 - msgspec reads the annotations at run time
from typing import Any


@dataclass(frozen=True)
class Owner:
    """A workspace."""

    uuid: str


@dataclass(frozen=True)
class Repository:
    """A repository."""

    uuid: str
    workspace: Owner


@dataclass(frozen=True)
class RunnerState:
    """What a runner does; Bitbucket tells its step without a word in the documentation."""

    status: str
    cordoned: bool = False
    step: Any = None
    updated_on: datetime | None = None


@dataclass(frozen=True)
class Client:
    """What a runner logs in with; the secret is told once, to whoever made the runner."""

    id: str
    secret: str = ""


@dataclass(frozen=True)
class Runner:
    """One registered runner."""

    uuid: str
    name: str
    state: RunnerState
    labels: list[str] = field(default_factory=list)
    oauth_client: Client | None = None
    created_on: datetime | None = None


@dataclass(frozen=True)
class Runners:
    """One page of them."""

    values: list[Runner]
    next: str = ""


@dataclass(frozen=True)
class Trouble:
    """What went wrong beside the script."""

    message: str = ""


@dataclass(frozen=True)
class Result:
    """How it ended."""

    name: str
    error: Trouble | None = None


@dataclass(frozen=True)
class State:
    """How far a pipeline or a step is: PENDING, IN_PROGRESS, COMPLETED and others."""

    name: str
    result: Result | None = None

    @property
    def is_over(self) -> bool:
        """Nothing more will happen."""
        return self.name == "COMPLETED"

    @property
    def is_running(self) -> bool:
        """A runner has it."""
        return self.name == "IN_PROGRESS"

    @property
    def is_good(self) -> bool:
        """It ended as it should."""
        return self.is_over and self.result is not None and self.result.name == "SUCCESSFUL"

    @property
    def is_broken_off(self) -> bool:
        """Its runner vanished: Bitbucket calls that an error of the system.

        https://support.atlassian.com/bitbucket-cloud/kb/pipeline-build-failed-with-unexpected-system-error-that-may-have-left-your
        """
        if not self.is_over or not self.result or self.result.name != "ERROR":
            return False
        return not self.result.error or "system error" in self.result.error.message.lower()


@dataclass(frozen=True)
class Pipeline:
    """One run of a pipeline; its target is kept as it is, to be sent again."""

    uuid: str
    build_number: int
    state: State
    target: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pipelines:
    """One page of them."""

    values: list[Pipeline]


@dataclass(frozen=True)
class Step:
    """One step of a pipeline."""

    uuid: str
    state: State
    name: str = ""
    started_on: datetime | None = None


@dataclass(frozen=True)
class Steps:
    """One page of them."""

    values: list[Step]


@dataclass(frozen=True)
class Token:
    """What an OAuth consumer gets for its secret."""

    access_token: str
    expires_in: int = 7200
