"""Clearing up beside launches, beside others who clear up, and with clocks that are wrong."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner import clouds, leases, steps, sweep
from cml_runner.errors import RunnerError
from cml_runner.model import Identifier
from cml_runner.store import Store
from cml_runner.sweep import Report, Sweep
from tests.clouds.conftest import until
from tests.clouds.test_contract import LAB

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.clouds import Plan
    from cml_runner.model import Task
    from tests.clouds.aws_rig import AwsRig
    from tests.clouds.conftest import LocalRig
    from tests.clouds.test_contract import Rig
    from tests.conftest import Cli

HOOKED = ("aws", "azure", "gcp")  # whose fakes tell of every call before they serve it


@pytest.fixture(
    params=[pytest.param(one, marks=[pytest.mark.lab] * (one in LAB)) for one in clouds.NAMES]
)
def place(request: pytest.FixtureRequest) -> tuple[str, Rig]:
    return request.param, request.getfixturevalue(f"{request.param}_rig")


def now() -> datetime:
    return datetime.now(timezone.utc)


def launched(rig: Rig | AwsRig, task: Task) -> Plan:
    """Do all that a launch does."""
    plan = rig.cloud.plan(task)
    steps.create(plan.resources, claim=plan.bucket)
    plan.group.resize(1)
    plan.group.expire(task.expires)
    return plan


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Do things at the same time; return what they return."""
    found: list[Any] = [None] * len(works)
    start = threading.Barrier(len(works))

    def work(number: int) -> None:
        start.wait()
        found[number] = works[number]()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("name", HOOKED)
def test_at_no_call_of_a_launch_is_it_touched(name: str, request: pytest.FixtureRequest) -> None:
    rig = request.getfixturevalue(f"{name}_rig")
    front = getattr(rig, name).app
    turn, reports = threading.Lock(), []

    def watch(_: Any) -> None:
        if turn.acquire(blocking=False):  # the sweep's own calls come here, too
            try:
                reports.append(Sweep(name, "us-west").run())
            finally:
                turn.release()

    front.watch = watch
    plan = launched(rig, replace(rig.task(), expires=now() + timedelta(hours=2)))
    front.watch = lambda _: None
    assert len(reports) > 5
    assert [one for report in reports for one in (*report.items, *report.unseen)] == []
    assert len(rig.cloud.tasks()) == 1
    until(plan.group.instances)


def test_between_no_steps_of_a_launch_is_it_touched(place: tuple[str, Rig]) -> None:
    name, rig = place
    task = replace(rig.task(), expires=now() + timedelta(hours=2))
    plan = rig.cloud.plan(task)
    sweeps = Sweep(name, "us-west")
    for resource in plan.resources:
        assert resource.create()
        assert sweeps.run() == Report()
    plan.group.resize(1)
    assert sweeps.run() == Report()
    plan.group.expire(task.expires)
    assert sweeps.run() == Report()
    assert [one.id for one in rig.cloud.tasks()] == [task.id]


def test_two_at_once(place: tuple[str, Rig]) -> None:
    name, rig = place
    tasks = [rig.launch(1) for _ in range(2)]
    assert len(tasks) == 2
    work = Sweep(name, "us-west", older_than=0.001).run
    for report in at_once(work, work, work):
        assert [one.error for one in report.items if one.error] == []
        assert report.code == 0
        assert all(one.outcome == "removed" for one in report.items)
    assert rig.cloud.tasks() == []


def test_what_was_launched_anew_meanwhile_is_left_alone(place: tuple[str, Rig]) -> None:
    name, rig = place
    task = rig.task()
    plan = rig.launch(1, task)
    ((found,), unseen) = sweep.look(name, "us-west")
    assert unseen == []
    steps.delete(plan.resources)
    again = rig.launch(1, task)
    (item,) = sweep.destroy([found], lambda: None).items
    assert item.outcome == "removed", "it is gone, whoever did it"
    assert [one.id for one in rig.cloud.tasks()] == [task.id]
    assert len(rig.running(again)) == 1


def test_a_failure_is_told_and_hinders_nothing_else(aws_rig: AwsRig, cli: Cli) -> None:
    ids = {str(aws_rig.launch(0).group.name) for _ in range(2)}  # type: ignore[attr-defined]
    fault = aws_rig.aws.fail("autoscaling:DeleteAutoScalingGroup", "ResourceContention", times=3)
    where = ("--cloud", "aws", "--cloud-region", "us-west", "--older-than", "0.001")
    environment = aws_rig.aws.environment()
    done = cli.run("gc", *where, "--output", "json", environment=environment, code=10)
    assert set(done.json["found"]) == ids
    (bad,) = [one for one in done.json["items"] if one["outcome"] == "failed"]
    assert done.json["failed"] == [bad["id"]]
    assert set(done.json["removed"]) == ids - {bad["id"]}
    assert "ResourceContention" in bad["error"]
    assert "may still cost money" in done.err
    fault.times = 1  # which a second attempt overcomes
    done = cli.run("gc", *where, environment=environment)
    for line in done.out.splitlines():
        name, kind, place, reason, outcome = line.split("\t")
        assert name == bad["id"]
        assert (kind, place, outcome) == ("runner", "aws us-west", "removed")
        assert reason.startswith("older than")
    assert aws_rig.aws.left() == []


def test_expired_credentials_of_one_cloud(aws_rig: AwsRig, local_rig: LocalRig, cli: Cli) -> None:
    local_rig.launch(1)
    for principal in aws_rig.aws.app.principals.values():
        principal.expired = True
    environment = aws_rig.aws.environment()
    arguments = ("gc", "--older-than", "0.001", "--output", "json")
    done = cli.run(*arguments, environment=environment, code=3)
    assert len(done.json["removed"]) == 1
    assert local_rig.cloud.tasks() == []
    assert {one["place"].split()[0] for one in done.json["unseen"]} == {"aws"}
    assert "not looked at: aws" in done.err
    assert "expired" in done.err


def test_a_launcher_whose_clock_is_behind(aws_rig: AwsRig) -> None:
    """Its claim looks as if the launch had begun hours ago."""
    identifier = Identifier.new("late")
    claim = leases.Claim(created=now() - timedelta(hours=3), expires=now() + timedelta(hours=1))
    store = aws_rig.cloud.plan(aws_rig.task()).bucket.leases  # type: ignore[attr-defined]
    assert isinstance(store, Store)
    store.save(leases.key(identifier), claim)
    (lease,) = aws_rig.cloud.tasks()
    assert not lease.launched
    assert Sweep("aws", "us-west").run() == Report()


@pytest.mark.parametrize(("minutes", "ahead", "found"), [(-30, -3600, False), (30, 3600, True)])
def test_the_clouds_clock_decides(
    aws_rig: AwsRig, minutes: int, ahead: float, *, found: bool
) -> None:
    plan = launched(aws_rig, replace(aws_rig.task(), expires=now() + timedelta(hours=5)))
    deadline = now() + timedelta(minutes=minutes)
    plan.bucket.renew(deadline)  # type: ignore[attr-defined]
    aws_rig.aws.app.ahead = ahead
    items = Sweep("aws", "us-west", dry=True).run().items
    assert bool(items) is found
    assert all("past its deadline" in one.reason for one in items)


def test_a_cloud_that_does_not_tell_the_time_is_not_swept(
    local_rig: LocalRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the far side can't fail here, its clock does."""
    local_rig.launch(1)

    def broken(_: Any) -> datetime:
        msg = "no time"
        raise RunnerError(msg)

    monkeypatch.setattr(type(local_rig.cloud), "now", broken)
    report = Sweep("local", "us-west", older_than=0.001).run()
    assert (report.items, report.code) == ([], 1)
    assert len(local_rig.cloud.tasks()) == 1
