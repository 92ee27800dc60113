"""What CI systems include: the same options as the program, and it runs."""

from __future__ import annotations

import json
import os
import re
import shutil
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

    def run(
        self, name: str, path: str = "", **inputs: str
    ) -> list[subprocess.CompletedProcess[str]]:
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
            own |= {"PATH": path} if path else {}
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


class Computer:
    """A computer for setting up: what is on its PATH is what a test puts there, and bash's own."""

    def __init__(self, job: Job) -> None:
        self.job, self.programs = job, job.directory / "programs"
        self.programs.mkdir()
        for name in ("bash", "cat", "chmod", "cp", "dirname", "mkdir", "rm"):
            found = shutil.which(name)
            assert found
            (self.programs / name).symlink_to(found)
        shutil.rmtree(job.directory / "cml-runner")

    def has(self, name: str, script: str) -> None:
        """Put a program there; `$said` is where it writes down what it was called with."""
        said = f'said="{self.job.directory}/said"\necho "{name} $*" >>"$said"\n'
        (self.programs / name).write_text(f"#!/bin/bash\n{said}{script}\n")
        (self.programs / name).chmod(0o755)

    def set_up(self, **inputs: str) -> subprocess.CompletedProcess[str]:
        (done,) = self.job.run("setup", path=str(self.programs), **inputs)
        return done

    @property
    def said(self) -> list[str]:
        return (self.job.directory / "said").read_text().splitlines()


@pytest.fixture
def computer(job: Job) -> Computer:
    return Computer(job)


# Stand-ins for Python and uv: what they leave behind in an environment are the stubs of above.
MAKE = """\
    mkdir -p "$place/%(bin)s"
    for one in %(names)s; do
        printf '#!/bin/bash\\necho "%%s $*" >>"%%s"\\n' "$one" "$said" >"$place/%(bin)s/$one"
        chmod +x "$place/%(bin)s/$one"
    done
"""
UNIX = {"bin": "bin", "names": "python pip cml-runner"}
PYTHON = """\
case "$*" in
    -c*) exit 0 ;;
    "-m venv "*) place=$3
%s ;;
    *) exit 1 ;;
esac"""
NO_VENV = "mkdir -p $3/bin; echo 'ensurepip is not available'; exit 1"
UV = f"""\
if [ "$1" = venv ]; then
    place="${{@: -1}}"
{MAKE % {**UNIX, "names": "python cml-runner"}}
fi"""


def test_setting_up_with_venv(computer: Computer) -> None:
    computer.has("python3", PYTHON % (MAKE % UNIX))
    done = computer.set_up(clouds="aws")
    assert done.returncode == 0, done.stderr
    assert computer.said[-2].startswith("pip install ")
    assert computer.said[-2].endswith(f" {ACTIONS.parent}[aws]")
    assert computer.said[-1] == "cml-runner --version"
    assert computer.job.path.read_text() == f"{computer.job.directory}/cml-runner/bin\n"


def test_setting_up_without_venv(computer: Computer) -> None:
    computer.has("python3", PYTHON % NO_VENV)
    computer.has("uv", UV)
    done = computer.set_up(clouds="aws")
    assert done.returncode == 0, done.stderr
    place = f"{computer.job.directory}/cml-runner"
    assert computer.said[-3:] == [
        f"uv venv --quiet --python >=3.10 {place}",
        f"uv pip install --quiet --python {place}/bin/python {ACTIONS.parent}[aws]",
        "cml-runner --version",
    ]
    assert computer.set_up(clouds="gcp").returncode == 0, "it may be called again"
    assert computer.said[-2].endswith(f" {ACTIONS.parent}[gcp]")


def test_setting_up_with_an_old_python_and_uv(computer: Computer) -> None:
    computer.has("python3", "exit 1")
    computer.has("uv", UV)
    assert computer.set_up().returncode == 0


def test_setting_up_with_pip_alone(computer: Computer) -> None:
    computer.has("uv", UV)
    uv = computer.job.directory / "uv"
    (computer.programs / "uv").rename(uv)
    put = f'mkdir -p "${{@: -1}}/bin"; cp {uv} "${{@: -1}}/bin/uv"'
    computer.has(
        "python3", PYTHON.replace("    *) exit", f'    "-m pip "*) {put} ;;\n    *) exit') % NO_VENV
    )
    done = computer.set_up(clouds="aws")
    assert done.returncode == 0, done.stderr
    assert computer.said[-2].startswith("uv pip install ")


@pytest.mark.parametrize("python", ["", "exit 1", PYTHON % NO_VENV])
def test_what_is_missing_is_said_in_one_line(computer: Computer, python: str) -> None:
    if python:
        computer.has("python3", python)
    done = computer.set_up(clouds="aws")
    assert (done.returncode, done.stderr) == (1, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith("::error::cml-runner needs Python 3.10")


def test_setting_up_on_windows(computer: Computer) -> None:
    names = {"bin": "Scripts", "names": "python.exe pip.exe cml-runner.exe"}
    computer.has("python", PYTHON % (MAKE % names))
    computer.has("cygpath", """[ "$1" = -m ] && echo "$2" || echo "${2//\\//\\\\}" """)
    script = computer.job.directory / "cml-runner" / "bin" / "cml-runner"
    done = computer.set_up(clouds="aws")
    assert (computer.job.directory / "cml-runner" / "bin" / "cml-runner.exe").exists(), done.stderr
    assert [one for one in computer.said if one.startswith("pip.exe install ")]
    assert computer.job.path.read_text() == f"{script.parent}\n".replace("/", "\\")


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
