"""Azure for the tests of clouds, without root: machines that do nothing until they are told."""

from __future__ import annotations

import hashlib
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from cml_runner import boot
from cml_runner.boot.first_azure import VARIABLE
from cml_runner.clouds.azure import Cloud, session
from cml_runner.clouds.azure.machine import INTERRUPT
from cml_runner.model import Identifier, Machine, Program, Task
from cml_runner.wait import until
from tests.lab.azure import Azure

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import pytest

    from cml_runner.clouds import Plan
    from cml_runner.model import Notice
    from tests.lab.azure.azurite import Azurite

PROGRAM = Program(
    wheel=b"wheel",
    sha256=hashlib.sha256(b"wheel").hexdigest(),
    index="https://index.example/simple/",
)


class Obedient(threading.Thread):
    """Ends machines that were told to go, as their supervisors would."""

    def __init__(self, azure: Azure) -> None:
        super().__init__(daemon=True)
        self.azure, self.over = azure, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.05):
            for name, life in list(self.azure.fleet.lives.items()):
                told = life.tags.get(INTERRUPT)
                if told and not life.ended and datetime.fromisoformat(told) < now():
                    self.azure.fleet.delete(name)


class AzureRig:
    """One subscription, as a fake, and what happens on its machines."""

    def __init__(self, azure: Azure, monkeypatch: pytest.MonkeyPatch) -> None:
        self.azure, self.monkeypatch = azure, monkeypatch
        for name, value in azure.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(session, "POLL", 0.02)
        self.cloud = Cloud("us-west")

    def task(self, settings: str = "{}", tags: Mapping[str, str] | None = None) -> Task:
        return Task(
            id=Identifier.new("some task"),
            settings=settings,
            machine=Machine(spot=True, disk=35),
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
        """Lose it without a word, as in an eviction whose notice never came."""
        assert plan
        self.azure.fleet.evict(instance, after=0)

    def leave(self, plan: Plan, instance: str) -> None:
        with self.on(instance):
            identifier = Identifier.parse(str(plan.group.name))  # type: ignore[attr-defined]
            last = len(plan.group.instances()) == 1
            Cloud("westus2").leave(identifier, plan.bucket.store.url, last=last)

    @contextmanager
    def machine(self, plan: Plan, instance: str) -> Iterator[boot.Machine]:
        with self.on(instance):
            yield boot.machine(self.url(plan))

    def url(self, plan: Plan) -> str:
        """Where the task is, as its machines know it."""
        name = plan.group.name  # type: ignore[attr-defined]
        return f"{plan.bucket.store.url}#azure/westus2/{name}"

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
        """List where it stands: in objects, resources, start scripts, or requests."""
        found = [key for key, one in self.azure.objects().items() if secret.encode() in one]
        lives = self.azure.fleet.lives.values()
        found += [life.instance.id for life in lives if secret in repr(life)]
        resources = self.azure.manager.resources.items()
        found += [path for path, one in resources if secret in repr(one)]
        bodies = [one for one in self.azure.app.calls if secret in repr(one.body)]
        return found + [one.path for one in bodies if "blobs" not in one.action]

    @contextmanager
    def on(self, instance: str) -> Iterator[None]:
        """Be on a machine: its metadata service answers, and no other credentials are there."""
        url = self.azure.serve(self.azure.metadata(instance))
        with self.monkeypatch.context() as patch:
            for name in ("AZURE_CLIENT_ID", "AZURE_POD_IDENTITY_AUTHORITY_HOST"):
                patch.delenv(name)
            patch.setenv(VARIABLE, url)
            # obstore's name for it
            patch.setenv("AZURE_MSI_ENDPOINT", f"{url}/metadata/identity/oauth2/token")
            yield


def now() -> datetime:
    return datetime.now(timezone.utc)


def rig(monkeypatch: pytest.MonkeyPatch, azurite: Azurite | None = None) -> Iterator[AzureRig]:
    """Open it, and close it; whatever a test leaves is no test's business."""
    with Azure(azurite=azurite) as azure:
        obedient = Obedient(azure)
        obedient.start()
        found = AzureRig(azure, monkeypatch)
        found.cloud.setup()
        yield found
        obedient.over.set()
        obedient.join()
