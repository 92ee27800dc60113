"""A runner's life on Google Cloud, on machines that boot, with no more rights than ours ask for."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner.wait import until
from tests.lab.conftest import PREPARED
from tests.lab.gcp.region import GoogleRegion
from tests.lab.github import WorkflowJob
from tests.lab.region import missing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lab.machines import Machine

pytestmark = pytest.mark.lab

LONG = "echo first half\nsleep 4\necho second half"
LAUNCH = ("launch", "--cloud", "gcp", "--labels", "x", "--wait-timeout", "80s")
IN_REGION = ("--cloud", "gcp", "--cloud-region", "us-west1")


@pytest.fixture
def google(tmp_path: Path, suite: str) -> Iterator[GoogleRegion]:
    """A project that is set up, whose launcher may do no more than our own role says."""
    if reason := missing(PREPARED):
        pytest.skip(f"the lab {reason}")
    with GoogleRegion(PREPARED, tmp_path, suite) as found:
        done = found.cli("setup", "gcp")
        assert done.returncode == 0, done.stderr
        role = json.loads(found.cli("permissions", "gcp").stdout)
        found.launcher = found.gcp.add_user(role)
        yield found
        refused = [one for one in found.gcp.app.calls if "Required" in one.error]
        assert refused == []


def launch(region: GoogleRegion, *more: str) -> dict[str, Any]:
    done = region.cli(*LAUNCH, *more)
    assert done.returncode == 0, f"{done.stderr}\n{region.said()}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def submit(region: GoogleRegion, name: str, script: str) -> None:
    region.github.add_run("acme/model", [WorkflowJob(name, ("self-hosted", "x"), script)])


def wait(region: GoogleRegion, condition: Any, what: str, timeout: float = 60) -> None:
    try:
        until(condition, what, timeout, 0.1)
    except Exception as error:
        raise AssertionError(f"{error}\n{region.said()}") from error


def ended(region: GoogleRegion, name: str) -> str | None:
    return region.github.job(name).conclusion


def nothing_is_left(region: GoogleRegion) -> None:
    wait(region, lambda: region.gcp.left() == [], f"all to go: {region.gcp.left()}")
    assert region.world.runners() == {}
    for machine in region.machines.values():
        machine.end()


def only(region: GoogleRegion) -> Machine:
    (machine,) = region.alive()
    return machine


def test_preempted_in_the_middle_of_a_job(google: GoogleRegion) -> None:
    submit(google, "other", "echo fine")
    identifier = launch(google, "--cloud-spot", "--idle-timeout", "4s")["id"]
    submit(google, "train", LONG)
    wait(google, lambda: ended(google, "other") == "success", "the other job")
    wait(google, lambda: "first half" in google.github.job("train").log, "its middle")
    first = only(google).instance.id
    google.gcp.compute.preempt(first, after=30)
    wait(google, lambda: [one.instance.id for one in google.alive()] != [first], "its end")
    wait(google, lambda: ended(google, "train") == "success", "its good end", 90)
    assert google.github.job("train").attempt == 2
    assert google.github.job("other").attempt == 1
    nothing_is_left(google)
    done = google.cli("logs", identifier)
    assert "preemption" in done.stdout, done.stderr
    assert "idle for 4 s" in done.stdout, done.stderr


def test_a_single_machine_holds_nothing_worth_reading(google: GoogleRegion) -> None:
    token = google.token
    launch(google, "--single", "--idle-timeout", "never")
    machine = only(google)
    assert machine.traces(token) == []
    assert token not in machine.instance.user_data
    assert not any(token.encode() in content for content in google.gcp.objects().values())
    assert machine.remembers("cml_runner.supervise", "cml_runner")  # or this would prove nothing
    assert not machine.remembers("cml_runner.supervise", token)
    service = "http://169.254.169.254/computeMetadata/v1/instance/id"
    ask = f"curl -s -m 3 -H 'Metadata-Flavor: Google' {service}"
    assert machine.run(ask).stdout == machine.instance.id  # root may
    refused = machine.run(f"runuser -u runner -- {ask}")
    assert (refused.returncode, refused.stdout) == (7, "")
    rules = machine.run("iptables -t mangle -S FORWARD").stdout  # of containers, which none is in
    assert "-d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DROP" in rules
    submit(google, "train", "id -un; sudo id -un; env")
    wait(google, lambda: ended(google, "train") == "success", "the job")
    log = google.github.job("train").log
    assert {"runner", "root"} <= set(log.splitlines())
    assert token not in log
    wait(google, lambda: google.gcp.left() == [], "the end")


def test_a_machine_that_loses_its_host_is_replaced_and_its_job_run_again(
    google: GoogleRegion,
) -> None:
    launch(google, "--cloud-spot", "--idle-timeout", "4s")
    submit(google, "train", LONG.replace("sleep 4", "sleep 8"))
    wait(google, lambda: "first half" in google.github.job("train").log, "the middle of the job")
    time.sleep(2)  # until its status has been written
    google.gcp.compute.crash(only(google).instance.id)
    wait(google, lambda: ended(google, "train") == "success", "its good end", 90)
    assert google.github.job("train").attempt == 2
    nothing_is_left(google)


def test_who_is_done_leaves_its_peers_alone(google: GoogleRegion) -> None:
    submit(google, "long", "sleep 9")
    launch(google, "--count", "2", "--idle-timeout", "3s")
    wait(google, lambda: len(google.alive()) == 1, "one to leave")
    wait(google, lambda: ended(google, "long") == "success", "the other's job")
    assert len(google.machines) == 2  # nobody came in the place of the one that left
    nothing_is_left(google)


def test_a_machine_that_hangs_is_ended_at_the_deadline(google: GoogleRegion) -> None:
    launch(google, "--idle-timeout", "never", "--max-lifetime", "45s")
    only(google).freeze()
    wait(google, lambda: not google.alive(), "the deadline")
    assert not [one for one in google.gcp.left() if one.startswith("instance")]
    done = google.cli("gc", *IN_REGION)
    assert done.returncode == 0, done.stderr
    nothing_is_left(google)


def test_a_boot_that_fails_is_told(google: GoogleRegion) -> None:
    done = google.cli(*LAUNCH, "--machine-package", "cml-runner==0.0.0")
    assert done.returncode == 11
    assert "bootstrap failed: installing cml-runner" in done.stderr
    nothing_is_left(google)
