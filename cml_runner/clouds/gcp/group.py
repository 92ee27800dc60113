"""The regional managed instance group: it holds a task's machines, and replaces those that die."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Literal

from cml_runner import wait
from cml_runner.boot.gcp import LABEL
from cml_runner.clouds.gcp import happenings, shell
from cml_runner.clouds.gcp.machine import DEADLINE, INTERRUPT
from cml_runner.clouds.gcp.session import last
from cml_runner.errors import AlreadyExists, ConfigurationError, NotFound, RunnerError
from cml_runner.model import Happening, Instance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from cml_runner.clouds import Resource
    from cml_runner.clouds.gcp.resources import Bucket, Template
    from cml_runner.clouds.gcp.session import Session
    from cml_runner.clouds.gcp.site import Site
    from cml_runner.terminal import Program

log = logging.getLogger(__name__)

SERVICE = "RegionInstanceGroupManagers"
LONGEST = 900  # seconds for a group to vanish with its machines
STATUS: Mapping[str, Literal["starting", "running", "stopping"]] = {
    "PENDING": "starting",
    "PROVISIONING": "starting",
    "STAGING": "starting",
    "RUNNING": "running",
}


@dataclass(eq=False)
class Group:
    """One group over all zones of the region in which one of the types can be had."""

    bucket: Bucket
    site: Site | None
    template: Template
    needs: Sequence[Resource]
    label: str = "instance group"
    fresh: bool = field(default=False, init=False)  # it was created here, and is still empty
    told: bool = field(default=False, init=False)  # the lease says that the task is launched
    expires: datetime | None = field(default=None, init=False)  # and until when it may be there

    def create(self) -> bool:
        """Create it without a machine; its machines' end is in the template."""
        try:
            self._insert()
        except AlreadyExists:
            if self._is_there():
                return False
            self._gone()  # an older one of this name is about to vanish
            self._insert()
        self.fresh = True
        return True

    def delete(self) -> None:
        """Delete it with its machines, and wait until they are gone."""
        try:
            self._change("delete")
        except NotFound:
            return
        except RunnerError:
            if self._is_there():  # and isn't being deleted already
                raise
            self._gone()

    def resize(self, count: int) -> None:
        """Have it hold so many; who asks for the first ones has launched the task."""
        if not self.fresh:
            self.session.begin(SERVICE, "resize", **self._whose, size=count)
            return
        self.fresh = False
        with ThreadPoolExecutor(1) as pool:  # both at once, as a launch waits for each: design 49
            told = pool.submit(self.bucket.renew, self.bucket.task.expires)
            self.session.begin(SERVICE, "resize", **self._whose, size=count)
            told.result()
        self.expires = self.bucket.task.expires
        self.told = True

    def instances(self) -> list[Instance]:
        """List those which are there."""
        return [
            Instance(
                id=str(one.id), status=STATUS.get(one.status, "stopping"), address=_address(one)
            )
            for one in self._instances()
        ]

    def events(self) -> list[Happening]:
        """Read what the group couldn't do, what befell its machines, and what we did to them."""
        with ThreadPoolExecutor(4) as pool:
            errors = pool.submit(self._errors)
            operations = pool.submit(self._operations)
            own = pool.submit(self.bucket.store.load, happenings.OWN, list[Happening])
            claim = pool.submit(self.bucket.claim)
        marked, begun = own.result() or [], claim.result()
        found = happenings.of_group(errors.result(), self.site.zones if self.site else ())
        since = begun.created if begun else None
        found += happenings.of_machines(operations.result(), since, marked)
        return sorted([*found, *marked], key=lambda one: one.at)

    def expire(self, at: datetime | None) -> None:
        """Set the end in the lease and, if it is another than the template's, in a new template.

        The end of a machine that runs can't be moved any more: it is told, and ends itself.
        """
        if at != self.bucket.task.expires or not self.site:
            with suppress(NotFound):  # a task may be there for its data alone
                self._move(at)
        if not (self.told and at == self.expires):
            self.bucket.renew(at)
        self.told, self.expires = True, at

    def interrupt(self, instance: str, after: float) -> None:
        """Mark a machine in its metadata: it learns of it at once, ends its job and itself."""
        found = self._running(instance)
        now = datetime.now(timezone.utc)
        at = now + timedelta(seconds=after)
        self._mark(found, INTERRUPT, at)
        message = f"{found.name} was interrupted on demand"
        happening = Happening(at=now, kind="interruption", message=message)
        older = self.bucket.store.load(happenings.OWN, list[Happening]) or []
        self.bucket.store.save(happenings.OWN, [*older, happening])

    def evict(self, instance: str) -> None:
        """Simulate a maintenance event, in which Compute Engine preempts a spot machine."""
        found = self._running(instance)
        if found.scheduling.provisioning_model != "SPOT":
            msg = f"--real: {found.name} is no spot machine; without --real it goes all the same"
            raise ConfigurationError(msg)
        where = {"instance": found.name, "zone": last(found.zone)}
        self.session.begin("Instances", "simulate_maintenance_event", **where)

    def shell(self, instance: str, command: Sequence[str]) -> AbstractContextManager[Program]:
        """Let Google's proxy in to the machine meanwhile, with a key made for the occasion."""
        number = str(self._running(instance).id)
        return shell.opened(self.session, lambda: self._running(number), command)

    def console(self) -> str:
        """Ask for one console after the other, until one has anything written on it."""

        def order(one: Any) -> tuple[bool, str]:
            return one.status not in STATUS, str(one.creation_timestamp)

        for one in sorted(self._instances(), key=order, reverse=True):
            with suppress(RunnerError):
                found = self.session.call(
                    "Instances", "get_serial_port_output", instance=one.name, zone=last(one.zone)
                )
                if found.contents:
                    return str(found.contents)
        return ""

    @property
    def session(self) -> Session:
        """The bucket's."""
        return self.bucket.session

    @property
    def name(self) -> str:
        """The task's."""
        return str(self.bucket.task.id)

    @property
    def _whose(self) -> dict[str, str]:
        return {"instance_group_manager": self.name}

    def _change(self, method: str, **fields: Any) -> None:
        self.session.change(SERVICE, method, **self._whose, **fields)

    def _insert(self) -> None:
        """Create it, to be spread as capacity has it, and never to be moved for balance."""
        assert self.site
        body = {
            "name": self.name,
            "base_instance_name": self.name,
            "instance_template": self._template(self.template.name),
            "target_size": 0,
            "distribution_policy": {
                "target_shape": "ANY",
                "zones": [{"zone": f"zones/{zone}"} for zone in self.site.zones],
            },
            "update_policy": {"type_": "OPPORTUNISTIC", "instance_redistribution_type": "NONE"},
            "instance_lifecycle_policy": {
                "default_action_on_failure": "REPAIR",
                "on_repair": {"allow_changing_zone": "YES"},
            },
            **self._choice(),
        }
        self.session.change(SERVICE, "insert", instance_group_manager_resource=body)

    def _choice(self) -> dict[str, Any]:
        """Of several types, name all; the group takes the best that there is."""
        assert self.site
        if len(self.site.types) < 2:
            return {}
        selections = {
            f"choice-{rank}": {"machine_types": [one.name], "rank": rank}
            for rank, one in enumerate(self.site.types, 1)
        }
        return {"instance_flexibility_policy": {"instance_selections": selections}}

    def _template(self, name: str) -> str:
        return f"projects/{self.session.project}/global/instanceTemplates/{name}"

    def _move(self, at: datetime | None) -> None:
        new = {"instance_template": self._template(self.template.move(at))}
        self._change(
            "set_instance_template",
            region_instance_group_managers_set_template_request_resource=new,
        )
        for one in self._instances():
            with suppress(NotFound):
                self._mark(one, DEADLINE, at)

    def _mark(self, instance: Any, key: str, at: datetime | None) -> None:
        """Write a time into a machine's metadata, or remove it."""
        items = {one.key: one.value for one in instance.metadata.items}
        items.pop(key, None)
        if at:
            items[key] = at.isoformat(timespec="milliseconds")
        self.session.change(
            "Instances",
            "set_metadata",
            instance=instance.name,
            zone=last(instance.zone),
            metadata_resource={
                "fingerprint": instance.metadata.fingerprint,
                "items": [{"key": name, "value": value} for name, value in items.items()],
            },
        )

    def _running(self, instance: str) -> Any:
        """Find a machine that runs; without a name, the first. Raises NotFound."""
        running = [one for one in self._instances() if one.status == "RUNNING"]
        found = [one for one in running if instance in (str(one.id), one.name, "")]
        if not found:
            msg = f"{self.name} has no running machine {instance}".rstrip()
            raise NotFound(msg)
        return found[0]

    def _is_there(self) -> bool:
        try:
            found = self.session.call(SERVICE, "get", **self._whose)
        except NotFound:
            return False
        return not (found.target_size == 0 and found.current_actions.deleting)

    def _gone(self) -> None:
        def absent() -> bool:
            try:
                self.session.call(SERVICE, "get", **self._whose)
            except NotFound:
                return True
            return False

        wait.until(absent, f"{self.name} to vanish with its machines", LONGEST, every=1)

    def _instances(self) -> list[Any]:
        found = self.session.pages(
            "Instances",
            "aggregated_list",
            filter=f"labels.{LABEL} = {self.name}",
        )
        return [one for _, listed in found for one in listed.instances]

    def _errors(self) -> list[Any]:
        with suppress(NotFound):
            return self.session.pages(SERVICE, "list_errors", **self._whose)
        return []

    def _operations(self) -> list[Any]:
        found = self.session.pages(
            "GlobalOperations",
            "aggregated_list",
            filter=f'targetLink eq ".*/instances/{self.name}-[a-z0-9]+"',
        )
        return [one for _, listed in found for one in listed.operations]


def _address(instance: Any) -> str:
    for card in instance.network_interfaces:
        outside = [one.nat_i_p for one in card.access_configs if one.nat_i_p]
        return str(next(iter(outside), card.network_i_p))
    return ""
