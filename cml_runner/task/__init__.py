"""Run a script on machines of a cloud, with files in and out: a task."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import msgspec

from cml_runner import clouds, inventory, steps, store
from cml_runner.errors import (
    AlreadyExists,
    ConfigurationError,
    NotFound,
    RunnerError,
)
from cml_runner.launch import USER, provision
from cml_runner.model import OLDER, Machine, Program, Script, Settings, Task, names
from cml_runner.reports import statuses
from cml_runner.task import files, older
from cml_runner.task.follow import Follow, results
from cml_runner.task.view import parallelism

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cml_runner.clouds import Plan
    from cml_runner.inventory import Found
    from cml_runner.store import Store
    from cml_runner.task.files import Progress
    from cml_runner.task.options import Order

log = logging.getLogger(__name__)

KIND = "task"  # value of the tag "kind"
SAVING = timedelta(minutes=15)  # between the script's deadline and the cloud's
LEAST = 60.0  # seconds that a task has left when it is started again
STOPPING = 180.0  # seconds for machines to save their data when they are told to stop
PAUSE = 0.5


@dataclass(frozen=True, kw_only=True)
class Resume:
    """With what a task was launched, so that it can be started again. Secret."""

    machine: Machine
    program: Program  # without the wheel: who starts the task gives the machines their own
    settings: Settings
    tags: dict[str, str]
    timeout: float  # seconds that are left to it


def run(order: Order, tell: Callable[[str], None], progress: Progress) -> Plan:
    """Create everything, send the working directory, and start the machines.

    Raises whatever hinders it, after deleting all that this call has created.
    """
    wanted = _resume(order)
    plan = _plan(wanted, order.program)
    data = _container(order) or plan.bucket.store
    try:
        steps.create(plan.resources, claim=plan.bucket)
    except AlreadyExists as error:
        msg = f"{order.name} is there already; to be rid of it: cml-runner task destroy {order.id}"
        raise AlreadyExists(msg) from error
    with _undone(plan, data):
        tell(f"sending {order.workdir}")
        files.push(plan.bucket.store, data, order, progress)
        plan.bucket.store.save(store.RESUME, wanted)
        tell("starting machines")
        plan.group.resize(order.count)
        with suppress(NotFound):  # a script may be done by now
            plan.group.expire(_expires(wanted))
    return plan


def give_up(plan: Plan, count: int) -> None:
    """Delete a task of which no machine has ever come, nor will one."""
    if not statuses(plan.bucket.store, count):
        log.warning("deleting the task: nothing has been done")
        with steps.uninterrupted():
            steps.delete(plan.resources)


def find(text: str, cloud: str = "", region: str = "") -> Found:
    """Find a task by its identifier or name. Raises NotFound, also for what is a runner."""
    if text.startswith(f"{OLDER}-"):
        for one in older.tasks(cloud, region):
            if str(one.id) == text:
                return one
    found = inventory.find(text, cloud, region)
    if not _is_task(found):
        msg = f"{text} is a runner, not a task: see cml-runner show {text}"
        raise NotFound(msg)
    return found


def tasks(cloud: str = "", region: str = "") -> list[Found]:
    """List the tasks which are there, oldest first, with those whose data nobody has destroyed.

    Those of terraform-provider-iterative come before ours.
    """
    ours = [one for one in inventory.tasks(cloud, region) if _is_task(one)]
    return [*older.tasks(cloud, region), *ours]


def follow(found: Found) -> Follow:
    """Watch it until it is over."""
    return Follow(found.plan, parallelism(found))


def pull(found: Found, directory: Path | None, progress: Progress) -> tuple[Path, int]:
    """Fetch what it has made so far; return where that is, and how many files are new."""
    label = files.label(found.bucket)
    place = directory or files.home(label, str(found.id))
    return place, files.pull(label, _data(found, label), place, progress)


def stop(found: Found, tell: Callable[[str], None]) -> None:
    """Have the machines save their data, and end them; `start` has it go on."""
    bucket = found.bucket
    wanted = bucket.load(store.RESUME, Resume)
    if wanted is None:
        msg = f"{found.id} is over: there is nothing to stop"
        raise NotFound(msg)
    if bucket.read(store.RECALL) is None:
        expires = wanted.settings.expires
        left = (expires - datetime.now(timezone.utc)).total_seconds() if expires else LEAST
        bucket.save(store.RESUME, replace(wanted, timeout=max(LEAST, left)))
        bucket.write(store.RECALL, b"")
    _wait_until_saved(found, tell)
    tell("ending the machines")
    inventory.end(found)


def start(found: Found) -> None:
    """Have a task go on that was stopped, with the time that was left to it."""
    bucket = found.bucket
    wanted = bucket.load(store.RESUME, Resume)
    if wanted is None:
        msg = f"{found.id} is over: run it anew"
        raise NotFound(msg)
    if bucket.read(store.RECALL) is None and bucket.read(store.SETTINGS) is not None:
        log.info("%s hasn't been stopped", found.id)
        return
    expires = datetime.now(timezone.utc) + timedelta(seconds=wanted.timeout)
    wanted = replace(wanted, settings=replace(wanted.settings, expires=expires))
    plan = _plan(wanted, provision.with_wheel(wanted.program))
    inventory.end(found)  # whatever a stop has left that was itself interrupted
    steps.create(plan.resources)
    bucket.save(store.SETTINGS, wanted.settings)
    bucket.save(store.RESUME, wanted)
    bucket.delete(store.RECALL)
    plan.group.resize(len(wanted.settings.names))
    with suppress(NotFound):
        plan.group.expire(_expires(wanted))


def destroy(found: Found, directory: Path | None, progress: Progress, *, fetch: bool) -> int:
    """Fetch its results, and only then delete all that there is of it.

    Raises what hinders the fetching, and then deletes nothing.
    """
    fetched = 0
    if older.is_old(found.id):
        older.destroy(found, fetch=fetch)
        return fetched
    if fetch:
        with suppress(NotFound):  # it never had any data
            _, fetched = pull(found, directory, progress)
    inventory.end(found)
    with suppress(NotFound):
        data = _data(found, files.label(found.bucket))
        data.remove(data.keys(f"{store.DATA}/"))
    steps.delete(found.plan.resources)
    return fetched


def _data(found: Found, label: files.Label) -> Store:
    """Open what holds its data."""
    if label.container:
        return found.place.cloud.container(label.container, label.container_options)
    return found.bucket


def _container(order: Order) -> Store | None:
    """Open the bucket of the user's own for the data, if there is one."""
    if not order.container:
        return None
    cloud = clouds.load(order.cloud, order.region)
    return cloud.container(order.container, order.container_options)


def _is_task(found: Found) -> bool:
    if found.lease:
        return found.lease.tags.get("kind") == KIND
    with suppress(RunnerError):
        return found.bucket.read(files.LABEL) is not None
    return False


def _resume(order: Order) -> Resume:
    cloud = clouds.load(order.cloud, order.region)
    if not cloud.keeps:
        msg = f"--cloud {order.cloud}: tasks can't be had there"
        raise ConfigurationError(msg)
    content = Settings(
        id=order.id,
        driver="",
        repo="",
        names=names(order.name, order.count),
        labels=(),
        cloud=order.cloud,
        region=order.region,
        expires=order.deadline,
        user=USER if cloud.dedicated else "",
        script=Script(
            content=order.script,
            environment=order.environment,
            exclude=order.rules.lines,
            data=found.url if (found := _container(order)) else "",
        ),
        authorities=order.authorities,
        proxies=order.proxies,
    )
    own = {"kind": KIND, "name": order.name, "count": str(order.count)}
    return Resume(
        machine=order.machine,
        program=provision.without_wheel(order.program),
        settings=content,
        tags={**order.tags, **own},
        timeout=order.timeout,
    )


def _plan(wanted: Resume, program: Program) -> Plan:
    settings = wanted.settings
    task = Task(
        id=settings.id,
        settings=msgspec.json.encode(settings).decode(),
        machine=wanted.machine,
        program=program,
        count=len(settings.names),
        expires=_expires(wanted),
        tags=wanted.tags,
        keeps=True,
    )
    return clouds.load(settings.cloud, settings.region).plan(task)


def _expires(wanted: Resume) -> datetime | None:
    """When the cloud ends it: late enough for the data to be saved after the script's deadline."""
    return wanted.settings.expires + SAVING if wanted.settings.expires else None


@contextmanager
def _undone(plan: Plan, data: Store) -> Iterator[None]:
    """Leave nothing behind when it can't be started, or is given up."""
    try:
        yield
    except BaseException as error:
        log.warning("deleting what was created")
        with steps.uninterrupted():
            if not isinstance(error, AlreadyExists):  # the data there are another task's
                data.remove(data.keys(f"{store.DATA}/"))
            steps.delete(plan.resources)
        raise


def _wait_until_saved(found: Found, tell: Callable[[str], None]) -> None:
    """Give machines the time that they need; those which haven't said anything have no data."""
    bucket, count = found.bucket, parallelism(found)
    end = time.monotonic() + STOPPING
    while time.monotonic() < end:
        done, said = results(bucket, count), statuses(bucket, count)
        states = [one.state for rank, one in said.items() if rank not in done]
        busy = [state for state in states if state not in ("stopped", "ended", "failed")]
        if not busy or not found.plan.group.instances():
            return
        tell(f"{len(busy)} of {count} machines are saving their data")
        time.sleep(PAUSE)
    log.warning("not all machines have saved their data in time: what they saved before is kept")
