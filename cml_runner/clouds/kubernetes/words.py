"""What a task's pods say, in the form of a bucket: a pod writes nowhere but into its log.

The settings are a Secret. A pod's status is the last one among the lines of its log that say so;
if it ended without a word, what the cluster knows of its end.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import msgspec

from cml_runner import bootstrap, store
from cml_runner.clouds.kubernetes import pod, secret
from cml_runner.errors import CredentialsError, RunnerError
from cml_runner.model import Status

if TYPE_CHECKING:
    from cml_runner.clouds.kubernetes.session import Session

log = logging.getLogger(__name__)

BRIEF = 3  # seconds for a node to answer
FRESH = 0.5  # seconds for which a list of pods is good
INDEX = "batch.kubernetes.io/job-completion-index"
BEGUN = ("Running", "Succeeded", "Failed")
LONGEST = 10_000_000  # bytes of a log to read


class Words(store.Store):
    """The bucket of one task."""

    def __init__(self, session: Session, task: str) -> None:
        super().__init__(f"kubernetes:{task}")
        self._session, self._task = session, task
        self._lock = threading.Lock()
        self._asked = 0.0
        self._pods: list[dict[str, Any]] = []
        self._read: dict[int, dict[str, str]] = {}  # what pods have said, some of which are gone

    def pods(self, *, fresh: bool = True) -> list[dict[str, Any]]:
        """List the task's pods, those which have ended too, in the order of their creation."""
        with self._lock:
            if fresh or time.monotonic() > self._asked + FRESH:
                found = self._session.items("pods", labelSelector=f"{pod.TASK}={self._task}")
                self._pods = sorted(found, key=lambda one: one["metadata"]["creationTimestamp"])
                self._asked = time.monotonic()
            return self._pods

    def claim(self, key: str, content: bytes) -> bool:
        """Refuse: the Job is the claim, and pods have their places."""
        raise self._unwritable(key)

    def read(self, key: str) -> bytes | None:
        """Return the settings, or what a pod has said."""
        if key == store.SETTINGS:
            return secret.read(self._session, self._task)
        with suppress(ValueError, IndexError):
            rank = int(key.partition(".")[0].split("-")[1])
            if key.startswith("log-"):
                return self.log(rank).encode() or None
            if key.startswith("status-") and (found := self._status(rank)):
                return store.encoded(found)
        return None

    def write(self, key: str, content: bytes) -> None:
        """Write the settings, and nothing else."""
        if key != store.SETTINGS:
            raise self._unwritable(key)
        secret.write(self._session, self._task, content)

    def delete(self, key: str) -> None:
        """Delete the settings; all else goes with the pods."""
        if key == store.SETTINGS:
            secret.delete(self._session, self._task)

    def keys(self, prefix: str) -> list[str]:
        """List what has been said, but not the settings."""
        begun = {_rank(one) for one in self.pods() if one["status"].get("phase") in BEGUN}
        found = [f"log-{rank:03}-000000.txt" for rank in begun]
        found += [store.status(rank) for rank in begun]
        return sorted(key for key in found if key.startswith(prefix))

    def log(self, rank: int) -> str:
        """Return all that the pods of a rank have said; to whoever goes on asking, of all."""
        read = self._read.setdefault(rank, {})
        for one in self.pods(fresh=False):
            if _rank(one) == rank:
                text = self.said(one)
                name = one["metadata"]["name"]
                read[name] = max(read.get(name, ""), text, key=len)
        lines = "".join(read.values()).splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith(store.SAID))

    def said(self, one: dict[str, Any]) -> str:
        """Return a pod's log; empty if it has none yet, or its node doesn't answer (any more)."""
        query: dict[str, str | int] = {"container": pod.CONTAINER, "limitBytes": LONGEST}
        name = f"{one['metadata']['name']}/log"
        try:
            return self._session.text("pods", name, query=query, patience=BRIEF)
        except CredentialsError:
            raise
        except RunnerError as error:
            log.debug("%s can't be read: %s", name, error)
            return ""

    def _status(self, rank: int) -> Status | None:
        mine = [one for one in self.pods(fresh=False) if _rank(one) == rank]
        if not mine:
            return None
        text = self.said(mine[-1])
        said = [line for line in text.splitlines() if line.startswith(store.SAID)]
        found = None
        with suppress(msgspec.MsgspecError):
            if said:
                found = msgspec.json.decode(said[-1].removeprefix(store.SAID), type=Status)
        return ended(mine[-1], found)

    def _unwritable(self, key: str) -> RunnerError:
        return RunnerError(f"{key} can't be written: only a task's pods say what they do")


def _rank(one: dict[str, Any]) -> int:
    metadata = one["metadata"]
    labels, annotations = metadata.get("labels", {}), metadata.get("annotations", {})
    return int(labels.get(INDEX) or annotations.get(INDEX) or 0)


def ended(one: dict[str, Any], said: Status | None) -> Status | None:
    """Say how a pod ended which didn't say so itself."""
    end = terminated(one)
    over = said and said.state in ("ended", "failed", "interrupted")
    if over or (not end and one["status"].get("phase") != "Failed"):
        return said
    now = datetime.now(timezone.utc)
    last = said or Status(state="starting", at=now, since=now, runner=one["metadata"]["name"])
    code = end.get("exitCode", 1)
    if code == 0:
        return replace(last, state="ended")
    reason = " ".join(filter(None, (end.get("reason"), one["status"].get("message"))))
    if code in (bootstrap.INTERRUPTED, *pod.KILLED):
        return replace(last, state="interrupted", reason=reason)
    return replace(last, state="failed", code=1, reason=f"exit code {code} {reason}".rstrip())


def terminated(one: dict[str, Any]) -> dict[str, Any]:
    """Say how a pod's program ended; empty if it hasn't, or never began."""
    for container in one["status"].get("containerStatuses", ()):
        if container["name"] == pod.CONTAINER:
            found: dict[str, Any] = container["state"].get("terminated", {})
            return found
    return {}
