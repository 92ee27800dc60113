"""The commands for what was launched, on the embedded cloud and forge."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.test_life import gone, launch
from tests.worlds import Local, wait

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Cli

FIELDS = (  # CML's
    "awsSecurityGroup awsSubnetId cloud driver id idleTimeout image instanceGpu instanceHddSize "
    "instanceIp instanceLaunchTime instanceType instancePermissionSet labels metadata name region "
    "repo single spot spotPrice timeouts kubernetesNodeSelector"
)


@pytest.fixture
def local(tmp_path: Path) -> Local:
    return Local(tmp_path)


def test_from_launch_to_destroy(cli: Cli, local: Local, home: Path) -> None:
    arguments = ("launch", "--repo", local.repo, "--cloud", "local", "--name", "one")
    tags = ("--cloud-metadata", "team=ml", "--cloud-region", "eu-west", "--idle-timeout", "1h")
    launched = cli.run(*arguments, *tags)
    assert set(FIELDS.split()) <= set(launched.json)
    assert launched.json["metadata"] == {"team": "ml"}
    assert "one: online after" in launched.err
    identifier = launched.json["id"]

    (row,) = cli.run("list", "--output", "json").json
    assert (row["id"], row["name"], row["region"]) == (identifier, "one", "eu-west")
    assert row["states"] == {"ready": 1}
    assert cli.run("list").out.startswith(f"{identifier}\tone\tlocal\teu-west\t1 ready")
    assert cli.run("list", "--cloud-region", "us-east").out == ""

    details = cli.run("show", "one", "--output", "json").json
    assert details["tags"]["team"] == "ml"
    (machine,) = details["machines"]
    assert (machine["runner"], machine["state"]) == ("one", "ready")
    assert details["instances"][0]["status"] == "running"
    assert "machine 0.1 started" in cli.run("show", identifier).out

    follower = cli.start("logs", "-f", "one")
    local.submit("train", "true")
    wait(lambda: local.job("train").state == "succeeded", "the job")
    wait(lambda: "running train" in cli.run("logs", "one").out, "the log")
    cli.run("gc")
    assert len(cli.run("list", "--output", "json").json) == 1
    assert cli.run("destroy", "one", "--output", "json").json == {"destroyed": [identifier]}
    out, err = follower.communicate(timeout=30)
    assert follower.returncode == 0, err
    assert "one is ready for jobs" in out
    assert "running train" in out
    assert local.runners() == {}
    assert not list(home.rglob("bucket"))
    assert "no runner" in cli.run("show", identifier, code=4).err
    assert "nothing is there" in cli.run("list").err


def test_logs_of_a_runner_that_is_over(cli: Cli, local: Local, home: Path) -> None:
    identifier = launch(cli, local, "--name", "brief", "--idle-timeout", "1s")
    wait(lambda: gone(cli, home), "its end")
    assert "ended: idle for" in cli.run("logs", identifier).out
    lines = cli.run("logs", identifier, "--output", "json").out.splitlines()
    assert {json.loads(line)["rank"] for line in lines} == {0}
    assert cli.run("show", identifier, "--output", "json").json["over"] is True
    assert "is over" in cli.run("interrupt", identifier, code=4).err
    cli.run("destroy", identifier)
    cli.run("logs", identifier, code=4)


def test_gc_removes_what_is_too_old(cli: Cli, local: Local) -> None:
    identifier = launch(cli, local, "--idle-timeout", "1h")
    assert cli.run("gc", "--older-than", "1h", "--output", "json").json["removed"] == []
    dry = cli.run("gc", "--older-than", "0.1", "--dry-run", "--output", "json").json
    assert (dry["removed"], dry["found"]) == ([], [identifier])
    found = cli.run("gc", "--older-than", "0.1", "--output", "json").json
    assert found["removed"] == [identifier]
    assert local.runners() == {}
    assert "nothing to remove" in cli.run("gc").err


def test_a_dry_run_changes_nothing(cli: Cli, local: Local, home: Path) -> None:
    arguments = ("launch", "--repo", local.repo, "--cloud", "local", "--dry-run")
    found = cli.run(*arguments).json
    assert found["resources"] == ["bucket", "group of machines"]
    assert found["pricePerHour"] == 0
    assert not home.exists()


def test_no_wait(cli: Cli, local: Local) -> None:
    launch(cli, local, "--no-wait", "--name", "later")
    wait(lambda: local.runners() == {"later": True}, "it to come online")
    cli.run("destroy", "later")


def test_variables_in_place_of_flags(cli: Cli, local: Local) -> None:
    environment = {
        "CML_RUNNER_REPO": local.repo,
        "CML_RUNNER_CLOUD": "local",
        "CML_RUNNER_NAME": "by-variable",
        "CML_RUNNER_SINGLE": "true",
        "CML_RUNNER_LABELS": "a,b",
    }
    found = cli.run("launch", environment=environment).json
    assert (found["name"], found["single"], found["labels"]) == ("by-variable", True, "a,b")
    cli.run("destroy", "by-variable", environment=environment)


def test_outputs_of_a_github_step(cli: Cli, local: Local, tmp_path: Path) -> None:
    environment = {
        "GITHUB_OUTPUT": str(tmp_path / "out"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "s"),
    }
    arguments = ("launch", "--repo", local.repo, "--cloud", "local", "--name", "step")
    cli.run(*arguments, environment=environment)
    assert "name<<" in (tmp_path / "out").read_text()
    assert "| name | step |" in (tmp_path / "s").read_text()
    cli.run("destroy", "step")


def test_errors_are_annotated_in_github_actions(cli: Cli, local: Local) -> None:
    arguments = ("launch", "--repo", local.repo, "--count", "0", "--single", "--reuse")
    done = cli.run(*arguments, environment={"GITHUB_ACTIONS": "true"}, code=2)
    assert "::error title=cml-runner::" in done.err
    assert "%0A" in done.err
