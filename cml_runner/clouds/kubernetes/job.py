"""The Job of a task: the claim on its name, and the group of its pods."""

from __future__ import annotations

import json
import math
import re
import secrets
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cml_runner import clouds, wait
from cml_runner.clouds.kubernetes import pod
from cml_runner.clouds.kubernetes.pod import keeps, over
from cml_runner.clouds.kubernetes.shell import Shell
from cml_runner.clouds.kubernetes.words import Words, forget, terminated
from cml_runner.errors import AlreadyExists, NotFound
from cml_runner.model import Happening, Identifier, Instance, Lease

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from cml_runner.clouds import Resource
    from cml_runner.clouds.kubernetes.session import Session
    from cml_runner.model import Task

LAUNCH = timedelta(hours=1)  # the longest that one can take
LONGEST = 300  # seconds for a Job to be gone with its pods
EXPIRES = f"{pod.PREFIX}expires"
TAGS, ATTEMPT = f"{pod.PREFIX}tags", f"{pod.PREFIX}attempt"
INSTANCE = {"Pending": "starting", "Running": "running"}
KINDS = (
    ("quota", re.compile(r"exceeded quota|must specify (limits|requests)")),
    ("permission", re.compile(r"forbidden|denied the request|violates PodSecurity")),
)
NO_IMAGE = re.compile(
    r"InvalidImageName|couldn't parse image|invalid reference format|not found|does not exist"
    r"|manifest unknown|denied|unauthorized|forbidden|no such host|no match for platform",
    re.IGNORECASE,
)
IMAGE = re.compile(r"pull image|InvalidImageName|couldn't parse image|ErrImage")
PULLS = 4  # of an image that fail, for whatever reason, before it is given up; after a minute or so
NOISE = re.compile(  # what only repeats another event, and our own doing
    r"Error: (ErrImagePull|ImagePullBackOff)|Back-off pulling image .*|Job (suspended|resumed)"
)
INTERRUPTIONS = ("Evicted", "Preempted", "TaintManagerEviction", "Killing", "NodeShutdown")


@dataclass(frozen=True, eq=False)
class Job:
    """A suspended Job. Who has created it has the task."""

    session: Session
    task: Task
    manifest: Mapping[str, Any] | None  # None: it won't be created
    label: str = "job"
    needs: tuple[Resource, ...] = ()
    ours: list[str] = field(default_factory=list, init=False)  # the uid of what we have created

    @property
    def name(self) -> str:
        """The task's."""
        return str(self.task.id)

    @cached_property
    def store(self) -> Words:
        """What its pods say."""
        return Words(self.session, self.name)

    def create(self) -> bool:
        """Create it, unless there is one; one that is over goes first, if it keeps nothing."""
        assert self.manifest
        metadata = {**self.manifest["metadata"]}
        attempt = secrets.token_hex(8)  # tells our own Job from somebody else's
        expires = _written(self.task.expires)
        metadata["annotations"] = {**metadata["annotations"], EXPIRES: expires, ATTEMPT: attempt}
        body = {**self.manifest, "metadata": metadata}
        try:
            return self._created(body)
        except AlreadyExists:
            found = self.read() or {}
            if found and found["metadata"].get("annotations", {}).get(ATTEMPT) == attempt:
                self.ours.append(found["metadata"]["uid"])  # only the answer was lost
                return True
            there = found and (keeps(found) or not over(found))
            if there and "deletionTimestamp" not in found["metadata"]:
                return False
            self.delete()
            return self._created(body)

    def delete(self) -> None:
        """Delete it with its pods, and wait until they are gone."""
        try:
            self.session.call(
                "DELETE", "jobs", self.name, query={"propagationPolicy": "Foreground"}
            )
        except NotFound:
            return
        what = f"{self.name} to be gone with its pods; is their node alive?"
        wait.until(lambda: self.read() is None, what, LONGEST, every=0.3)

    def read(self) -> dict[str, Any] | None:
        """Return it as it is now; None if there is none."""
        with suppress(NotFound):
            return self.session.call("GET", "jobs", self.name)
        return None

    def uid(self) -> str:
        """What owns all that belongs to it. Raises NotFound."""
        if not self.ours:
            return str(self.session.call("GET", "jobs", self.name)["metadata"]["uid"])
        return self.ours[0]

    def patch(self, body: Mapping[str, Any]) -> None:
        """Change it. Raises NotFound."""
        self.session.call("PATCH", "jobs", self.name, body)

    def _created(self, body: Mapping[str, Any]) -> bool:
        found = self.session.call("POST", "jobs", body=body)
        self.ours.append(found["metadata"]["uid"])
        return True


@dataclass(frozen=True, eq=False)
class Group:
    """The pods of a Job: it replaces those that are taken away."""

    job: Job
    needs: tuple[Resource, ...]
    label: str = "pods"

    def create(self) -> bool:
        """Do nothing: they come with the Job, once it isn't suspended any more."""
        return bool(self.job.ours)

    def delete(self) -> None:
        """Delete them with their Job; one that keeps data is suspended, and waits without them."""
        self.job.store.close()
        found = self.job.read()
        if found is None or not keeps(found):
            self.job.delete()
            return
        if not over(found):
            self.job.patch({"spec": {"suspend": True}})
        what = f"the pods of {self.job.name} to end; is their node alive?"
        wait.until(lambda: not self.instances(), what, LONGEST, every=0.3)

    def resize(self, count: int) -> None:
        """Have so many pods; without any, the Job is suspended."""
        self.job.store.close()
        if not count:
            self.job.patch({"spec": {"suspend": True}})
            return
        spec: dict[str, Any] = {"suspend": False, "completions": count, "parallelism": count}
        expires = self.job.task.expires
        if not self.job.ours and (found := self.job.read()):
            expires = _read(found["metadata"]["annotations"].get(EXPIRES, ""))
        if expires:  # a suspended Job has no clock
            spec["activeDeadlineSeconds"] = _seconds(expires, datetime.now(timezone.utc))
        self.job.patch({"spec": spec})

    def instances(self) -> list[Instance]:
        """List the pods that have not ended."""
        found = []
        for one in self.job.store.pods():
            status = INSTANCE.get(one["status"].get("phase", ""), "")
            if status and not terminated(one):
                going = "deletionTimestamp" in one["metadata"]
                found.append(
                    Instance(
                        id=one["metadata"]["name"],
                        status="stopping" if going else status,  # type: ignore[arg-type]
                        address=one["status"].get("podIP", ""),
                    )
                )
        return found

    def events(self) -> list[Happening]:
        """Read what the cluster says of Job and pods; it forgets that after an hour.

        Raises NotFound if somebody deletes the Job, or its namespace, while it is being launched.
        """
        if self.job.ours:
            self._check()
        of_job = self.job.session.items(
            "events", fieldSelector=f"involvedObject.kind=Job,involvedObject.name={self.job.name}"
        )
        of_pods = self.job.session.items("events", fieldSelector="involvedObject.kind=Pod")
        own = [one for one in of_pods if self._is_pod(one["involvedObject"]["name"])]
        deleted = {one["message"].rpartition(" ")[2] for one in of_job if _is_deletion(one)}
        told = [one for one in (*of_job, *own) if not NOISE.fullmatch(one.get("message") or "")]
        found = [happening(one, deleted) for one in told]
        return sorted(found, key=lambda one: one.at)

    def expire(self, at: datetime | None) -> None:
        """Have the Job controller end it then; with that, the task is launched."""
        found = self.job.read()
        if found is None:
            msg = f"{self.job.name} is gone: launch it again"
            raise NotFound(msg)
        began = found["status"].get("startTime")
        since = _time(began) if began else datetime.now(timezone.utc)
        annotations = {EXPIRES: _written(at), pod.LAUNCHED: "true"}
        seconds = _seconds(at, since) if at else None
        self.job.patch(
            {
                "metadata": {"annotations": annotations},
                "spec": {"activeDeadlineSeconds": seconds},
            }
        )

    def interrupt(self, instance: str, after: float) -> None:
        """Evict a pod, as whoever drains a node does."""
        name = self._running(instance)
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name},
            "deleteOptions": {"gracePeriodSeconds": max(1, math.ceil(after))},
        }
        self.job.session.call("POST", "pods", f"{name}/eviction", body)

    def evict(self, instance: str) -> None:
        """Evict a pod: that is in earnest, whoever asks for it."""
        self.interrupt(instance, pod.GRACE)

    def shell(self, instance: str, command: Sequence[str]) -> AbstractContextManager[Shell]:
        """Run it in the pod; nothing has to be opened for that."""
        return nullcontext(Shell(self.job.session, self._running(instance), command))

    def console(self) -> str:
        """Return the log of the pod that ended last or, if none has, of the youngest."""
        pods = self.job.store.pods()
        ended = [one for one in pods if terminated(one)]
        last = max(ended, key=lambda one: str(terminated(one).get("finishedAt")), default=None)
        chosen = last or next(reversed(pods), None)
        return self.job.store.said(chosen) if chosen else ""

    def _running(self, instance: str) -> str:
        return clouds.running(self.instances(), instance, self.job.name, "pod")

    def _check(self) -> None:
        """See if the Job can have pods. Raises NotFound.

        In a namespace that is being deleted nothing is created any more, not even an event.
        """
        if self.job.read() is None:
            msg = f"{self.job.name} is gone: somebody deleted it, or its namespace"
            raise NotFound(msg)
        if not self.instances():
            metadata = {"name": self.job.name}
            with suppress(AlreadyExists):
                query = {"dryRun": "All"}
                self.job.session.call("POST", "configmaps", "", {"metadata": metadata}, query=query)

    def _is_pod(self, name: str) -> bool:
        return name.startswith(f"{self.job.name}-")


def lease(found: Mapping[str, Any]) -> Lease:
    """Say how long a Job may be there. Raises ConfigurationError if it isn't ours.

    One whose launcher died before the end isn't long.
    """
    metadata = found["metadata"]
    notes, created = metadata.get("annotations", {}), _time(metadata["creationTimestamp"])
    expires = _read(notes.get(EXPIRES, ""))
    launched = pod.LAUNCHED in notes
    if launched and keeps(found) and over(found):
        expires = None  # it costs no more than its data do
    if not launched:
        given_up = created + LAUNCH
        expires = min(expires, given_up) if expires else given_up
    return Lease(
        id=Identifier.parse(metadata["name"]),
        created=created,
        expires=expires,
        tags=json.loads(notes.get(TAGS, "{}")),
        keeps=launched and keeps(found),
        launched=launched,
    )


def tidy(session: Session, found: Mapping[str, Any]) -> None:
    """See, once, that nothing secret is left of a task that is over, and keeps its data."""
    metadata = found["metadata"]
    if keeps(found) and over(found) and metadata["annotations"].get(EXPIRES):
        forget(session, metadata["name"])
        with suppress(NotFound):
            body = {"metadata": {"annotations": {EXPIRES: ""}}}
            session.call("PATCH", "jobs", metadata["name"], body)


def happening(event: Mapping[str, Any], deleted: set[str]) -> Happening:
    """Give an event its kind; which pods the Job controller itself deletes is known."""
    text = event.get("message") or event.get("reason") or ""
    at = event.get("lastTimestamp") or event.get("eventTime") or event.get("firstTimestamp")
    found = _time(at or event["metadata"]["creationTimestamp"])
    kind: Any = "info"
    name, reason = event["involvedObject"]["name"], event.get("reason", "")
    if event["involvedObject"]["kind"] == "Job":
        if reason == "FailedCreate":
            kind = next((kind for kind, words in KINDS if words.search(text)), "error")
    elif IMAGE.search(text) and event.get("type") == "Warning":
        hopeless = NO_IMAGE.search(text) or (event.get("count") or 1) >= PULLS
        kind = "image" if hopeless else "info"
    elif reason in INTERRUPTIONS and name not in deleted:
        kind, text = "interruption", f"{name} has to go: {text}"
    elif reason == "Failed":
        kind = "error"
    return Happening(at=found, kind=kind, message=text)


def _is_deletion(event: Mapping[str, Any]) -> bool:
    return bool(event.get("reason") == "SuccessfulDelete")


def _seconds(at: datetime, since: datetime) -> int:
    return max(1, math.ceil((at - since).total_seconds()))


def _written(at: datetime | None) -> str:
    return at.astimezone(timezone.utc).isoformat() if at else ""


def _read(text: str) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
