"""Bitbucket's runner program as the agent installs, starts, understands and ends it."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from cml_runner.errors import AgentFailed
from cml_runner.forges.bitbucket import Agent, Forge, agent
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
from tests.lab.bitbucket import Bitbucket

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STAMP = "[2026-11-05 17:23:41,945] "
ONLINE = f'{STAMP}Updating runner status to "ONLINE" and checking for new steps assigned'
STEP = (
    f"{STAMP}Getting step StepId{{accountUuid={{a-1}}, repositoryUuid={{r-2}},"
    " pipelineUuid={p-3}, stepUuid={s-4}}."
)
DETAILS = {"workspace": "{w}", "repository": "{r}", "runner": "{u-1}", "client": "client"}
REGISTRATION = Registration(
    url="u", name="one", labels=("cml",), single=False, secret="ATOA-sesame", details=DETAILS
)


@pytest.fixture
def bb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bitbucket]:
    with Bitbucket() as there:
        for name, value in there.environment(tmp_path / "java").items():
            monkeypatch.setenv(name, value)
        yield there


def _packages(bb: Bitbucket) -> list[Package]:
    return Forge(f"{bb.url}/team/repo", Credential()).packages()


# Installation


def test_install(bb: Bitbucket, tmp_path: Path, home: Path) -> None:
    for directory in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        assert Agent().install(directory, _packages(bb)) == "3.24.0"
        assert (directory / "bin" / "runner.jar").exists()
    assert len(bb.asked("GET", "/_downloads/.*")) == 1
    kept = [one.name for one in (home / "agents").iterdir() if not one.name.startswith(".")]
    assert kept == ["bitbucket-pipelines-runner-linux-x64-3.24.0.tar.gz"]


def test_wrong_checksum(bb: Bitbucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bb.checksum = "f" * 64
    monkeypatch.setenv("BITBUCKET_RUNNER_PACKAGE", bb.archive)
    with pytest.raises(AgentFailed, match="is not what Atlassian says"):
        Agent().install(tmp_path / "a", _packages(bb))


def test_without_a_checksum(
    bb: Bitbucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("BITBUCKET_RUNNER_PACKAGE", bb.archive.partition("#")[0])
    caplog.set_level("INFO")
    Agent().install(tmp_path / "a", _packages(bb))
    assert "publishes no checksum" in caplog.text


def test_the_release_that_we_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITBUCKET_RUNNER_PACKAGE", raising=False)
    found = agent.package()
    assert {one.arch for one in found} == {"x64", "arm64"}
    assert found[0].version.startswith(f"{agent.MAJOR}.")
    assert found[0].url.startswith("https://product-downloads.atlassian.com/")


@pytest.mark.parametrize("content", [b"no archive", b""])
def test_broken_archives(bb: Bitbucket, tmp_path: Path, content: bytes) -> None:
    bb.fault("GET", "/_downloads/.*", 9, status=200, body=content.decode())
    packages = [
        Package(version="3.1.0", arch=one.arch, url=one.url, sha256="") for one in _packages(bb)
    ]
    with pytest.raises(AgentFailed, match="can't be installed"):
        Agent().install(tmp_path / "a", packages)


# The command


def test_the_secret_is_in_a_file_until_it_is_online(bb: Bitbucket, tmp_path: Path) -> None:
    found = Agent()
    found.install(tmp_path, _packages(bb))
    command = found.command(tmp_path, REGISTRATION)
    java, options, *rest = command.arguments
    assert java == f"{os.environ['JAVA_HOME']}/bin/java"
    assert rest == ["-jar", str(tmp_path / "bin" / "runner.jar")]
    assert "sesame" not in " ".join(command.arguments) + str(command.environment)
    file = tmp_path / options.removeprefix(f"@{tmp_path}/")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    lines = file.read_text().splitlines()
    prefix = '"-Dbitbucket.pipelines.runner.'
    assert f'{prefix}oauth.client.secret=ATOA-sesame"' in lines
    assert f'{prefix}account.uuid={{w}}"' in lines
    assert f'{prefix}runtime=linux-shell"' in lines
    assert found.parse(ONLINE) == Ready()
    assert not file.exists()
    assert found.parse(ONLINE) is None
    assert found.command(tmp_path, REGISTRATION) == command
    assert found.parse(ONLINE) == Ready()


def test_java_has_names_of_its_own_for_proxies(
    bb: Bitbucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Agent()
    found.install(tmp_path, _packages(bb))

    def options() -> list[str]:
        found.command(tmp_path, REGISTRATION)
        lines = (tmp_path / "java-options").read_text().splitlines()
        return [line.strip('"').removeprefix("-D") for line in lines if "roxy" in line]

    assert options() == []
    monkeypatch.setenv("NO_PROXY", "localhost, .corp,169.254.169.254")
    monkeypatch.setenv("http_proxy", "http://proxy:port")
    assert options() == []
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy:3128")
    monkeypatch.setenv("http_proxy", "http://other")
    assert options() == [
        *("https.proxyHost=proxy", "https.proxyPort=3128"),
        *("http.proxyHost=other", "http.proxyPort=80"),
        "http.nonProxyHosts=localhost|*.corp|169.254.169.254",
    ]


def test_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docker").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (tmp_path / "docker").chmod(0o755)
    (tmp_path / "socket").touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(agent, "SOCKET", tmp_path / "socket")
    found = Agent()
    assert found.programs() == {}
    assert found.install(tmp_path / "a", []) == "3"
    command = found.command(tmp_path / "a", REGISTRATION)
    assert command.arguments[:5] == ("docker", "run", "--rm", "--name", "runner-u-1")
    assert command.arguments[-1].endswith("bitbucket-pipelines-runner:3")
    assert command.environment["OAUTH_CLIENT_SECRET"] == "ATOA-sesame"
    assert command.environment["REPOSITORY_UUID"] == "{r}"
    assert "sesame" not in " ".join(command.arguments)
    found.parse(STEP)
    found.abort(1)
    pulled, listed = (tmp_path / "calls").read_text().splitlines()
    assert pulled.startswith("pull --quiet")
    assert listed == "ps --quiet --filter name=s-4"
    assert "HTTPS_PROXY" not in command.arguments
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy:3128")
    command = found.command(tmp_path / "a", REGISTRATION)
    assert "HTTPS_PROXY" in command.arguments
    assert command.environment["HTTPS_PROXY"] == "http://me:secret@proxy:3128"
    assert "secret" not in " ".join(command.arguments)


def test_an_image_that_cant_be_pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docker").write_text("#!/bin/sh\necho no route >&2; exit 1\n")
    (tmp_path / "docker").chmod(0o755)
    (tmp_path / "socket").touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(agent, "SOCKET", tmp_path / "socket")
    with pytest.raises(AgentFailed, match="can't be pulled: no route"):
        Agent().install(tmp_path / "a", [])


# Its output


def test_a_step() -> None:
    found = Agent()
    job = Job(name="step {s-4}", id="{r-2}/{p-3}/{s-4}")
    assert found.parse(STEP) == JobStarted(job=job)
    done = f"{STAMP}Completing step with result Result{{status={{}}, error=None}}."
    for status, good in (("PASSED", True), ("FAILED", False), ("ERROR", False)):
        assert found.parse(done.replace("{}", status)) == JobEnded(succeeded=good)


@pytest.mark.parametrize(
    ("line", "cut_off"),
    [
        ("Failed to reach the service", False),
        ("An error occurred whilst updating runner state: 401 Unauthorized", True),
        ("java.net.UnknownHostException: error", False),
    ],
)
def test_complaints(line: str, cut_off: bool) -> None:
    assert Agent().parse(STAMP + line) == Troubled(message=line, cut_off=cut_off)


@pytest.mark.parametrize(
    "line",
    [
        'Updating runner status to "ONLINE"',
        f"x {STEP}",
        "Completing step with result Result{status=PASSED",
        f"{STAMP}Setting runner state to executing step.",
        "",
    ],
)
def test_other_lines(line: str) -> None:
    assert Agent().parse(line) is None


@pytest.mark.parametrize(("code", "reason"), [(143, "told to end"), (1, "exit code 1")])
def test_exit_codes(code: int, reason: str) -> None:
    exited = Agent().exited(code)
    assert (exited.again, exited.outdated) == (False, False)
    assert reason in exited.reason


def test_an_end_by_a_signal() -> None:
    assert Agent().exited(-9) == Exited(code=-9, reason="it was ended by SIGKILL")


def test_what_the_machine_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITBUCKET_RUNNER_RUNTIME", "shell")
    assert set(Agent().programs()) == {"java", "git"}
