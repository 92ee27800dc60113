"""Whole launches on Azure, with the real program, which may die at its work."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

import pytest

from cml_runner import program
from cml_runner.forges.local import Forge

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.clouds.azure_rig import AzureRig
    from tests.conftest import Cli
    from tests.lab.azure.wire import Call

IN_REGION = ("--cloud", "azure", "--cloud-region", "westus2")


@pytest.fixture
def environment(azure_rig: AzureRig, tmp_path: Path) -> Mapping[str, str]:
    forge = Forge(str(tmp_path))
    user = azure_rig.azure.add_user(dict(azure_rig.cloud.permissions()))
    return {**azure_rig.azure.environment(user), "CML_RUNNER_REPO": forge.url}


def test_ctrl_c_clears_up(azure_rig: AzureRig, cli: Cli, environment: Mapping[str, str]) -> None:
    process = None

    def watch(call: Call) -> None:
        if call.method == "PATCH" and process:
            process.send_signal(signal.SIGINT)

    azure_rig.azure.app.watch = watch
    process = cli.start("launch", *IN_REGION, environment=environment)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert azure_rig.azure.left() == []


def test_on_demand_when_there_is_no_spot_capacity(
    azure_rig: AzureRig, cli: Cli, environment: Mapping[str, str]
) -> None:
    azure_rig.azure.fleet.hinder = lambda _zone, _size, spot: "SkuNotAvailable" if spot else ""
    spot = ("launch", *IN_REGION, "--no-wait", "--cloud-spot")
    done = cli.run(*spot, environment=environment, code=6)
    assert "SkuNotAvailable" in done.err
    assert azure_rig.azure.left() == []
    done = cli.run(*spot, "--cloud-spot-fallback", environment=environment)
    assert done.json["spot"] is False
    assert "trying westus2, on demand" in done.err


def test_capacity_that_turns_out_to_be_missing_is_told_while_waiting(
    azure_rig: AzureRig, cli: Cli, environment: Mapping[str, str]
) -> None:
    azure_rig.azure.fleet.hinder = lambda *_: "AllocationFailed"
    done = cli.run("launch", *IN_REGION, environment=environment, code=6)
    assert "sufficient capacity" in done.err
    assert azure_rig.azure.left() == []


def test_what_is_there_can_be_seen_and_destroyed(
    azure_rig: AzureRig, cli: Cli, environment: Mapping[str, str]
) -> None:
    named = ("--no-wait", "--name", "train")
    done = cli.run("launch", *IN_REGION, *named, environment=environment)
    assert done.json["cloud"] == "azure"
    again = cli.run("launch", *IN_REGION, *named, environment=environment, code=5)
    assert "cml-runner destroy" in again.err
    listed = cli.run("list", *IN_REGION, "--output", "json", environment=environment)
    (row,) = json.loads(listed.out)
    assert (row["name"], row["id"]) == ("train", done.json["id"])
    shown = cli.run("show", "train", *IN_REGION, "--output", "json", environment=environment)
    assert len(shown.json["instances"]) == 1
    cli.run("interrupt", "train", *IN_REGION, "--after", "60s", environment=environment)
    cli.run("destroy", "train", *IN_REGION, environment=environment)
    assert azure_rig.azure.left() == []


def test_it_has_another_name(azure_rig: AzureRig, cli: Cli, environment: Mapping[str, str]) -> None:
    place = ("--cloud", "az", "--cloud-region", "westus2")
    done = cli.run("launch", *place, "--no-wait", environment=environment)
    assert done.json["cloud"] == "azure"
    assert len(cli.run("list", *place, "--output", "json", environment=environment).json) == 1
    (life,) = azure_rig.azure.fleet.lives.values()
    digest = program.digest()
    assert digest in life.instance.user_data
    assert azure_rig.azure.programs() == {f"{digest}.whl": program.wheel()}


def test_the_clouds_mistakes_are_told_before_the_forge_is_asked(
    cli: Cli, environment: Mapping[str, str]
) -> None:
    nowhere = {**environment, "CML_RUNNER_REPO": "https://git.example/a/b", "REPO_TOKEN": "x"}
    more = ("--driver", "github", "--cloud-type", "huge", "--cloud-image", "nonsense")
    done = cli.run("launch", *IN_REGION, *more, environment=nowhere, code=2)
    assert "huge" in done.err
    assert "git.example" not in done.err


def test_a_launch_imports_only_what_it_uses(
    azure_rig: AzureRig, cli: Cli, environment: Mapping[str, str]
) -> None:
    watched = {**environment, "PYTHONPROFILEIMPORTTIME": "1"}
    done = cli.run("launch", *IN_REGION, "--no-wait", environment=watched)
    names = {line.rpartition("|")[2].strip() for line in done.err.splitlines()}
    own = {name.partition(".mgmt.")[2] for name in names if name.startswith("azure.mgmt.")}
    assert {name.partition(".")[0] for name in own} == {"compute", "core", "monitor"}
    assert len(azure_rig.azure.fleet.lives) == 1


def test_a_dry_run_makes_nothing(
    azure_rig: AzureRig, cli: Cli, environment: Mapping[str, str]
) -> None:
    before = len(azure_rig.azure.app.calls)
    done = cli.run("launch", *IN_REGION, "--dry-run", environment=environment)
    assert "scale set" in done.json["resources"]
    assert all(one.action.endswith("/read") for one in azure_rig.azure.app.calls[before:])
