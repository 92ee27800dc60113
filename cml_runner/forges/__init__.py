"""The git forges: every module here defines a class Forge and a class Agent."""

from __future__ import annotations

import logging
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Protocol

from cml_runner.errors import AlreadyExists

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path
    from typing import ClassVar

    from cml_runner.model import (
        Check,
        Command,
        Credential,
        Event,
        Exited,
        Job,
        Package,
        Registration,
        Runner,
    )

log = logging.getLogger(__name__)

NAMES = tuple(module.name for module in iter_modules(__path__))


class Forge(Protocol):
    """The runners of one repository, organisation or group.

    Every method raises CredentialsError (which permission is missing) or NotFound (no such
    repository); passing faults and rate limits are waited for and tried again inside.
    """

    job_limit: ClassVar[float]  # seconds that the forge lets one job run, whatever its project says
    one_time: ClassVar[bool]  # a machine for one job needs its registration, and no credential

    @property
    def url(self) -> str:
        """The full address of the repository, organisation or group."""

    def __init__(self, url: str, credential: Credential, group: str = "") -> None:
        """Take an address or a slug; send nothing. Raises ConfigurationError."""

    @staticmethod
    def detect(url: str, environment: Mapping[str, str]) -> str:
        """Return the address to use if this is the right forge for it, else "".

        An empty url stands for the repository whose CI job the environment describes.
        """

    def check(self, labels: Sequence[str] = ()) -> None:
        """Make sure that we may register runners with these labels, before money is spent.

        Raises ConfigurationError for labels that can't be.
        """

    def checks(self, labels: Sequence[str] = ()) -> Iterable[Check]:
        """Look at all that `check()` makes sure of, and more, changing nothing, as clouds do.

        Raises NoCredentials at once, else nothing.
        """

    def runners(self) -> list[Runner]:
        """List every runner that is registered."""

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

        A forge that can is told when it will be gone, so that no job takes longer.

        Raises AlreadyExists if a runner of this name is online. With `single` the secret is
        good for one job of one runner; otherwise it ceases to be valid soon after its use.
        """

    def unregister(self, runner: Runner) -> None:
        """Remove a runner; absent is removed already. Raises JobRunning when it is busy."""

    def drain(self, name: str) -> None:
        """Give this runner no other job, if the forge can be told; its running one goes on."""

    def job(self, seen: Job) -> Job:
        """Complete what an agent could say of its job with what the forge knows."""

    def retry(self, job: Job) -> bool:
        """Run this job again, and only it; True once that is so, however often it is asked.

        False: not yet, ask again later (its pipeline is still running, say).
        Raises RunnerError when it never will.
        """

    def better_lost(self, job: Job) -> bool:
        """Say if a running job had better be lost with its machine than fail at once.

        So it is where it can't be run again before others of its pipeline have ended, for which
        the machine can't wait, and `lost()` will tell the next machine of it.
        """

    def lost(self, name: str) -> list[Job]:
        """List the jobs which a runner of this name was running when it vanished.

        Or one that was renamed from it. To be asked while no such runner is there. It may not know
        all, but what it lists is certain: a job that failed by itself is never among them.
        """

    def packages(self) -> list[Package]:
        """The agent releases to install, one per architecture; none if it comes with us."""


class Agent(Protocol):
    """The forge's own runner program."""

    def install(self, directory: Path, packages: Sequence[Package]) -> str:
        """Put it there, its checksum verified, unless it is there; return its version.

        Raises AgentFailed.
        """

    def programs(self) -> Mapping[str, str]:
        """Name what it needs on this machine: programs, and the packages of Debian with them."""

    def command(
        self,
        directory: Path,
        registration: Registration,
        *,
        volumes: Sequence[str] = (),
        idle_timeout: float = 0,
    ) -> Command:
        """Make it ready to take this registration, and say how to start it.

        `volumes` are for the containers of jobs, if it has such. After `idle_timeout`, in
        seconds, nobody wants it to wait for jobs any longer; 0: for ever.
        """

    def parse(self, line: str) -> Event | None:
        """Understand one line of its output."""

    def job(self, directory: Path, seen: Job) -> Job:
        """Complete what its output said about the running job with what else it left behind."""

    def exited(self, code: int) -> Exited:
        """Say what its exit code means."""

    def abort(self, pid: int) -> None:
        """Make the running job fail at once, so that it can be run again, and take no other.

        An agent which can't be told the latter is stopped as soon as the job has ended.
        """

    def drain(self, pid: int) -> None:
        """Have it take no other job, if it can be told; the running one goes on."""

    def stop(self, pid: int) -> None:
        """Ask it to end; a running job is given up."""

    def leave(self, registration: Registration) -> None:
        """Take it off the forge with nothing but its registration, where that can be done.

        Raises RunnerError.
        """


def load(name: str, url: str, credential: Credential, group: str = "") -> Forge:
    """Import the named forge, and no other."""
    forge: Forge = import_module(f"{__name__}.{name}").Forge(url, credential, group)
    return forge


def agent(name: str) -> Agent:
    """Import the named forge's agent."""
    found: Agent = import_module(f"{__name__}.{name}").Agent()
    return found


def make_room(forge: Forge, name: str) -> None:
    """Remove offline runners of a name, for forges that don't mind several of them.

    Raises AlreadyExists if one is online.
    """
    for runner in forge.runners():
        if runner.name == name and runner.online:
            msg = f"a runner called {name} is online at {forge.url}: choose another --name"
            raise AlreadyExists(msg)
        if runner.name == name:
            log.info("replacing the offline runner %s", name)
            forge.unregister(runner)


def detect(
    url: str, environment: Mapping[str, str], names: Sequence[str] = NAMES
) -> tuple[str, str]:
    """Find the forge of an address, or of the CI job that the environment describes.

    Returns its name and the address; the name is "" if no forge claims it.
    """
    for name in names:
        if found := import_module(f"{__name__}.{name}").Forge.detect(url, environment):
            return name, found
    return "", url
