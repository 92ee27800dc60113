"""What GitLab answers: of each object, the fields that we need.

https://docs.gitlab.com/api/rest/ and https://docs.gitlab.com/api/graphql/reference/
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date, datetime  # noqa: TC003 - msgspec reads the annotations at run time


@dataclass(frozen=True)
class Version:
    """Which GitLab it is."""

    version: str


@dataclass(frozen=True)
class Token:
    """What a personal, project or group access token may do."""

    scopes: list[str]
    name: str = ""
    expires_at: date | None = None


@dataclass(frozen=True)
class Role:
    """What somebody is in a project or in its group."""

    access_level: int


@dataclass(frozen=True)
class Roles:
    """Both roles, where they are known."""

    project_access: Role | None = None
    group_access: Role | None = None

    @property
    def highest(self) -> int | None:
        """The one that counts."""
        known = [one.access_level for one in (self.project_access, self.group_access) if one]
        return max(known, default=None)


@dataclass(frozen=True)
class Place:
    """A project or a group."""

    id: int
    permissions: Roles = Roles()


@dataclass(frozen=True)
class Created:
    """A runner that was just made."""

    id: int
    token: str


@dataclass(frozen=True)
class Details:
    """One runner."""

    id: int
    contacted_at: datetime | None = None


@dataclass(frozen=True)
class Pipeline:
    """The pipeline of a job."""

    id: int


@dataclass(frozen=True)
class JobRunner:
    """The runner of a job."""

    id: int
    description: str | None = None


@dataclass(frozen=True)
class Job:
    """One attempt of one job."""

    id: int
    name: str
    status: str
    pipeline: Pipeline
    web_url: str = ""
    runner: JobRunner | None = None


# GraphQL: REST tells neither the tags nor the last contact of more than one runner at a time.


@dataclass(frozen=True)
class Node:
    """One runner of a list."""

    id: str  # gid://gitlab/Ci::Runner/7
    description: str | None = None
    tagList: list[str] | None = None
    contactedAt: datetime | None = None
    jobExecutionStatus: str | None = None
    createdAt: datetime | None = None
    maintenanceNote: str | None = None


@dataclass(frozen=True)
class PageInfo:
    """Where the next page begins."""

    hasNextPage: bool
    endCursor: str | None = None


@dataclass(frozen=True)
class Runners:
    """One page of runners."""

    nodes: list[Node]
    pageInfo: PageInfo


@dataclass(frozen=True)
class Scope:
    """Who has runners."""

    runners: Runners | None = None


@dataclass(frozen=True)
class Data:
    """The scope that was asked for."""

    scope: Scope | None = None
    runners: Runners | None = None  # of the whole server


@dataclass(frozen=True)
class Complaint:
    """Why a query failed."""

    message: str


@dataclass(frozen=True)
class Result:
    """The answer to a query."""

    data: Data | None = None
    errors: list[Complaint] = field(default_factory=list)
