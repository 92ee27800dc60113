"""The scale set: it holds a task's machines, and its autoscale setting replaces what dies."""

from __future__ import annotations

import logging
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, NoReturn

from cml_runner import wait
from cml_runner.boot.azure import COUNT, GONE
from cml_runner.clouds.azure import arm, autoscale, states, virtual
from cml_runner.clouds.azure.machine import INTERRUPT
from cml_runner.clouds.azure.resources import tags
from cml_runner.errors import (
    AlreadyExists,
    ConfigurationError,
    CredentialsError,
    NoCapacity,
    NotFound,
    RunnerError,
)
from cml_runner.model import Happening, Instance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cml_runner.clouds import Resource
    from cml_runner.clouds.azure.resources import Bucket
    from cml_runner.clouds.azure.session import Operation, Session
    from cml_runner.clouds.azure.site import Site

log = logging.getLogger(__name__)

SCALE_SETS, MACHINES = "virtual_machine_scale_sets", "virtual_machines"  # as the SDK names them
SETTINGS = "autoscale_settings"
LONGEST = 900  # seconds for a scale set to vanish with its machines
HISTORY = timedelta(days=5)  # of what Azure writes down
FRESH = 15  # seconds before it is asked again what it has written down
RECORD = "events-"  # objects with what the machine can't tell any more


@dataclass(eq=False)
class Group:
    """One scale set, in all zones in which its sizes can be had."""

    bucket: Bucket
    site: Site | None
    needs: Sequence[Resource]
    label: str = "scale set"
    fresh: bool = field(default=False, init=False)  # it was created here
    empty: bool = field(default=False, init=False)  # and holds nothing yet
    expires: datetime | None = field(default=None, init=False)  # as Azure was told
    operation: Operation | None = field(default=None, init=False)  # what starts machines
    _read: tuple[float, list[Happening]] = field(default=(0, []), init=False)

    def create(self) -> bool:
        """Create it without a machine."""
        new = {"If-None-Match": "*"}
        try:
            self._create(new)
        except AlreadyExists:
            found = self._describe()
            if not found or found["properties"].get("provisioningState") == "Deleting":
                self._gone()  # an older one of this name is about to vanish
                self._create(new)
            elif self.bucket.ours:  # so this is ours, too: the answer to our call was lost
                self._create({})
            else:
                return False
        self.fresh = self.empty = True
        return True

    def delete(self) -> None:
        """Delete it with its machines, wait until they are gone, and forget its deadline."""
        self._delete("compute", SCALE_SETS, "begin_delete", self.name, force_deletion=True)
        self._delete("monitor", SETTINGS, "delete", self.name)
        self._gone()

    def resize(self, count: int) -> None:
        """Have Azure hold that many machines, and start them now."""
        if self.empty:
            self._climb(count)
            self.empty = False
            return
        with suppress(NotFound):
            self.expires = autoscale.until(self._setting())
        gone = len(self.bucket.store.keys(GONE))
        self._hold(count, self.expires, gone)
        self.operation = self._patch({"sku": {**self._sku(), "capacity": count}})

    def instances(self) -> list[Instance]:
        """List the machines, those included which cost money without running."""
        kinds = ("network_interfaces", "public_ip_addresses")
        with ThreadPoolExecutor(2) as pool:
            interfaces, addresses = (pool.submit(self._network, kind) for kind in kinds)
            machines = self._machines()
            known = virtual.addresses(interfaces.result(), addresses.result())
        return [
            Instance(
                id=one["name"],
                status=states.status(one),
                address=known.get(one["id"].lower(), ""),
            )
            for one in machines
        ]

    def events(self) -> list[Happening]:
        """Say what became of starting machines, how they are, and what Azure has written down."""
        with ThreadPoolExecutor(3) as pool:
            parts = [pool.submit(one) for one in (self._starting, self._written, self._recorded)]
            found = [event for one in self._machines() for event in states.happenings(one)]
            found += [event for part in parts for event in part.result()]
        return sorted(found, key=lambda one: one.at)

    def expire(self, at: datetime | None) -> None:
        """Set the group's end, if it is another than before; with that, the task is launched."""
        if not self.fresh or at != self.expires:
            with suppress(NotFound):
                self._settle(autoscale.moved(self._setting(), at))
                self.expires = at
        self.bucket.renew(at)

    def interrupt(self, instance: str, after: float) -> None:
        """Tag a machine, which learns of it, ends its job and itself."""
        name = str(self._running(instance)["name"])
        now = datetime.now(timezone.utc)
        at = now + timedelta(seconds=after)
        tag = {INTERRUPT: at.isoformat(timespec="milliseconds")}
        machine = self.bucket.place.id("Compute/virtualMachines", name).lstrip("/")
        body = {"operation": "Merge", "properties": {"tags": tag}}
        self.session.call("resource", "tags", "begin_update_at_scope", machine, body)
        record = Happening(at=now, kind="interruption", message=f"{name} was interrupted")
        self.bucket.store.save(f"{RECORD}{name}.json", record)

    def evict(self, instance: str) -> None:
        """Have Azure evict a spot machine, which it does within half an hour."""
        found = self._running(instance)
        name = found["name"]
        if found["properties"].get("priority") != "Spot":
            msg = f"--real: {name} is no spot machine; without --real it goes all the same"
            raise ConfigurationError(msg)
        where = (MACHINES, "simulate_eviction", self.bucket.place.group)
        self.session.call("compute", *where, name)

    def shell(self, instance: str, command: Sequence[str]) -> NoReturn:
        """Refuse, and say how Azure's own program does it.

        A rule of the security group would outlive a process that dies, and it is all machines'.
        """
        name = self._running(instance)["name"]
        where = f"--resource-group {self.bucket.place.group} --name {name}"
        script = shlex.quote(shlex.join(command or ("COMMAND",)))
        msg = (
            "on Azure nothing leads to a machine; az has commands run on it, as root:\n"
            f"  az vm run-command invoke {where} --command-id RunShellScript --scripts {script}\n"
            "a shell takes Azure Bastion in the machines' network, and a key:\n"
            f"  az vm user update {where} --username azureuser --ssh-key-value KEY.pub\n"
            f"  az network bastion ssh --name BASTION --resource-group {self.bucket.place.group}"
            f" --target-resource-id {self.bucket.place.id('Compute/virtualMachines', name)}"
            " --auth-type ssh-key --username azureuser --ssh-key KEY"
        )
        raise ConfigurationError(msg)

    def console(self) -> str:
        """Ask for one console after the other, until one has anything written on it."""

        def order(one: dict[str, Any]) -> tuple[bool, str]:
            return states.status(one) == "stopping", str(one["properties"].get("timeCreated", ""))

        for one in sorted(self._machines(), key=order, reverse=True):
            if text := self._console(one["name"]):
                return text
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
    def path(self) -> str:
        """The scale set's identifier."""
        return self.bucket.place.id("Compute/virtualMachineScaleSets", self.name)

    @property
    def setting(self) -> str:
        """The identifier of what holds it at its size."""
        return self.bucket.place.id(autoscale.KIND, self.name)

    def _create(self, headers: dict[str, str]) -> None:
        assert self.site
        body = virtual.scale_set(self.bucket.place, self.bucket.task, self.site)
        where = (SCALE_SETS, "begin_create_or_update", self.bucket.place.group, self.name)
        self.session.call("compute", *where, body, headers=headers)

    def _climb(self, count: int) -> None:
        """Start the machines, of one mixture of sizes after the other. Raises NoCapacity."""
        assert self.site
        rungs, until = self.site.rungs if count else [], self.bucket.task.expires
        several = len(rungs) > 1  # then nobody but us may start any before one has proved right
        self._hold(count, until, least=0 if several else count)
        tried: list[str] = []
        for number, sizes in enumerate(rungs):
            if self._had(sizes, count, number, tried):
                break
        if rungs and len(tried) == len(rungs):
            raise NoCapacity("; ".join(tried))
        if several:
            self._hold(count, until)

    def _had(self, sizes: tuple[str, ...], count: int, number: int, tried: list[str]) -> bool:
        """Say if machines could be had; else note why not, and clear up."""
        assert self.site
        try:
            self._start(sizes, count, number, last=number + 1 == len(self.site.rungs))
        except NoCapacity as error:
            log.warning("%s: %s", ", ".join(sizes), error)
            tried.append(f"{', '.join(sizes)}: {error}")
            self._sweep()
            return False
        return True

    def _start(self, sizes: tuple[str, ...], count: int, number: int, *, last: bool) -> None:
        """Ask for them; how it goes on is waited for only as long as there is something else."""
        spot = self.bucket.task.machine.spot
        kind = virtual.sizes(sizes, spot=spot, capacity=count)
        self.operation = self._patch(kind if number else {"sku": kind["sku"]})
        if not last:
            self.session.finish(self.operation, f"start {', '.join(sizes)}")
            self.operation = None

    def _patch(self, body: dict[str, Any]) -> Operation:
        where = (SCALE_SETS, "begin_update", self.bucket.place.group, self.name)
        return self.session.begin("compute", *where, body)

    def _sweep(self) -> None:
        """Delete what a failed allocation leaves behind: machines that never were."""
        for one in self._machines():
            if one["properties"].get("provisioningState") == "Failed":
                self._delete("compute", MACHINES, "begin_delete", one["name"])

    def _sku(self) -> dict[str, Any]:
        found = self._describe()
        if not found:
            msg = f"{self.name} is gone: launch it again"
            raise NotFound(msg)
        sku: dict[str, Any] = found["sku"]
        return sku

    def _hold(
        self, count: int, until: datetime | None, gone: int = 0, least: int | None = None
    ) -> None:
        """Have Azure keep that many machines, beside those that have left, until then."""
        task, place = self.bucket.task, self.bucket.place
        own = tags(task, **{COUNT: count + gone})
        bounds = (count if least is None else least, count)
        self._settle(autoscale.setting(place.region, self.path, bounds, until, own))
        self.expires = until

    def _settle(self, body: dict[str, Any]) -> None:
        where = (SETTINGS, "create_or_update", self.bucket.place.group, self.name)
        self.session.call("monitor", *where, body)

    def _setting(self) -> dict[str, Any]:
        return self.session.call("monitor", SETTINGS, "get", self.bucket.place.group, self.name)

    def _describe(self) -> dict[str, Any] | None:
        try:
            where = (SCALE_SETS, "get", self.bucket.place.group, self.name)
            return self.session.call("compute", *where)
        except NotFound:
            return None

    def _delete(self, service: str, kind: str, method: str, name: str, **named: Any) -> None:
        with suppress(NotFound, AlreadyExists):  # or it is being deleted already
            self.session.call(service, kind, method, self.bucket.place.group, name, **named)

    def _gone(self) -> None:
        """Wait until it has vanished, which is when its last machine has."""
        what = f"{self.name} to vanish with its machines"
        wait.until(lambda: self._describe() is None, what, LONGEST, every=1)

    def _machines(self) -> list[dict[str, Any]]:
        ours = f"'virtualMachineScaleSet/id' eq '{self.path}'"
        where = (MACHINES, "list", self.bucket.place.group)
        with suppress(NotFound):
            return self.session.pages("compute", *where, filter=ours, expand="instanceView")
        return []

    def _running(self, instance: str) -> dict[str, Any]:
        """Find a machine that runs; without a name, the first. Raises NotFound."""
        for one in self._machines():
            if states.status(one) == "running" and instance in (one["name"], ""):
                return one
        msg = f"{self.name} has no running machine {instance}".rstrip()
        raise NotFound(msg)

    def _network(self, kind: str) -> list[dict[str, Any]]:
        with suppress(NotFound):
            return self.session.pages("network", kind, "list", self.bucket.place.group)
        return []

    def _starting(self) -> list[Happening]:
        """Look at what starts the machines: a failure is told there first."""
        if not self.operation:
            return []
        state, content = self.session.state(self.operation, "start machines")
        if state == "Failed":
            code, text = arm.details(content)
            return [states.failed(datetime.now(timezone.utc), code, text)]
        if state == "Succeeded":
            self.operation = None
        return []

    def _recorded(self) -> list[Happening]:
        store = self.bucket.store
        found = (store.load(key, Happening) for key in store.keys(RECORD))
        return [one for one in found if one]

    def _written(self) -> list[Happening]:
        """Read the activity log, which is behind by some minutes, and needn't be read all along."""
        when, found = self._read
        if when and time.monotonic() < when + FRESH:
            return found
        place = self.bucket.place
        since = datetime.now(timezone.utc) - HISTORY
        if self.bucket.ours:  # what became of an older task of this name isn't ours
            since = self.bucket.ours[0].created
        query = f"eventTimestamp ge '{since:%Y-%m-%dT%H:%M:%SZ}'"
        query += f" and resourceGroupName eq '{place.group}'"
        listed = []
        with suppress(CredentialsError):  # it is not so important
            listed = self.session.pages("monitor", "activity_logs", "list", query)
        ours = (one for one in listed if self.name in str(one.get("resourceId", "")).lower())
        found = [event for one in ours if (event := states.activity(one))]
        self._read = (time.monotonic(), found)
        return found

    def _console(self, machine: str) -> str:
        where = ("retrieve_boot_diagnostics_data", self.bucket.place.group, machine)
        with suppress(RunnerError):
            found = self.session.call("compute", MACHINES, *where)
            if url := found.get("serialConsoleLogBlobUri"):
                return self.session.read(url)
        return ""
