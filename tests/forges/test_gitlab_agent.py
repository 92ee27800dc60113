"""GitLab's runner program as the agent installs, starts, understands and ends it."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import psutil
import pytest

from cml_runner.errors import AgentFailed, RunnerError
from cml_runner.forges.gitlab import Agent, Forge, agent
from cml_runner.model import (
    Credential,
    Exited,
    Job,
    JobEnded,
    JobStarted,
    Package,
    Ready,
    Registration,
    Troubled,
)
from cml_runner.wait import until
from tests.lab.gitlab import GitLab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cml_runner.model import Event
    from tests.forges.conftest import Started

REGISTRATION = Registration(
    url="https://git.example/a/b",
    name="one",
    labels=("cml",),
    single=False,
    secret="glrt-sesame",
    details={"server": "https://git.example"},
)
SINGLE = Registration(
    url="u", name="one", labels=(), single=True, secret="glrt-sesame", details={"server": "s"}
)


@pytest.fixture
def gl(monkeypatch: pytest.MonkeyPatch) -> Iterator[GitLab]:
    with GitLab() as there:
        there.add("a/b")
        monkeypatch.setenv("GITLAB_RUNNER_DOWNLOADS", there.downloads)
        monkeypatch.setenv("RUNNER_EXECUTOR", "shell")
        yield there


def _packages(gl: GitLab) -> list[Package]:
    return Forge(f"{gl.url}/a/b", Credential(token=gl.add_token())).packages()


# Installation


def test_install(gl: GitLab, tmp_path: Path, home: Path) -> None:
    for directory in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        assert Agent().install(directory, _packages(gl)) == "v18.5.0"
        assert os.access(directory / "gitlab-runner", os.X_OK)
    assert len(gl.asked("GET", ".*/gitlab-runner-linux-amd64")) == 1
    kept = [one.name for one in (home / "agents").iterdir() if not one.name.startswith(".")]
    assert kept == ["gitlab-runner-linux-x64-v18.5.0"]


def test_a_newer_version(gl: GitLab, tmp_path: Path, home: Path) -> None:
    Agent().install(tmp_path / "a", _packages(gl))
    gl.version, gl.releases = "18.6.1", ("v18.6.0",)
    assert Agent().install(tmp_path / "a", _packages(gl)) == "v18.6.0"
    kept = [one.name for one in (home / "agents").iterdir() if not one.name.startswith(".")]
    assert kept == ["gitlab-runner-linux-x64-v18.6.0"]


def test_wrong_checksum(gl: GitLab, tmp_path: Path) -> None:
    gl.checksum = "f" * 64
    with pytest.raises(AgentFailed, match="is not what GitLab says"):
        Agent().install(tmp_path / "a", _packages(gl))
    assert not (tmp_path / "a" / "gitlab-runner").exists()


def test_no_such_release(tmp_path: Path) -> None:
    with pytest.raises(AgentFailed, match="GitLab offers nothing"):
        Agent().install(tmp_path, [])


# The command


def test_in_a_shell(gl: GitLab, tmp_path: Path) -> None:
    command = Agent().command(tmp_path, REGISTRATION, volumes=["/a:/b"], idle_timeout=300)
    line = " ".join(command.arguments)
    assert line.startswith(f"{tmp_path}/gitlab-runner --log-format json run-single --name one")
    assert "--wait-timeout 360" in line
    assert f"--builds-dir {tmp_path}/builds" in line
    assert not {"--max-builds", "--docker-volumes"} & {*command.arguments}
    assert "sesame" not in line
    assert command.environment["CI_SERVER_TOKEN"] == "glrt-sesame"
    assert command.environment["CI_SERVER_URL"] == "https://git.example"
    assert Agent().programs() == {"git": "git"}


def test_one_job(gl: GitLab, tmp_path: Path) -> None:
    line = " ".join(Agent().command(tmp_path, SINGLE).arguments)
    assert "--max-builds 1" in line
    assert "--wait-timeout" not in line


def test_in_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docker").write_text("")
    (tmp_path / "docker").chmod(0o755)
    (tmp_path / "device").touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(agent, "SOCKET", tmp_path / "device")
    monkeypatch.setattr(agent, "GPU", tmp_path / "nowhere")
    found = Agent()
    assert found.programs() == {}
    line = " ".join(found.command(tmp_path, REGISTRATION, volumes=["/a:/b", "/c"]).arguments)
    assert "--docker-image ubuntu:24.04 --docker-volumes /a:/b --docker-volumes /c" in line
    assert "--builds-dir" not in line
    monkeypatch.setenv("DOCKER_IMAGE", "mine")
    monkeypatch.setattr(agent, "GPU", tmp_path / "device")
    command = found.command(tmp_path, REGISTRATION)
    assert "--docker-image mine --docker-gpus all" in " ".join(command.arguments)
    assert command.environment["RUNNER_EXECUTOR"] == "docker"


def test_containers_get_proxies_that_everybody_may_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNNER_EXECUTOR", "docker")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@proxy:3128")
    monkeypatch.setenv("NO_PROXY", "localhost,.corp")
    line = " ".join(Agent().command(tmp_path, REGISTRATION).arguments)
    for name in ("HTTPS_PROXY", "https_proxy"):
        assert f" --env {name}=http://proxy:3128" in line
    for name in ("NO_PROXY", "no_proxy"):
        assert f" --env {name}=localhost,.corp" in line
    assert "secret" not in line
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:3128")
    assert "127.0.0.1" not in " ".join(Agent().command(tmp_path, REGISTRATION).arguments)


def test_a_private_authority(gl: GitLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "CI_SERVER_TLS_CA_FILE"
    assert name not in Agent().command(tmp_path, REGISTRATION).environment
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/ca.pem")
    assert Agent().command(tmp_path, REGISTRATION).environment[name] == "/ca.pem"
    monkeypatch.setenv("SSL_CERT_FILE", "/ca.pem")  # which its program reads
    assert name not in Agent().command(tmp_path, REGISTRATION).environment


# Its output


def _line(message: str, level: str = "info", **fields: str | float) -> str:
    return json.dumps({"level": level, "msg": message, "time": "2026-11-05T10:00:00Z", **fields})


RECEIVED = {"job": "77", "repo_url": "https://git.example/a/b.git", "runner": "abc"}
FORBIDDEN = "Checking for jobs... forbidden"
ABORTED = "Job failed (system failure): aborted: terminated"


@pytest.mark.parametrize(
    ("line", "event"),
    [
        (_line("Starting runner for https://git.example with token abc ..."), Ready()),
        (
            _line("Checking for jobs... received", "info", **RECEIVED),
            JobStarted(job=Job(name="job 77", id="77", url="https://git.example/a/b/-/jobs/77")),
        ),
        (
            _line("Job succeeded", duration_s=1.5, **{"job-status": "success"}),
            JobEnded(succeeded=True),
        ),
        (_line("Job failed: exit status 1\n", "warning", exit_code=1), JobEnded(succeeded=False)),
        (_line(ABORTED, "error"), JobEnded(succeeded=False)),
        (
            _line(FORBIDDEN, "error"),
            Troubled(
                message="Checking for jobs... forbidden (its runner was removed)", cut_off=True
            ),
        ),
        (
            _line("Checking for jobs... failed", "warning", status="502 Bad Gateway"),
            Troubled(message="Checking for jobs... failed (502 Bad Gateway)"),
        ),
        (_line("Missing Token", "fatal"), Troubled(message="Missing Token")),
        (_line("Requested quit, waiting for builds to finish", "warning"), None),
        (_line("Checking for jobs... nothing", "debug"), None),
        ("Job succeeded", None),
        ("[]", None),
        ("7", None),
        ('{"msg": 7}', None),
        ("", None),
    ],
)
def test_lines(line: str, event: Event | None) -> None:
    assert Agent().parse(line) == event


def test_exit_codes() -> None:
    found = Agent()
    assert found.exited(0) == Exited(code=0, reason="it was done")
    assert not found.exited(1).again
    assert found.exited(-15).reason == "it was ended by SIGTERM"


def test_a_program_that_is_weary_is_started_again() -> None:
    found = Agent()
    found.parse(_line("This runner has not received a job in 60 seconds, so now exiting"))
    assert found.exited(0).again
    found.parse(_line("Starting runner for https://git.example with token abc ..."))
    assert not found.exited(0).again


# The program itself


@pytest.fixture
def running(
    gl: GitLab, tmp_path: Path, start: Callable[..., Started]
) -> Callable[[], tuple[Agent, Started]]:
    def one() -> tuple[Agent, Started]:
        forge = Forge(f"{gl.url}/a/b", Credential(token=gl.add_token()))
        found = Agent()
        found.install(tmp_path, forge.packages())
        registration = forge.register("one", ["cml"], single=False, arch="x64")
        return found, start(found, found.command(tmp_path, registration))

    return one


def test_a_stubborn_job_is_killed_at_once(
    gl: GitLab, running: Callable[[], tuple[Agent, Started]], tmp_path: Path
) -> None:
    stubborn = f"trap '' TERM; echo $$ > {tmp_path}/pid; while true; do sleep 0.1; done"
    job = gl.add_job("a/b", "train", stubborn)
    found, started = running()
    until((tmp_path / "pid").exists, "the job", 20, 0.05)
    found.abort(started.pid)
    found.stop(started.pid)  # a second signal would be one too many
    assert started.ended() == 0
    assert (job.status, job.failure) == ("failed", "runner_system_failure")
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_draining_program_takes_no_other_job(
    gl: GitLab, running: Callable[[], tuple[Agent, Started]], tmp_path: Path
) -> None:
    first = gl.add_job("a/b", "first", f"touch {tmp_path}/started; sleep 1")
    second = gl.add_job("a/b", "second", "true")
    found, started = running()
    until((tmp_path / "started").exists, "the job", 20, 0.05)
    found.drain(started.pid)
    assert started.ended() == 0
    assert (first.status, second.status) == ("success", "pending")


def test_a_runner_that_is_removed_by_hand(
    gl: GitLab, running: Callable[[], tuple[Agent, Started]]
) -> None:
    found, started = running()
    started.wait(Ready)
    gl.runners.clear()
    assert started.wait(Troubled).cut_off
    found.stop(started.pid)
    assert started.ended() == 0


def test_leaving(gl: GitLab) -> None:
    forge = Forge(f"{gl.url}/a/b", Credential(token=gl.add_token()))
    registration = forge.register("one", ["cml"], single=True, arch="x64")
    gl.fault("DELETE", "/api/v4/runners", status=500)
    with pytest.raises(RunnerError, match="status 500"):
        Agent().leave(registration)
    for _ in range(2):
        Agent().leave(registration)
    assert gl.runners == {}


def test_the_stand_in_knows_its_arguments(gl: GitLab, tmp_path: Path) -> None:
    """So that a test would fail if we gave the program what it doesn't know."""
    found = Agent()
    found.install(tmp_path, _packages(gl))
    command = [str(tmp_path / "gitlab-runner"), "run-single", "--no-such-flag"]
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0


def test_what_an_image_brings_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought = tmp_path / "gitlab-runner"
    brought.write_text("#!/bin/sh\nprintf 'Version:      18.5.0\\nGit revision: bda84871\\n'\n")
    brought.chmod(0o755)
    monkeypatch.setattr(agent, "BROUGHT", brought)
    directory = tmp_path / "mine"
    assert Agent().install(directory, []) == "18.5.0"
    assert (directory / "gitlab-runner").resolve() == brought
