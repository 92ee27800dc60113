"""A runner's life on AWS for the forges which the other scenes aren't played on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab import test_aws_scenes
from tests.lab.test_aws_scenes import nothing_is_left, only, wait

if TYPE_CHECKING:
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


PATIENCE = 60  # seconds


def launch(region: Region, *more: str) -> str:
    """Launch machines on which there is a Java; return the identifier."""
    script = region.directory / "script"
    script.write_text(JAVA)
    found = test_aws_scenes.launch(region, "--cloud-startup-script", f"@{script}", *more)
    return str(found["id"])


def test_interrupted_in_the_middle_of_a_job(region: Region, forge: str) -> None:
    world = region.world
    world.submit("train", LONG, "x")
    identifier = launch(region, "--cloud-spot", "--idle-timeout", "4s")
    wait(region, lambda: "first half" in world.job("train").log, "the middle of the job", PATIENCE)
    first = only(region).instance.id
    region.aws.instances.interrupt(first, after=30)
    wait(
        region, lambda: [one.instance.id for one in region.alive()] != [first], "its end", PATIENCE
    )
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
    wait(region, lambda: world.job("train").state == "succeeded", "the job", PATIENCE)
    log = world.job("train").log
    assert "runner" in log.splitlines()
    assert not [one for one in world.secrets if one in log]
    nothing_is_left(region)
    assert world.job("second").state == "queued"
