"""Kubernetes: a Job for each task, in one namespace of the cluster that the kubeconfig names.

What a task consists of, all of it named after its identifier:

    job        the claim on the name; suspended until all the rest is there. It numbers its pods,
               replaces those that are evicted or killed, never those whose program fails, ends
               at the deadline, and goes an hour after its end; one that keeps data stays
    settings   a Secret, and
    script     a ConfigMap, which the pods mount; our program is in it as well. Both belong to
               the Job and go with it
    claim      a volume claim, for the data of a task that keeps them; likewise
    kept       a Secret with what only launchers read of such a task; likewise
    pods       with the image's own user, and no access to the cluster unless it is asked for

There is no bucket: what pods have to say stands in their logs, and in the volume.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cml_runner import bootstrap, clouds
from cml_runner.clouds.kubernetes import catalogue, checks, container, machine, pod, secret
from cml_runner.clouds.kubernetes.job import Group, Job, lease, tidy
from cml_runner.clouds.kubernetes.session import Session
from cml_runner.errors import ConfigurationError, CredentialsError, NotFound
from cml_runner.model import Task
from cml_runner.store import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime

    from cml_runner.model import Check, Identifier, Lease, Notice, Program, Quote
    from cml_runner.store import Store

BRIEF = 5  # seconds to wait for a cluster which may be of the past
KEPT = 3600  # seconds that a Job is there after its end, for who wants to read its logs
BUCKET = f"said://{machine.DIRECTORY}/bucket"
RULES = (  # group, resource, verbs
    ("batch", "jobs", ("create", "get", "list", "patch", "delete")),
    ("", "secrets", ("create", "get", "patch", "delete")),
    ("", "configmaps", ("create", "get", "delete")),
    ("", "persistentvolumeclaims", ("create", "get")),
    ("", "pods", ("list", "create", "delete")),
    ("", "pods/log", ("get",)),
    ("", "pods/exec", ("get", "create")),  # the first until 1.34, both from then on
    ("", "pods/eviction", ("create",)),
    ("", "events", ("list",)),
)
DOCTOR_RULES = (("", "resourcequotas", ("list",)), ("", "serviceaccounts", ("get",)))


class Cloud:
    """One cluster and namespace. A region is all of it, or the nodes with some label."""

    dedicated = True
    keeps = True
    metadata_service = False
    kept: int = KEPT  # a test may be in a hurry
    grace: int = pod.GRACE  # likewise
    start: Callable[[Program, str], str]  # likewise

    def __init__(self, region: str) -> None:
        self.region, self._nodes = catalogue.region(region)
        self._session = Session()
        self.start = _start

    def plan(self, task: Task) -> clouds.Plan:
        """Describe a task's resources."""
        name = task.machine.options.get("kubernetes-namespace", "")
        session = Session(name) if name else self._session
        manifest = None
        bucket = f"{BUCKET}?data={pod.DATA}" if pod.claims(task) else BUCKET
        if task != Task(id=task.id):  # the identifier alone will do for all but creation
            wanted = pod.understood(task, self._nodes)
            secret.check(task, self.start(task.program, bucket))
            manifest = pod.job(task, wanted, self.region, kept=self.kept, grace=self.grace)
        job = Job(session, task, manifest)
        settings = secret.settings(job)
        script = secret.script(job, lambda: self.start(task.program, bucket))
        parts = (settings, script, *([secret.claim(job)] if pod.claims(task) else ()))
        group = Group(job, (job, *parts))
        return clouds.Plan(resources=(job, *parts, group), group=group, bucket=job)

    def container(self, address: str, options: Mapping[str, str]) -> Store:
        """Open a bucket of any service, s3://NAME/PATH say, with the environment's credentials."""
        return container.opened(address, options)

    def tasks(self) -> list[Lease]:
        """List the Jobs of this region that are not over, or keep data."""
        labels = ",".join(f"{key}={value}" for key, value in pod.OURS.items())
        selector = f"{labels},{pod.REGION}={self.region}"
        found = []
        for one in self._session.items("jobs", patience=BRIEF, labelSelector=selector):
            with suppress(ConfigurationError):
                if _is_there(one):
                    found.append(lease(one))
                    tidy(self._session, one)
        return found

    def lease(self, identifier: Identifier) -> Lease | None:
        """Read its Job."""
        with suppress(NotFound):
            found = self._session.call("GET", "jobs", str(identifier))
            return lease(found) if _is_there(found) else None
        return None

    def older(self) -> list[Lease]:
        """Know none."""
        return []

    def now(self) -> datetime:
        """Read the date of an answer of the API server."""
        return self._session.now()

    def setup(self) -> list[str]:
        """Make nothing, since the tasks share nothing; see if we may do what has to be done."""

        def ask(rule: tuple[str, str, str]) -> str:
            group, resource, verb = rule
            return "" if self._session.may(group, resource, verb) else f"{verb} {resource}"

        wanted = [(group, resource, verb) for group, resource, verbs in RULES for verb in verbs]
        with ThreadPoolExecutor() as pool:
            missing = [one for one in pool.map(ask, wanted) if one]
        if missing:
            msg = f"not allowed in namespace {self._session.namespace}: {', '.join(missing)}."
            raise CredentialsError(f"{msg} See: cml-runner permissions kubernetes")
        return []

    def permissions(self, *, doctor: bool = False) -> Mapping[str, Any]:
        """Write a Role for whoever launches."""
        rules = (*RULES, *(DOCTOR_RULES if doctor else ()))
        return {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": {"name": "cml-runner"},
            "rules": [
                {"apiGroups": [group], "resources": [resource], "verbs": list(verbs)}
                for group, resource, verbs in rules
            ],
        }

    def checks(self, task: Task) -> Iterator[Check]:
        """Look at cluster, namespace, and what the pods are to be."""
        name = task.machine.options.get("kubernetes-namespace", "")
        session = Session(name) if name else self._session
        return checks.checks(session, task, RULES, lambda: pod.understood(task, self._nodes))

    def quotes(self, task: Task) -> list[Quote]:
        """Know none: nodes have a price, and others pay it."""
        return []

    @staticmethod
    def rank() -> int:
        """The Job controller numbers its pods."""
        return machine.rank()

    @staticmethod
    def forgotten() -> int:
        """The Job controller counts the pods that it had to replace."""
        return machine.replaced()

    @staticmethod
    def machine() -> str:
        """Return the pod's name."""
        return machine.name()

    @staticmethod
    def notice() -> Notice | None:
        """See if the pod has been told to end."""
        return machine.notice()

    def leave(self, identifier: Identifier, url: str, *, last: bool) -> None:
        """Do nothing: a pod leaves by ending well, and a Job is over with its last pod."""


def _is_there(job: Mapping[str, Any]) -> bool:
    """Say if a Job isn't over, or keeps data."""
    there = pod.keeps(job) or not pod.over(job)
    return there and "deletionTimestamp" not in job["metadata"]


def _start(program: Program, bucket: str) -> str:
    settings, wheel = f"{pod.SETTINGS}/{SETTINGS}", f"{pod.SCRIPT}/{pod.wheel(program)}"
    return bootstrap.container(settings, bucket, program, wheel)
