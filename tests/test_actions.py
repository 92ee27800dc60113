"""What CI systems include: the same options as the program, and it runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
import yaml

from cml_runner.cli import cli
from cml_runner.forges.local import Forge
from cml_runner.wait import until
from tests.cli.test_ci import parsed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.conftest import Cli

ACTIONS = Path(__file__).parent.parent / "actions"
EXAMPLES = ACTIONS.parent / ".github" / "examples"
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
        self.state = directory / "state"
        self.output.touch()
        self.state.touch()
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
        """Run an action's steps, as far as GitHub would; after the last, the one for the end."""
        given = {**_defaults(name), **{key.replace("_", "-"): one for key, one in inputs.items()}}
        runs = action(name)["runs"]
        if runs["using"].startswith("node"):
            return self._node(ACTIONS / name, runs, given)
        done = []
        for step in runs["steps"]:
            assert step["shell"] == "bash"
            own = {key: _evaluated(text, given) for key, text in step.get("env", {}).items()}
            own["GITHUB_ACTION_PATH"] = str(ACTIONS / name)
            bash = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"])
            done.append(self._run(bash, own))
            if done[-1].returncode:
                break
        return done

    def start(self, name: str, **inputs: str) -> subprocess.Popen[str]:
        """Start the main step of one in Node."""
        given = {**_defaults(name), **{key.replace("_", "-"): one for key, one in inputs.items()}}
        main = str(ACTIONS / name / action(name)["runs"]["main"])
        return subprocess.Popen(
            ("node", main),
            env=self._environment(_inputs(given)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
        )

    def _node(
        self, place: Path, runs: Mapping[str, str], given: Mapping[str, str]
    ) -> list[subprocess.CompletedProcess[str]]:
        main = self._run(("node", str(place / runs["main"])), _inputs(given))
        state = parsed(self.state.read_text())
        kept = {f"STATE_{key}": value for key, value in state.items()}
        return [main, self._run(("node", str(place / runs["post"])), {**_inputs(given), **kept})]

    def _environment(self, own: Mapping[str, str]) -> dict[str, str]:
        return {
            **os.environ,
            "RUNNER_TEMP": str(self.directory),
            "GITHUB_OUTPUT": str(self.output),
            "GITHUB_PATH": str(self.path),
            "GITHUB_STATE": str(self.state),
            **own,
        }

    def _run(
        self, command: Sequence[str], own: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self._environment(own),
            check=False,
            capture_output=True,
            text=True,
            cwd=self.directory,
        )


def _defaults(name: str) -> dict[str, str]:
    return {key: one.get("default", "") for key, one in action(name)["inputs"].items()}


def _inputs(given: Mapping[str, str]) -> dict[str, str]:
    """Name the variables of an action in Node, as GitHub does."""
    return {f"INPUT_{key.upper()}": value for key, value in given.items()}


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


def test_inputs_of_a_launch_are_all_its_options() -> None:
    assert list(action("launch")["inputs"]) == list(options("launch"))


@pytest.mark.parametrize("name", ["recover", "gc"])
def test_inputs_are_options(name: str) -> None:
    found, steps = action(name), action(name)["runs"]["steps"]
    known = options(name)
    found["inputs"].pop("run", None)  # an argument
    steps[-1]["env"].pop("RUN", None)
    assert set(found["inputs"]) <= set(known)
    variables = {f"CML_RUNNER_{known[one].name}".upper(): one for one in found["inputs"]}
    assert set(steps[-1]["env"]) == set(variables)
    for variable, text in steps[-1]["env"].items():
        assert f"inputs.{variables[variable]} }}}}" in text


@pytest.mark.parametrize("name", ["gc", "recover", "setup"])
def test_nothing_of_a_users_is_part_of_a_script(name: str) -> None:
    assert not any("${{" in step["run"] for step in action(name)["runs"]["steps"])


def test_outputs_are_what_a_launch_tells(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "forge").mkdir()
    where = ("--repo", (tmp_path / "forge").as_uri(), "--cloud", "local", "--dry-run")
    fields = json.loads(cli.run("launch", *where, "--output", "json").out)
    assert set(action("launch")["outputs"]) <= set(fields)


def test_a_launch(job: Job, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "forge").mkdir()
    repo = (tmp_path / "forge").as_uri()
    wanted = {"repo": repo, "cloud": "local", "labels": "a,b", "cloud_metadata": "x=1 y=2"}
    done, end = job.run("launch", **wanted, cloud_spot="true")
    assert done.returncode == 0, done.stderr
    assert job.installed == str(ACTIONS.parent)
    outputs = parsed(job.output.read_text())
    assert (outputs["labels"], outputs["spot"]) == ("a,b", "true")
    assert json.loads(outputs["metadata"]) == {"x": "1", "y": "2"}
    assert end.returncode == 0, end.stderr
    assert re.search(rf"id +{outputs['id']}\n", end.stdout), "the end tells what became of it"
    assert "ready" in end.stdout
    cli.run("destroy", outputs["id"])


def test_a_launch_that_is_cancelled_leaves_nothing(job: Job, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "forge").mkdir()
    repo, script = (tmp_path / "forge").as_uri(), tmp_path / "script"
    script.write_text("sleep 60")  # so that it can't be online yet
    more = {"cloud": "local", "cloud_startup_script": f"@{script}"}
    process = job.start("launch", repo=repo, **more)
    until(lambda: json.loads(cli.run("list", "--output", "json").out), "the machine", 30, 0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert json.loads(cli.run("list", "--output", "json").out) == []
    assert "STATE_id" not in job.state.read_text()


def test_no_cloud_is_no_reason_to_take_the_jobs_own_machine(job: Job) -> None:
    done, end = job.run("launch")
    assert (done.returncode, end.returncode, end.stdout) == (2, 0, "")
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


def test_recovering(job: Job, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "forge").mkdir()
    repo = Forge(str(tmp_path / "forge"))
    number = repo.submit("train", "#!/bin/sh\nexit 3", ("cml",)).id
    cli.run("launch", "--repo", repo.url, "--single")
    *_, done = job.run("recover", run=f"{repo.url}/done/{number}")
    assert done.returncode == 0, done.stderr
    assert "nothing was interrupted" in done.stderr
    assert parsed(job.output.read_text())["count"] == "0"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yml")), ids=lambda one: str(one.name))
def test_examples_name_what_there_is(file: Path) -> None:
    text = file.read_text()
    step = r"OWNER/cml-runner/actions/(\w+)@main\n(?:        with:\n((?:          .*\n)+))?"
    used = re.findall(step, text)
    for name, given in used:
        inputs = re.findall(r"^          ([\w-]+):", given, re.MULTILINE)
        assert set(inputs) <= set(action(name)["inputs"])
    for line in re.findall(r"cml-runner launch (.*)", text):
        assert set(re.findall(r"--([a-z-]+)", line)) <= set(options("launch"))
    assert used or "cml-runner launch " in text
