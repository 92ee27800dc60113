"""What has been launched and is there: list it, read it, interrupt it, end it."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cml_runner import clouds, reports, steps, store
from cml_runner.errors import (
    CleanupFailed,
    ConfigurationError,
    CredentialsError,
    MissingDependency,
    NoCredentials,
    NotFound,
    RunnerError,
)
from cml_runner.model import Bill, Identifier, Instance, Lease, Task, names
from cml_runner.reports import Tail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from cml_runner.access import Access
    from cml_runner.clouds import Cloud, Plan
    from cml_runner.forges import Forge
    from cml_runner.model import Status

log = logging.getLogger(__name__)

AT_ONCE = 8  # buckets that are read
FOLLOW = 0.5  # seconds between two looks at a log
PATIENCE = 10  # failures in a row, with growing pauses, before following is given up


@dataclass(frozen=True)
class Place:
    """One region of one cloud."""

    name: str
    region: str
    cloud: Cloud = field(repr=False)


@dataclass(frozen=True)
class Found:
    """A task that is there or, without a lease, the record of one that is over."""

    id: Identifier
    place: Place
    lease: Lease | None

    @cached_property
    def plan(self) -> Plan:
        """Everything that it consists of."""
        return self.place.cloud.plan(Task(id=self.id))

    @cached_property
    def bucket(self) -> store.Store:
        """Where its status and its logs are."""
        return self.plan.bucket.store

    def statuses(self) -> dict[int, Status]:
        """What its machines last said, by rank."""
        return reports.statuses(self.bucket, tolerant=True)

    def runners(self) -> set[str]:
        """Names that its machines have, or had, on the forge."""
        tags = self.lease.tags if self.lease else {}
        count = int(tags.get("count", "1"))
        named = names(tags["name"], count) if "name" in tags else ()
        return {*named, *(status.runner for status in self.statuses().values())}


def places(cloud: str, region: str) -> list[Place]:
    """Name the regions to look at: one, all of one cloud, or all of every cloud."""
    if cloud and cloud not in clouds.NAMES:
        msg = f"--cloud {cloud}: choose one of {', '.join(clouds.NAMES)}"
        raise ConfigurationError(msg)
    return having([cloud] if cloud else clouds.NAMES, [region] if region else clouds.REGIONS)


def having(names: Sequence[str], regions: Sequence[str]) -> list[Place]:
    """Name the regions which the named clouds have; ConfigurationError if none has any."""
    found: list[Place] = []
    mistakes: list[str] = []
    for name in names:
        for region in regions:
            try:
                found.append(Place(name, region, clouds.load(name, region)))
            except ConfigurationError as error:
                mistakes += error.mistakes
    if not found:
        raise ConfigurationError(*mistakes)
    return found


def scan(
    cloud: str, region: str, ask: Callable[[Cloud], list[Lease]]
) -> tuple[list[Found], list[tuple[Place, RunnerError]]]:
    """Ask everywhere at the same time; return what is there, oldest first, and what failed where.

    What a failure means is for the caller to say: none hides what other places answer.
    """

    def answer(place: Place) -> list[Lease] | RunnerError:
        try:
            return ask(place.cloud)
        except RunnerError as error:
            return error

    asked = places(cloud, region)
    with ThreadPoolExecutor() as pool:
        answers = list(zip(asked, pool.map(answer, asked), strict=True))
    failures = [(place, one) for place, one in answers if isinstance(one, RunnerError)]
    there = [(lease, place) for place, one in answers if isinstance(one, list) for lease in one]
    order = sorted(there, key=lambda one: one[0].created)
    return [Found(lease.id, place, lease) for lease, place in order], failures


def tasks(cloud: str = "", region: str = "") -> list[Found]:
    """List the tasks which are there, oldest first.

    Of all clouds, those without credentials are passed over; one that fails hides no other.
    """
    found, failures = scan(cloud, region, lambda one: one.tasks())
    for place, error in failures:
        absent = isinstance(error, NoCredentials | MissingDependency)
        if cloud and (region or absent or isinstance(error, CredentialsError)):
            raise error
        if not absent:
            log.warning("%s %s: %s", place.name, place.region, error)
    return found


def find(text: str, cloud: str = "", region: str = "") -> Found:
    """Find a task by its identifier or by the name of its runner; else the record of one.

    Raises NotFound, or ConfigurationError if several have this name.
    """
    there = [(one, one.lease.tags.get("name")) for one in tasks(cloud, region) if one.lease]
    named = [one for one, name in there if text in (str(one.id), name)]
    if len(named) > 1:
        listed = ", ".join(f"{one.id} ({one.place.name} {one.place.region})" for one in named)
        msg = f"several runners are called {text}; say which one: {listed}"
        raise ConfigurationError(msg)
    if named:
        return named[0]
    try:
        identifier = Identifier.parse(text)
    except ConfigurationError:
        msg = f"no runner {text!r} is there; cml-runner list shows all"
        raise NotFound(msg) from None
    for found in (Found(identifier, place, None) for place in places(cloud, region)):
        try:
            if found.bucket.ranks():
                return found
        except RunnerError:
            if cloud and region:
                raise
    msg = f"no runner {text} is there, nor a record of one"
    raise NotFound(msg)


def row(found: Found) -> dict[str, Any]:
    """Describe a task in a line."""
    return _row(found, found.statuses())


def _row(found: Found, statuses: Mapping[int, Status]) -> dict[str, Any]:
    states = [status.state for status in statuses.values()]
    jobs = [status.job.name for status in statuses.values() if status.job]
    lease = found.lease
    tags = lease.tags if lease else {}
    return {
        "id": str(found.id),
        "name": tags.get("name", str(found.id)),
        "cloud": found.place.name,
        "region": found.place.region,
        "repo": tags.get("repo", ""),
        "labels": tags.get("labels", ""),
        "states": {state: states.count(state) for state in dict.fromkeys(states)},
        "jobs": jobs,
        "created": _iso(lease.created if lease else None),
        "expires": _iso(lease.expires if lease else None),
        "over": lease is None,
        **_cost(found, statuses),
    }


def _cost(found: Found, statuses: Mapping[int, Status]) -> dict[str, float | None]:
    """Say what it costs, and has cost until now or, once it is over, until it was last heard of."""
    bill = None
    with suppress(RunnerError):
        bill = found.bucket.load(store.PRICE, Bill)
    if not bill:
        return {"pricePerHour": None, "cost": None}
    last = max((one.at for one in statuses.values()), default=bill.since)
    end = _now() if found.lease else last
    hours = max(0.0, (end - bill.since).total_seconds() / 3600)
    return {"pricePerHour": bill.price, "cost": round(bill.price * hours, 4)}


def rows(several: Sequence[Found]) -> list[dict[str, Any]]:
    """Describe tasks, each in a line; their buckets are read at the same time."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="row") as pool:
        return list(pool.map(row, several))


def details(found: Found) -> dict[str, Any]:
    """Describe all that is known of a task."""
    group, statuses = found.plan.group, found.statuses()
    instances: list[Instance] = group.instances() if found.lease else []
    return {
        **_row(found, statuses),
        "tags": dict(found.lease.tags) if found.lease else {},
        "instances": [
            {"id": one.id, "status": one.status, "address": one.address} for one in instances
        ],
        "machines": [
            {
                "rank": rank,
                "runner": status.runner,
                "state": status.state,
                "since": _iso(status.since),
                "heartbeat": _iso(status.at),
                "reason": status.reason,
                "job": status.job.name if status.job else "",
                "jobUrl": status.job.url if status.job else "",
                "agent": status.version,
                "program": status.program,
            }
            for rank, status in statuses.items()
        ],
        "events": [
            {"at": _iso(event.at), "kind": event.kind, "message": event.message}
            for event in group.events()
        ],
    }


def logs(found: Found, *, follow: bool) -> Iterator[tuple[int, str]]:
    """Yield what each machine has logged: its rank, and some whole lines.

    With `follow` it goes on until the task is over, through respawns and moments in which the
    cloud can't be reached. Of machines that have not got so far, or never did, what they have
    written to the console is all that there is.
    """
    tails: dict[int, Tail] = {}
    failures, silent = 0, True
    while True:
        try:
            there = follow and found.place.cloud.lease(found.id) is not None
            for rank in found.bucket.ranks():
                tail = tails.setdefault(rank, Tail(found.bucket, rank))
                if text := tail.text(last=not there):
                    silent = False
                    yield rank, text
        except RunnerError as error:
            failures += 1
            if not follow or isinstance(error, CredentialsError) or failures > PATIENCE:
                raise
            log.debug("can't read the log: %s", error)
            time.sleep(FOLLOW * failures)
            continue
        failures = 0
        if not there:
            if silent and found.lease and (text := found.plan.group.console()):
                yield 0, text  # its supervisor hasn't begun to speak
            return
        time.sleep(FOLLOW)


def interrupt(found: Found, instance: str, after: float) -> None:
    """Take a machine away as the cloud would, `after` so many seconds."""
    _group(found).interrupt(instance, after)


def evict(found: Found, instance: str) -> None:
    """Have the cloud itself take a spot machine away, when it likes."""
    _group(found).evict(instance)


def shell(
    found: Found, instance: str, command: Sequence[str]
) -> AbstractContextManager[clouds.Shell]:
    """Open a way into a machine, the first that runs unless one is named, and close it."""
    return _group(found).shell(instance, command)


def _group(found: Found) -> clouds.Group:
    """Return what holds its machines. Raises NotFound if it is over."""
    if not found.lease:
        msg = f"{found.id} is over"
        raise NotFound(msg)
    return found.plan.group


def destroy(several: Sequence[Found], access: Callable[[], Access | None]) -> None:
    """End tasks, with their machines, their records, and what is registered of them.

    Those with data keep these: task.destroy has them go, once they are pulled. Goes on after a
    failure; raises CleanupFailed at the end.
    """
    failures: list[tuple[str, Exception]] = []
    for found in several:
        try:
            remove(found, access)
        except CleanupFailed as error:
            failures += error.failures
        except RunnerError as error:
            failures.append((str(found.id), error))
    if failures:
        raise CleanupFailed(failures)


def remove(
    found: Found,
    access: Callable[[], Access | None],
    permit: Callable[[], bool] = lambda: True,
) -> None:
    """End one task, as destroy does, as long as `permit` says so."""
    if found.lease and found.lease.keeps:
        end(found, permit)
        return
    runners, refused = found.runners(), []

    def asked() -> bool:
        refused.extend([] if permit() else [True])
        return not refused

    steps.delete(found.plan.resources, asked)
    if found.lease and not refused:  # or its runners may be those of another launch
        _unregister(found.lease, runners, access)


def end(found: Found, permit: Callable[[], bool] = lambda: True) -> None:
    """End the machines of a task with data, and all that it has but the data."""
    plan = found.plan
    steps.delete([one for one in plan.resources if one is not plan.bucket], permit)
    with suppress(NotFound):
        if permit():
            plan.group.expire(None)  # there is nothing left that costs much


def _unregister(lease: Lease, names: set[str], access: Callable[[], Access | None]) -> None:
    """Take what a task had registered off its forge, if we may speak to that forge.

    Of other repositories there it may be that our credential isn't good for them.
    """
    given, repo = access(), lease.tags.get("repo", "")
    found = given.beside(repo) if given and repo else None
    if not given or not found:
        return
    try:
        _take_off(found.forge(), names)
    except (CredentialsError, NotFound) as error:
        if repo == given.url:
            raise
        log.warning("%s may still be registered: %s", ", ".join(sorted(names)), error)


def _take_off(forge: Forge, names: set[str]) -> None:
    for runner in forge.runners():
        if runner.name in names and not runner.online:
            log.info("removing %s from %s", runner.name, forge.url)
            forge.unregister(runner)


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _iso(at: datetime | None) -> str | None:
    return at.astimezone(timezone.utc).isoformat(timespec="seconds") if at else None
