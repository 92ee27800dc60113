"""Plain data that every layer shares; nothing here touches the outside world."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping  # noqa: TC003 - msgspec reads the annotations at run time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime  # noqa: TC003
from pathlib import Path  # noqa: TC003
from typing import Literal

from cml_runner.errors import ConfigurationError

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
LONGEST_NAME = 28  # 50 in all, less "cml--" and two times eight digits, as TPI has it
OLDER = "tpi"  # prefix of the identifiers that TPI gave
TIMES = 3  # an interrupted job is run again at most, however often that happens


@dataclass(frozen=True)
class Identifier:
    """The name of a task. Every resource's own name follows from it, so we keep no state.

    The text form is PREFIX-NAME-SALT-CHECK, at most 50 characters of a-z, 0-9 and "-"; the check
    is a hash of name and salt, so that names of others are never taken for ours. The algorithm
    is that of terraform-provider-iterative, bit for bit (task/common/identifier.go).
    """

    name: str
    salt: str
    prefix: str = "cml"

    @classmethod
    def new(cls, name: str = "", prefix: str = "cml") -> Identifier:
        """Make one that nobody else has."""
        return cls(_normalize(name) or "runner", _hash(secrets.token_hex(8)), prefix)

    @classmethod
    def fixed(cls, name: str, prefix: str = "cml", seed: str = "") -> Identifier:
        """Make the one that always belongs to this name (and seed, where names clash)."""
        normal = _normalize(name) or "runner"
        return cls(normal, _hash(seed or normal), prefix)

    @classmethod
    def parse(cls, text: str) -> Identifier:
        """Read one back; raise ConfigurationError for a name which isn't ours."""
        pattern = r"([a-z0-9]{3})-([a-z0-9]+(?:[a-z0-9-]*[a-z0-9])?)-([a-z0-9]+)-([a-z0-9]+)"
        match = re.fullmatch(pattern, text)
        if not match or str(found := cls(match[2], match[3], match[1])) != text:
            msg = f"{text!r} is not an identifier of ours"
            raise ConfigurationError(msg)
        return found

    @property
    def short(self) -> str:
        """Sixteen letters and digits, for clouds which allow no more."""
        return self.salt + _hash(self.name + self.salt)

    def __str__(self) -> str:
        return f"{self.prefix}-{self.name}-{self.salt}-{_hash(self.name + self.salt)}"


def _normalize(text: str) -> str:
    short = re.sub("[^a-z0-9]+", "-", text.lower())[:LONGEST_NAME]
    return short.removeprefix("-").removesuffix("-")


def _hash(seed: str, digits: int = 8) -> str:
    value = int.from_bytes(hashlib.sha256(seed.encode()).digest(), "big")
    text = ""
    while value:
        value, rest = divmod(value, len(DIGITS))
        text = DIGITS[rest] + text
    return text[:digits]


def names(name: str, count: int) -> tuple[str, ...]:
    """Name the runners of one launch."""
    return (name,) if count == 1 else tuple(f"{name}-{rank}" for rank in range(count))


def renamed(name: str) -> str:
    """Name a runner anew while the forge still has one of its name that is no more."""
    return f"{name}-{secrets.token_hex(2)}"


def stands_for(name: str, first: str) -> bool:
    """Say if a runner has this first name, or was renamed from it."""
    return bool(re.fullmatch(f"{re.escape(first)}(-[0-9a-f]{{4}})?", name))


def made_up(name: str) -> bool:
    """Know a runner's name that we made up, with what is added to it for more than one runner."""
    for text in (name, re.sub(r"(-\d{1,3})?(-[0-9a-f]{4})?$", "", name)):
        with suppress(ConfigurationError):
            return Identifier.parse(text).prefix == "cml"
    return False


# What people ask for


@dataclass(frozen=True, kw_only=True)
class Credential:
    """What opens a forge's door: a token, or a GitHub App."""

    token: str = field(default="", repr=False)
    app_id: str = ""
    app_key: str = field(default="", repr=False)  # PEM


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What to ask a cloud for; an empty value leaves the choice to the cloud."""

    types: tuple[str, ...] = ("m",)  # in order of preference
    gpu: str = ""
    disk: int = 0  # GB
    image: str = ""
    spot: bool = False
    spot_price: float = -1  # USD/h; -1 = the current price
    spot_fallback: bool = False  # on demand when no region has spot capacity: launching sees to it
    permissions: str = ""
    ssh_key: str = field(default="", repr=False)  # PEM, private
    docker: bool = False  # an engine for containers is needed, beside what the image has
    options: Mapping[str, str] = field(default_factory=dict)  # --cloud-NAME-…, native to one cloud


@dataclass(frozen=True, kw_only=True)
class Program:
    """The program that a task's machines run, and what they need to fetch it. Not secret."""

    wheel: bytes = field(default=b"", repr=False)  # empty: machines have our program already
    sha256: str = ""  # of the wheel, in hexadecimal digits
    index: str = ""  # address of the package index for its dependencies, without a login
    proxies: Mapping[str, str] = field(default_factory=dict)  # HTTPS_PROXY, …; without a login
    authorities: str = ""  # PEM of --machine-ca: needed before the settings can be read


@dataclass(frozen=True, kw_only=True)
class Task:
    """A script to run on some machines. A runner is a task whose script is our supervisor.

    The identifier alone will do to find a task again and to delete it.
    """

    id: Identifier
    settings: str = field(default="", repr=False)  # JSON for `cml-runner supervise`; secret
    machine: Machine = Machine()
    program: Program = Program()
    count: int = 1
    expires: datetime | None = None  # when the cloud itself must have ended it
    tags: Mapping[str, str] = field(default_factory=dict)
    keeps: bool = False  # when its machines are gone it is still there, with its data: deleted last


# What a cloud reports


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One machine of a task."""

    id: str
    status: Literal["starting", "running", "stopping"]
    address: str = ""


@dataclass(frozen=True, kw_only=True)
class Happening:
    """Something that a cloud did or could not do for a task.

    "capacity", "quota", "permission", "image" and "error" are reasons why a machine doesn't come;
    "info" and "interruption" belong to normal life.
    """

    at: datetime
    kind: Literal["info", "interruption", "capacity", "quota", "permission", "image", "error"]
    message: str


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A task as found in a cloud: since when it has been there, and until when it may be."""

    id: Identifier
    created: datetime
    expires: datetime | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    keeps: bool = False  # its data outlives its machines
    launched: bool = True  # False: its launch goes on, or died


@dataclass(frozen=True, kw_only=True)
class Quote:
    """What one machine of a type costs, in USD per hour; None: nobody knows."""

    type: str
    price: float | None  # now, as it was asked for: on the spot market, or on demand
    on_demand: float | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that a launch needs, looked at before anything is paid for.

    "unknown": it couldn't be looked at; the message says why, and a launch may well succeed.
    """

    what: str
    state: Literal["ok", "warning", "failed", "unknown"]
    message: str = ""
    hint: str = ""  # what to do next: a command, where there is one
    code: int = 0  # if it failed, the exit code with which a launch would


# What a forge reports


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A runner as its forge reports it."""

    id: str
    name: str
    labels: frozenset[str]
    online: bool
    busy: bool
    ours: bool = False  # the forge keeps a note that we made it
    seen: datetime | None = None  # when it was last heard of, or made; None: nobody knows


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of a forge; empty fields are not known (yet)."""

    name: str
    id: str = ""
    pipeline: str = ""  # what the forge needs to find it again: a run, a pipeline
    attempt: int = 0
    runner: str = ""  # name of the runner that ran it
    url: str = ""  # for people

    @property
    def key(self) -> str:
        """The same for every attempt of one job, and for no other job."""
        return hashlib.sha256(f"{self.pipeline}\n{self.name}".encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Package:
    """A release of a forge's agent for Linux."""

    version: str
    arch: Literal["x64", "arm64"]
    url: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Registration:
    """Room for one runner on a forge, and what its agent must show to take it."""

    url: str  # of the repository, organisation, …
    name: str
    labels: tuple[str, ...]
    single: bool
    secret: str = field(repr=False)
    group: str = ""
    details: Mapping[str, str] = field(default_factory=dict)  # what else the agent must know


@dataclass(frozen=True, kw_only=True)
class Command:
    """How to start an agent; secrets stand in the variables, never among the arguments."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    directory: Path


# What a launcher and its machines tell each other, through the bucket


@dataclass(frozen=True, kw_only=True)
class Script:
    """What the machines of a task run in an agent's place, in the directory with its data."""

    content: str = field(repr=False)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    exclude: tuple[str, ...] = ()  # from snapshots: lines as in .gitignore
    data: str = ""  # URL of the bucket with the data; empty: the task's own


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a supervisor must know. Secret: it may hold the forge's credential."""

    id: Identifier
    driver: str
    repo: str
    names: tuple[str, ...]  # of the runners, one per machine
    labels: tuple[str, ...]
    cloud: str = ""  # empty: this machine isn't a cloud's
    region: str = ""
    credential: Credential | None = None
    registrations: tuple[Registration, ...] = ()  # one per machine, in place of a credential
    group: str = ""  # of runners, on the forge
    packages: tuple[Package, ...] = ()
    single: bool = False
    retry: bool = True
    idle_timeout: float = 300  # seconds; 0 = never
    expires: datetime | None = None
    user: str = ""  # the account that agent and jobs get; empty: the supervisor's own
    sudo: bool = True  # that account may become root
    docker: bool = False  # is installed if it is missing
    workdir: str = ""  # empty: one of our own, or below the current directory
    startup: str = field(default="", repr=False)  # a script to run first
    docker_volumes: tuple[str, ...] = ()
    authorities: str = ""  # PEM: certificates that the machine trusts beside its system's own
    proxies: Mapping[str, str] = field(default_factory=dict, repr=False)  # HTTPS_PROXY, …
    script: Script | None = None  # in an agent's place


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a machine last said of itself."""

    state: Literal[
        "starting",
        "installing",
        "restoring",  # the data of a task
        "registering",
        "ready",
        "busy",
        "stopping",
        "stopped",  # a task, on demand: it can be started again
        "interrupted",  # another machine may come in its place
        "ended",
        "failed",
    ]
    at: datetime
    since: datetime  # the state has been this
    runner: str
    reason: str = ""
    job: Job | None = None
    version: str = ""  # of the agent
    code: int = 0  # exit code of our error, if it failed
    program: str = ""  # first 12 digits of the SHA-256 of the machine's program


@dataclass(frozen=True, kw_only=True)
class Result:
    """How the script of one rank ended; there is one at most, and only once its data are safe."""

    code: int
    at: datetime
    reason: str = ""
    epoch: int = 0  # how many machines it took


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What all machines of a task cost, in USD per hour, as its launcher learned."""

    price: float
    since: datetime


@dataclass(frozen=True, kw_only=True)
class Interruption:
    """A job that was cut off. It is pending until the forge has queued it again."""

    job: Job
    times: int = 1
    pending: bool = True


# What happens to a supervisor


@dataclass(frozen=True)
class Ready:
    """The agent waits for a job."""


@dataclass(frozen=True, kw_only=True)
class JobStarted:
    """The agent took a job."""

    job: Job


@dataclass(frozen=True, kw_only=True)
class Identified:
    """The forge told more about the running job."""

    job: Job


@dataclass(frozen=True, kw_only=True)
class JobEnded:
    """The agent finished its job."""

    succeeded: bool


@dataclass(frozen=True, kw_only=True)
class Troubled:
    """The agent complains; it may recover, unless it is cut off: no job will come any more."""

    message: str
    cut_off: bool = False


@dataclass(frozen=True, kw_only=True)
class Exited:
    """The agent is gone. `again`: start it once more; `outdated`: only with a newer version."""

    code: int
    reason: str = ""
    again: bool = False
    outdated: bool = False


@dataclass(frozen=True, kw_only=True)
class Notice:
    """The cloud is about to take this machine away; without a deadline: it may do so soon."""

    reason: str
    deadline: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Signalled:
    """Somebody asks us to stop."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Retried:
    """The forge queued an interrupted job again, or `given_up` says why it never will."""

    job: Job
    given_up: str = ""


@dataclass(frozen=True)
class Recalled:
    """Somebody wants a task to stop for a while."""


@dataclass(frozen=True)
class Superseded:
    """Another machine has taken this one's place."""


@dataclass(frozen=True)
class Tick:
    """Some time went by."""


Event = (
    Ready
    | JobStarted
    | Identified
    | JobEnded
    | Troubled
    | Exited
    | Notice
    | Signalled
    | Retried
    | Recalled
    | Superseded
    | Tick
)
