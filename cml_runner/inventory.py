"""What has been launched and is there: list it, read it, interrupt it, end it."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cml_runner import clouds, steps, store
from cml_runner.errors import (
    CleanupFailed,
    ConfigurationError,
    CredentialsError,
    MissingDependency,
    NotFound,
    RunnerError,
)
from cml_runner.model import Identifier, Instance, Lease, Status, Task, made_up, names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from cml_runner.access import Access
    from cml_runner.clouds import Cloud, Plan
    from cml_runner.model import Runner

log = logging.getLogger(__name__)

FOLLOW = 0.5  # seconds between two looks at a log
SILENCE = timedelta(days=1)  # after which nobody waits for a runner any more


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
        bucket, found = self.bucket, {}
        for rank in bucket.ranks():
            try:
                if status := bucket.load(store.status(rank), Status):
                    found[rank] = status
            except RunnerError as error:
                log.warning("%s", error)
        return found

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
    found: list[Place] = []
    mistakes: list[str] = []
    for name in [cloud] if cloud else clouds.NAMES:
        for one in [region] if region else clouds.REGIONS:
            try:
                found.append(Place(name, one, clouds.load(name, one)))
            except ConfigurationError as error:
                mistakes += error.mistakes
    if not found:  # not one of the clouds has such a region
        raise ConfigurationError(*mistakes)
    return found


def tasks(cloud: str = "", region: str = "") -> list[Found]:
    """List the tasks which are there, oldest first.

    Of all clouds, those without credentials are passed over; one that fails hides no other.
    """
    asked = places(cloud, region)

    def ask(place: Place) -> list[Found]:
        try:
            return [Found(lease.id, place, lease) for lease in place.cloud.tasks()]
        except (CredentialsError, MissingDependency):
            if cloud:
                raise
        except RunnerError as error:
            if cloud and region:
                raise
            log.warning("%s %s: %s", place.name, place.region, error)
        return []

    with ThreadPoolExecutor() as pool:
        found = [one for several in pool.map(ask, asked) for one in several]
    return sorted(found, key=lambda one: one.lease.created if one.lease else _now())


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
    }


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

    With `follow` it goes on until the task is over. Of machines that have not got so far, or never
    did, what they have written to the console is all that there is.
    """
    read: dict[int, int] = {}
    while True:
        there = follow and any(one.id == found.id for one in found.place.cloud.tasks())
        for rank in found.bucket.ranks():
            text = found.bucket.log(rank)
            new = text[read.get(rank, 0) :]
            whole = new if not there else new[: new.rfind("\n") + 1]
            if whole:
                read[rank] = read.get(rank, 0) + len(whole)
                yield rank, whole
        if not there:
            if not read and found.lease and (text := found.plan.group.console()):
                yield 0, text  # its supervisor hasn't begun to speak
            return
        time.sleep(FOLLOW)


def interrupt(found: Found, instance: str, after: float) -> None:
    """Take a machine away as the cloud would, `after` so many seconds."""
    if not found.lease:
        msg = f"{found.id} is over"
        raise NotFound(msg)
    found.plan.group.interrupt(instance, after)


def destroy(several: Sequence[Found], access: Callable[[], Access | None]) -> None:
    """End tasks, with their machines, their records, and what is registered of them.

    Those with data keep these: task.destroy has them go, once they are pulled. Goes on after a
    failure; raises CleanupFailed at the end.
    """
    failures: list[tuple[str, Exception]] = []
    for found in several:
        try:
            if found.lease and found.lease.keeps:
                end(found)
                continue
            runners = found.runners()
            steps.delete(found.plan.resources)
            if found.lease:
                _unregister(found.lease, runners, access)
        except CleanupFailed as error:
            failures += error.failures
        except RunnerError as error:
            failures.append((str(found.id), error))
    if failures:
        raise CleanupFailed(failures)


def end(found: Found) -> None:
    """End the machines of a task with data, and all that it has but the data."""
    plan = found.plan
    steps.delete([one for one in plan.resources if one is not plan.bucket])
    with suppress(NotFound):
        plan.group.expire(None)  # there is nothing left that costs much


def expired(several: Sequence[Found], older_than: float) -> list[Found]:
    """Pick the tasks which are past their deadline or, if not zero, older than so many seconds."""
    now = _now()
    oldest = now - timedelta(seconds=older_than)
    return [
        one
        for one in several
        if one.lease
        and (
            (one.lease.expires and one.lease.expires < now)
            or (older_than and one.lease.created < oldest and not _only_data(one.lease))
        )
    ]


def _only_data(lease: Lease) -> bool:
    """Say if the machines of a task are gone already."""
    return lease.keeps and lease.expires is None


def stale(runners: Sequence[Runner], living: Sequence[Found]) -> list[Runner]:
    """Pick the registrations of ours whose runner is gone for good.

    Ours are those which say so, or whose name no other program makes up. Of living tasks none is
    taken, nor one that a launch elsewhere may have just made: it must have been silent for a day.
    """
    kept = {name for found in living for name in found.runners()}
    oldest = _now() - SILENCE
    return [
        one
        for one in runners
        if not one.online
        and one.name not in kept
        and (one.ours or made_up(one.name))
        and one.seen
        and one.seen < oldest
    ]


def _unregister(lease: Lease, names: set[str], access: Callable[[], Access | None]) -> None:
    """Take what a task had registered off its forge, if we may speak to that forge."""
    found = access()
    if not found or found.url != lease.tags.get("repo"):
        return
    forge = found.forge()
    for runner in forge.runners():
        if runner.name in names and not runner.online:
            log.info("removing %s from %s", runner.name, forge.url)
            forge.unregister(runner)


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _iso(at: datetime | None) -> str | None:
    return at.astimezone(timezone.utc).isoformat(timespec="seconds") if at else None
