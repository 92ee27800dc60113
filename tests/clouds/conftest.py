"""What the tests of clouds share: how to wait, and the embedded cloud with its machines."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec
import psutil
import pytest

from cml_runner import wait
from cml_runner.clouds import local
from cml_runner.clouds.local.processes import VARIABLE, Process, alive, find
from cml_runner.errors import NotReady
from cml_runner.model import Identifier, Task
from tests.clouds.aws_rig import rig as aws
from tests.clouds.azure_rig import rig as azure
from tests.clouds.gcp_rig import rig as gcp
from tests.clouds.kubernetes_rig import rig as kubernetes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cml_runner.clouds import Plan
    from cml_runner.model import Happening, Notice
    from tests.clouds.aws_rig import AwsRig
    from tests.clouds.azure_rig import AzureRig
    from tests.clouds.gcp_rig import GcpRig
    from tests.clouds.kubernetes_rig import KubernetesRig
    from tests.lab.town import Country

T = TypeVar("T")

# A machine that does nothing until it is told to leave; it writes down that it was asked to end.
PROGRAM = """
trap 'touch "$LOCAL_CLOUD_MACHINE/asked"; exit 0' TERM
touch "$LOCAL_CLOUD_MACHINE/up"
while [ ! -e "$LOCAL_CLOUD_MACHINE/go" ]; do sleep 0.1 & wait $!; done
exec "{python}" -c "
import os, pathlib
from cml_runner.clouds.local import Cloud
from cml_runner.model import Identifier
task = pathlib.Path(os.environ['LOCAL_CLOUD_MACHINE']).parent.parent
Cloud(str(task.parent)).leave(Identifier.parse(task.name), '', last=False)
"
"""


def until(condition: Callable[[], T], timeout: float = 30) -> T:
    """Wait, not long, for something to be true, and return it."""
    return wait.until(condition, "what the test needs", timeout, every=0.02)


class LocalRig:
    """The embedded cloud, and what happens on its machines."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.monkeypatch = home, monkeypatch
        self.cloud = local.Cloud("us-west")
        self.cloud.grace = 2
        self.runs(PROGRAM.format(python=sys.executable))

    def runs(self, program: str) -> None:
        """Have machines that are launched from now on run this shell script."""
        path = self.home.parent / "program.sh"
        path.write_text(program)
        self.cloud.command = ("/bin/sh", str(path))

    def task(self, settings: str = "{}", tags: Mapping[str, str] | None = None) -> Task:
        return Task(id=Identifier.new("some task"), settings=settings, tags=tags or {})

    def launch(self, count: int, task: Task | None = None) -> Plan:
        """Create a task and its machines, and wait until these run."""
        plan = self.cloud.plan(task or self.task())
        for resource in plan.resources:
            assert resource.create()
        plan.group.resize(count)
        until(lambda: len(self.running(plan)) == count)
        return plan

    def running(self, plan: Plan) -> list[str]:
        return [one.id for one in plan.group.instances() if one.status == "running"]

    def up(self, plan: Plan, instance: str) -> Path:
        """Wait until a machine has booted, and return its directory."""
        machine = directory(plan) / "machines" / instance
        until((machine / "up").exists)
        return machine

    def leader(self, plan: Plan, instance: str) -> psutil.Process:
        path = directory(plan) / "machines" / instance / "machine.json"
        process = find(msgspec.json.decode(path.read_bytes(), type=Process))
        assert process
        return process

    def keeper(self, plan: Plan) -> psutil.Process | None:
        with suppress(FileNotFoundError):
            content = (directory(plan) / "keeper.json").read_bytes()
            found = find(msgspec.json.decode(content, type=Process))
            return found if alive(found) else None
        return None

    def die(self, plan: Plan, instance: str) -> None:
        self.leader(plan, instance).kill()

    def leave(self, plan: Plan, instance: str) -> None:
        (self.up(plan, instance) / "go").touch()

    def settings(self, plan: Plan) -> str:
        """Return the only place where the settings may be."""
        return str(directory(plan) / "bucket" / "settings.json")

    def say(self, plan: Plan, instance: str, key: str, text: str) -> None:
        assert instance
        plan.bucket.store.write(key, text.encode())

    def notice(self, plan: Plan, instance: str) -> Notice | None:
        with self.monkeypatch.context() as patch:
            patch.setenv(VARIABLE, str(directory(plan) / "machines" / instance))
            return local.Cloud.notice()

    def traces(self, secret: str) -> list[str]:
        """List the files and the processes in which a secret can be read."""
        found = [
            str(path)
            for path in self.home.rglob("*")
            if path.is_file() and secret.encode() in path.read_bytes()
        ]
        for process in self.processes():
            with suppress(psutil.Error):
                seen = [*process.cmdline(), *process.environ().values()]
                found += [process.name()] if any(secret in text for text in seen) else []
        return found

    def processes(self) -> list[psutil.Process]:
        """List the keepers and all that runs on machines."""
        return [one for one in psutil.process_iter() if self._ours(one) and alive(one)]

    def _ours(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            mine = str(self.home)
            seen = [*process.cmdline(), *process.environ().values()]
            return process.pid != os.getpid() and any(mine in text for text in seen)
        return False


def directory(plan: Plan) -> Path:
    return Path(unquote(urlsplit(plan.bucket.store.url).path)).parent


def messages(plan: Plan, kind: str) -> list[str]:
    events: list[Happening] = plan.group.events()
    return [event.message for event in events if event.kind == kind]


@pytest.fixture
def aws_rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[AwsRig]:
    yield from aws(monkeypatch)


@pytest.fixture
def azure_rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[AzureRig]:
    yield from azure(monkeypatch)


@pytest.fixture
def gcp_rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcpRig]:
    yield from gcp(tmp_path, monkeypatch)


@pytest.fixture
def kubernetes_rig(
    country: Country, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KubernetesRig]:
    yield from kubernetes(country, tmp_path, monkeypatch)


@pytest.fixture
def local_rig(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalRig]:
    rig = LocalRig(home, monkeypatch)
    yield rig
    for lease in rig.cloud.tasks():
        for resource in reversed(rig.cloud.plan(Task(id=lease.id)).resources):
            resource.delete()
    with suppress(NotReady):
        until(lambda: not rig.processes(), 5)
    left = rig.processes()
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    assert not left, "processes were left behind"
