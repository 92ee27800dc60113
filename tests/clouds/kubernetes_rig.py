"""Kubernetes for the tests of clouds: real pods that do nothing until they are told."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil

from cml_runner.clouds.kubernetes import Cloud, machine
from cml_runner.clouds.kubernetes.job import Group
from cml_runner.errors import NotReady
from cml_runner.model import Identifier, Machine, Program, Task
from cml_runner.wait import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import pytest

    from cml_runner.clouds import Plan
    from cml_runner.model import Notice
    from tests.lab.town import Country

PROGRAM = """\
trap '' TERM
echo begun
while [ ! -e /run/cml-runner/go ]; do
    if [ -e /run/cml-runner/say ]; then
        cat /run/cml-runner/say
        rm /run/cml-runner/say
    fi
    sleep 0.1
done
"""
DIRECTORY = "run/cml-runner"


class KubernetesRig:
    """A namespace, and what happens in its pods."""

    def __init__(
        self, country: Country, namespace: str, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.country, self.namespace, self.monkeypatch = country, namespace, monkeypatch
        monkeypatch.setenv("KUBECONFIG", str(country.kubeconfig(namespace, directory / "config")))
        self.cloud = Cloud("us-west")
        self.cloud.kept, self.cloud.grace = 6, 2
        self.cloud.start = lambda *_: PROGRAM

    def task(self, settings: str = "{}", tags: Mapping[str, str] | None = None) -> Task:
        return Task(
            id=Identifier.new("some task"),
            settings=settings,
            machine=Machine(types=("0.1-20",), image="lab.example/busybox:1"),
            program=Program(
                wheel=b"wheel",
                sha256=hashlib.sha256(b"wheel").hexdigest(),
                index="https://index.example/simple/",
            ),
            tags=tags or {},
        )

    def launch(self, count: int, task: Task | None = None) -> Plan:
        plan = self.cloud.plan(replace(task or self.task(), count=max(count, 1)))
        for resource in plan.resources:
            assert resource.create()
        plan.group.resize(count)
        until(lambda: len(self.running(plan)) == count, "the pods", 20, 0.05)
        return plan

    def running(self, plan: Plan) -> list[str]:
        return [one.id for one in plan.group.instances() if one.status == "running"]

    def die(self, plan: Plan, instance: str) -> None:
        assert plan
        for process in self.country.cluster.processes(instance):
            with suppress(psutil.Error):
                process.kill()

    def leave(self, plan: Plan, instance: str) -> None:
        assert isinstance(plan.group, Group)
        last = len(plan.group.instances()) == 1
        self.cloud.leave(plan.group.job.task.id, plan.bucket.store.url, last=last)
        (self.directory(instance) / "go").touch()

    def say(self, plan: Plan, instance: str, key: str, text: str) -> None:
        """Have a pod say something; a status is said as one, and in one write."""
        assert plan
        from cml_runner.store import SAID, TOLD

        begin = {"status": SAID, "result": TOLD}.get(key.partition("-")[0], "")
        new = self.directory(instance) / "new"
        new.write_text(f"{begin}{text}\n" if begin else text)
        until(lambda: not new.with_name("say").exists(), "what was said before", 5, 0.02)
        new.rename(new.with_name("say"))
        until(lambda: not new.with_name("say").exists(), "the pod to say it", 5, 0.02)

    def notice(self, plan: Plan, instance: str) -> Notice | None:
        assert plan
        directory = self.directory(instance)
        if "deletionTimestamp" in self.pod(instance)["metadata"]:
            until((directory / machine.NOTICE).exists, "the hook", 2, 0.01)
            with suppress(NotReady):
                until((directory / machine.NOTICE).read_text, "its word", 1, 0.01)
        with self.monkeypatch.context() as patch:
            patch.setenv(machine.HOME, str(directory))
            patch.setenv(machine.GRACE, str(self.cloud.grace))
            return Cloud.notice()

    def settings(self, plan: Plan) -> str:
        assert isinstance(plan.group, Group)
        return f"secrets/{plan.group.job.name}"

    def traces(self, secret: str) -> list[str]:
        import base64

        found = []
        for kind in ("secrets", "configmaps", "pods", "events", "jobs"):
            for one in self.ask("GET", kind)["items"]:
                data = one.get("data", {}).values() if kind == "secrets" else ()
                texts = [json.dumps(one), *(base64.b64decode(text).decode() for text in data)]
                if any(secret in text for text in texts):
                    found.append(f"{kind}/{one['metadata']['name']}")
        return found

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        base = "/apis/batch/v1" if path.startswith("jobs") else "/api/v1"
        full = f"{base}/namespaces/{self.namespace}/{path}"
        return self.country.cluster.kubectl(method, full, body)

    def pod(self, instance: str) -> Any:
        return self.ask("GET", f"pods/{instance}")

    def directory(self, instance: str) -> Path:
        return self.country.cluster.volume(self.pod(instance)["metadata"]["uid"], "run")


def rig(
    country: Country, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KubernetesRig]:
    """Open it, and close it."""
    with country.namespace() as namespace, country.internet.entered():
        yield KubernetesRig(country, namespace, directory, monkeypatch)
