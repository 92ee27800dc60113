"""The resources of a task, but for its group: the claim, the settings, the instance template."""

from __future__ import annotations

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from cml_runner import bootstrap, keys, store
from cml_runner.clouds.gcp.account import (
    LABEL,
    LEASES,
    NETWORK,
    NETWORK_TAG,
    TASKS,
    address,
    bucket,
    ssh,
)
from cml_runner.errors import AlreadyExists, NotFound
from cml_runner.model import Lease

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cml_runner.clouds import Resource
    from cml_runner.clouds.gcp.catalogue import Type
    from cml_runner.clouds.gcp.session import Session
    from cml_runner.clouds.gcp.site import Site
    from cml_runner.model import Identifier, Task
    from cml_runner.store import Store

log = logging.getLogger(__name__)

LAUNCH = timedelta(hours=1)  # the longest that one can take
KEY, VALUE = re.compile(r"[a-z][a-z0-9_-]{0,62}"), re.compile(r"[a-z0-9_-]{0,63}")
LABELS = 64 - 4  # that a machine may have, less what Google and we add


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the lease object holds."""

    created: datetime
    expires: datetime | None
    launched: bool = False
    tags: dict[str, str] = field(default_factory=dict)


def opened(
    project: str,
    *path: str,
    credentials: Callable[[], Mapping[str, Any]] | None = None,
) -> store.Store:
    """Open a part of the project's bucket."""
    return store.Store(f"gs://{bucket(project)}/{'/'.join(path)}", credentials)


def key(identifier: Identifier) -> str:
    """Name a task's lease."""
    return f"{identifier}.json"


def clear(target: store.Store) -> None:
    """Delete the settings, and all else that nobody wants to read when the task is over."""
    for one in sorted(target.keys(""), key=lambda one: one != store.SETTINGS):
        if not store.kept(one):
            target.delete(one)


def lease(task: Task, claim: Claim) -> Lease:
    """Say how long a task may be there; one whose launcher died before the end isn't long."""
    expires = claim.expires
    if not claim.launched:
        given_up = claim.created + LAUNCH
        expires = min(expires, given_up) if expires else given_up
    return Lease(id=task.id, created=claim.created, expires=expires, tags=claim.tags)


@dataclass(frozen=True, eq=False)
class Bucket:
    """The task's part of the project's bucket. Who has put its lease object there has the task."""

    session: Session
    task: Task
    site: Site | None  # None: it won't be created
    label: str = "lease"
    needs: tuple[Resource, ...] = ()
    ours: list[Claim] = field(default_factory=list, init=False)  # what we have put there

    @cached_property
    def store(self) -> Store:
        """Where the task's objects are."""
        return self._open(TASKS, self.session.region, str(self.task.id))

    def create(self) -> bool:
        """Put the lease there, unless there is one; before that, see if all else can be had."""
        assert self.site
        self.site.look()
        now = datetime.now(timezone.utc)
        content = Claim(created=now, expires=self.task.expires, tags=dict(self.task.tags))
        if not self._leases.claim(key(self.task.id), msgspec.json.encode(content)):
            return False
        self.ours.append(content)
        return True

    def delete(self) -> None:
        """Delete all of the task's objects, the lease at last."""
        for one in self.store.keys(""):
            self.store.delete(one)
        self.release()

    def release(self) -> None:
        """Delete the lease: nobody has the task any more."""
        self._leases.delete(key(self.task.id))

    def claim(self) -> Claim | None:
        """Read the lease."""
        return self.ours[0] if self.ours else self._leases.load(key(self.task.id), Claim)

    def renew(self, expires: datetime | None) -> None:
        """Write that the task is launched, and until when it may be there."""
        old = self.claim()
        if old is None:
            msg = f"{self.task.id} is gone: launch it again"
            raise NotFound(msg)
        new = Claim(created=old.created, expires=expires, launched=True, tags=old.tags)
        self._leases.save(key(self.task.id), new)

    @property
    def _leases(self) -> Store:
        return self._open(LEASES, self.session.region)

    def _open(self, *path: str) -> Store:
        return opened(self.session.project, *path, credentials=self.session.credentials)


@dataclass(frozen=True, eq=False)
class Settings:
    """What machines have to know; only they can read it."""

    bucket: Bucket
    label: str = "settings"

    @property
    def needs(self) -> tuple[Resource, ...]:
        """Who has no claim may not write there."""
        return (self.bucket,)

    def create(self) -> bool:
        """Write them, and remove what an older task of this name has left."""
        target, content = self.bucket.store, self.bucket.task.settings.encode()
        with ThreadPoolExecutor(1) as pool:
            older = pool.submit(target.keys, "")
            new = target.claim(store.SETTINGS, content)
            if self.bucket.ours:
                for one in older.result():
                    if one != store.SETTINGS:
                        target.delete(one)
                if not new:  # somebody's who didn't clear up
                    target.write(store.SETTINGS, content)
        return new or bool(self.bucket.ours)

    def delete(self) -> None:
        """Delete them, and all else that nobody wants to read when the task is over."""
        clear(self.bucket.store)


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
        """Create it, with the task's own end."""
        body = {"name": self.name, "properties": self._properties()}
        try:
            self.bucket.session.change(
                "InstanceTemplates", "insert", instance_template_resource=body
            )
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
        """Create one which is like the newest but for its machines' end; return its name."""
        newest = max(self.all(), key=lambda one: str(one.creation_timestamp))
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

    def _properties(self) -> dict[str, Any]:
        assert self.site
        task, project = self.bucket.task, self.bucket.session.project
        account = self.site.identity.account or address(project)
        if "@" not in account:
            account = address(project).replace("cml-runner@", f"{account}@", 1)
        first = self.site.types[0]
        metadata = {
            "user-data": start_script(task, self.bucket),
            LABEL: self.name,
            "block-project-ssh-keys": "TRUE",
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
            "scheduling": _scheduling(task, first),
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


def start_script(task: Task, bucket: Bucket) -> str:
    """Write the user data: which settings to read and, if they are gone, which task to end."""
    url = f"{bucket.store.url}#gcp/{bucket.session.region}/{task.id}"
    return bootstrap.machine(url, task.program, task.expires)


def labels(task: Task) -> dict[str, str]:
    """Take of the tags what can be a label; all of them are in the lease."""
    fitting = {
        key: value
        for key, value in task.tags.items()
        if KEY.fullmatch(key) and VALUE.fullmatch(value)
    }
    return {**dict(list(fitting.items())[:LABELS]), LABEL: str(task.id)}


def _scheduling(task: Task, first: Type) -> dict[str, Any]:
    """Say on which market, and until when."""
    if task.machine.spot:
        return {
            "provisioning_model": "SPOT",
            "instance_termination_action": "DELETE",
            "automatic_restart": False,
            "on_host_maintenance": "TERMINATE",
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
