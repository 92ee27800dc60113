"""Look at everything that a launch needs, before anything is paid for; nothing is changed."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cml_runner import access, checkup, clouds, inventory
from cml_runner.errors import (
    ConfigurationError,
    CredentialsError,
    MissingDependency,
    NoCredentials,
    RunnerError,
)
from cml_runner.launch import options as reading
from cml_runner.model import Identifier, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from cml_runner.launch.options import Options
    from cml_runner.model import Check

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """What was seen somewhere."""

    place: str  # "aws us-west", or the address of a repository
    check: Check


@dataclass(frozen=True)
class Place:
    """A forge, or one region of a cloud."""

    name: str
    asked: bool  # for by name: then it is a failure that we have no credentials there
    look: Callable[[], Iterable[Check]]


def examine(options: Options, environment: Mapping[str, str]) -> list[Finding]:
    """Look at the forge and at each cloud, all at the same time: none hides another.

    Without --cloud and --repo those without credentials are passed over. Raises ConfigurationError
    for options that make no sense anywhere, and CredentialsError if nothing could be looked at.
    """
    places = [*_forge(options, environment), *_clouds(options)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_examined, places))
    if not any(found):
        names = ", ".join(place.name for place in places)
        msg = f"there are no credentials for any of these, so there is nothing to look at: {names}"
        raise CredentialsError(msg)
    return [one for several in found for one in several]


def code(findings: Sequence[Finding]) -> int:
    """Return the exit code: that of the first failure; 0 if all is well, but for warnings."""
    return next((one.check.code for one in findings if one.check.state == "failed"), 0)


def _forge(options: Options, environment: Mapping[str, str]) -> list[Place]:
    asked = access.Asked.among(vars(options))
    named = bool(asked.repo)
    try:
        found = access.find(asked, environment)
    except ConfigurationError:
        if named or asked.driver:
            raise
        log.info("no repository was named, and none found: no forge is looked at")
        return []
    labels = reading.labels(options)
    return [Place(found.url, named, lambda: found.forge().checks(labels))]


def _clouds(options: Options) -> list[Place]:
    """Name the places; a region that only some clouds have is looked at on those."""
    names = [options.cloud] if options.cloud else clouds.NAMES
    tasks = {name: _task(options, name) for name in names}
    return [
        Place(
            f"{one.name} {one.region}",
            bool(options.cloud),
            partial(one.cloud.checks, tasks[one.name]),
        )
        for one in inventory.having(names, reading.regions(options))
    ]


def _task(options: Options, cloud: str) -> Task:
    """Describe what would be launched on a cloud; others' own options mean nothing to it."""
    machine, count = reading.machine(options, cloud)
    return Task(id=Identifier.new("doctor"), settings="{}", machine=machine, count=count)


def _examined(place: Place) -> list[Finding]:
    try:
        found = list(place.look())
    except (NoCredentials, MissingDependency) as error:
        if not place.asked:
            log.info("%s isn't looked at: %s", place.name, _why(error))
            return []
        found = [_failed(error)]
    except RunnerError as error:
        found = [_failed(error)]
    return [Finding(place.name, one) for one in found]


def _failed(error: RunnerError) -> Check:
    message, _, hint = " ".join(str(error).split()).partition(": ")
    return checkup.failed("login", message, hint, type(error))


def _why(error: RunnerError) -> str:
    return "its SDK isn't installed" if isinstance(error, MissingDependency) else "no credentials"
