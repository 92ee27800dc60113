"""A task's life on machines that really boot, with no more rights than ours ask for."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner.wait import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lab.stage import Stage

pytestmark = pytest.mark.lab

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


def run(stage: Stage, workdir: Path, *more: str) -> None:
    where = ("--cloud", stage.cloud, "--region", stage.name, "--workdir", str(workdir))
    script = ("--name", "count", "--detach", "--script", str(workdir / "script"))
    stage.cli("task", "run", *where, *script, *more)


def log(stage: Stage) -> str:
    found: str = stage.region.cli("task", "logs", "count", *stage.place).stdout
    return found


def begins(stage: Stage) -> list[int]:
    """Say how far the script was whenever it began."""
    return [int(one) for one in re.findall(r"begin at (\d+), epoch \d, as runner", log(stage))]


def comes_home(stage: Stage, workdir: Path) -> None:
    """Wait for the end; see that all has come home, and that nothing is left."""
    done = stage.cli("task", "logs", "-f", "count", *stage.place)
    assert done.stdout.splitlines()[-1] == "root"
    stage.wait(lambda: not stage.costly(), "all that costs much to go")
    stage.cli("task", "destroy", "count", *stage.place)
    assert (workdir / "counter").read_text() == f"{LAST}\n"
    lines = set((workdir / "large").read_text().split()[:-1])
    assert lines == {str(LAST)}
    assert stage.there.objects() == {}


def test_interrupted_in_the_middle(stage: Stage, workdir: Path) -> None:
    run(stage, workdir, "--spot", "0")
    stage.wait(lambda: "now 5\n" in log(stage), "it to count", 90)
    stage.interrupt()
    stage.wait(lambda: len(begins(stage)) == 2, "another machine to go on", 120)
    assert "told at" in log(stage)
    assert begins(stage)[1] >= 5
    comes_home(stage, workdir)
    assert len(stage.region.machines) == 2


def test_a_machine_without_power_and_a_task_that_is_stopped(stage: Stage, workdir: Path) -> None:
    run(stage, workdir)
    stage.wait(lambda: "now 30\n" in log(stage), "it to count", 90)
    stage.cut()
    stage.wait(lambda: len(begins(stage)) == 2, "another machine to go on", 120)
    assert begins(stage)[1] > 0
    stage.cli("task", "stop", "count", *stage.place)
    until(lambda: not stage.region.alive(), "the machine to end", 30)
    last = re.findall(r"told at (\d+)", log(stage))[-1]
    stage.cli("task", "start", "count", *stage.place)
    stage.wait(lambda: len(begins(stage)) == 3, "a third machine to go on", 90)
    assert begins(stage)[2] in (int(last), int(last) - 1)
    comes_home(stage, workdir)


BUCKET = "theirs"  # somebody's own, which ours has no rights in
USE = {
    "Effect": "Allow",
    "Action": ["s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"],
    "Resource": [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"],
}


def own_bucket(stage: Stage) -> Any:
    """Make a bucket that the launcher may use; return a client that sees all that is in it."""
    there = stage.there
    client = there._client("s3", stage.name)
    place = {"LocationConstraint": stage.name}
    client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration=place)
    role = json.loads(stage.cli("permissions", stage.cloud).stdout)
    stage.region.launcher = there.add_user({**role, "Statement": [*role["Statement"], USE]})
    return client


@pytest.mark.parametrize("stage", ["aws"], indirect=True)
def test_data_in_a_bucket_of_ones_own(stage: Stage, workdir: Path) -> None:
    client = own_bucket(stage)
    iam = stage.there._client("iam", "us-east-1")
    names = [one["RoleName"] for one in iam.list_roles()["Roles"]]
    (role,) = [name for name in names if name.startswith("cml-runner")]
    policy = json.dumps({"Version": "2012-10-17", "Statement": [USE]})
    iam.put_role_policy(RoleName=role, PolicyName="use", PolicyDocument=policy)
    run(stage, workdir, "--spot", "0", "--storage-container", f"{BUCKET}/some/where")
    stage.wait(lambda: "now 5\n" in log(stage), "it to count", 90)
    stage.interrupt()
    stage.wait(lambda: len(begins(stage)) == 2, "another machine to go on", 120)
    assert begins(stage)[1] >= 5
    keys = [one["Key"] for one in client.list_objects_v2(Bucket=BUCKET)["Contents"]]
    assert all(key.startswith("some/where/") for key in keys)
    assert not [key for key in stage.there.objects() if "/b/" in key]
    comes_home(stage, workdir)
    assert "Contents" not in client.list_objects_v2(Bucket=BUCKET)


@pytest.mark.parametrize("stage", ["aws"], indirect=True)
def test_a_bucket_that_machines_may_not_use(stage: Stage, workdir: Path) -> None:
    own_bucket(stage)
    run(stage, workdir, "--storage-container", f"{BUCKET}/some/where")
    done = stage.cli("task", "logs", "-f", "count", *stage.place, code=3)
    assert f"no access to s3://{BUCKET}" in done.stderr
    stage.wait(lambda: not stage.costly(), f"all that costs much to go: {stage.costly()}")
