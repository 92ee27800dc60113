"""A runner's life on machines that really boot, with no more rights than ours ask for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.lab.region import PACKAGES

if TYPE_CHECKING:
    from tests.lab.stage import Stage

pytestmark = pytest.mark.lab

LISTENING = "ss --no-header --listening --tcp --udp --numeric"
LONG = "echo first half\nsleep 4\necho second half"
REASONS = {"aws": "interruption", "azure": "spot eviction", "gcp": "preemption"}
on_aws = pytest.mark.parametrize("stage", ["aws"], indirect=True)  # what no cloud has to do with


def test_interrupted_in_the_middle_of_a_job(stage: Stage) -> None:
    stage.submit("other", "echo fine")
    identifier = stage.launch("--cloud-spot", "--idle-timeout", "4s")["id"]
    stage.submit("train", LONG)
    stage.wait_for_job("other")
    stage.wait_for_log("train", "first half")
    stage.wait_for_another(stage.interrupt())
    stage.wait_for_job("train", 90)
    assert stage.job("train").attempt == 2
    assert stage.job("other").attempt == 1
    stage.nothing_is_left()
    said = stage.cli("logs", identifier).stdout
    assert REASONS[stage.cloud] in said
    assert "idle for 4 s" in said


def test_interrupted_on_demand(stage: Stage) -> None:
    identifier = stage.launch("--idle-timeout", "4s")["id"]
    stage.submit("train", LONG)
    stage.wait_for_log("train", "first half")
    stage.cli("interrupt", identifier, *stage.place, "--after", "20s")
    stage.wait_for_job("train", 90)
    assert stage.job("train").attempt == 2
    assert len(stage.region.machines) == 2
    stage.nothing_is_left()


def test_a_machine_that_vanishes_is_replaced_and_its_job_run_again(stage: Stage) -> None:
    stage.launch("--cloud-spot", "--idle-timeout", "4s")
    stage.submit("train", LONG.replace("sleep 4", "sleep 8"))
    stage.wait_for_log("train", "first half")
    time.sleep(2)  # until its status has been written
    stage.cut()
    stage.wait_for_job("train", 90)
    assert stage.job("train").attempt == 2
    stage.nothing_is_left()


def test_a_single_machine_holds_nothing_worth_reading(stage: Stage) -> None:
    token = stage.region.token
    stage.launch("--single", "--idle-timeout", "never")
    machine = stage.only()
    assert machine.traces(token) == []
    assert token not in machine.instance.user_data
    assert not any(token.encode() in content for content in stage.there.objects().values())
    assert machine.remembers("cml_runner.supervise", "cml_runner")  # or this would prove nothing
    assert not machine.remembers("cml_runner.supervise", token)
    lines = machine.run(LISTENING).stdout.splitlines()
    ports = {line.split()[4].rpartition(":")[2] for line in lines}
    assert ports <= {"22"}, "and that is the image's own"
    assert stage.ask_metadata(machine).stdout  # root may
    refused = stage.ask_metadata(machine, "runner")
    assert (refused.returncode, refused.stdout) == (7, "")
    if stage.cloud == "gcp":  # of containers, which none is in
        rules = machine.run("iptables -t mangle -S FORWARD").stdout
        assert "-d 169.254.169.254/32 -p tcp -m tcp --dport 80 -j DROP" in rules
    stage.submit("train", "id -un; sudo id -un; env")
    stage.wait_for_job("train")
    log = stage.job("train").log
    assert {"runner", "root"} <= set(log.splitlines())
    assert token not in log
    stage.wait(lambda: stage.there.left() == [], "the end")


def test_who_is_done_leaves_its_peers_alone(stage: Stage) -> None:
    for number in range(2):
        stage.submit(f"job {number}", "sleep 1")
    stage.submit("long", "sleep 9")
    stage.launch("--count", "2", "--idle-timeout", "3s")
    stage.wait(lambda: len(stage.region.alive()) == 1, "one to leave")
    stage.wait_for_job("long")
    assert len(stage.region.machines) == 2  # nobody came in the place of the one that left
    stage.nothing_is_left()


def test_a_machine_that_hangs_is_ended_at_the_deadline(stage: Stage) -> None:
    stage.launch("--idle-timeout", "never", "--max-lifetime", "40s")
    stage.only().freeze()
    stage.wait(lambda: not stage.region.alive(), "the deadline")
    assert not [one for one in stage.costly() if one.startswith(("instance", "machine", "volume"))]
    stage.cli("gc", *stage.place)
    stage.nothing_is_left()


def test_a_boot_that_fails_is_told_within_seconds(stage: Stage) -> None:
    stage.region.stock = True
    done = stage.try_launch("--machine-index", f"https://{PACKAGES}/nothing/", code=11)
    assert f"GET https://{PACKAGES}/nothing/uv/: 404" in done.stderr
    stage.nothing_is_left()


@on_aws
def test_a_startup_script_that_fails_is_told(stage: Stage) -> None:
    script = stage.region.directory / "script"
    script.write_text("echo no good; exit 3")
    done = stage.try_launch("--cloud-startup-script", f"@{script}", code=1)
    assert "no good" in done.stderr
    assert "the startup script failed with exit code 3" in done.stderr
    stage.nothing_is_left()


@on_aws
def test_without_sudo_a_job_stays_what_it_is(stage: Stage) -> None:
    stage.submit("train", "sudo -n true && exit 1; cat /proc/1/environ && exit 1; id -Gn")
    stage.launch("--no-sudo", "--idle-timeout", "3s")
    stage.wait_for_job("train")
    assert "runner" in stage.job("train").log.splitlines()
    stage.nothing_is_left()


@on_aws
@pytest.mark.parametrize("suite", ["trixie"])  # all other scenes are played on the older one
def test_on_another_system(stage: Stage, suite: str) -> None:
    stage.submit("train", f"grep {suite} /etc/os-release && sudo id -un")
    stage.launch("--idle-timeout", "3s")
    stage.wait_for_job("train")
    stage.nothing_is_left()


def test_a_supervisor_that_dies_takes_its_machine_along(stage: Stage) -> None:
    """One that just powered itself off would be paid for, or be replaced some minutes later."""
    stage.launch("--cloud-spot", "--idle-timeout", "6s")
    first = stage.only()
    fault = stage.throttle_ends(3)
    killed = first.run("systemctl kill --kill-whom=main --signal=KILL cml-runner.service")
    assert killed.returncode == 0, killed
    stage.wait(lambda: stage.region.life(first.instance.id).ended, "its end")
    assert not fault.times
    stage.wait(lambda: len(stage.region.machines) == 2, "another one")
    stage.nothing_is_left()
