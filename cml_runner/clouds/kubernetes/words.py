"""What a task's pods say, in the form of a bucket: a pod writes nowhere but into its log.

The settings are a Secret, and so is what only launchers read. A pod's status is the last one among
the lines of its log that say so; if it ended without a word, what the cluster knows of its end. The
data of a task that keeps them are in its volume, and there are the words of pods that are gone.
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

from cml_runner import store
from cml_runner.boot import failing, prepare
from cml_runner.clouds.kubernetes import container as buckets
from cml_runner.clouds.kubernetes import machine, pod, secret
from cml_runner.clouds.kubernetes.volume import Volume
from cml_runner.errors import CredentialsError, NotFound, NotReady, RunnerError
from cml_runner.model import Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cml_runner.clouds.kubernetes.session import Session

log = logging.getLogger(__name__)

BRIEF = 3  # seconds for a node to answer
FRESH = 0.5  # seconds for which a list of pods is good
INDEX = "batch.kubernetes.io/job-completion-index"
BEGUN = ("Running", "Succeeded", "Failed")
KEPT = {name: name.rpartition("/")[2] for name in (store.LABEL, store.RECALL, store.RESUME)}
_DATA = f"{store.DATA}/"
# What a node says instead of a log.
LOST = ("unable to retrieve container logs", "failed to try resolving symlinks")
LONGEST = 10_000_000  # bytes of a log to read


class Words(store.Store):
    """The bucket of one task."""

    def __init__(self, session: Session, task: str) -> None:
        super().__init__(f"kubernetes:{task}")
        self._session, self._task = session, task
        self._lock = threading.Lock()
        self._asked = 0.0
        self._pods: list[dict[str, Any]] = []
        self._volume = Volume(session, task)
        self._kept = secret.kept(task)
        self._keeps: bool | None = None  # None: who knows
        self._job_asked = -FRESH
        self._found: dict[str, Any] | None = None
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
        """Put a task's data there; the Job is the claim on all else, and pods have their places."""
        return self._data(key).claim(key, content)

    def read(self, key: str) -> bytes | None:
        """Return the settings, what a launcher keeps, a task's data, or what a pod has said."""
        if key in KEPT:
            gone = key == store.RESUME and self._finished()
            return None if gone else secret.read(self._session, self._kept, KEPT[key])
        if key == store.SETTINGS:
            return None if self._finished() else secret.read(self._session, self._task)
        if key.startswith(_DATA):
            return self._data(key).read(key)
        rank = _number(key)
        if rank in self._silent(key):
            return self._beyond().read(store.WORDS + key)
        if key.startswith("log-"):
            return self.log(rank).encode() or None
        if key.startswith("status-") and (found := self._status(rank)):
            return store.encoded(found)
        if key.startswith("result-"):
            return self._result(rank)
        return None

    def view(self, key: str, start: int = 0, end: int = 0) -> memoryview | None:
        """Return a part of a task's data."""
        return self._data(key).view(key, start, end)

    def expect(self, keys: Sequence[str]) -> None:
        """Fetch a task's data at once."""
        self._volume.expect(keys)

    def write(self, key: str, content: bytes) -> None:
        """Write the settings, what a launcher keeps, or a task's data; nothing else."""
        if key in KEPT:
            secret.keep(self._session, self._task, KEPT[key], content)
            if key == store.RECALL:  # pods get their notice, and save what they have
                self._session.call("PATCH", "jobs", self._task, {"spec": {"suspend": True}})
        elif key == store.SETTINGS:
            secret.write(self._session, self._task, content)
        else:
            self._data(key).write(key, content)

    def delete(self, key: str) -> None:
        """Delete the settings, or what a launcher keeps; all else goes with the Job."""
        if key == store.SETTINGS:
            secret.delete(self._session, self._task)
        if key in KEPT:
            secret.keep(self._session, self._task, KEPT[key], None)

    def remove(self, keys: Sequence[str]) -> None:
        """Do nothing: data go with the Job."""

    def keys(self, prefix: str) -> list[str]:
        """List what has been said and, in their folders, snapshots; not the settings."""
        if prefix.startswith(_DATA):  # all of it isn't deleted one by one
            return self._volume.keys(prefix) if prefix != _DATA else []
        begun = {_rank(one) for one in self.pods() if one["status"].get("phase") in BEGUN}
        found = [f"log-{rank:03}-000000.txt" for rank in begun]
        found += [store.status(rank) for rank in begun]
        if "result-".startswith(prefix) or prefix.startswith("result-"):
            found += [store.result(rank) for rank in begun if self._result(rank)]
        if silent := self._silent(prefix):
            told = (key.removeprefix(store.WORDS) for key in self._beyond().keys(store.WORDS))
            kept = [key for key in told if store.kept(key)]
            found = [key for key in found if _number(key) not in silent]
            found += [key for key in kept if _number(key) in silent]
        return sorted(key for key in found if key.startswith(prefix))

    def close(self) -> None:
        """Let go of what was needed to move data."""
        self._volume.close()

    def log(self, rank: int) -> str:
        """Return all that the pods of a rank have said; to whoever goes on asking, of all."""
        read = self._read.setdefault(rank, {})
        for one in self.pods(fresh=False):
            if _rank(one) == rank:
                text = self.said(one)
                name = one["metadata"]["name"]
                read[name] = max(read.get(name, ""), text, key=len)
        lines = "".join(read.values()).splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith((store.SAID, store.TOLD)))

    def said(self, one: dict[str, Any]) -> str:
        """Return a pod's log; empty if it has none yet, or its node doesn't answer (any more)."""
        query: dict[str, str | int] = {"container": pod.CONTAINER, "limitBytes": LONGEST}
        name = f"{one['metadata']['name']}/log"
        try:
            text = self._session.text("pods", name, query=query, patience=BRIEF)
            return "" if text.startswith(LOST) else text
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

    def _result(self, rank: int) -> bytes | None:
        """Find how a rank's script has ended, in the words of any of its pods."""
        for one in self.pods(fresh=False):
            if _rank(one) == rank:
                text = self.said(one)
                told = [line for line in text.splitlines() if line.startswith(store.TOLD)]
                if told:
                    return told[0].removeprefix(store.TOLD).encode()
        return None

    def _finished(self) -> bool:
        """Say if a task is over that keeps its data; then nobody needs its secrets any more."""
        found = self._job()
        if not (found and pod.keeps(found) and pod.over(found)):
            return False
        forget(self._session, self._task)
        return True

    def _silent(self, key: str) -> set[int]:
        """Name the ranks whose words, of this kind, pods can't tell any more.

        Of a task that is over or stopped, those without pods; their logs too if there were others
        before them, unless these have been read in time.
        """
        found = self._job() if self._keeps is not False else None
        self._keeps = None if found is None else pod.keeps(found)
        if not found or not self._keeps:
            return set()
        logs = key.startswith("log-")
        stopped = found["spec"].get("suspend") and pod.LAUNCHED in found["metadata"]["annotations"]
        if not pod.over(found) and not (logs and stopped):
            return set()
        ranks = set(range(found["spec"]["completions"]))
        if logs and stopped:
            return ranks - set(self._read)
        there = [one for one in self.pods(fresh=False) if not (logs and _replaced(one))]
        if key.startswith("result-"):  # whose pods are there may have lost their logs
            there = [one for one in there if self._result(_rank(one))]
        return ranks - {_rank(one) for one in there} - (set(self._read) if logs else set())

    def _job(self) -> dict[str, Any] | None:
        """Return the Job as it is, or was just now."""
        with self._lock:
            if time.monotonic() > self._job_asked + FRESH:
                self._found = None
                with suppress(NotFound):
                    self._found = self._session.call("GET", "jobs", self._task)
                self._job_asked = time.monotonic()
            return self._found

    def _beyond(self) -> store.Store:
        """Return what keeps the words of pods that are gone."""
        label = msgspec.json.decode(self.read(store.LABEL) or b"{}")
        if label.get("container"):
            return buckets.opened(label["container"], label["container_options"])
        return self._volume

    def _data(self, key: str) -> Volume:
        if not key.startswith(_DATA):
            raise self._unwritable(key)
        return self._volume

    def _unwritable(self, key: str) -> RunnerError:
        return RunnerError(f"{key} can't be written: only a task's pods say what they do")


def forget(session: Session, task: str) -> None:
    """Delete what is secret of a task that is over, and keeps its data."""
    secret.delete(session, task)
    secret.keep(session, task, KEPT[store.RESUME], None)


def _number(key: str) -> int:
    """Return the rank in an object's name; -1 if there is none."""
    number = key.partition(".")[0].partition("-")[2][:3]
    return int(number) if number.isdecimal() else -1


def _rank(one: dict[str, Any]) -> int:
    metadata = one["metadata"]
    labels, annotations = metadata.get("labels", {}), metadata.get("annotations", {})
    return int(labels.get(INDEX) or annotations.get(INDEX) or 0)


def _replaced(one: dict[str, Any]) -> bool:
    """Say if there were others before a pod, in its place."""
    notes = one["metadata"].get("annotations", {})
    return any(int(notes.get(name) or 0) for name in machine.COUNTS.values())


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
    if code in (prepare.INTERRUPTED, *pod.KILLED):
        return replace(last, state="interrupted", reason=reason)
    _, unprepared, why = str(end.get("message")).rpartition(f"{failing.FAILED}: ")
    if unprepared and not said:  # the message of a container is its last words
        return replace(last, state="failed", code=NotReady.exit_code, reason=why.strip())
    return replace(last, state="failed", code=1, reason=f"exit code {code} {reason}".rstrip())


def terminated(one: dict[str, Any]) -> dict[str, Any]:
    """Say how a pod's program ended; empty if it hasn't, or never began."""
    for container in one["status"].get("containerStatuses", ()):
        if container["name"] == pod.CONTAINER:
            found: dict[str, Any] = container["state"].get("terminated", {})
            return found
    return {}
