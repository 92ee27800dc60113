from __future__ import annotations

import os
import queue
import signal
from typing import TYPE_CHECKING, cast

import psutil
import pytest

from cml_runner.errors import AgentFailed
from cml_runner.model import Command, Exited, Troubled
from cml_runner.supervise.process import Process, scrubbed
from cml_runner.wait import until

if TYPE_CHECKING:
    from pathlib import Path

    from cml_runner.forges import Agent
    from cml_runner.model import Event


def test_nothing_secret_gets_through() -> None:
    environment = {
        "PATH": "/bin",
        "HOME": "/root",
        "https_proxy": "http://proxy",
        "SSL_CERT_FILE": "/ca",
        "AWS_REGION": "eu-west-1",
        "REPO_TOKEN": "x",
        "repo_token": "x",
        "GITHUB_TOKEN": "x",
        "CML_RUNNER_TOKEN": "x",
        "CML_RUNNER_CLOUD_SSH_PRIVATE": "x",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_SESSION_TOKEN": "x",
        "AZURE_CLIENT_SECRET": "x",
        "GOOGLE_APPLICATION_CREDENTIALS_DATA": "x",
        "KUBERNETES_CONFIGURATION": "x",
        "KUBECONFIG_DATA": "x",
        "ACTIONS_RUNTIME_TOKEN": "x",
        "DB_PASSWORD": "x",
        "STRIPE_API_KEY": "x",
        "LISTED": "x",
        "ALSO_LISTED": "x",
        "_CML_RUNNER_SENSITIVE_ENV": "LISTED:ALSO_LISTED:ABSENT",
        "INNOCENT": "https://user:s3cret@example.com",
    }
    kept = {"PATH", "HOME", "https_proxy", "SSL_CERT_FILE", "AWS_REGION"}
    assert set(scrubbed(environment, ("s3cret",))) == kept


class Talker:
    """An agent which is a shell script."""

    def parse(self, line: str) -> Event | None:
        return Troubled(message=line)

    def exited(self, code: int) -> Exited:
        return Exited(code=code)

    def abort(self, pid: int, reason: str = "") -> None:
        del reason
        os.kill(pid, signal.SIGUSR1)

    def stop(self, pid: int) -> None:
        os.kill(pid, signal.SIGTERM)


def start(directory: Path, script: str) -> tuple[Process, queue.Queue[Event]]:
    events: queue.Queue[Event] = queue.Queue()
    command = Command(arguments=("/bin/sh", "-c", script), directory=directory)
    return Process(cast("Agent", Talker()), command, (), events), events


def test_output_and_end_become_events(tmp_path: Path) -> None:
    process, events = start(tmp_path, "echo one; echo two >&2; exit 3")
    found = [events.get(timeout=10) for _ in range(3)]
    assert found == [Troubled(message="one"), Troubled(message="two"), Exited(code=3)]
    process.stop(1)
    process.abort()
    assert events.empty()


def test_what_ignores_us_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    script = "trap '' TERM; sleep 600 & echo $! > child; while :; do sleep 600; done"
    process, events = start(tmp_path, script)
    until(
        lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text(), "it", 10, 0.02
    )
    process.stop(0.2)
    child = int((tmp_path / "child").read_text())
    until(lambda: not psutil.pid_exists(child), "the child's end", 10, 0.02)
    assert events.get(timeout=10) == Exited(code=-9)


def test_nothing_comes_after_the_end(tmp_path: Path) -> None:
    """Or the end of an old agent would be taken for that of the new one."""
    script = "setsid sh -c 'sleep 3; echo late' & echo $! > child; sleep 600"
    process, events = start(tmp_path, script)
    until((tmp_path / "child").exists, "the child", 10, 0.02)
    process.stop(1)
    late = [one for one in psutil.process_iter() if "sleep 3; echo late" in text(one)]
    psutil.wait_procs(late, 10)
    assert Troubled(message="late") not in list(events.queue)


def text(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    command = Command(arguments=(str(tmp_path / "none"),), directory=tmp_path)
    with pytest.raises(AgentFailed, match="can't be started"):
        Process(cast("Agent", Talker()), command, (), queue.Queue())
