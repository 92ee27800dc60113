"""Google Cloud for the tests of clouds, without root: machines do nothing until they are told."""

from __future__ import annotations

import hashlib
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from cml_runner import boot
from cml_runner.boot.gcp import VARIABLE
from cml_runner.clouds.gcp import Cloud
from cml_runner.clouds.gcp.machine import DEADLINE, INTERRUPT
from cml_runner.model import Identifier, Machine, Program, Task
from cml_runner.wait import until
from tests.lab.gcp import GCP, ssh

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import pytest

    from cml_runner.clouds import Plan
    from cml_runner.model import Notice

PROGRAM = Program(
    wheel=b"wheel",
    sha256=hashlib.sha256(b"wheel").hexdigest(),
    index="https://index.example/simple/",
)


class Obedient(threading.Thread):
    """Ends machines that were told to go, as their supervisors would."""

    def __init__(self, gcp: GCP) -> None:
        super().__init__(daemon=True)
        self.gcp, self.over = gcp, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.05):
            for one in self.gcp.compute.alive():
                told = [one.metadata[key] for key in (INTERRUPT, DEADLINE) if key in one.metadata]
                if any(datetime.fromisoformat(at) < now() for at in told):
                    self.gcp.compute.powered_off(one.id)


class GcpRig:
    """One project, as a fake, and what happens on its machines."""

    def __init__(self, gcp: GCP, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gcp, self.monkeypatch = gcp, monkeypatch
        self.hosts: dict[str, str] = {}  # metadata services of machines
        for name, value in gcp.environment().items():
            monkeypatch.setenv(name, value)
        ssh.install(monkeypatch)
        self.cloud = Cloud("us-west")

    def task(self, settings: str = "{}", tags: Mapping[str, str] | None = None) -> Task:
        return Task(
            id=Identifier.new("some task"),
            settings=settings,
            machine=Machine(spot=True, disk=10),
            program=PROGRAM,
            tags=tags or {},
        )

    def launch(self, count: int, task: Task | None = None) -> Plan:
        plan = self.cloud.plan(replace(task or self.task(), count=max(count, 1)))
        for resource in plan.resources:
            assert resource.create()
        plan.group.resize(count)
        until(lambda: len(self.running(plan)) == count, "the machines", 10, 0.02)
        return plan

    def running(self, plan: Plan) -> list[str]:
        return [one.id for one in plan.group.instances() if one.status == "running"]

    def die(self, plan: Plan, instance: str) -> None:
        assert plan
        self.gcp.compute.crash(instance)

    def leave(self, plan: Plan, instance: str) -> None:
        with self.on(instance):
            identifier = Identifier.parse(str(plan.group.name))  # type: ignore[attr-defined]
            last = self.is_last(plan)
            Cloud("us-west1").leave(identifier, plan.bucket.store.url, last=last)

    @contextmanager
    def machine(self, plan: Plan, instance: str) -> Iterator[boot.Machine]:
        """Be on a machine, before our environment is there."""
        with self.on(instance):
            yield boot.machine(self.url(plan))

    def url(self, plan: Plan) -> str:
        """Return the URL that a machine gets."""
        return f"{plan.bucket.store.url}#gcp/us-west1/{plan.group.name}"  # type: ignore[attr-defined]

    def is_last(self, plan: Plan) -> bool:
        """Say what the machines would have agreed on."""
        groups = self.gcp.compute.groups
        (group,) = (one for one in groups.values() if one.name == plan.group.name)  # type: ignore[attr-defined]
        return len(group.members.keys() - group.leaving) == 1

    def say(self, plan: Plan, instance: str, key: str, text: str) -> None:
        assert instance
        plan.bucket.store.write(key, text.encode())

    def notice(self, plan: Plan, instance: str) -> Notice | None:
        assert plan
        with self.on(instance):
            return Cloud.notice()

    def settings(self, plan: Plan) -> str:
        return f"tasks/us-west1/{plan.group.name}/settings.json"  # type: ignore[attr-defined]

    def traces(self, secret: str) -> list[str]:
        """List where it stands: in objects, templates, machines or groups."""
        found = [key for key, content in self.gcp.objects().items() if secret.encode() in content]
        compute = self.gcp.compute
        found += [name for name, one in compute.templates.items() if secret in repr(one)]
        found += [one.name for one in compute.instances.values() if secret in repr(one)]
        return found + [one.name for one in compute.groups.values() if secret in repr(one)]

    @contextmanager
    def on(self, instance: str) -> Iterator[None]:
        """Be on a machine: its metadata service answers, and no other credentials are there."""
        host = self.hosts.get(instance)
        if host is None:
            host = self.hosts[instance] = self.gcp.serve(self.gcp.metadata(instance))
        with self.monkeypatch.context() as patch:
            for name in self.gcp.login():
                patch.delenv(name)
            patch.setenv(VARIABLE, host)
            yield


def now() -> datetime:
    return datetime.now(timezone.utc)


def rig(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcpRig]:
    """Open it, and close it; whatever a test leaves is no test's business."""
    with GCP(directory) as gcp:
        obedient = Obedient(gcp)
        obedient.start()
        found = GcpRig(gcp, monkeypatch)
        found.cloud.setup()
        yield found
        obedient.over.set()
        obedient.join()
