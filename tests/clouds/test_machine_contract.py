"""What a machine of every cloud can do with its own identity alone. A rig provides `machine`."""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Protocol

import pytest

from cml_runner import boot, clouds
from cml_runner.boot import failing, objects, places
from cml_runner.boot.failing import Failure, fail
from cml_runner.errors import CredentialsError, RunnerError
from cml_runner.model import Status
from cml_runner.store import Store
from tests.clouds.conftest import until

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from cml_runner.clouds import Plan
    from tests.clouds.test_contract import Rig

    class BootRig(Rig, Protocol):
        """A rig that can be on one of its machines."""

        def machine(self, plan: Plan, instance: str) -> AbstractContextManager[boot.Machine]: ...


CLOUDS = ("aws", "azure", "gcp")


@pytest.fixture(params=CLOUDS)
def rig(request: pytest.FixtureRequest) -> BootRig:
    found: BootRig = request.getfixturevalue(f"{request.param}_rig")
    return found


def test_each_cloud_with_a_module_here_is_tested() -> None:
    modules = {one.name for one in pkgutil.iter_modules(boot.__path__)}
    assert modules & set(clouds.NAMES) == set(CLOUDS)
    assert {f"first_{name}" for name in CLOUDS} <= modules


def test_objects_are_those_of_the_store(rig: BootRig) -> None:
    plan = rig.launch(1, rig.task('{"a": 1}'))
    store = plan.bucket.store
    with rig.machine(plan, rig.running(plan)[0]) as machine:
        bucket = machine.objects
        assert bucket.read("settings.json") == b'{"a": 1}'
        assert bucket.read("nothing") is None
        bucket.write("status-000.json", b"one")
        bucket.write("status-000.json", b"two")
        assert store.read("status-000.json") == b"two"
        assert bucket.claim("place-000-0000", b"mine")
        assert not bucket.claim("place-000-0000", b"yours")
        assert store.read("place-000-0000") == b"mine"
        bucket.write("data/000/a b+c", b"x")
        bucket.write("left-000", b"")
        assert bucket.read("left-000") == b""
        for prefix in ("", "data/", "place-", "status", "none"):
            assert bucket.keys(prefix) == store.keys(prefix), prefix
        bucket.remove(["data/000/a b+c", "left-000", "never"])
        assert store.read("data/000/a b+c") is None
        assert f"{plan.bucket.task.id}.json" in machine.leases.keys("")  # type: ignore[attr-defined]


def test_more_objects_than_fit_on_a_page(rig: BootRig) -> None:
    plan = rig.launch(1)
    with rig.machine(plan, rig.running(plan)[0]) as machine:
        names = [f"log-000-{number:06}.txt" for number in range(1005)]
        for name in names:
            plan.bucket.store.write(name, b"")
        assert machine.objects.keys("log-000-") == names


def test_a_machine_has_its_own_name(rig: BootRig) -> None:
    plan = rig.launch(2)
    names = set()
    for instance in rig.running(plan):
        with rig.machine(plan, instance) as machine:
            machine.check()
            names.add(machine.name())
    assert len(names) == 2


def test_a_machine_of_another_task_is_known(rig: BootRig) -> None:
    plan, other = rig.launch(1), rig.launch(1)
    with rig.machine(other, rig.running(plan)[0]) as machine, pytest.raises(RunnerError):
        machine.check()


def test_one_is_replaced_at_once_and_the_others_stay(rig: BootRig) -> None:
    plan = rig.launch(2)
    first, other = rig.running(plan)
    with rig.machine(plan, first) as machine:
        machine.replace()
    until(lambda: first not in rig.running(plan) and len(rig.running(plan)) == 2)
    assert other in rig.running(plan)


def test_the_second_failure_in_a_row_ends_everything(rig: BootRig) -> None:
    plan = rig.launch(1, rig.task("SECRET"))
    for number in range(failing.FAILURES):
        until(lambda: len(rig.running(plan)) == 1)
        (instance,) = rig.running(plan)
        with rig.machine(plan, instance) as machine:
            failure = Failure(f"no index ({number})", "ab" * 32, "last lines")
            fail(machine, 1, failure, consoles=())
        until(lambda gone=instance: gone not in rig.running(plan))  # type: ignore[misc]
    until(lambda: not rig.cloud.tasks())
    until(lambda: not plan.group.instances())
    store = plan.bucket.store
    status = store.load("status-000.json", Status)
    assert status
    assert (status.state, status.reason, status.code) == ("failed", "no index (1)", 11)
    assert status.program == "ab" * 6
    said = store.log(0)
    assert "no index (0)\nlast lines" in said
    assert "no index (1)\nlast lines" in said
    until(lambda: rig.traces("SECRET") == [])


def test_failures_of_several_machines_are_counted_by_their_places(rig: BootRig) -> None:
    plan = rig.launch(2)
    for instance in rig.running(plan):
        with rig.machine(plan, instance) as machine:
            fail(machine, 2, Failure("no disk", "ab" * 32), consoles=())
    assert rig.cloud.tasks(), "each place has failed once"
    marks = plan.bucket.store.keys("failed-")
    assert marks == [objects.failed(0, 0), objects.failed(1, 0)]
    failing.forget(plan.bucket.store, 1)
    assert plan.bucket.store.keys("failed-") == [objects.failed(0, 0)]


def test_a_place_that_fails_again_and_again_takes_no_other_with_it(rig: BootRig) -> None:
    plan = rig.launch(2)
    _, healthy = rig.running(plan)
    with rig.machine(plan, healthy) as machine:
        places.take(plan.bucket.store, 2, machine.name())
    for _ in range(failing.FAILURES):
        until(lambda: len(rig.running(plan)) == 2)
        (broken,) = set(rig.running(plan)) - {healthy}
        with rig.machine(plan, broken) as machine:
            fail(machine, 2, Failure("no disk", "ab" * 32), consoles=())
        until(lambda gone=broken: gone not in rig.running(plan))  # type: ignore[misc]
    until(lambda: rig.running(plan) == [healthy])
    assert rig.cloud.tasks()


def test_the_program_can_be_read_by_machines_and_by_nobody_changed(rig: BootRig) -> None:
    plan = rig.launch(1)
    program = plan.bucket.task.program  # type: ignore[attr-defined]
    name, stored = f"{program.sha256}.whl", plan.bucket.programs  # type: ignore[attr-defined]
    with rig.machine(plan, rig.running(plan)[0]):
        there = Store(stored.url)  # as this machine
        assert there.read(name) == program.wheel
        for change in (
            lambda: there.write(name, b"evil"),
            lambda: there.claim("other.whl", b"evil"),
            lambda: there.delete(name),
        ):
            with pytest.raises(CredentialsError):
                change()
    assert stored.read(name) == program.wheel
