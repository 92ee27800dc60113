"""What CI systems include: the same options as the program, and it runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
import yaml

from cml_runner.cli import cli
from tests.cli.test_ci import parsed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.conftest import Cli

ACTIONS = Path(__file__).parent.parent / "actions"
ALSO = {"log", "output"}  # options that say nothing about a runner
STUBS = {
    "python": f'exec {sys.executable} "$@"\n',
    "cml-runner": f'exec {sys.executable} -m cml_runner "$@"\n',
    "pip": 'printf "%s\\n" "$@" >>"$RUNNER_TEMP/pip"\n',
}


def action(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ACTIONS / name / "action.yml").read_text())
    return found


def options(name: str) -> dict[str, click.Option]:
    command = cli.get_command(click.Context(cli), name)
    assert command
    found = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
    return {one.opts[0].removeprefix("--"): one for one in found if one.name not in ALSO}


class Job:
    """A job on a machine where pip has nothing to install: all is there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output, self.path = directory / "output", directory / "path"
        self.output.touch()
        programs = directory / "cml-runner" / "bin"
        programs.mkdir(parents=True)
        for name, text in STUBS.items():
            (programs / name).write_text(f"#!/bin/sh\n{text}")
            (programs / name).chmod(0o755)

    @property
    def installed(self) -> str:
        """What pip was asked for last."""
        return (self.directory / "pip").read_text().splitlines()[-1]

    def run(self, name: str, **inputs: str) -> list[subprocess.CompletedProcess[str]]:
        """Run an action's steps, as far as GitHub would."""
        defaults = {key: one.get("default", "") for key, one in action(name)["inputs"].items()}
        given = {**defaults, **{key.replace("_", "-"): value for key, value in inputs.items()}}
        done = []
        for step in action(name)["runs"]["steps"]:
            assert step["shell"] == "bash"
            own = {key: _evaluated(text, given) for key, text in step.get("env", {}).items()}
            done.append(self._step(step["run"], own, ACTIONS / name))
            if done[-1].returncode:
                break
        return done

    def _step(
        self, script: str, own: Mapping[str, str], place: Path
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "RUNNER_TEMP": str(self.directory),
            "GITHUB_OUTPUT": str(self.output),
            "GITHUB_PATH": str(self.path),
            "GITHUB_ACTION_PATH": str(place),
            **own,
        }
        bash = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script)
        return subprocess.run(
            bash, env=environment, check=False, capture_output=True, text=True, cwd=self.directory
        )


def _evaluated(text: str, inputs: Mapping[str, str]) -> str:
    """Evaluate an expression of the few kinds that there are."""
    inside = re.fullmatch(r"\$\{\{ (.*) \}\}", text)
    if not inside:
        return text
    *conditions, wanted = (one.removeprefix("inputs.") for one in inside[1].split(" && "))
    return inputs[wanted] if all(inputs[one] for one in conditions) else ""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize("name", ["launch", "gc"])
def test_inputs_are_options(name: str) -> None:
    found, steps = action(name), action(name)["runs"]["steps"]
    known = options(name)
    assert set(found["inputs"]) <= set(known)
    if name == "launch":
        assert list(found["inputs"]) == list(known)
    variables = {f"CML_RUNNER_{known[one].name}".upper(): one for one in found["inputs"]}
    assert set(steps[-1]["env"]) == set(variables)
    for variable, text in steps[-1]["env"].items():
        assert f"inputs.{variables[variable]} }}}}" in text


@pytest.mark.parametrize("name", ["launch", "gc", "setup"])
def test_nothing_of_a_users_is_part_of_a_script(name: str) -> None:
    assert not any("${{" in step["run"] for step in action(name)["runs"]["steps"])


def test_outputs_are_what_a_launch_tells(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "forge").mkdir()
    where = ("--repo", (tmp_path / "forge").as_uri(), "--cloud", "local", "--dry-run")
    fields = json.loads(cli.run("launch", *where, "--output", "json").out)
    for name, one in action("launch")["outputs"].items():
        assert name in fields
        assert one["value"] == f"${{{{ steps.launch.outputs.{name} }}}}"


def test_a_launch(job: Job, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "forge").mkdir()
    repo = (tmp_path / "forge").as_uri()
    wanted = {"repo": repo, "cloud": "local", "labels": "a,b", "cloud_metadata": "x=1 y=2"}
    *_, done = job.run("launch", **wanted, cloud_spot="true")
    assert done.returncode == 0, done.stderr
    outputs = parsed(job.output.read_text())
    assert (outputs["labels"], outputs["spot"]) == ("a,b", "true")
    assert json.loads(outputs["metadata"]) == {"x": "1", "y": "2"}
    cli.run("destroy", outputs["id"])


def test_no_cloud_is_no_reason_to_take_the_jobs_own_machine(job: Job) -> None:
    *_, done = job.run("launch")
    assert done.returncode == 2
    assert "cloud is missing" in done.stdout


@pytest.mark.parametrize(
    ("clouds", "extras"),
    [("", ""), ("local", ""), ("aws", "[aws]"), ("az,kubernetes,local", "[azure,kubernetes]")],
)
def test_setting_up(job: Job, clouds: str, extras: str) -> None:
    (done,) = job.run("setup", clouds=clouds)
    assert done.returncode == 0, done.stderr
    assert job.installed == f"{ACTIONS.parent}{extras}"
    assert job.path.read_text() == f"{job.directory}/cml-runner/bin\n"


def test_clearing_up(job: Job) -> None:
    *_, done = job.run("gc", cloud="local", repo="https://github.com/acme/model")
    assert done.returncode == 0, done.stderr
    assert job.installed == str(ACTIONS.parent)


def test_what_gitlab_includes() -> None:
    found = yaml.safe_load((ACTIONS / "gitlab.yml").read_text())
    assert found[".cml-runner-launch"]["script"] == ["cml-runner launch"]
    assert found[".cml-runner-launch"]["artifacts"]["reports"]["dotenv"] == "cml-runner.env"
