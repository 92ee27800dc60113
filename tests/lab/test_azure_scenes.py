"""A runner's life on Azure, on machines that really boot, with no more rights than ours ask for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner.wait import until
from tests.lab.azure.region import AzureRegion
from tests.lab.conftest import PREPARED
from tests.lab.github import WorkflowJob
from tests.lab.region import missing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lab.machines import Machine

pytestmark = pytest.mark.lab

LONG = "echo first half\nsleep 4\necho second half"
IN_REGION = ("--cloud", "azure", "--cloud-region", "westus2")
LAUNCH = ("launch", *IN_REGION, "--labels", "x", "--wait-timeout", "80s")
OUTSIDE = "Microsoft.Compute/skus/read"  # a right that nobody has on a resource group


@pytest.fixture
def region(tmp_path: Path, suite: str, forge: str) -> Iterator[AzureRegion]:
    """A set-up subscription, whose launcher may do no more than our own role says."""
    if reason := missing(PREPARED):
        pytest.skip(f"the lab {reason}")
    found = AzureRegion(PREPARED, tmp_path, suite, forge)
    with found:
        done = found.cli("setup", "azure")
        assert done.returncode == 0, done.stderr
        role = json.loads(found.cli("permissions", "azure").stdout)
        found.launcher = found.azure.add_user(role)
        yield found
        calls = found.azure.app.calls
        refused = [one for one in calls if "Auth" in one.error and one.action != OUTSIDE]
        assert refused == []


def launch(region: AzureRegion, *more: str) -> dict[str, Any]:
    done = region.cli(*LAUNCH, *more)
    assert done.returncode == 0, f"{done.stderr}\n{region.said()}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def submit(region: AzureRegion, name: str, script: str) -> None:
    region.github.add_run("acme/model", [WorkflowJob(name, ("self-hosted", "x"), script)])


def wait(region: AzureRegion, condition: Any, what: str, timeout: float = 45) -> None:
    try:
        until(condition, what, timeout, 0.1)
    except Exception as error:
        calls = [(one.action, one.who[-20:], one.error) for one in region.azure.app.calls[-12:]]
        raise AssertionError(f"{error}\n{region.azure.left()}\n{calls}\n{region.said()}") from error


def ended(region: AzureRegion, name: str) -> str | None:
    return region.github.job(name).conclusion


def nothing_is_left(region: AzureRegion) -> None:
    wait(region, lambda: region.azure.left() == [], "all to go")
    assert region.world.runners() == {}
    for machine in region.machines.values():
        machine.end()


def only(region: AzureRegion) -> Machine:
    (machine,) = region.alive()
    return machine


def test_evicted_in_the_middle_of_a_job(region: AzureRegion) -> None:
    submit(region, "train", LONG)
    identifier = launch(region, "--cloud-spot", "--idle-timeout", "4s")["id"]
    wait(region, lambda: "first half" in region.github.job("train").log, "its middle")
    first = only(region).instance.id
    region.azure.fleet.evict(first, after=30)
    wait(region, lambda: [one.instance.id for one in region.alive()] != [first], "its end")
    wait(region, lambda: ended(region, "train") == "success", "its good end", 60)
    assert region.github.job("train").attempt == 2
    nothing_is_left(region)
    done = region.cli("logs", identifier)
    assert "spot eviction" in done.stdout, done.stderr
    assert "idle for 4 s" in done.stdout


def test_interrupted_on_demand(region: AzureRegion) -> None:
    identifier = launch(region, "--idle-timeout", "4s")["id"]
    submit(region, "train", LONG)
    wait(region, lambda: "first half" in region.github.job("train").log, "its middle")
    done = region.cli("interrupt", identifier, *IN_REGION, "--after", "20s")
    assert done.returncode == 0, done.stderr
    wait(region, lambda: ended(region, "train") == "success", "its good end", 60)
    assert region.github.job("train").attempt == 2
    assert len(region.machines) == 2
    nothing_is_left(region)


def test_a_single_machine_holds_nothing_worth_reading(region: AzureRegion) -> None:
    token = region.token
    launch(region, "--single", "--idle-timeout", "never")
    machine = only(region)
    assert machine.traces(token) == []
    assert token not in machine.instance.user_data
    assert not any(token.encode() in one for one in region.azure.objects().values())
    ask = "curl -s -m 3 -H Metadata:true"
    service = "'http://169.254.169.254/metadata/instance/compute?api-version=2021-12-13'"
    assert machine.run(f"{ask} {service}").stdout  # root may
    refused = machine.run(f"runuser -u runner -- {ask} {service}")
    assert (refused.returncode, refused.stdout) == (7, "")
    submit(region, "train", "id -un; sudo id -un; env")
    wait(region, lambda: ended(region, "train") == "success", "the job")
    log = region.github.job("train").log
    assert {"runner", "root"} <= set(log.splitlines())
    assert token not in log
    wait(region, lambda: region.azure.left() == [], "the end")


def test_who_is_done_leaves_its_peers_alone(region: AzureRegion) -> None:
    for number in range(2):
        submit(region, f"job {number}", "sleep 1")
    submit(region, "long", "sleep 9")
    launch(region, "--count", "2", "--idle-timeout", "3s")
    wait(region, lambda: len(region.alive()) == 1, "one to leave", 60)
    assert region.github.job("long").status == "in_progress"
    wait(region, lambda: ended(region, "long") == "success", "the other's job")
    assert len(region.machines) == 2  # nobody came in the place of the one that left
    nothing_is_left(region)


def test_a_supervisor_that_dies_takes_its_machine_along(region: AzureRegion) -> None:
    """One that just powered itself off would be paid for, and not be replaced."""
    launch(region, "--cloud-spot", "--idle-timeout", "6s")
    first = only(region)
    killed = first.run("systemctl kill --signal=KILL cml-runner.service")
    assert killed.returncode == 0, killed
    wait(region, lambda: region.life(first.instance.id).ended, "its end")
    wait(region, lambda: len(region.machines) == 2, "another one")
    nothing_is_left(region)


def test_a_machine_that_hangs_is_ended_at_the_deadline(region: AzureRegion) -> None:
    launch(region, "--idle-timeout", "never", "--max-lifetime", "25s")
    only(region).freeze()
    wait(region, lambda: not region.alive(), "the deadline")
    done = region.cli("gc", *IN_REGION)
    assert done.returncode == 0, done.stderr
    nothing_is_left(region)


def test_a_boot_that_fails_is_told_within_seconds(region: AzureRegion) -> None:
    done = region.cli(*LAUNCH, "--machine-package", "cml-runner==0.0.0")
    assert done.returncode == 11, done.stderr
    assert "bootstrap failed: installing cml-runner" in done.stderr
    assert "cml-runner==0.0.0" in done.stderr
    nothing_is_left(region)
