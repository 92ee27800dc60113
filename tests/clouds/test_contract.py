"""What every cloud must do. A new one joins with a fixture NAME_rig."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Protocol

import pytest

from cml_runner import clouds
from cml_runner.errors import ConfigurationError, NotFound
from cml_runner.model import Machine, Status, Task
from cml_runner.store import SETTINGS, encoded
from tests.clouds.conftest import until

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cml_runner.clouds import Cloud, Plan
    from cml_runner.model import Instance, Notice

SECRET = "ghp_" + "s3cr3t"


class Rig(Protocol):
    """A cloud whose machines do nothing until they are told."""

    @property
    def cloud(self) -> Cloud: ...

    def task(self, settings: str = "{}", tags: Mapping[str, str] | None = None) -> Task:
        """Describe a new task that this cloud can run."""

    def launch(self, count: int, task: Task | None = None) -> Plan:
        """Create a task and that many machines, which run."""

    def running(self, plan: Plan) -> list[str]:
        """List the machines that are not just coming or going."""

    def die(self, plan: Plan, instance: str) -> None:
        """Have a machine break down."""

    def leave(self, plan: Plan, instance: str) -> None:
        """Have a machine call Cloud.leave() and exit."""

    def notice(self, plan: Plan, instance: str) -> Notice | None:
        """Ask Cloud.notice() on a machine."""

    def say(self, plan: Plan, instance: str, key: str, text: str) -> None:
        """Have a machine put something into the bucket."""

    def traces(self, secret: str) -> list[str]:
        """List the places in the cloud where a secret can be read."""

    def settings(self, plan: Plan) -> str:
        """Return the one that is meant for the settings."""


LAB = {"kubernetes"}  # has no stand-in but a real cluster


@pytest.fixture(
    params=[pytest.param(one, marks=[pytest.mark.lab] * (one in LAB)) for one in clouds.NAMES]
)
def rig(request: pytest.FixtureRequest) -> Rig:
    found: Rig = request.getfixturevalue(f"{request.param}_rig")
    return found


def delete(plan: Plan) -> None:
    for resource in reversed(plan.resources):
        resource.delete()


def instances(plan: Plan) -> dict[str, Instance]:
    return {one.id: one for one in plan.group.instances()}


def test_a_task_is_created_listed_and_deleted(rig: Rig) -> None:
    before = datetime.now(timezone.utc)
    task = rig.task(tags={"repo": "owner/repo", "name": "Some Name"})
    plan = rig.launch(1, task)
    (lease,) = rig.cloud.tasks()
    assert lease == rig.cloud.lease(task.id)
    assert (lease.id, lease.tags) == (task.id, task.tags)
    assert abs(lease.created - before) < timedelta(minutes=1)
    (instance,) = plan.group.instances()
    assert instance.address
    delete(plan)
    assert rig.cloud.tasks() == []
    assert rig.cloud.lease(task.id) is None
    assert plan.group.instances() == []


def test_data_outlive_the_machines(rig: Rig) -> None:
    if not rig.cloud.keeps:
        pytest.skip("there are no tasks with data")
    expires = datetime.now(timezone.utc) + timedelta(hours=1)
    task = replace(rig.task(SECRET), keeps=True, expires=expires)
    plan = rig.cloud.plan(task)
    for resource in plan.resources:
        assert resource.create()
    (lease,) = rig.cloud.tasks()
    assert not lease.keeps, "it isn't launched yet, and may be swept"
    plan.group.resize(1)
    until(lambda: rig.running(plan))
    plan.group.expire(expires)
    bucket = plan.bucket.store
    bucket.claim("data/000/h/00000001-00000001", b"data")
    (instance,) = rig.running(plan)
    rig.say(plan, instance, "result-000.json", "{}")
    rig.leave(plan, instance)
    until(lambda: rig.cloud.tasks()[0].expires is None)
    (lease,) = rig.cloud.tasks()
    assert (lease.id, lease.keeps) == (task.id, True)
    assert until(lambda: not plan.group.instances())
    kept = ("data/000/h/00000001-00000001", "result-000.json")
    assert [bucket.read(key) for key in kept] == [b"data", b"{}"]
    assert bucket.read(SETTINGS) is None
    assert rig.traces(SECRET) == []
    assert not rig.cloud.plan(task).bucket.create(), "its name is taken"
    with suppress(NotFound):  # it has nothing left that could come to an end
        rig.cloud.plan(Task(id=task.id)).group.expire(None)
    # It may have machines again.
    again = rig.cloud.plan(task)
    for resource in again.resources:
        resource.create()
    assert bucket.read(kept[0]) == b"data"
    delete(again)
    assert rig.cloud.tasks() == []
    assert bucket.keys("") == []


def test_the_cloud_tells_the_time(rig: Rig) -> None:
    difference = rig.cloud.now() - datetime.now(timezone.utc)
    assert abs(difference) < timedelta(minutes=1)


def test_the_plan_names_its_parts(rig: Rig) -> None:
    plan = rig.cloud.plan(rig.task())
    assert plan.resources[0] is plan.bucket
    assert any(resource is plan.group for resource in plan.resources)
    for index, resource in enumerate(plan.resources):
        assert resource.label
        before = plan.resources[:index]
        assert all(any(need is one for one in before) for need in resource.needs)
    assert rig.cloud.tasks() == []


def test_creating_twice_adopts(rig: Rig) -> None:
    task = rig.task()
    first, second = rig.cloud.plan(task), rig.cloud.plan(task)
    assert [resource.create() for resource in first.resources] == [True] * len(first.resources)
    assert [resource.create() for resource in second.resources] == [False] * len(first.resources)
    (lease,) = rig.cloud.tasks()
    assert (lease.id, lease.launched) == (task.id, False)
    assert lease == rig.cloud.lease(task.id)


def test_deleting_twice_is_no_error_and_needs_the_identifier_alone(rig: Rig) -> None:
    task = rig.task()
    rig.launch(2, task)
    for _ in range(2):
        delete(rig.cloud.plan(Task(id=task.id)))
        assert rig.cloud.tasks() == []


def test_deleting_what_never_was_is_no_error(rig: Rig) -> None:
    delete(rig.cloud.plan(Task(id=rig.task().id)))


def test_a_task_can_be_created_again(rig: Rig) -> None:
    task = rig.task()
    delete(rig.launch(1, task))
    assert rig.running(rig.launch(1, task))


def test_the_group_is_resized(rig: Rig) -> None:
    plan = rig.launch(1)
    (first,) = rig.running(plan)
    plan.group.resize(3)
    until(lambda: len(rig.running(plan)) == 3)
    assert first in rig.running(plan)
    plan.group.resize(1)
    until(lambda: len(instances(plan)) == 1)
    plan.group.resize(0)
    until(lambda: not instances(plan))
    assert rig.cloud.tasks()  # it can be started again
    plan.group.resize(1)
    until(lambda: rig.running(plan))


def test_a_machine_that_dies_is_created_again(rig: Rig) -> None:
    plan = rig.launch(2)
    dead, other = rig.running(plan)
    rig.die(plan, dead)
    until(lambda: dead not in instances(plan) and len(rig.running(plan)) == 2)
    assert other in rig.running(plan)


def test_an_interrupted_machine_has_notice_is_gone_in_time_and_comes_back(rig: Rig) -> None:
    plan = rig.launch(2)
    machine, other = rig.running(plan)
    assert rig.notice(plan, machine) is None
    before = datetime.now(timezone.utc)
    plan.group.interrupt(machine, 1.5)
    notice = rig.notice(plan, machine)
    assert notice
    assert notice.reason
    assert notice.deadline
    assert timedelta(seconds=1) < notice.deadline - before < timedelta(seconds=5)
    assert machine in instances(plan)
    assert rig.notice(plan, other) is None
    until(lambda: machine not in instances(plan))
    assert datetime.now(timezone.utc) >= notice.deadline
    until(lambda: len(rig.running(plan)) == 2)
    assert other in rig.running(plan)
    assert "interruption" in {event.kind for event in plan.group.events()}


def test_a_spot_machine_is_taken_away_in_earnest_or_it_is_said_why_not(rig: Rig) -> None:
    plan = rig.launch(1)
    (machine,) = rig.running(plan)
    refused = ""
    try:
        plan.group.evict(machine)
    except ConfigurationError as error:
        refused = str(error)
    if refused:
        assert machine in refused
        assert rig.notice(plan, machine) is None
    else:
        assert until(lambda: machine not in instances(plan) or rig.notice(plan, machine))


def test_only_a_machine_that_is_there_can_be_interrupted_or_entered(rig: Rig) -> None:
    plan = rig.launch(0)
    for name in ("", "no such machine"):
        with pytest.raises(NotFound):
            plan.group.interrupt(name, 0)
        with pytest.raises(NotFound):
            plan.group.evict(name)
        with pytest.raises(NotFound), plan.group.shell(name, ()):
            pass


def test_a_machine_is_entered_or_it_is_said_how_else(rig: Rig) -> None:
    plan = rig.launch(1)
    refused, code = "", None
    try:
        with plan.group.shell("", ("true",)) as shell:
            code = shell.run()
    except ConfigurationError as error:
        refused = str(error)
    assert "az vm run-command" in refused if refused else code == 0


def test_the_deadline_ends_everything(rig: Rig) -> None:
    plan = rig.launch(2)
    plan.group.expire(datetime.now(timezone.utc) + timedelta(seconds=0.5))
    until(lambda: not plan.group.instances())
    now = datetime.now(timezone.utc)  # what is left costs nothing, and can be cleared up
    assert all(lease.expires and lease.expires < now for lease in rig.cloud.tasks())


def test_the_deadline_is_in_the_lease(rig: Rig) -> None:
    plan = rig.launch(0)
    at = datetime.now(timezone.utc) + timedelta(hours=3)
    plan.group.expire(at)
    (lease,) = rig.cloud.tasks()
    assert lease.expires
    assert abs(lease.expires - at) < timedelta(seconds=1)
    plan.group.expire(None)
    assert [lease.expires for lease in rig.cloud.tasks()] == [None]


def test_who_leaves_leaves_the_others_alone(rig: Rig) -> None:
    plan = rig.launch(2)
    leaving, staying = rig.running(plan)
    rig.leave(plan, leaving)
    until(lambda: leaving not in instances(plan))
    rig.die(plan, staying)  # by when the other has come back, the one that left would have
    until(lambda: staying not in instances(plan) and rig.running(plan))
    assert len(instances(plan)) == 1
    assert rig.cloud.tasks()


def test_the_last_to_leave_takes_everything_along(rig: Rig) -> None:
    plan = rig.launch(2, rig.task(settings=SECRET))
    bucket = plan.bucket.store
    machines = rig.running(plan)
    now = datetime.now(timezone.utc)
    status = Status(state="ended", at=now, since=now, runner="name")
    rig.say(plan, sorted(machines)[0], "log-000-000000.txt", "hello\n")
    rig.say(plan, sorted(machines)[0], "status-000.json", encoded(status).decode())
    for machine in machines:
        rig.leave(plan, machine)
    until(lambda: not rig.cloud.tasks())
    until(lambda: not plan.group.instances())
    assert bucket.log(0).endswith("hello\n")
    assert bucket.load("status-000.json", Status) == status
    until(lambda: bucket.read(SETTINGS) is None)
    until(lambda: rig.traces(SECRET) == [])


def test_the_settings_are_in_the_bucket_and_nowhere_else(rig: Rig) -> None:
    plan = rig.launch(1, rig.task(settings=SECRET))
    assert plan.bucket.store.read(SETTINGS) == SECRET.encode()
    assert rig.traces(SECRET) == [rig.settings(plan)]
    delete(plan)
    assert rig.traces(SECRET) == []


@pytest.mark.parametrize("region", ["", "nowhere", "US-WEST", "us-west,us-east", "../us-west"])
def test_an_unknown_region_is_refused(rig: Rig, region: str) -> None:
    with pytest.raises(ConfigurationError):
        type(rig.cloud)(region)


def test_an_unknown_size_is_refused(rig: Rig) -> None:
    task = Task(id=rig.task().id, machine=Machine(types=("m", "as big as a house")))
    with pytest.raises(ConfigurationError, match="as big as a house"):
        rig.cloud.plan(task)


def test_what_a_launch_needs_can_be_looked_at_and_is_there(rig: Rig) -> None:
    found = list(rig.cloud.checks(rig.task()))
    assert found[0].what == "login"
    assert {one.state for one in found} <= {"ok", "warning", "unknown"}, found
    assert [one.state for one in found if one.what == "clock"] == ["ok"]
    assert len(found) > 2
    assert rig.cloud.tasks() == []


def test_a_machine_that_makes_no_sense_is_told_by_looking(rig: Rig) -> None:
    task = replace(rig.task(), machine=Machine(types=("no such type!",), image="no such image!"))
    wrong = [one for one in rig.cloud.checks(task) if one.state == "failed"]
    if rig.cloud.dedicated or wrong:  # the embedded cloud has but one machine
        assert {one.code for one in wrong} == {ConfigurationError.exit_code}
        assert all(one.hint for one in wrong)


def test_what_machines_cost_can_be_asked(rig: Rig) -> None:
    for one in rig.cloud.quotes(rig.task()):
        assert one.type
        assert one.price is None or one.price >= 0
    assert rig.cloud.tasks() == []
