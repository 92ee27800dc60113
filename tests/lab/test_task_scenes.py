"""A task's life on AWS, on machines that really boot: its data survive."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from cml_runner.wait import until
from tests.lab.test_aws_scenes import only, wait

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lab.region import Region

pytestmark = pytest.mark.lab

PLACE = ("--cloud", "aws", "--cloud-region", "us-west-2")
LAST = 60
SCRIPT = f"""\
#!/bin/bash
# How far it is stands in a small file and, five million times, in a large one.
trap 'echo "told at $i"; exit 1' TERM
i=$(cat counter 2>/dev/null || echo 0)
echo "begin at $i, epoch $CML_EPOCH, as $(id -un)"
while [ $i -lt {LAST} ]; do
  i=$((i + 1))
  yes $i | head -c 5000000 >large.new && mv large.new large
  echo $i >counter
  echo "now $i"
  sleep 0.4
done
sudo id -un
"""


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    place = tmp_path / "work"
    place.mkdir()
    (place / "script").write_text(SCRIPT)
    (place / "ünïcode and space").write_text("x")
    return place


def run(region: Region, workdir: Path, *more: str) -> str:
    arguments = ("--region", "us-west-2", "--workdir", str(workdir), "--name", "count", "--detach")
    script = ("--script", str(workdir / "script"))
    done = region.cli("task", "run", "--cloud", "aws", *arguments, *script, *more)
    assert done.returncode == 0, f"{done.stderr}\n{region.said()}"
    return done.stdout.strip()


def log(region: Region) -> str:
    return region.cli("task", "logs", "count", *PLACE).stdout


def begins(region: Region) -> list[int]:
    return [int(one) for one in re.findall(r"begin at (\d+), epoch \d, as runner", log(region))]


def costly(region: Region) -> list[str]:
    return [one for one in region.aws.left() if not one.startswith("object")]


def check(region: Region, workdir: Path) -> None:
    """Wait for its end; see that all has come home, and that nothing is left."""
    done = region.cli("task", "logs", "-f", "count", *PLACE)
    assert done.returncode == 0, f"{done.stderr}\n{done.stdout}\n{region.said()}"
    assert done.stdout.splitlines()[-1] == "root"
    wait(region, lambda: not costly(region), f"all that costs much to go: {costly(region)}")
    done = region.cli("task", "destroy", "count", *PLACE)
    assert done.returncode == 0, done.stderr
    assert (workdir / "counter").read_text() == f"{LAST}\n"
    lines = set((workdir / "large").read_text().split()[:-1])
    assert lines == {str(LAST)}
    assert region.aws.objects() == {}


def test_interrupted_in_the_middle(region: Region, workdir: Path) -> None:
    run(region, workdir, "--spot", "0")
    wait(region, lambda: "now 5\n" in log(region), "it to count", 60)
    first = only(region).instance.id
    region.aws.instances.interrupt(first, after=30)
    wait(region, lambda: len(begins(region)) == 2, "another machine to go on", 90)
    assert "told at" in log(region)
    assert begins(region)[1] >= 5
    check(region, workdir)
    assert len(region.machines) == 2


def test_a_machine_without_power_and_a_task_that_is_stopped(region: Region, workdir: Path) -> None:
    run(region, workdir)
    wait(region, lambda: "now 30\n" in log(region), "it to count", 90)
    name = only(region).instance.id
    region.aws.instances.terminate("us-west-2", name, "Server.InternalError")
    wait(region, lambda: len(begins(region)) == 2, "another machine to go on", 120)
    assert begins(region)[1] > 0
    done = region.cli("task", "stop", "count", *PLACE)
    assert done.returncode == 0, done.stderr
    until(lambda: not region.alive(), "the machine to end", 30)
    last = re.findall(r"told at (\d+)", log(region))[-1]
    done = region.cli("task", "start", "count", *PLACE)
    assert done.returncode == 0, done.stderr
    wait(region, lambda: len(begins(region)) == 3, "a third machine to go on", 90)
    assert begins(region)[2] in (int(last), int(last) - 1)
    check(region, workdir)
