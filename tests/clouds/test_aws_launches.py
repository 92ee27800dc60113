"""Whole launches on AWS, with the real program, which may die at its work."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

import pytest

from cml_runner.forges.local import Forge

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.clouds.aws_rig import AwsRig
    from tests.conftest import Cli
    from tests.lab.aws.wire import Call

IN_REGION = ("--cloud", "aws", "--cloud-region", "us-west-2")


@pytest.fixture
def environment(aws_rig: AwsRig, tmp_path: Path) -> Mapping[str, str]:
    forge = Forge(str(tmp_path))
    return {
        **aws_rig.aws.environment(aws_rig.aws.add_user(dict(aws_rig.cloud.permissions()))),
        "CML_RUNNER_REPO": forge.url,
    }


def test_ctrl_c_clears_up(aws_rig: AwsRig, cli: Cli, environment: Mapping[str, str]) -> None:
    process = None

    def watch(call: Call) -> None:
        if call.action == "LaunchInstances" and process:
            process.send_signal(signal.SIGINT)

    aws_rig.aws.app.watch = watch
    process = cli.start("launch", *IN_REGION, environment=environment)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert aws_rig.aws.left() == []


def test_the_next_region_when_one_has_nothing(
    aws_rig: AwsRig, cli: Cli, environment: Mapping[str, str]
) -> None:
    aws_rig.aws.instances.hinder = lambda zone, *_: (
        "InsufficientInstanceCapacity" if zone.startswith("us-west-2") else ""
    )
    admin = {**environment, **aws_rig.aws.environment()}
    region = ("--cloud", "aws", "--cloud-region", "us-west,us-east")
    done = cli.run("launch", *region, "--no-wait", environment=admin)
    assert done.json["region"] == "us-east"
    assert "; trying us-east, on demand" in done.err
    assert aws_rig.aws.left("us-west-2") == []
    cli.run("destroy", done.json["id"], *IN_REGION[:2], environment=admin)
    assert [one for one in aws_rig.aws.left("us-east-1") if not one.startswith("bucket")] == []


def test_on_demand_when_no_region_has_spot_capacity(
    aws_rig: AwsRig, cli: Cli, environment: Mapping[str, str]
) -> None:
    aws_rig.aws.instances.hinder = lambda _zone, _type, spot: (
        "InsufficientInstanceCapacity" if spot else ""
    )
    admin = {**environment, **aws_rig.aws.environment()}
    spot = ("--cloud", "aws", "--cloud-region", "us-west,us-east", "--no-wait", "--cloud-spot")
    cli.run("launch", *spot, environment=admin, code=6)
    assert aws_rig.aws.left("us-west-2") == aws_rig.aws.left("us-east-1")
    done = cli.run("launch", *spot, "--cloud-spot-fallback", environment=admin)
    assert (done.json["region"], done.json["spot"]) == ("us-west", False)
    assert "trying us-east, spot" in done.err
    assert "trying us-west, on demand" in done.err


def test_what_is_there_can_be_seen_and_destroyed(
    aws_rig: AwsRig, cli: Cli, environment: Mapping[str, str]
) -> None:
    done = cli.run("launch", *IN_REGION, "--no-wait", "--name", "train", environment=environment)
    assert done.json["cloud"] == "aws"
    again = cli.run(
        "launch", *IN_REGION, "--no-wait", "--name", "train", environment=environment, code=5
    )
    assert "cml-runner destroy" in again.err
    (row,) = json.loads(
        cli.run("list", *IN_REGION, "--output", "json", environment=environment).out
    )
    assert (row["name"], row["id"]) == ("train", done.json["id"])
    shown = cli.run("show", "train", *IN_REGION, "--output", "json", environment=environment)
    assert len(shown.json["instances"]) == 1
    cli.run("interrupt", "train", *IN_REGION, "--after", "60s", environment=environment)
    cli.run("destroy", "train", *IN_REGION, environment=environment)
    assert aws_rig.aws.left() == []


def test_the_clouds_mistakes_are_told_before_the_forge_is_asked(
    cli: Cli, environment: Mapping[str, str]
) -> None:
    nowhere = {**environment, "CML_RUNNER_REPO": "https://git.example/a/b", "REPO_TOKEN": "x"}
    more = ("--driver", "github", "--cloud-type", "huge", "--cloud-image", "nonsense")
    done = cli.run("launch", *IN_REGION, *more, environment=nowhere, code=2)
    assert "huge" in done.err
    assert "git.example" not in done.err


def test_a_dry_run_makes_nothing(aws_rig: AwsRig, cli: Cli, environment: Mapping[str, str]) -> None:
    before = len(aws_rig.aws.app.calls)
    done = cli.run("launch", *IN_REGION, "--dry-run", environment=environment)
    assert "launch template" in done.json["resources"]
    looks = ("Describe", "Get", "List")
    assert all(one.action.startswith(looks) for one in aws_rig.aws.app.calls[before:])
