"""The settings of a task, which are a Secret, and the script, which is a ConfigMap.

Both belong to the Job: whatever deletes it, the cluster deletes them after it.
"""

from __future__ import annotations

import base64
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cml_runner.clouds.kubernetes import pod
from cml_runner.errors import AlreadyExists, NotFound
from cml_runner.store import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.clouds.kubernetes.job import Job
    from cml_runner.clouds.kubernetes.session import Session


def read(session: Session, task: str) -> bytes | None:
    """Return the settings; None if there are none."""
    with suppress(NotFound):
        found = session.call("GET", "secrets", task)
        return base64.b64decode(found.get("data", {}).get(SETTINGS, ""))
    return None


def write(session: Session, task: str, content: bytes) -> None:
    """Replace the settings. Raises NotFound if there are none."""
    data = {SETTINGS: base64.b64encode(content).decode()}
    session.call("PATCH", "secrets", task, {"data": data})


def delete(session: Session, task: str) -> None:
    """Delete the settings; absent is deleted already."""
    with suppress(NotFound):
        session.call("DELETE", "secrets", task)


@dataclass(frozen=True, eq=False)
class Part:
    """Something small that belongs to a Job and has its name."""

    job: Job
    kind: str  # as the API names it
    label: str
    content: Callable[[], dict[str, Any]]

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
            self.delete()
            self._create(owner)
        return True

    def delete(self) -> None:
        """Delete it; absent is deleted already."""
        with suppress(NotFound):
            self.job.session.call("DELETE", self.kind, self.job.name)

    def _create(self, owner: str) -> None:
        task = self.job.task
        owned = {"apiVersion": "batch/v1", "kind": "Job", "name": self.job.name, "uid": owner}
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
        return {"stringData": {SETTINGS: job.task.settings}, "type": "Opaque"}

    return Part(job, "secrets", "settings", content)


def script(job: Job, text: Callable[[], str]) -> Part:
    """Describe what the pods run first."""
    return Part(job, "configmaps", "script", lambda: {"data": {pod.KEY: text()}})
