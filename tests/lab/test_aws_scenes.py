"""A runner's life on AWS, on machines that really boot, with no more rights than ours ask for."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner.wait import until
from tests.lab.github import WorkflowJob

if TYPE_CHECKING:
    from tests.lab.machines import Machine
    from tests.lab.region import Region

pytestmark = pytest.mark.lab

LONG = "echo first half\nsleep 4\necho second half"
LAUNCH = ("launch", "--cloud", "aws", "--labels", "x", "--wait-timeout", "80s")


def launch(region: Region, *more: str) -> dict[str, Any]:
    done = region.cli(*LAUNCH, *more)
    assert done.returncode == 0, f"{done.stderr}\n{region.said()}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def submit(region: Region, name: str, script: str) -> None:
    region.github.add_run("acme/model", [WorkflowJob(name, ("self-hosted", "x"), script)])


def wait(region: Region, condition: Any, what: str, timeout: float = 45) -> None:
    try:
        until(condition, what, timeout, 0.1)
    except Exception as error:
        raise AssertionError(f"{error}\n{region.said()}") from error


def ended(region: Region, name: str) -> str | None:
    return region.github.job(name).conclusion


def nothing_is_left(region: Region) -> None:
    wait(region, lambda: region.aws.left() == [], f"all to go: {region.aws.left()}")
    assert region.world.runners() == {}
    for machine in region.machines.values():
        machine.end()


def only(region: Region) -> Machine:
    (machine,) = region.alive()
    return machine


def test_interrupted_in_the_middle_of_a_job(region: Region) -> None:
    submit(region, "train", LONG)
    submit(region, "other", "echo fine")
    identifier = launch(region, "--cloud-spot", "--idle-timeout", "4s")["id"]
    wait(region, lambda: ended(region, "other") == "success", "the other job", 60)
    wait(region, lambda: region.github.job("train").status == "completed", "the job", 60)
    submit(region, "train again", LONG)
    wait(region, lambda: "first half" in region.github.job("train again").log, "its middle")
    first = only(region).instance.id
    region.aws.instances.interrupt(first, after=30)
    wait(region, lambda: [one.instance.id for one in region.alive()] != [first], "its end")
    wait(region, lambda: ended(region, "train again") == "success", "its good end", 60)
    assert region.github.job("train again").attempt == 2
    assert region.github.job("train").attempt == region.github.job("other").attempt == 1
    nothing_is_left(region)
    done = region.cli("logs", identifier)
    assert "idle for 4 s" in done.stdout, done.stderr


def test_a_single_machine_holds_nothing_worth_reading(region: Region) -> None:
    token = region.token
    launch(region, "--single", "--idle-timeout", "never")
    machine = only(region)
    assert machine.traces(token) == []
    assert token not in machine.instance.user_data
    assert not any(token.encode() in content for content in region.aws.objects().values())
    assert machine.remembers("cml_runner.supervise", "cml_runner")  # or this would prove nothing
    assert not machine.remembers("cml_runner.supervise", token)
    ask = "curl -s -m 3 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 9'"
    service = "http://169.254.169.254/latest/api/token"
    assert machine.run(f"{ask} {service}").stdout  # root may
    refused = machine.run(f"runuser -u runner -- {ask} {service}")
    assert (refused.returncode, refused.stdout) == (7, "")
    submit(region, "train", "id -un; sudo id -un; env")
    wait(region, lambda: ended(region, "train") == "success", "the job")
    log = region.github.job("train").log
    assert {"runner", "root"} <= set(log.splitlines())
    assert token not in log
    wait(region, lambda: region.aws.left() == [], "the end")


def test_without_sudo_a_job_stays_what_it_is(region: Region) -> None:
    submit(region, "train", "sudo -n true && exit 1; cat /proc/1/environ && exit 1; id -Gn")
    launch(region, "--no-sudo", "--idle-timeout", "3s")
    wait(region, lambda: ended(region, "train") == "success", "the job")
    assert "runner" in region.github.job("train").log.splitlines()
    nothing_is_left(region)


@pytest.mark.parametrize("suite", ["trixie"])  # all other scenes are played on the older one
def test_on_another_system(region: Region, suite: str) -> None:
    submit(region, "train", f"grep {suite} /etc/os-release && sudo id -un")
    launch(region, "--idle-timeout", "3s")
    wait(region, lambda: ended(region, "train") == "success", "the job")
    nothing_is_left(region)


def test_who_is_done_leaves_its_peers_alone(region: Region) -> None:
    for number in range(2):
        submit(region, f"job {number}", "sleep 1")
    submit(region, "long", "sleep 9")
    launch(region, "--count", "2", "--idle-timeout", "3s")
    wait(region, lambda: len(region.alive()) == 1, "one to leave", 60)
    assert region.github.job("long").status == "in_progress"
    wait(region, lambda: ended(region, "long") == "success", "the other's job")
    assert len(region.machines) == 2  # nobody came in the place of the one that left
    nothing_is_left(region)


def test_a_machine_that_loses_its_power_is_replaced_and_its_job_run_again(region: Region) -> None:
    launch(region, "--cloud-spot", "--idle-timeout", "4s")
    submit(region, "train", LONG.replace("sleep 4", "sleep 8"))
    wait(region, lambda: "first half" in region.github.job("train").log, "the middle of the job")
    time.sleep(2)  # until its status has been written
    region.aws.instances.terminate("us-west-2", only(region).instance.id, "Server.InternalError")
    wait(region, lambda: ended(region, "train") == "success", "its good end", 90)
    assert region.github.job("train").attempt == 2
    nothing_is_left(region)


def test_a_machine_that_hangs_is_ended_at_the_deadline(region: Region) -> None:
    launch(region, "--idle-timeout", "never", "--max-lifetime", "25s")
    only(region).freeze()
    wait(region, lambda: not region.alive(), "the deadline")
    left = [one for one in region.aws.left() if not one.startswith("object")]
    assert not [one for one in left if one.startswith(("instance", "volume"))]
    done = region.cli("gc", "--cloud", "aws", "--cloud-region", "us-west-2")
    assert done.returncode == 0, done.stderr
    nothing_is_left(region)


def test_a_boot_that_fails_is_told_within_seconds(region: Region) -> None:
    done = region.cli(*LAUNCH, "--machine-package", "cml-runner[aws]==0.0.0")
    assert done.returncode == 11
    assert "bootstrap failed: installing cml-runner" in done.stderr
    assert "cml-runner[aws]==0.0.0" in done.stderr
    nothing_is_left(region)


def test_a_startup_script_that_fails_is_told(region: Region) -> None:
    script = region.directory / "script"
    script.write_text("echo no good; exit 3")
    done = region.cli(*LAUNCH, "--cloud-startup-script", f"@{script}")
    assert done.returncode == 1
    assert "no good" in done.stderr
    assert "the startup script failed with exit code 3" in done.stderr
    nothing_is_left(region)
