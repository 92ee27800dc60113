"""The clouds: every module here defines one class called Cloud, and its file name is its name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from cml_runner.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime

    from cml_runner.model import Check, Happening, Identifier, Instance, Lease, Notice, Quote, Task
    from cml_runner.store import Store

NAMES = tuple(module.name for module in iter_modules(__path__))
ALIASES = {"az": "azure"}  # what else people call them
REGIONS = ("us-east", "us-west", "eu-north", "eu-west")  # names that every cloud translates
SIZES = ("s", "m", "l", "xl")  # likewise


class Resource(Protocol):
    """One thing in a cloud. Every method may be repeated without harm."""

    @property
    def label(self) -> str:
        """What people call it: "launch template"."""

    @property
    def needs(self) -> Sequence[Resource]:
        """The resources which must exist before this one can be created."""

    def create(self) -> bool:
        """Create it; True if it is new, False if the one which exists was adopted.

        One that can't be created leaves nothing behind.
        """

    def delete(self) -> None:
        """Delete it and wait until it is gone; one which doesn't exist is deleted already."""


class Shell(Protocol):
    """A way into a machine."""

    def run(self) -> int:
        """Have the user's terminal until it ends; return its exit code, 0 if nobody tells it."""


class Group(Resource, Protocol):
    """The resource that holds a task's machines, and re-creates those that die."""

    def resize(self, count: int) -> None:
        """Ask for that many machines, and return without waiting for them.

        Raises NoCapacity or CredentialsError where the cloud says so at once.
        """

    def instances(self) -> list[Instance]:
        """List the machines which the group has now."""

    def events(self) -> list[Happening]:
        """What the cloud did and could not do for this group, oldest first."""

    def expire(self, at: datetime | None) -> None:
        """Have the cloud itself end the group then, whatever the machines do; None: never.

        It is also the last step of a launch: a task without it is one whose launcher died.
        """

    def interrupt(self, instance: str, after: float) -> None:
        """Take a machine away as the cloud would: a notice now, its end `after` seconds later.

        Where the cloud can't do this by itself, the machine, which has the notice, ends itself.
        """

    def evict(self, instance: str) -> None:
        """Have the cloud itself take a spot machine away in earnest, whenever it likes.

        Raises NotFound, or ConfigurationError where the cloud can't be asked for that.
        """

    def shell(self, instance: str, command: Sequence[str]) -> AbstractContextManager[Shell]:
        """Open a way into a running machine, for a login shell or a command, and close it again.

        Nothing is open before or afterwards; what a process that dies leaves open closes itself.
        Raises NotFound; MissingDependency if a program is missing here; ConfigurationError, with
        what can be done in place of it, where there is no such way.
        """

    def console(self) -> str:
        """Return the console of the machine that ended last or, if none has, of the youngest.

        It may be incomplete, or not be known yet.
        """


class Bucket(Resource, Protocol):
    """The resource that holds a task's settings, logs and status; the first to be created.

    Creating it is atomic: of two launches of one task, one gets True and the other False.
    """

    @property
    def store(self) -> Store:
        """Its content; on the machines, `Store(store.url)` opens the same."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a task needs in one cloud."""

    resources: Sequence[Resource]  # in creation order; deletion goes backwards
    group: Group  # the one which holds the machines
    bucket: Bucket  # the one which holds the files
    arch: Literal["x64", "arm64"] = "x64"  # of the machines


class Cloud(Protocol):
    """One account in one region of one cloud."""

    dedicated: ClassVar[bool]  # each machine is a system of its own in which nothing else runs
    keeps: ClassVar[bool]  # tasks with data can be had: Task.keeps, and container()
    metadata_service: ClassVar[bool]  # a machine's identity can be had over its network

    def __init__(self, region: str) -> None:
        """Take a generic or native region; raise ConfigurationError for an unknown one."""

    def plan(self, task: Task) -> Plan:
        """Say what the task needs, changing nothing; an identifier alone will do for deletion.

        Raises ConfigurationError with every mistake in the machine's description.
        """

    def container(self, address: str, options: Mapping[str, str]) -> Store:
        """Open a bucket of the user's own, NAME/PATH, for the data of a task.

        Sends nothing. Raises ConfigurationError.
        """

    def tasks(self) -> list[Lease]:
        """List the tasks which exist in this region, found by their tags."""

    def lease(self, identifier: Identifier) -> Lease | None:
        """Look for one task, and tell of it what tasks() would; None if it isn't there."""

    def older(self) -> list[Lease]:
        """List this region's tasks of terraform-provider-iterative, which can only be deleted.

        plan() takes their identifiers, too. None where they can't be found cheaply.
        """

    def now(self) -> datetime:
        """Ask the cloud what time it is: deadlines are kept by its clock, ours may be wrong."""

    def setup(self) -> list[str]:
        """Make what all tasks of this account and region share; return the labels of what is new.

        Raises CredentialsError, with all that is missing, if we may not.
        """

    def permissions(self, *, doctor: bool = False) -> Mapping[str, Any]:
        """Return the least policy for whoever launches, as the cloud writes it; sends nothing.

        With `doctor` it also allows what only `checks()` reads.
        """

    def checks(self, task: Task) -> Iterable[Check]:
        """Look at all that launching this task takes, changing nothing.

        The first one is the login; if that fails, or if the description of the machine makes no
        sense, what depends on it is left out. Raises NoCredentials or MissingDependency, at once;
        else it raises nothing: what can't be looked at is unknown.
        """

    def quotes(self, task: Task) -> list[Quote]:
        """Ask what a machine of each type costs that this task may get; none where nobody knows.

        It changes nothing, and may take seconds. Raises ConfigurationError as `plan` does, and
        RunnerError if it can't be asked; a price that we may not ask for isn't known.
        """

    @staticmethod
    def rank() -> int | None:
        """Which of its group's machines this one is, on the machine.

        None where the cloud doesn't number them: then they agree on it in the bucket.
        """

    @staticmethod
    def forgotten() -> int | None:
        """Count the machines, on the machine, which had its place and of which nothing is left.

        None where the bucket keeps what machines write, so that each learns of those before it.
        """

    @staticmethod
    def machine() -> str:
        """Return this machine's own name, on the machine; no other one ever has it."""

    @staticmethod
    def notice() -> Notice | None:
        """Ask, on the machine and without an SDK, if the cloud will take it away.

        Raises OSError when the metadata service doesn't answer.
        """

    def leave(self, identifier: Identifier, url: str, *, last: bool) -> None:
        """End this machine's part of the task, on the machine; the last thing that it does.

        The URL is that of the task's bucket. It doesn't return before it has worked: where it
        can't be known that this is a machine of the task, it says so and goes on looking.

        Other machines of the group are not touched; the last one takes everything with it that
        costs money or is secret. Only logs and status stay, in the bucket; of a task that keeps
        them its data and its lease, too, without a deadline from now on. A cloud which knows
        by itself who is the last one doesn't need to be told.
        """


def named(text: str) -> str:
    """Return a cloud's own name."""
    return ALIASES.get(text, text)


def running(instances: Iterable[Instance], wanted: str, group: str, what: str = "machine") -> str:
    """Name the one of a group's instances that is wanted, or its first, if that one runs.

    Raises NotFound.
    """
    there = [one.id for one in instances if one.status == "running"]
    name = wanted or next(iter(there), "")
    if name not in there:
        msg = f"{group} has no running {what} {name}".rstrip()
        raise NotFound(msg)
    return name


def load(name: str, region: str) -> Cloud:
    """Import the named cloud, and no other."""
    cloud: Cloud = import_module(f"{__name__}.{name}").Cloud(region)
    return cloud
