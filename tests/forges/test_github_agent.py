"""GitHub's runner program: what we make of its output, its exit codes and its hooks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cml_runner import forges
from cml_runner.errors import AgentFailed
from cml_runner.forges.github import Agent, Forge
from cml_runner.model import (
    Credential,
    Job,
    JobEnded,
    JobStarted,
    Ready,
    Registration,
    Troubled,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lab.github import GitHub

NOW = "2026-11-23 17:59:14Z: "
SECRET = "AABRA-CADABRA"
RECORDER = f"""\
#!{sys.executable} -IS
import json, os, sys
from pathlib import Path
text = json.dumps([sys.argv[1:], dict(os.environ)])
Path("recorded").write_text(text)
Path(".runner").touch()
print("said", os.environ["ACTIONS_RUNNER_INPUT_TOKEN"])
sys.exit(int(os.path.exists("fail")))
"""


@pytest.fixture
def agent() -> forges.Agent:
    return forges.agent("github")


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A directory with a program that only writes down how it was started."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "Runner.Listener"
    program.write_text(RECORDER)
    program.chmod(0o755)
    return tmp_path


def _registration(
    *labels: str, single: bool = False, group: str = "", secret: str = SECRET
) -> Registration:
    url = "https://github.com/o/r"
    return Registration(
        url=url, name="one", labels=labels, single=single, secret=secret, group=group
    )


# Output


@pytest.mark.parametrize(
    ("line", "event"),
    [
        (NOW + "Listening for Jobs", Ready()),
        (NOW + "Listening for Jobs\r", Ready()),
        (NOW + "Running job: build / test (3.10)", JobStarted(job=Job(name="build / test (3.10)"))),
        (NOW + "Job a completed with result: Succeeded", JobEnded(succeeded=True)),
        (NOW + "Job a completed with result: SucceededWithIssues", JobEnded(succeeded=True)),
        (NOW + "Job a completed with result: Failed", JobEnded(succeeded=False)),
        (NOW + "Job a completed with result: Canceled", JobEnded(succeeded=False)),
        (NOW + "Job a completed with result: Abandoned", JobEnded(succeeded=False)),
        # Names are whatever the workflow's author thought of.
        (
            NOW + "Running job: Job a completed with result: Succeeded",
            JobStarted(job=Job(name="Job a completed with result: Succeeded")),
        ),
        (
            NOW + "Job Listening for Jobs completed with result: Failed",
            JobEnded(succeeded=False),
        ),
        (
            NOW + "Job completed with result: Succeeded completed with result: Failed",
            JobEnded(succeeded=False),
        ),
        ("Listening for Jobs", None),
        ("Running job: a", None),
        ("x " + NOW + "Running job: a", None),
        ("Job a completed with result: Succeeded", None),
        (NOW + "Runner reconnected.", None),
        ("√ Connected to GitHub", None),
        ("Current runner version: '2.337.0'", None),
        ("", None),
    ],
)
def test_parse(agent: forges.Agent, line: str, event: object) -> None:
    assert agent.parse(line) == event


@pytest.mark.parametrize(
    "text",
    [
        "A session for this runner already exists.",
        "Failed to create a session. The runner registration has been deleted from the server.",
        "The runner no longer exists on the server. Please reconfigure the runner.",
        "An error occurred: Runner version v2.300.0 is deprecated and cannot receive messages.",
        "The local machine's clock may be out of sync with the server time.",
        "Runner connect error: nothing there. Retrying until reconnected.",
    ],
)
def test_complaints(agent: forges.Agent, text: str) -> None:
    assert agent.parse(text) == agent.parse(NOW + text) == Troubled(message=text)
    assert agent.parse(f"{NOW}Running job: {text}") == JobStarted(job=Job(name=text))


@pytest.mark.parametrize(
    ("code", "again", "outdated"),
    [
        (0, False, False),
        (1, False, False),
        (2, True, False),
        (3, True, True),
        (4, True, True),
        (5, True, False),
        (6, True, False),
        (7, False, True),
        (-9, False, False),
        (134, False, False),
    ],
)
def test_exit_codes(agent: forges.Agent, code: int, *, again: bool, outdated: bool) -> None:
    exited = agent.exited(code)
    assert (exited.code, exited.again, exited.outdated) == (code, again, outdated)
    assert exited.reason


def test_the_signal_that_ended_it(agent: forges.Agent) -> None:
    assert "SIGKILL" in agent.exited(-9).reason


@pytest.mark.parametrize(
    ("mode", "code"), [("retryable", 2), ("update", 3), ("deprecated", 7), ("conflict", 5)]
)
def test_real_exits(gh: GitHub, tmp_path: Path, mode: str, code: int) -> None:
    forge = Forge(f"{gh.url}/owner/repo", Credential(token=gh.add_token("repo")))
    gh.mode("one", *[mode] * 50)
    agent = Agent()
    agent.install(tmp_path, forge.packages())
    command = agent.command(tmp_path, forge.register("one", [], single=False, arch="x64"))
    done = subprocess.run(
        command.arguments,
        cwd=command.directory,
        env={"PATH": os.environ["PATH"], "STAND_IN_CONFLICT_LIMIT": "0", **command.environment},
        capture_output=True,
        timeout=60,
        check=False,
    )
    exited = agent.exited(done.returncode)
    assert exited.code == code
    assert exited.again or exited.outdated


# Registration


def test_configuration(
    agent: forges.Agent, recorder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPO_TOKEN", "ghp_secret")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    registration = _registration("self-hosted", "Linux", "X64", "cml", "gpu", group="Big Ones")
    command = agent.command(recorder, registration)
    assert command.arguments == (str(recorder / "bin" / "Runner.Listener"), "run")
    assert SECRET not in str(command.environment)
    text = (recorder / "recorded").read_text()
    arguments, environment = json.loads(text)
    expected = "configure --unattended --replace --disableupdate --url https://github.com/o/r"
    expected += " --name one --work _work --labels cml,gpu --runnergroup"
    assert arguments == [*expected.split(), "Big Ones"]
    assert environment["ACTIONS_RUNNER_INPUT_TOKEN"] == SECRET
    assert environment["https_proxy"] == "http://proxy.example:3128"
    assert "ghp_secret" not in text


def test_only_own_labels(agent: forges.Agent, recorder: Path) -> None:
    agent.command(recorder, _registration("self-hosted", "Linux", "ARM64"))
    assert "--labels" not in (recorder / "recorded").read_text()


def test_registered_once_with_one_token(agent: forges.Agent, recorder: Path) -> None:
    first = agent.command(recorder, _registration("cml"))
    (recorder / "recorded").unlink()
    assert agent.command(recorder, _registration("cml")) == first
    assert not (recorder / "recorded").exists()
    agent.command(recorder, _registration("cml", secret="ANOTHER"))
    assert (recorder / "recorded").exists()


def test_failed_registration(agent: forges.Agent, recorder: Path) -> None:
    (recorder / "fail").touch()
    with pytest.raises(AgentFailed, match=r"exit 1\):\nsaid \*\*\*") as caught:
        agent.command(recorder, _registration("cml"))
    assert SECRET not in str(caught.value)
    (recorder / "fail").unlink()
    agent.command(recorder, _registration("cml"))


def test_no_program(agent: forges.Agent, tmp_path: Path) -> None:
    with pytest.raises(AgentFailed, match=r"Runner\.Listener"):
        agent.command(tmp_path, _registration("cml"))
    with pytest.raises(AgentFailed, match="nowhere"):
        agent.command(tmp_path / "nowhere", _registration("cml"))


def test_a_program_that_hangs(
    agent: forges.Agent, recorder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cml_runner.forges.github.agent.PATIENCE", 0.2)
    (recorder / "bin" / "Runner.Listener").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(AgentFailed, match="within") as caught:
        agent.command(recorder, _registration("cml"))
    assert SECRET not in str(caught.value)


def test_single(agent: forges.Agent, recorder: Path) -> None:
    agent.command(recorder, _registration("cml"))
    (recorder / "recorded").unlink()
    command = agent.command(recorder, _registration("cml", single=True))
    assert command.environment["ACTIONS_RUNNER_INPUT_JITCONFIG"] == SECRET
    assert SECRET not in " ".join(command.arguments)
    assert SECRET not in repr(command)
    assert not (recorder / "recorded").exists()
    assert not (recorder / ".runner").exists()


@pytest.mark.parametrize("uid", [0, 1000])
def test_root(
    agent: forges.Agent, recorder: Path, monkeypatch: pytest.MonkeyPatch, uid: int
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    environment = agent.command(recorder, _registration(single=True)).environment
    assert ("RUNNER_ALLOW_RUNASROOT" in environment) == (uid == 0)


@pytest.mark.parametrize("library", ["libicuuc.so.72", None])
def test_machines_without_icu(
    agent: forges.Agent, recorder: Path, monkeypatch: pytest.MonkeyPatch, library: str | None
) -> None:
    monkeypatch.setattr("ctypes.util.find_library", lambda _: library)
    environment = agent.command(recorder, _registration(single=True)).environment
    assert ("DOTNET_SYSTEM_GLOBALIZATION_INVARIANT" in environment) == (library is None)


# Hooks


def _hook(agent: forges.Agent, directory: Path, when: str, shell: str = "sh", **odd: str) -> int:
    command = agent.command(directory, _registration(single=True))
    return _run(command.environment[f"ACTIONS_RUNNER_HOOK_JOB_{when}"], shell, odd)


def _run(script: str, shell: str, variables: dict[str, str]) -> int:
    environment = {
        "PATH": os.environ["PATH"],
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_REPOSITORY": "o/r",
        "GITHUB_RUN_ID": "42",
        "GITHUB_RUN_ATTEMPT": "3",
        "RUNNER_NAME": "one",
        **variables,
    }
    command = [shutil.which(shell) or shell, "-e", script]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.stdout + done.stderr == b""
    return done.returncode


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_the_running_job(agent: forges.Agent, tmp_path: Path, shell: str) -> None:
    directory = tmp_path / "it's a $(dir)"
    directory.mkdir()
    seen = Job(name="build (3.10)")
    assert agent.job(directory, seen) == seen
    assert _hook(agent, directory, "STARTED", shell) == 0
    assert agent.job(directory, seen) == Job(
        name="build (3.10)",
        pipeline="o/r/actions/runs/42",
        attempt=3,
        runner="one",
        url="https://github.com/o/r/actions/runs/42/attempts/3",
    )
    assert _hook(agent, directory, "COMPLETED", shell) == 0
    assert agent.job(directory, seen) == seen


@pytest.mark.parametrize("odd", ["$(touch /tmp/owned)", "a'b\"c\\n%s", "two\nlines", "ü — 漢"])
def test_odd_values(agent: forges.Agent, tmp_path: Path, odd: str) -> None:
    assert _hook(agent, tmp_path, "STARTED", RUNNER_NAME=odd) == 0
    assert agent.job(tmp_path, Job(name="x")).runner == odd


@pytest.mark.parametrize("odd", ["", "x", "1.5"])
def test_no_attempt(agent: forges.Agent, tmp_path: Path, odd: str) -> None:
    assert _hook(agent, tmp_path, "STARTED", GITHUB_RUN_ATTEMPT=odd) == 0
    assert agent.job(tmp_path, Job(name="x")) == Job(name="x")


def test_hooks_never_fail(agent: forges.Agent, tmp_path: Path) -> None:
    directory = tmp_path / "agent"
    directory.mkdir()
    command = agent.command(directory, _registration(single=True))
    scripts = [
        command.environment[f"ACTIONS_RUNNER_HOOK_JOB_{w}"] for w in ("STARTED", "COMPLETED")
    ]
    (directory / ".cml-runner-job").mkdir()  # can be neither written nor removed
    (directory / ".cml-runner-job.new").mkdir()
    assert [_run(script, "sh", {}) for script in scripts] == [0, 0]
    assert [_run(script, "sh", {"PATH": "/nowhere"}) for script in scripts] == [0, 0]
    assert agent.job(directory, Job(name="x")) == Job(name="x")


def test_a_note_which_a_killed_worker_left(agent: forges.Agent, tmp_path: Path) -> None:
    """The hook's parent is the worker."""
    command = agent.command(tmp_path, _registration(single=True))
    hook = command.environment["ACTIONS_RUNNER_HOOK_JOB_STARTED"]
    worker = f"sh -e {hook}; exit 0"
    variables = {"PATH": os.environ["PATH"], "GITHUB_REPOSITORY": "o/r", "GITHUB_RUN_ATTEMPT": "1"}
    subprocess.run(["sh", "-c", worker], env=variables, check=True)
    assert (tmp_path / ".cml-runner-job").exists()
    assert agent.job(tmp_path, Job(name="x")) == Job(name="x")


# Signals


def test_abort_without_a_job(agent: forges.Agent) -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & wait"]) as listener:
        agent.abort(listener.pid)
        assert listener.poll() is None
        listener.kill()


def test_no_process(agent: forges.Agent) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    agent.abort(gone.pid)
    agent.stop(gone.pid)
