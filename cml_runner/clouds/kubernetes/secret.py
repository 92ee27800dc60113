"""The settings of a task, which are a Secret; script and program, which are a ConfigMap.

Both belong to the Job: whatever deletes it, the cluster deletes them after it.
"""

from __future__ import annotations

import base64
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cml_runner.clouds.kubernetes import pod
from cml_runner.errors import AlreadyExists, ConfigurationError, NotFound
from cml_runner.store import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.clouds.kubernetes.job import Job
    from cml_runner.clouds.kubernetes.session import Session
    from cml_runner.model import Task

LARGEST = 1 << 20  # bytes in a Secret or in a ConfigMap


def read(session: Session, name: str, key: str = SETTINGS) -> bytes | None:
    """Return what a Secret holds, the settings say; None if it doesn't, or isn't there."""
    with suppress(NotFound):
        text = session.call("GET", "secrets", name).get("data", {}).get(key)
        return None if text is None else base64.b64decode(text)
    return None


def write(session: Session, task: str, content: bytes) -> None:
    """Replace the settings. Raises NotFound if there are none."""
    session.call("PATCH", "secrets", task, {"data": {SETTINGS: _coded(content)}})


def delete(session: Session, task: str) -> None:
    """Delete the settings; absent is deleted already."""
    with suppress(NotFound):
        session.call("DELETE", "secrets", task)


def keep(session: Session, task: str, key: str, content: bytes | None) -> None:
    """Write what pods don't read, into a Secret that goes with the Job; None deletes it.

    Raises NotFound if the Job is gone.
    """
    data = {key: None if content is None else _coded(content)}
    try:
        session.call("PATCH", "secrets", kept(task), {"data": data})
    except NotFound:
        if content is None:
            return
        job = session.call("GET", "jobs", task)["metadata"]
        metadata = {"name": kept(task), "labels": pod.OURS, "ownerReferences": [pod.owner(job)]}
        session.call("POST", "secrets", body={"metadata": metadata, "data": data})


def kept(task: str) -> str:
    """Name the Secret that stays until its task is destroyed."""
    return f"{task}-kept"


def _coded(content: bytes) -> str:
    return base64.b64encode(content).decode()


@dataclass(frozen=True, eq=False)
class Part:
    """Something small that belongs to a Job and has its name."""

    job: Job
    kind: str  # as the API names it
    label: str
    content: Callable[[], dict[str, Any]]
    stays: bool = False

    @property
    def needs(self) -> tuple[Job, ...]:
        """The Job owns it."""
        return (self.job,)

    def create(self) -> bool:
        """Create it; one that an older Job left goes first."""
        owner = self.job.uid()
        try:
            self._create(owner)
        except AlreadyExists:
            if owner in self._owners():
                return False
            self._remove()
            self._create(owner)
        return True

    def delete(self) -> None:
        """Delete it, unless it stays as long as its Job; absent is deleted already."""
        if self.stays:
            return
        self._remove()

    def _remove(self) -> None:
        with suppress(NotFound):
            self.job.session.call("DELETE", self.kind, self.job.name)

    def _create(self, owner: str) -> None:
        task = self.job.task
        owned = pod.owner({"name": self.job.name, "uid": owner})
        body = {
            "metadata": {
                "name": self.job.name,
                "labels": {**pod.OURS, pod.TASK: str(task.id)},
                "ownerReferences": [owned],
            },
            **self.content(),
        }
        self.job.session.call("POST", self.kind, body=body)

    def _owners(self) -> list[str]:
        with suppress(NotFound):
            found = self.job.session.call("GET", self.kind, self.job.name)
            return [one["uid"] for one in found["metadata"].get("ownerReferences", ())]
        return []


def settings(job: Job) -> Part:
    """Describe what the pods read; the only thing that is secret."""

    def content() -> dict[str, Any]:
        found = {SETTINGS: job.task.settings, **pod.ways(job.task)}
        return {"stringData": found, "type": "Opaque"}

    return Part(job, "secrets", "settings", content)


def script(job: Job, text: Callable[[], str]) -> Part:
    """Describe what the pods run first, and the program that it starts."""

    def content() -> dict[str, Any]:
        program = job.task.program
        binary = {pod.wheel(program): _coded(program.wheel)} if program.wheel else {}
        return {"data": {pod.KEY: text()}, "binaryData": binary}

    return Part(job, "configmaps", "script", content)


def check(task: Task, script: str) -> None:
    """Raise ConfigurationError if something is too large for a cluster.

    https://kubernetes.io/docs/concepts/configuration/configmap/, …/secret/
    """
    settings = (task.settings, *pod.ways(task).values())
    sizes = {
        "the program and its start script": len(task.program.wheel) + len(script.encode()),
        "the settings": sum(len(one.encode()) for one in settings),
    }
    if mistakes := [
        f"{what} have {size:,} bytes: a cluster takes {LARGEST:,} at most"
        for what, size in sizes.items()
        if size > LARGEST
    ]:
        raise ConfigurationError(*mistakes)


def claim(job: Job) -> Part:
    """Describe the volume claim of a task's data."""
    return Part(job, "persistentvolumeclaims", "claim", lambda: pod.claim(job.task), stays=True)
