"""AWS for the tests of clouds, without root: machines that do nothing until they are told."""

from __future__ import annotations

import hashlib
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from cml_runner import boot
from cml_runner.boot.aws import VARIABLE
from cml_runner.clouds.aws import Cloud
from cml_runner.clouds.aws.machine import INTERRUPT
from cml_runner.model import Identifier, Machine, Program, Task
from cml_runner.wait import until
from tests.lab.aws import AWS, sessions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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

    def __init__(self, aws: AWS) -> None:
        super().__init__(daemon=True)
        self.aws, self.over = aws, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.05):
            for name, life in list(self.aws.instances.lives.items()):
                told = self.aws.instances.tags(name).get(INTERRUPT)
                if told and not life.ended and datetime.fromisoformat(told) < now():
                    self.aws.instances.powered_off(name)


class AwsRig:
    """One account, as a fake, and what happens on its machines."""

    def __init__(self, aws: AWS, monkeypatch: pytest.MonkeyPatch) -> None:
        self.aws, self.monkeypatch = aws, monkeypatch
        for name, value in aws.environment().items():
            monkeypatch.setenv(name, value)
        self.cloud = Cloud("us-west")
        sessions.install(monkeypatch)

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
        self.aws.instances.terminate("us-west-2", instance, "Server.InternalError")

    def leave(self, plan: Plan, instance: str) -> None:
        with self.on(instance):
            identifier = Identifier.parse(str(plan.group.name))  # type: ignore[attr-defined]
            last = len(plan.group.instances()) == 1
            Cloud("us-west-2").leave(identifier, plan.bucket.store.url, last=last)

    @contextmanager
    def machine(self, plan: Plan, instance: str) -> Iterator[boot.Machine]:
        with self.on(instance):
            name = plan.group.name  # type: ignore[attr-defined]
            yield boot.machine(f"{plan.bucket.store.url}#aws/us-west-2/{name}")

    def say(self, plan: Plan, instance: str, key: str, text: str) -> None:
        assert instance
        plan.bucket.store.write(key, text.encode())

    def notice(self, plan: Plan, instance: str) -> Notice | None:
        assert plan
        with self.on(instance):
            return Cloud.notice()

    def settings(self, plan: Plan) -> str:
        return f"tasks/{plan.group.name}/settings.json"  # type: ignore[attr-defined]

    def traces(self, secret: str) -> list[str]:
        """List where it stands: in objects, templates, user data, tags or requests but to S3."""
        found = [key for key, content in self.aws.objects().items() if secret.encode() in content]
        lives = self.aws.instances.lives.values()
        found += [life.instance.id for life in lives if secret in repr(life)]
        groups = self.aws.groups.groups.values()
        found += [group.name for group in groups if secret in repr(group)]
        return found

    @contextmanager
    def on(self, instance: str) -> Iterator[None]:
        """Be on a machine: its metadata service answers, and no other credentials are there."""
        url = self.aws.serve(self.aws.metadata(instance))
        with self.monkeypatch.context() as patch:
            for name in self.aws.environment():
                if "KEY" in name or "TOKEN" in name:
                    patch.delenv(name)
            patch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
            patch.setenv(VARIABLE, url)
            patch.setenv("AWS_METADATA_ENDPOINT", url)  # obstore's name for it
            yield


def now() -> datetime:
    return datetime.now(timezone.utc)


def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[AwsRig]:
    """Open it, and close it; whatever a test leaves is no test's business."""
    with AWS() as aws:
        obedient = Obedient(aws)
        obedient.start()
        found = AwsRig(aws, monkeypatch)
        found.cloud.setup()
        yield found
        obedient.over.set()
        obedient.join()
