"""Whole launches on Google Cloud, with the real program, which may die at its work."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

import pytest

from cml_runner.forges.local import Forge

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.clouds.gcp_rig import GcpRig
    from tests.conftest import Cli

IN_REGION = ("--cloud", "gcp", "--cloud-region", "us-west1")
EXHAUSTED = "ZONE_RESOURCE_POOL_EXHAUSTED"


@pytest.fixture
def environment(gcp_rig: GcpRig, tmp_path: Path) -> Mapping[str, str]:
    (tmp_path / "forge").mkdir()
    forge = Forge(str(tmp_path / "forge"))
    user = gcp_rig.gcp.add_user(gcp_rig.cloud.permissions())
    return {**gcp_rig.gcp.environment(user), "CML_RUNNER_REPO": forge.url}


def test_ctrl_c_clears_up(gcp_rig: GcpRig, cli: Cli, environment: Mapping[str, str]) -> None:
    process = None

    def watch(action: str) -> None:
        if action.endswith("GroupManagers.resize") and process:
            process.send_signal(signal.SIGINT)

    gcp_rig.gcp.app.watch = watch
    process = cli.start("launch", *IN_REGION, environment=environment)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert gcp_rig.gcp.left() == []


@pytest.mark.parametrize("code", [EXHAUSTED, "QUOTA_EXCEEDED"])
def test_the_next_region_when_one_has_nothing(
    gcp_rig: GcpRig, cli: Cli, environment: Mapping[str, str], code: str
) -> None:
    gcp_rig.gcp.compute.hinder = lambda zone, *_: code if zone.startswith("us-west1") else ""
    region = ("--cloud", "gcp", "--cloud-region", "us-west,us-east", "--wait-timeout", "10s")
    # The machines of this fake run nothing, so nothing comes online in the second region.
    done = cli.run("launch", *region, environment=environment, code=11)
    assert "; trying us-east, on demand" in done.err
    assert code in done.err
    assert gcp_rig.gcp.left("us-west1") == gcp_rig.gcp.left("us-east1") == []


def test_on_demand_when_no_region_has_spot_capacity(
    gcp_rig: GcpRig, cli: Cli, environment: Mapping[str, str]
) -> None:
    gcp_rig.gcp.compute.hinder = lambda _zone, _type, spot: EXHAUSTED if spot else ""
    spot = ("--cloud", "gcp", "--cloud-region", "us-west,us-east", "--cloud-spot")
    limit = ("--wait-timeout", "10s")
    cli.run("launch", *spot, *limit, environment=environment, code=6)
    assert gcp_rig.gcp.left("us-west1") == gcp_rig.gcp.left("us-east1") == []
    fallback = ("--cloud-spot-fallback", *limit)
    done = cli.run("launch", *spot, *fallback, environment=environment, code=11)
    assert "trying us-east, spot" in done.err
    assert "trying us-west, on demand" in done.err
    assert [one.spot for one in gcp_rig.gcp.compute.instances.values()] == [False]
    assert gcp_rig.gcp.left() == []


def test_what_the_group_may_not_do_fails_the_launch_at_once(
    gcp_rig: GcpRig, cli: Cli, environment: Mapping[str, str]
) -> None:
    gcp_rig.gcp.compute.hinder = lambda *_: "PERMISSIONS_ERROR"
    done = cli.run("launch", *IN_REGION, environment=environment, code=3)
    assert "Required 'compute.instances.create' permission" in done.err
    assert gcp_rig.gcp.left() == []


def test_what_is_there_can_be_seen_and_destroyed(
    gcp_rig: GcpRig, cli: Cli, environment: Mapping[str, str]
) -> None:
    done = cli.run("launch", *IN_REGION, "--no-wait", "--name", "train", environment=environment)
    assert done.json["cloud"] == "gcp"
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
    assert gcp_rig.gcp.left() == []


def test_the_clouds_mistakes_are_told_before_the_forge_is_asked(
    cli: Cli, environment: Mapping[str, str]
) -> None:
    nowhere = {**environment, "CML_RUNNER_REPO": "https://git.example/a/b", "REPO_TOKEN": "x"}
    more = ("--driver", "github", "--cloud-type", "huge", "--cloud-image", "nonsense")
    done = cli.run("launch", *IN_REGION, *more, environment=nowhere, code=2)
    assert "huge" in done.err
    assert "git.example" not in done.err


def test_the_commands_for_administrators(
    gcp_rig: GcpRig, cli: Cli, environment: Mapping[str, str]
) -> None:
    role = cli.run("permissions", "gcp").json  # takes no login
    assert "compute.instanceTemplates.create" in role["includedPermissions"]
    assert role.keys() == {"title", "description", "stage", "includedPermissions"}
    admin = {**environment, **gcp_rig.gcp.environment()}
    assert "nothing to do" in cli.run("setup", "gcp", environment=admin).out
    gcp_rig.gcp.iam.accounts.clear()
    refused = cli.run("setup", "gcp", environment=environment, code=3)
    assert "service account cml-runner is missing, and we may not make it" in refused.err


def test_a_dry_run_makes_nothing(gcp_rig: GcpRig, cli: Cli, environment: Mapping[str, str]) -> None:
    before = len(gcp_rig.gcp.app.calls)
    done = cli.run("launch", *IN_REGION, "--dry-run", environment=environment)
    assert "instance template" in done.json["resources"]
    looks = ("get", "list", "aggregatedList")
    assert all(one.action.endswith(looks) for one in gcp_rig.gcp.app.calls[before:])
