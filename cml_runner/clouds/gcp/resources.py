"""The resources of a task, but for its group: the claim, the settings, the instance template."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cml_runner import bootstrap, keys
from cml_runner import leases as base
from cml_runner.boot.gcp import LABEL
from cml_runner.boot.objects import PROGRAMS
from cml_runner.clouds.gcp.account import NETWORK, NETWORK_TAG, address, bucket, ssh
from cml_runner.clouds.gcp.machine import NOTICE
from cml_runner.errors import AlreadyExists, NotFound, RunnerError
from cml_runner.leases import LEASES, TASKS
from cml_runner.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cml_runner.clouds import Resource
    from cml_runner.clouds.gcp.catalogue import Type
    from cml_runner.clouds.gcp.session import Session
    from cml_runner.clouds.gcp.site import Site
    from cml_runner.model import Task

log = logging.getLogger(__name__)

KEY, VALUE = re.compile(r"[a-z][a-z0-9_-]{0,62}"), re.compile(r"[a-z0-9_-]{0,63}")
LONG_NOTICE = 120  # seconds; Google knows this and none
REFUSED = "preemptionNoticeDuration"  # what an error names that is about it: design 60
LABELS = 64 - 4  # that a machine may have, less what Google and we add


def opened(
    project: str,
    *path: str,
    credentials: Callable[[], Mapping[str, Any]] | None = None,
) -> Store:
    """Open a part of the project's bucket."""
    return Store(f"gs://{bucket(project)}/{'/'.join(path)}", credentials)


@dataclass(frozen=True, eq=False)
class Bucket(base.Bucket):
    """The task's part of the project's bucket. Who has put its lease object there has the task."""

    session: Session
    site: Site | None  # None: it won't be created

    @cached_property
    def store(self) -> Store:
        """Where the task's objects are."""
        return self._open(TASKS, self.session.region, str(self.task.id))

    @cached_property
    def leases(self) -> Store:
        """Where its lease is."""
        return self._open(LEASES, self.session.region)

    @cached_property
    def programs(self) -> Store:
        """Where the programs of machines are, in whatever region they run."""
        return self._open(PROGRAMS)

    def create(self) -> bool:
        """Put the lease there, unless there is one; before that, see if all else can be had."""
        assert self.site
        self.site.look()
        return super().create()

    def _open(self, *path: str) -> Store:
        return opened(self.session.project, *path, credentials=self.session.credentials)


@dataclass(frozen=True, eq=False)
class Template:
    """What every machine of the task is like. It can't be changed, so there may be several."""

    bucket: Bucket
    site: Site | None
    label: str = "instance template"

    @property
    def needs(self) -> tuple[Resource, ...]:
        """Only the lease."""
        return (self.bucket,)

    def create(self) -> bool:
        """Create it, with the task's own end; and a long notice, where Google gives one."""
        spot = self.bucket.task.machine.spot
        try:
            self._insert(LONG_NOTICE if spot else 0)
        except AlreadyExists:
            return False
        return True

    def delete(self) -> None:
        """Delete it, and what became of it when the end was moved."""
        session = self.bucket.session
        for one in self.all():
            with suppress(NotFound):
                session.change("InstanceTemplates", "delete", instance_template=one.name)

    def all(self) -> list[Any]:
        """List those of this task."""
        return self.bucket.session.pages(
            "InstanceTemplates", "list", filter=f'name eq "{self.name}(-[0-9]+)?"'
        )

    def move(self, end: datetime | None) -> str:
        """Create one which is like the newest but for its machines' end; return its name.

        Raises NotFound.
        """
        newest = max(self.all(), key=lambda one: str(one.creation_timestamp), default=None)
        if newest is None:
            msg = f"{self.name} has no machines any more"
            raise NotFound(msg)
        properties = type(newest.properties)(newest.properties)
        scheduling = properties.scheduling
        action = None if scheduling.provisioning_model == "STANDARD" else "DELETE"
        scheduling.termination_time = scheduling.instance_termination_action = None
        for field_, value in {"instance_termination_action": action, **_end(end)}.items():
            setattr(scheduling, field_, value)
        name = f"{self.name}-{int(datetime.now(timezone.utc).timestamp() * 1000)}"[:63]
        body = {"name": name, "properties": properties}
        self.bucket.session.change("InstanceTemplates", "insert", instance_template_resource=body)
        return name

    @property
    def name(self) -> str:
        """Of the first of them."""
        return str(self.bucket.task.id)

    def _insert(self, notice: int) -> None:
        """Ask for a notice of so many seconds before a preemption; if that is refused, for none."""
        body = {"name": self.name, "properties": self._properties(notice)}
        insert = ("InstanceTemplates", "insert")
        try:
            self.bucket.session.change(*insert, instance_template_resource=body)
        except RunnerError as error:
            if not notice or REFUSED not in str(error):
                raise
            log.warning("preemptions will be announced late: %s", error)
            self._insert(0)

    def _properties(self, notice: int) -> dict[str, Any]:
        assert self.site
        task, project = self.bucket.task, self.bucket.session.project
        account = self.site.identity.account or address(project)
        if "@" not in account:
            account = address(project).replace("cml-runner@", f"{account}@", 1)
        first = self.site.types[0]
        metadata = {
            "user-data": start_script(task, self.bucket.store.url, self.bucket.session.region),
            LABEL: self.name,
            "block-project-ssh-keys": "TRUE",
            **({NOTICE: str(notice)} if notice else {}),
            **self._login(),
        }
        network = {
            "network": f"projects/{project}/global/networks/{NETWORK}",
            "access_configs": [{"name": "External NAT", "type_": "ONE_TO_ONE_NAT"}],
        }
        return {
            "machine_type": first.name,
            "disks": [self._disk(first)],
            "network_interfaces": [network],
            "service_accounts": [{"email": account, "scopes": list(self.site.identity.scopes)}],
            "metadata": {"items": [{"key": key, "value": metadata[key]} for key in metadata]},
            "labels": labels(task),
            "tags": {
                "items": [NETWORK_TAG, *([ssh(self.site.address)] if self.site.address else [])]
            },
            "scheduling": _scheduling(task, first, notice),
            **_accelerators(first),
        }

    def _login(self) -> dict[str, str]:
        """Let whoever has the user's key in."""
        assert self.site
        private = self.bucket.task.machine.ssh_key
        if not private:
            return {}
        public = keys.public_key(private).decode()
        return {"ssh-keys": f"{self.site.user}:{public}", "enable-oslogin": "FALSE"}

    def _disk(self, first: Type) -> dict[str, Any]:
        assert self.site
        task, image = self.bucket.task, self.site.image
        size = max(task.machine.disk, image.size)
        if task.machine.disk and size > task.machine.disk:
            log.warning("the image needs a disk of %d GB", size)
        return {
            "boot": True,
            "auto_delete": True,
            "initialize_params": {
                "source_image": image.url,
                "disk_size_gb": size,
                "disk_type": first.disk,
                "labels": labels(task),
            },
        }


def start_script(task: Task, url: str, region: str) -> str:
    """Write the user data: where the task's objects are, and which task this is."""
    full = f"{url}#gcp/{region}/{task.id}"
    return bootstrap.machine(full, task.program, task.expires, task.count)


def labels(task: Task) -> dict[str, str]:
    """Take of the tags what can be a label; all of them are in the lease."""
    fitting = {
        key: value
        for key, value in task.tags.items()
        if KEY.fullmatch(key) and VALUE.fullmatch(value)
    }
    return {**dict(list(fitting.items())[:LABELS]), LABEL: str(task.id)}


def _scheduling(task: Task, first: Type, notice: int) -> dict[str, Any]:
    """Say on which market, and until when; a notice is for spot machines only."""
    if task.machine.spot:
        return {
            "provisioning_model": "SPOT",
            "instance_termination_action": "DELETE",
            "automatic_restart": False,
            "on_host_maintenance": "TERMINATE",
            **({"preemption_notice_duration": {"seconds": notice}} if notice else {}),
            **_end(task.expires),
        }
    moved = {"on_host_maintenance": "TERMINATE"} if first.has_gpu else {}
    return {"provisioning_model": "STANDARD", **moved, **_end(task.expires)}


def _end(at: datetime | None) -> dict[str, str]:
    if at is None:
        return {}
    text = at.astimezone(timezone.utc).isoformat(timespec="milliseconds")
    return {
        "termination_time": text.replace("+00:00", "Z"),
        "instance_termination_action": "DELETE",
    }


def _accelerators(first: Type) -> dict[str, Any]:
    if not first.gpu:
        return {}
    one = {"accelerator_type": first.gpu, "accelerator_count": first.count}
    return {"guest_accelerators": [one]}
