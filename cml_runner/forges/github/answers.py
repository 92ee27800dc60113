"""What GitHub answers: of each object, the fields that we need.

https://docs.github.com/en/rest/actions
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timezone


@dataclass(frozen=True)
class User:
    """Whose token it is."""

    login: str


@dataclass(frozen=True)
class Label:
    """One label of a runner."""

    name: str


@dataclass(frozen=True)
class Runner:
    """One registered runner."""

    id: int
    name: str
    status: str
    busy: bool
    labels: list[Label]


@dataclass(frozen=True)
class Runners:
    """One page of them."""

    runners: list[Runner]


@dataclass(frozen=True)
class Group:
    """A group of runners."""

    id: int
    name: str


@dataclass(frozen=True)
class Groups:
    """One page of them."""

    runner_groups: list[Group]


@dataclass(frozen=True)
class Token:
    """Permission to register one runner."""

    token: str


@dataclass(frozen=True)
class JustInTime:
    """A runner that was registered already, with all that its agent needs."""

    encoded_jit_config: str


@dataclass(frozen=True)
class Run:
    """One run of a workflow: its latest attempt."""

    run_attempt: int
    status: str
    id: int = 0


@dataclass(frozen=True)
class Runs:
    """One page of them."""

    workflow_runs: list[Run]


@dataclass(frozen=True)
class Job:
    """One job of one attempt."""

    id: int
    name: str
    status: str
    conclusion: str | None = None
    runner_name: str | None = None
    started_at: str | None = None
    completed_at: str | None = None

    @property
    def ended(self) -> datetime | None:
        """When it was over."""
        return _moment(self.completed_at) if self.completed_at else None

    def is_carried(self, later: Job) -> bool:
        """Say if a job of a later attempt is but a copy of this one, which was not run again."""
        same = self.runner_name == later.runner_name and self.conclusion == later.conclusion
        return same and (self.started_at, self.completed_at) == (
            later.started_at,
            later.completed_at,
        )


@dataclass(frozen=True)
class Annotation:
    """What people read beside a job."""

    message: str | None = None


@dataclass(frozen=True)
class Jobs:
    """One page of them."""

    jobs: list[Job]


@dataclass(frozen=True)
class Download:
    """One build of the runner program."""

    os: str
    architecture: str
    download_url: str
    filename: str
    sha256_checksum: str = ""


@dataclass(frozen=True)
class Asset:
    """One file of a release."""

    name: str
    browser_download_url: str

    @property
    def platform(self) -> str:
        """What a build of the runner program is for: "linux-x64"."""
        return "-".join(self.name.split("-")[2:4])


@dataclass(frozen=True)
class Release:
    """A release of the runner program."""

    assets: list[Asset]
    body: str | None = None

    @property
    def checksums(self) -> dict[str, str]:
        """The SHA-256 of each platform's build, which stand between marks in the notes."""
        mark = r"<!-- BEGIN SHA ([\w-]+) -->\s*([0-9a-fA-F]{64})\s*<!-- END SHA \1 -->"
        return dict(re.findall(mark, self.body or ""))


@dataclass(frozen=True)
class Deprecation:
    """When GitHub will refuse a version of the runner program."""

    registration_deprecates_at: str | None = None
    runtime_deprecates_at: str | None = None

    @property
    def soonest(self) -> datetime | None:
        """The first moment at which it will be of no use."""
        moments = (self.registration_deprecates_at, self.runtime_deprecates_at)
        return min((_moment(text) for text in moments if text), default=None)


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
