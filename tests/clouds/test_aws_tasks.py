"""Tasks on AWS: with no more rights than ours ask for, at the launcher's and on machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner import store
from cml_runner.boot.prepare import INTERRUPTED
from cml_runner.model import Identifier, Settings, Task

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.clouds.aws_rig import AwsRig
    from tests.conftest import Cli

PLACE = ("--cloud", "aws", "--cloud-region", "us-west-2")
RUN = ("task", "run", "--cloud", "aws", "--region", "us-west-2", "--name", "one", "--detach")


@pytest.fixture
def environment(aws_rig: AwsRig) -> Mapping[str, str]:
    keys = aws_rig.aws.add_user(dict(aws_rig.cloud.permissions()))
    return aws_rig.aws.environment(keys)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    for number in range(5):
        (tmp_path / "work" / f"file {number}").write_bytes(os.urandom(1 << 20))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def run(cli: Cli, environment: Mapping[str, str], *command: str) -> str:
    return cli.run(*RUN, "--", *command, environment=environment).out.strip()


def lease(rig: AwsRig, identifier: str) -> Any:
    return json.loads(rig.aws.objects()[f"leases/{identifier}.json"])


def data(rig: AwsRig, identifier: str) -> list[str]:
    return [key for key in rig.aws.objects() if key.startswith(f"tasks/{identifier}/data/")]


def be_the_machine(rig: AwsRig, identifier: str, directory: Path, code: int = 0) -> str:
    """Run the supervisor here, with a machine's rights; return what it said."""
    (instance,) = [name for name, life in rig.aws.instances.lives.items() if not life.ended]
    bucket = rig.cloud.plan(Task(id=Identifier.parse(identifier))).bucket.store
    settings = bucket.load(store.SETTINGS, Settings)
    assert settings
    assert settings.user == "runner"
    bucket.save(store.SETTINGS, replace(settings, user=""))  # no account is made here
    directory.mkdir()
    command = (sys.executable, "-m", "cml_runner.supervise", bucket.url)
    with rig.on(instance):
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == code, done.stderr
    return done.stderr


def test_from_run_to_destroy(
    aws_rig: AwsRig,
    cli: Cli,
    environment: Mapping[str, str],
    workdir: Path,
    tmp_path: Path,
) -> None:
    identifier = run(cli, environment, "sh", "-c", "cat file* | wc -c; echo made > made; exit 3")
    assert lease(aws_rig, identifier)["keeps"] is True
    assert data(aws_rig, identifier)
    (row,) = cli.run("task", "list", *PLACE, "--output", "json", environment=environment).json
    assert row["status"] == {"queued": 1}
    log = be_the_machine(aws_rig, identifier, tmp_path / "machine")
    assert "5242880" in log
    left = {one for one in aws_rig.aws.left() if not one.startswith("object")}
    assert left == set(), "all that costs much is gone"
    assert lease(aws_rig, identifier)["expires"] is None
    assert f"tasks/{identifier}/settings.json" not in aws_rig.aws.objects()
    assert f"tasks/{identifier}/resume.json" not in aws_rig.aws.objects()
    assert cli.run("gc", *PLACE, "--output", "json", environment=environment).json["removed"] == []
    done = cli.run("task", "logs", "-f", identifier, *PLACE, environment=environment, code=3)
    assert done.out == "5242880\n"
    cli.run("task", "destroy", identifier, environment=environment)
    assert (workdir / "made").exists()
    assert aws_rig.aws.objects() == {}


def test_stop_and_start(
    aws_rig: AwsRig,
    cli: Cli,
    environment: Mapping[str, str],
    workdir: Path,
    tmp_path: Path,
) -> None:
    identifier = run(cli, environment, "sh", "-c", "echo went on")
    assert workdir
    cli.run("task", "stop", "one", *PLACE, environment=environment)
    assert [one for one in aws_rig.aws.left() if not one.startswith("object")] == []
    assert f"tasks/{identifier}/settings.json" not in aws_rig.aws.objects()
    assert lease(aws_rig, identifier)["expires"] is None
    assert cli.run("gc", *PLACE, "--output", "json", environment=environment).json["removed"] == []
    cli.run("task", "start", "one", *PLACE, environment=environment)
    assert lease(aws_rig, identifier)["expires"]
    log = be_the_machine(aws_rig, identifier, tmp_path / "machine")
    assert "| went on" in log
    cli.run("task", "destroy", "one", *PLACE, environment=environment)
    assert aws_rig.aws.objects() == {}
    assert aws_rig.aws.left() == []


def test_nothing_is_left_of_what_could_not_be_started(
    aws_rig: AwsRig, cli: Cli, environment: Mapping[str, str], workdir: Path
) -> None:
    assert workdir
    aws_rig.aws.fail("autoscaling:LaunchInstances", "InsufficientInstanceCapacity", times=9)
    cli.run(*RUN, "--", "true", environment=environment, code=6)
    assert aws_rig.aws.left() == []
    assert aws_rig.aws.objects() == {}


def test_a_launcher_that_died_leaves_nothing_to_gc(
    aws_rig: AwsRig, cli: Cli, environment: Mapping[str, str], workdir: Path
) -> None:
    assert workdir
    process = None

    def watch(call: Any) -> None:
        if call.action == "LaunchInstances" and process:
            process.kill()

    process = cli.start(*RUN, "--", "true", environment=environment)
    aws_rig.aws.app.watch = watch
    process.communicate(timeout=60)
    assert process.returncode != 0
    cli.run("gc", *PLACE, "--older-than", "0.001", environment=environment)
    assert aws_rig.aws.left() == []
    assert aws_rig.aws.objects() == {}


def test_a_bucket_of_ones_own(aws_rig: AwsRig, cli: Cli, workdir: Path, tmp_path: Path) -> None:
    """Who launches and the machines may use it, in another region than theirs."""
    import boto3

    assert workdir
    admin = aws_rig.aws.environment()
    s3 = boto3.Session(region_name="eu-west-1").client("s3")
    s3.create_bucket(Bucket="mine", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})

    def keys() -> list[str]:
        found = s3.list_objects_v2(Bucket="mine").get("Contents", [])
        return [one["Key"] for one in found]

    more = ("--storage-container", "mine/a b", "--storage-container-opts", "region=eu-west-1")
    done = cli.run(*RUN, *more, "--", "sh", "-c", "echo made > made", environment=admin)
    identifier = done.out.strip()
    assert keys()
    assert all(key.startswith("a b/data/push/") for key in keys())
    assert data(aws_rig, identifier) == [f"tasks/{identifier}/data/task.json"]
    refused = be_the_machine(aws_rig, identifier, tmp_path / "machine", code=INTERRUPTED)
    assert "no access to s3://mine" in refused
    cli.run("task", "destroy", identifier, *PLACE, environment=admin)
    assert keys() == []
    assert aws_rig.aws.objects() == {}


def test_a_task_does_not_outlive_what_the_bucket_keeps(
    aws_rig: AwsRig, cli: Cli, environment: Mapping[str, str], workdir: Path
) -> None:
    assert workdir
    err = cli.run(*RUN, "--timeout", "29 days", "--", "true", environment=environment, code=2).err
    assert "--timeout: less than 28 days" in err
    assert aws_rig.aws.objects() == {}
