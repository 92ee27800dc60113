"""A runner's life for the forges which the other scenes aren't played on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.lab.stage import Stage

pytestmark = [
    pytest.mark.lab,
    pytest.mark.parametrize("stage", ["aws"], indirect=True),
    pytest.mark.parametrize("forge", ["gitlab", "bitbucket"]),
]

LONG = "echo first half\nsleep 6\necho second half"

# Bitbucket's program is in Java, and the stand-in for it in Python.
JAVA = """\
cat >/usr/local/bin/java <<'END'
#!/bin/sh
LAB_BITBUCKET=https://bitbucket.org exec python3 -B "$3" "$1"
END
chmod 755 /usr/local/bin/java
"""


def launch(stage: Stage, *more: str) -> str:
    """Launch machines on which there is a Java; return the identifier."""
    script = stage.region.directory / "script"
    script.write_text(JAVA)
    return str(stage.launch("--cloud-startup-script", f"@{script}", *more)["id"])


def test_interrupted_in_the_middle_of_a_job(stage: Stage, forge: str) -> None:
    stage.submit("train", LONG)
    identifier = launch(stage, "--cloud-spot", "--idle-timeout", "4s")
    stage.wait_for_log("train", "first half")
    stage.wait_for_another(stage.interrupt())
    stage.wait_for_job("train", 90)
    assert stage.job("train").attempt == 2
    stage.nothing_is_left()
    assert "idle for 4 s" in stage.cli("logs", identifier).stdout


def test_one_job_and_no_more(stage: Stage, forge: str) -> None:
    stage.submit("train", "id -un; env; sleep 2; ps -eo args")
    launch(stage, "--single", "--idle-timeout", "never")
    machine, token = stage.only(), stage.region.token
    assert token not in machine.instance.user_data
    if forge == "gitlab":  # nothing but the runner's own token is there
        assert machine.traces(token) == []
        assert not any(token.encode() in one for one in stage.there.objects().values())
        assert not machine.remembers("cml_runner.supervise", token)
    stage.submit("second", "true")
    stage.wait_for_job("train")
    log = stage.job("train").log
    assert "runner" in log.splitlines()
    assert not [one for one in stage.world.secrets if one in log]
    stage.nothing_is_left()
    assert stage.job("second").state == "queued"
