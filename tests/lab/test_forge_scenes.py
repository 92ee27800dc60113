"""A runner's life on AWS for the forges which the other scenes aren't played on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner.wait import until

if TYPE_CHECKING:
    from tests.lab.machines import Machine
    from tests.lab.region import Region

pytestmark = [pytest.mark.lab, pytest.mark.parametrize("forge", ["gitlab", "bitbucket"])]

LONG = "echo first half\nsleep 6\necho second half"

# Bitbucket's program is in Java, and the stand-in for it in Python.
JAVA = """\
cat >/usr/local/bin/java <<'END'
#!/bin/sh
LAB_BITBUCKET=https://bitbucket.org exec python3 -B "$3" "$1"
END
chmod 755 /usr/local/bin/java
"""


def launch(region: Region, *more: str) -> dict[str, Any]:
    script = region.directory / "script"
    script.write_text(JAVA)
    own = ("--labels", "x", "--cloud-startup-script", f"@{script}", "--wait-timeout", "80s")
    done = region.cli("launch", "--cloud", "aws", *own, *more)
    assert done.returncode == 0, f"{done.stderr}\n{region.said()}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def wait(region: Region, condition: Any, what: str, timeout: float = 60) -> None:
    try:
        until(condition, what, timeout, 0.1)
    except Exception as error:
        raise AssertionError(f"{error}\n{region.said()}") from error


def nothing_is_left(region: Region) -> None:
    wait(region, lambda: region.aws.left() == [], f"all to go: {region.aws.left()}")
    assert region.world.runners() == {}
    for machine in region.machines.values():
        machine.end()


def only(region: Region) -> Machine:
    (machine,) = region.alive()
    return machine


def test_interrupted_in_the_middle_of_a_job(region: Region, forge: str) -> None:
    world = region.world
    world.submit("train", LONG, "x")
    identifier = launch(region, "--cloud-spot", "--idle-timeout", "4s")["id"]
    wait(region, lambda: "first half" in world.job("train").log, "the middle of the job")
    first = only(region).instance.id
    region.aws.instances.interrupt(first, after=30)
    wait(region, lambda: [one.instance.id for one in region.alive()] != [first], "its end")
    wait(region, lambda: world.job("train").state == "succeeded", "its good end", 90)
    assert world.job("train").attempt == 2
    nothing_is_left(region)
    done = region.cli("logs", identifier)
    assert "idle for 4 s" in done.stdout, done.stderr


def test_one_job_and_no_more(region: Region, forge: str) -> None:
    world = region.world
    world.submit("train", "id -un; env; sleep 2; ps -eo args", "x")
    launch(region, "--single", "--idle-timeout", "never")
    machine = only(region)
    assert region.token not in machine.instance.user_data
    if forge == "gitlab":  # nothing but the runner's own token is there
        assert machine.traces(region.token) == []
        assert not any(region.token.encode() in one for one in region.aws.objects().values())
        assert not machine.remembers("cml_runner.supervise", region.token)
    world.submit("second", "true", "x")
    wait(region, lambda: world.job("train").state == "succeeded", "the job")
    log = world.job("train").log
    assert "runner" in log.splitlines()
    assert not [one for one in world.secrets if one in log]
    nothing_is_left(region)
    assert world.job("second").state == "queued"
