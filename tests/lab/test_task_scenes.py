"""A task's life on machines that really boot, with no more rights than ours ask for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner.wait import until
from tests.lab.azure.region import AzureRegion
from tests.lab.conftest import PREPARED
from tests.lab.gcp.region import GoogleRegion
from tests.lab.region import Region, missing
from tests.lab.test_aws_scenes import only, wait

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

pytestmark = pytest.mark.lab

PLACES: Mapping[str, tuple[type[Region], str]] = {
    "aws": (Region, "us-west-2"),
    "azure": (AzureRegion, "westus2"),
    "gcp": (GoogleRegion, "us-west1"),
}
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


@dataclass(frozen=True)
class Stage:
    """A region of one cloud."""

    cloud: str
    region: Any
    name: str  # of the region

    @property
    def there(self) -> Any:
        """The fake cloud."""
        return getattr(self.region, self.cloud)

    @property
    def place(self) -> tuple[str, ...]:
        return ("--cloud", self.cloud, "--cloud-region", self.name)

    def run(self, workdir: Path, *more: str) -> None:
        where = ("--cloud", self.cloud, "--region", self.name, "--workdir", str(workdir))
        script = ("--name", "count", "--detach", "--script", str(workdir / "script"))
        done = self.region.cli("task", "run", *where, *script, *more)
        assert done.returncode == 0, f"{done.stderr}\n{self.region.said()}"

    def wait(self, condition: Any, what: str, timeout: float = 60) -> None:
        wait(self.region, condition, what, timeout)

    def log(self) -> str:
        found: str = self.region.cli("task", "logs", "count", *self.place).stdout
        return found

    def begins(self) -> list[int]:
        found = re.findall(r"begin at (\d+), epoch \d, as runner", self.log())
        return [int(one) for one in found]

    def interrupt(self) -> None:
        """Announce that the machine will be taken away, and take it."""
        name = only(self.region).instance.id
        match self.cloud:
            case "aws":
                self.there.instances.interrupt(name, after=30)
            case "azure":
                self.there.fleet.evict(name, after=30)
            case "gcp":
                self.there.compute.preempt(name, after=30)

    def cut(self) -> None:
        """Take the machine away without a word."""
        name = only(self.region).instance.id
        match self.cloud:
            case "aws":
                self.there.instances.terminate(self.name, name, "Server.InternalError")
            case "azure":
                self.there.fleet.evict(name, after=0)
            case "gcp":
                self.there.compute.crash(name)

    def costly(self) -> list[str]:
        return [one for one in self.there.left() if not one.startswith("object")]

    def check(self, workdir: Path) -> None:
        """Wait for the end; see that all has come home, and that nothing is left."""
        done = self.region.cli("task", "logs", "-f", "count", *self.place)
        assert done.returncode == 0, f"{done.stderr}\n{done.stdout}\n{self.region.said()}"
        assert done.stdout.splitlines()[-1] == "root"
        self.wait(lambda: not self.costly(), f"all that costs much to go: {self.costly()}")
        done = self.region.cli("task", "destroy", "count", *self.place)
        assert done.returncode == 0, done.stderr
        assert (workdir / "counter").read_text() == f"{LAST}\n"
        lines = set((workdir / "large").read_text().split()[:-1])
        assert lines == {str(LAST)}
        assert self.there.objects() == {}


@pytest.fixture(params=PLACES)
def stage(
    request: pytest.FixtureRequest, tmp_path: Path, suite: str, forge: str
) -> Iterator[Stage]:
    if reason := missing(PREPARED):
        pytest.skip(f"the lab {reason}")
    kind, name = PLACES[request.param]
    with kind(PREPARED, tmp_path, suite, forge) as region:
        found = Stage(request.param, region, name)
        done = region.cli("setup", found.cloud)
        assert done.returncode == 0, done.stderr
        role = json.loads(region.cli("permissions", found.cloud).stdout)
        region.launcher = found.there.add_user(role)
        yield found


def test_interrupted_in_the_middle(stage: Stage, workdir: Path) -> None:
    stage.run(workdir, "--spot", "0")
    stage.wait(lambda: "now 5\n" in stage.log(), "it to count", 90)
    stage.interrupt()
    stage.wait(lambda: len(stage.begins()) == 2, "another machine to go on", 120)
    assert "told at" in stage.log()
    assert stage.begins()[1] >= 5
    stage.check(workdir)
    assert len(stage.region.machines) == 2


def test_a_machine_without_power_and_a_task_that_is_stopped(stage: Stage, workdir: Path) -> None:
    stage.run(workdir)
    stage.wait(lambda: "now 30\n" in stage.log(), "it to count", 90)
    stage.cut()
    stage.wait(lambda: len(stage.begins()) == 2, "another machine to go on", 120)
    assert stage.begins()[1] > 0
    done = stage.region.cli("task", "stop", "count", *stage.place)
    assert done.returncode == 0, done.stderr
    until(lambda: not stage.region.alive(), "the machine to end", 30)
    last = re.findall(r"told at (\d+)", stage.log())[-1]
    done = stage.region.cli("task", "start", "count", *stage.place)
    assert done.returncode == 0, done.stderr
    stage.wait(lambda: len(stage.begins()) == 3, "a third machine to go on", 90)
    assert stage.begins()[2] in (int(last), int(last) - 1)
    stage.check(workdir)


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
    role = json.loads(stage.region.cli("permissions", stage.cloud).stdout)
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
    stage.run(workdir, "--spot", "0", "--storage-container", f"{BUCKET}/some/where")
    stage.wait(lambda: "now 5\n" in stage.log(), "it to count", 90)
    stage.interrupt()
    stage.wait(lambda: len(stage.begins()) == 2, "another machine to go on", 120)
    assert stage.begins()[1] >= 5
    keys = [one["Key"] for one in client.list_objects_v2(Bucket=BUCKET)["Contents"]]
    assert all(key.startswith("some/where/") for key in keys)
    assert not [key for key in stage.there.objects() if "/b/" in key]
    stage.check(workdir)
    assert "Contents" not in client.list_objects_v2(Bucket=BUCKET)


@pytest.mark.parametrize("stage", ["aws"], indirect=True)
def test_a_bucket_that_machines_may_not_use(stage: Stage, workdir: Path) -> None:
    own_bucket(stage)
    stage.run(workdir, "--storage-container", f"{BUCKET}/some/where")
    done = stage.region.cli("task", "logs", "-f", "count", *stage.place)
    assert done.returncode == 3, f"{done.stderr}\n{done.stdout}\n{stage.region.said()}"
    assert f"no access to s3://{BUCKET}" in done.stderr
    stage.wait(lambda: not stage.costly(), f"all that costs much to go: {stage.costly()}")
