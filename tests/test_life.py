"""The whole life of a runner, on every forge, with the real program in real processes."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.conftest import processes_of
from tests.worlds import wait

if TYPE_CHECKING:
    from tests.conftest import Cli
    from tests.worlds import World

LONG = """
echo first half
for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.4; done
echo second half
"""


def launch(cli: Cli, world: World, *more: str) -> str:
    """Launch on the local cloud; return the identifier."""
    arguments = ("launch", "--repo", world.repo, "--cloud", "local", *more)
    identifier: str = cli.run(*arguments, environment=world.environment).json["id"]
    return identifier


def over(cli: Cli) -> bool:
    return bool(cli.run("list", "--cloud", "local", "--output", "json").json == [])


def gone(cli: Cli, home: Path) -> bool:
    """Nothing is listed, and who took it off the list, the last process, has ended as well."""
    return over(cli) and processes_of(home) == []


def nothing_is_left(world: World, home: Path) -> None:
    """No registration, no process, and no file but the record of what was."""
    assert world.runners() == {}
    wait(lambda: processes_of(home) == [], "the last process to end")
    kept = [path for path in (home / "local").rglob("*") if path.is_file()]
    names = {path.name.split("-")[0].partition(".")[0] for path in kept if path.name != ".lock"}
    assert names <= {"log", "status", "events"}


def test_interrupted_in_the_middle_of_a_job(world: World, cli: Cli, home: Path) -> None:
    world.submit("train", LONG)
    identifier = launch(cli, world, "--cloud-spot", "--name", "spot", "--idle-timeout", "3s")
    wait(lambda: world.job("train").state == "running", "the job to start")
    assert world.runners() == {"spot": True}
    wait(lambda: "first half" in world.job("train").log, "the middle of the job")
    cli.run("interrupt", identifier, "--after", "20s")
    wait(lambda: world.job("train").attempt == 2, "the second attempt")
    wait(lambda: world.job("train").state == "succeeded", "its good end")
    assert "second half" in world.job("train").log
    world.submit("report", "echo fine")
    wait(lambda: world.job("report").state == "succeeded", "another job")
    wait(lambda: over(cli), "the idle runner to leave")
    assert world.job("train").attempt == 2, "it was run again more than once"
    nothing_is_left(world, home)
    log = cli.run("logs", identifier).out
    assert "will run again (1 of 3)" in log
    assert "idle for" in log
    cli.run("destroy", identifier)
    assert [path.name for path in (home / "local" / "us-west").iterdir()] == [".lock"]


def test_a_machine_that_vanishes_without_a_word(world: World, cli: Cli, home: Path) -> None:
    world.submit("train", LONG)
    launch(cli, world, "--cloud-spot", "--name", "gone", "--idle-timeout", "2s")
    wait(lambda: "first half" in world.job("train").log, "the middle of the job")
    # By now the supervisor has told the bucket what it runs.
    statuses = list((home / "local").rglob("status-000.json"))
    wait(lambda: '"attempt":1' in statuses[0].read_text(), "the status")
    for machine in (home / "local").glob("*/*/machines/*/"):
        kill(machine)
    wait(lambda: world.job("train").attempt == 2, "the second attempt")
    wait(lambda: world.job("train").state == "succeeded", "its good end")
    wait(lambda: over(cli), "the end", 60)
    nothing_is_left(world, home)


def kill(machine: Path) -> None:
    """Kill all that runs on a machine, its supervisor first, as a power cut would."""
    for process in psutil.process_iter():  # in the order of their numbers
        with suppress(psutil.NoSuchProcess):
            if on(process, machine):
                process.kill()


def on(process: psutil.Process, machine: Path) -> bool:
    try:
        return process.environ().get("LOCAL_CLOUD_MACHINE") == str(machine)
    except psutil.Error:
        return False


@pytest.mark.parametrize("spot", [(), ("--cloud-spot",)])
def test_single(world: World, cli: Cli, home: Path, spot: tuple[str, ...]) -> None:
    world.submit("first", "echo one")
    world.submit("second", "echo two")
    launch(cli, world, "--single", "--name", "single", *spot)
    wait(lambda: over(cli), "the runner to leave")
    states = [world.job("first").state, world.job("second").state]
    assert states == ["succeeded", "queued"]
    nothing_is_left(world, home)


def test_several_machines_share_the_work(world: World, cli: Cli, home: Path) -> None:
    names = [f"job-{number}" for number in range(4)]
    for name in names:
        world.submit(name, "sleep 1", "pool")
    launch(cli, world, "--count", "2", "--name", "pool", "--labels", "pool", "--idle-timeout", "2s")
    wait(lambda: all(world.job(name).state == "succeeded" for name in names), "all jobs")
    assert {world.job(name).runner for name in names} == {"pool-0", "pool-1"}
    wait(lambda: over(cli), "both runners to leave")
    nothing_is_left(world, home)


def test_this_machine_is_the_runner(world: World, cli: Cli, home: Path) -> None:
    world.submit("hello", "echo from here")
    arguments = ("launch", "--repo", world.repo, "--idle-timeout", "1s", "--name", "here")
    done = cli.run(*arguments, environment=world.environment)
    assert "from here" in world.job("hello").log
    assert "idle for" in done.err
    assert not Path(os.environ["HOME"], ".cml", "here").exists()
    nothing_is_left(world, home)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_runner_in_the_foreground(
    world: World, cli: Cli, home: Path, number: signal.Signals
) -> None:
    world.submit("long", "echo first half; sleep 60")
    process = cli.start(
        "launch", "--repo", world.repo, "--name", "here", environment=world.environment
    )
    wait(lambda: "first half" in world.job("long").log, "the job to start")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"stopping: {number.name}" in err
    wait(lambda: world.job("long").attempt == 2 or world.job("long").state == "queued", "the retry")
    nothing_is_left(world, home)


def test_no_secret_lies_around(world: World, cli: Cli, home: Path) -> None:
    world.submit("nosy", "env; sleep 2; ps -eo args")
    launch(cli, world, "--name", "quiet", "--idle-timeout", "1s", "--log", "debug")
    listed = "\n".join(" ".join(one) for one in command_lines())
    wait(lambda: gone(cli, home), "the end")
    logs = "".join(process_log.read_text() for process_log in (home / "local").rglob("log-*"))
    for secret in world.secrets:
        assert secret not in listed
        assert secret not in world.job("nosy").log
        assert secret not in logs
        kept = [path for path in home.rglob("*") if path.is_file()]
        assert not [path for path in kept if secret.encode() in path.read_bytes()]


def command_lines() -> list[list[str]]:
    found = []
    for process in psutil.process_iter():
        try:
            found.append(process.cmdline())
        except psutil.Error:
            continue
    return found
