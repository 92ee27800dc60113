"""What every test can count on: a clean environment, a home of its own, and no network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from pytest_socket import socket_allow_hosts

from cml_runner import steps, trust
from cml_runner.clouds.local import Cloud
from cml_runner.model import Task
from cml_runner.signals import ENDING
from tests.lab import cluster
from tests.lab.internet import GATEWAY
from tests.lab.town import Country
from tests.worlds import WORLDS, World, worlds

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

KEPT = ("PATH", "LANG", "TZ", "TMPDIR", "USER", "LOGNAME", "SHELL", "TERM", "PYTHONPATH")


def pytest_configure() -> None:
    """Start programs with no signal ignored, as people do, however the tests were started.

    A script's background jobs ignore SIGINT, and what nohup starts SIGHUP; programs inherit that,
    but no handler: one that does nothing is the same to the tests themselves.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (*ENDING, signal.SIGQUIT, signal.SIGTSTP):
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep all that needs the cluster together, where workers have groups: one is heavy enough."""
    for item in items:
        if "kubernetes" in item.nodeid and item.get_closest_marker("lab"):
            item.add_marker(pytest.mark.xdist_group("cluster"))


@pytest.fixture(autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing of the machine or of the CI job that runs the tests leak into them."""
    for name in os.environ:
        if not name.startswith(("LC_", "PYTEST_", "LAB_")) and name not in KEPT:
            monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("CML_RUNNER_HOME", str(home / ".cml-runner"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # this machine may be one of EC2
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", "")  # or of Azure
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # or one of Google's
    monkeypatch.setattr(trust, "ANCHORS", ())  # or one of a company with an authority of its own


@pytest.fixture(scope="session", autouse=True)
def _descriptions() -> Iterator[None]:
    """Read the SDK's description of each service of AWS once, not for each of many sessions."""
    from botocore.loaders import JSONFileLoader

    load = cache(JSONFileLoader().load_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", lambda _self, path: load(path))
        yield


@pytest.fixture(autouse=True)
def _network() -> Iterator[None]:
    """Refuse every connection but those to this machine, and to the lab's own internet."""
    socket_allow_hosts(["127.0.0.1", "::1", GATEWAY], allow_unix_socket=True)
    yield
    socket_allow_hosts(None)


@pytest.fixture(scope="session")
def country(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Country]:
    """A Kubernetes cluster, for all tests that want one."""
    prepared = Path(os.environ.get("LAB_DIRECTORY", "/nonexistent"))
    if reason := cluster.missing(prepared):
        pytest.skip(f"the lab {reason}")
    with Country(prepared, tmp_path_factory.mktemp("country")) as found:
        yield found


@pytest.fixture
def home() -> Path:
    """Where cml-runner keeps its things in this test."""
    return Path(os.environ["CML_RUNNER_HOME"])


@dataclass
class Cli:
    """The real program, in processes of its own; none of them outlives the test."""

    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "cml_runner", *arguments],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        return process

    def run(
        self, *arguments: str, environment: Mapping[str, str] | None = None, code: int = 0
    ) -> Done:
        process = self.start(*arguments, environment=environment)
        out, err = process.communicate(timeout=90)
        assert process.returncode == code, f"exit code {process.returncode}: {err}"
        return Done(out, err)


@dataclass(frozen=True)
class Done:
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(home: Path) -> Iterator[Cli]:
    found = Cli()
    yield found
    for process in found.running:
        process.kill()
        process.communicate()
    for region in (home / "local").glob("*/"):
        for lease in Cloud(str(region)).tasks():
            steps.delete(Cloud(str(region)).plan(Task(id=lease.id)).resources)
    assert processes_of(home) == [], "processes are left behind"


def processes_of(home: Path, *words: str) -> list[psutil.Process]:
    """List what runs in this home (machines, agents, jobs, keepers), and has these arguments."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            own = process.environ().get("CML_RUNNER_HOME") == str(home)
            marked = process.environ().get("LOCAL_CLOUD_MACHINE", "").startswith(str(home))
            fits = all(word in process.cmdline() for word in words)
            if (own or marked) and fits and process.pid != os.getpid():
                found.append(process)
    return found


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    yield from worlds(request.param, tmp_path)
