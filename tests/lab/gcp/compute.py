"""Compute Engine, as far as it can be told from outside: templates, groups, machines, operations.

A thread keeps each managed instance group as large as wanted, makes machines anew that died, and
ends those whose time has come. Every change is an operation, which takes a moment.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from tests.lab.gcp.discovery import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

PROJECT = "acme-ci"
BASE = "https://www.googleapis.com/compute/v1/projects"
TURN = 0.05  # seconds between two looks at all groups
MOMENT = 0.02  # seconds that an operation takes
NOTICE = 0.5  # seconds that a machine has left when its preemption is simulated
REPAIR = 5  # seconds until a group acts on a machine that has ended by itself; they are longer
AGAIN = 0.5  # seconds before a group that could start nothing tries again
ZONES = {
    "us-west1": "abc", "us-east1": "bcd", "europe-west1": "bcd", "europe-north1": "abc",
}  # fmt: skip
QUOTAS = {
    "CPUS": (2.0, 24.0), "N2_CPUS": (0.0, 24.0), "PREEMPTIBLE_CPUS": (0.0, 0.0),
    "NVIDIA_T4_GPUS": (0.0, 1.0), "PREEMPTIBLE_NVIDIA_T4_GPUS": (0.0, 4.0),
    "INSTANCES": (1.0, 72.0), "IN_USE_ADDRESSES": (1.0, 8.0),
}  # fmt: skip
GLOBAL_QUOTAS = {"CPUS_ALL_REGIONS": (2.0, 32.0), "GPUS_ALL_REGIONS": (0.0, 1.0)}
MESSAGES = {
    "ZONE_RESOURCE_POOL_EXHAUSTED": "The zone '{zone}' does not have enough resources available"
    " to fulfill the request.  Try a different zone, or try again later.",
    "QUOTA_EXCEEDED": "Quota 'N2_CPUS' exceeded.  Limit: 8.0 in region {region}.",
    "PERMISSIONS_ERROR": "Required 'compute.instances.create' permission for 'projects/{project}'",
    "CONDITION_NOT_MET": "Scheduling must have a termination time in the future.",
}


@dataclass
class Instance:
    """A machine."""

    id: str
    name: str
    zone: str
    type: str
    spot: bool
    metadata: dict[str, str]
    labels: dict[str, str]
    tags: list[str]
    address: str
    account: str
    scopes: list[str]
    end: datetime | None
    created: datetime
    status: str = "STAGING"
    preempted: bool = False
    maintenance: str = "NONE"
    console: str = ""
    repair: float = 0  # when its group acts on its end
    version: int = 1  # of its metadata
    timers: list[threading.Timer] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """It doesn't run any more."""
        return self.status not in ("STAGING", "RUNNING")

    @property
    def user_data(self) -> str:
        """Its first script."""
        return self.metadata.get("user-data", "")


@dataclass
class Group:
    """One managed instance group."""

    name: str
    region: str
    template: str
    base: str
    size: int
    zones: list[str]
    choices: list[str]  # machine types, the best first
    created: datetime
    ready: float  # when it can be used
    body: dict[str, Any]
    members: dict[str, str] = field(default_factory=dict)  # names of machines, and their numbers
    leaving: set[str] = field(default_factory=set)  # names that aren't to be made anew
    renewing: set[str] = field(default_factory=set)  # names that are to be made anew at once
    deleting: bool = False
    paused: float = 0
    errors: list[dict[str, Any]] = field(default_factory=list)


class Machines(Protocol):
    """Who plays machines."""

    def start(self, instance: Instance) -> None:
        """Boot one; returns at once."""

    def end(self, instance: str) -> None:
        """Take its power away."""


class Nobody:
    """Instances that just are there."""

    def start(self, instance: Instance) -> None: ...
    def end(self, instance: str) -> None: ...


class Compute:
    """The service, in every region."""

    project = PROJECT

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self.instances: dict[str, Instance] = {}  # by number; those which are gone as well
        self.templates: dict[str, dict[str, Any]] = {}
        self.groups: dict[tuple[str, str], Group] = {}
        self.firewalls: dict[str, dict[str, Any]] = {}
        self.operations: dict[str, dict[str, Any]] = {}
        self.images: dict[tuple[str, str], dict[str, Any]] = {}
        self.missing: set[tuple[str, str]] = set()  # types that a zone hasn't got
        self.types: set[str] = set()
        self.gpus: set[str] = set()
        self.hinder: Callable[[str, str, bool], str] = lambda _zone, _type, _spot: ""
        self.spoil: Callable[[str], str] = lambda _kind: ""  # code with which operations fail
        self.quotas: dict[str, tuple[float, float]] = dict(QUOTAS)  # usage and limit
        self.networks = {"default": set(ZONES)}  # and the regions in which they have subnets
        self._requests: dict[str, str] = {}  # operations by the number of who asked
        self._ready: dict[str, float] = {}  # when templates can be used
        self._done: dict[str, Callable[[], bool]] = {}
        self._numbers = count(1)
        self.lock = threading.RLock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="groups", daemon=True)

    def start(self) -> None:
        """Begin to keep groups."""
        self._thread.start()

    def stop(self) -> None:
        """Keep nothing any more."""
        self._over.set()
        self._thread.join()
        for one in self.instances.values():
            for timer in one.timers:
                timer.cancel()

    # What happens to machines

    def alive(self) -> list[Instance]:
        """List those that are there, whether they run or not."""
        return [one for one in self.instances.values() if one.status != "GONE"]

    def powered_off(self, number: str) -> None:
        """Hear that a machine has ended by itself; it is still there, and its disk costs."""
        with self.lock:
            one = self.instances[number]
            if one.status in ("RUNNING", "STAGING"):
                one.status, one.repair = "TERMINATED", time.monotonic() + REPAIR
                self._tell("compute.instances.guestTerminate", one)
                self._machines.end(number)

    def preempt(self, number: str, after: float = 30) -> None:
        """Take a spot machine away, with notice."""
        one = self.instances[number]
        one.preempted = True
        self._tell("compute.instances.preempted", one)
        timer = threading.Timer(after, self.remove, (number,))
        timer.daemon = True
        one.timers.append(timer)
        timer.start()

    def crash(self, number: str) -> None:
        """Have a machine lose its host."""
        self._tell("compute.instances.hostError", self.instances[number])
        self.remove(number)

    def remove(self, number: str) -> None:
        """Delete a machine, for whatever reason."""
        with self.lock:
            if self.instances[number].status == "GONE":
                return
            self.instances[number].status = "GONE"
        self._machines.end(number)

    # What can be asked for: one method for each of the API's

    def images_getFromFamily(self, where: dict[str, str], **_: Any) -> Any:
        return self._image(where["project"], where["family"], family=True)

    def images_get(self, where: dict[str, str], **_: Any) -> Any:
        return self._image(where["project"], where["image"], family=False)

    def machineTypes_aggregatedList(self, query: dict[str, str], **_: Any) -> Any:
        return self._everywhere("machineTypes", self.types, query)

    def acceleratorTypes_aggregatedList(self, query: dict[str, str], **_: Any) -> Any:
        return self._everywhere("acceleratorTypes", self.gpus, query)

    def regions_get(self, where: dict[str, str], **_: Any) -> Any:
        return {"kind": "compute#region", "name": where["region"], "quotas": _told(self.quotas)}

    def projects_get(self, **_: Any) -> Any:
        return {"kind": "compute#project", "name": PROJECT, "quotas": _told(GLOBAL_QUOTAS)}

    def networks_get(self, where: dict[str, str], **_: Any) -> Any:
        name = where["network"]
        if name not in self.networks:
            raise _absent(f"projects/{PROJECT}/global/networks/{name}")
        subnets = [
            f"{BASE}/{PROJECT}/regions/{region}/subnetworks/{name}"
            for region in sorted(self.networks[name])
        ]
        return {"kind": "compute#network", "name": name, "subnetworks": subnets}

    def firewalls_get(self, where: dict[str, str], **_: Any) -> Any:
        return self._named(self.firewalls, where["firewall"], "firewalls")

    def firewalls_insert(self, body: Any, query: dict[str, str], **_: Any) -> Any:
        self._new(self.firewalls, body["name"], "firewalls")
        self.firewalls[body["name"]] = body
        return self._operation("insert", f"global/firewalls/{body['name']}", query)

    def instanceTemplates_insert(self, body: Any, query: dict[str, str], **_: Any) -> Any:
        name = body["name"]
        if code := self.spoil("instanceTemplates.insert"):
            return self._operation("insert", f"global/instanceTemplates/{name}", query, code=code)
        self._new(self.templates, name, "instanceTemplates")
        self.templates[name] = {**body, "creationTimestamp": _text(_now())}
        self._ready[name] = time.monotonic() + MOMENT
        return self._operation("insert", f"global/instanceTemplates/{name}", query)

    def instanceTemplates_list(self, query: dict[str, str], **_: Any) -> Any:
        pattern = query["filter"].removeprefix('name eq "').removesuffix('"')
        found = [one for name, one in self.templates.items() if re.fullmatch(pattern, name)]
        return {"kind": "compute#instanceTemplateList", **({"items": found} if found else {})}

    def instanceTemplates_delete(
        self, where: dict[str, str], query: dict[str, str], **_: Any
    ) -> Any:
        name = where["instanceTemplate"]
        self._named(self.templates, name, "instanceTemplates")
        users = [one.name for one in self.groups.values() if one.template == name]
        if users:
            text = f"The instance_template resource '{name}' is already being used by '{users[0]}'"
            raise ApiError(400, "resourceInUseByAnotherResource", text)
        del self.templates[name]
        return self._operation("delete", f"global/instanceTemplates/{name}", query)

    def regionInstanceGroupManagers_insert(
        self, where: dict[str, str], body: Any, query: dict[str, str], **_: Any
    ) -> Any:
        name, region = body["name"], where["region"]
        place = f"regions/{region}/instanceGroupManagers/{name}"
        if code := self.spoil("regionInstanceGroupManagers.insert"):
            return self._operation("insert", place, query, code=code)
        if (region, name) in self.groups:
            self._new({name: 1}, name, "instanceGroupManagers")
        template = body["instanceTemplate"].rpartition("/")[2]
        found = self._named(self.templates, template, "instanceTemplates")
        self._must_be_ready(self._ready[template], template)
        chosen = body.get("instanceFlexibilityPolicy", {}).get("instanceSelections", {})
        ranked = sorted(chosen.values(), key=lambda one: int(one.get("rank", 0)))
        if chosen and body["updatePolicy"]["instanceRedistributionType"] != "NONE":
            raise ApiError(400, "invalid", "flexibility requires redistribution NONE")
        if chosen and found["properties"].get("guestAccelerators"):
            raise ApiError(400, "invalid", "flexibility can't be had with guestAccelerators")
        self.groups[region, name] = Group(
            name=name,
            region=region,
            template=template,
            base=body["baseInstanceName"],
            size=body["targetSize"],
            zones=[one["zone"].rpartition("/")[2] for one in body["distributionPolicy"]["zones"]],
            choices=[type_ for one in ranked for type_ in one["machineTypes"]]
            or [found["properties"]["machineType"]],
            created=_now(),
            ready=time.monotonic() + MOMENT,
            body=body,
        )
        return self._operation("insert", place, query)

    def regionInstanceGroupManagers_get(self, where: dict[str, str], **_: Any) -> Any:
        group = self._group(where)
        return {
            "kind": "compute#instanceGroupManager",
            "name": group.name,
            "targetSize": group.size,
            "currentActions": {"deleting": len(group.members) if group.deleting else 0},
            "status": {"isStable": len(group.members) == group.size},
        }

    def regionInstanceGroupManagers_delete(
        self, where: dict[str, str], query: dict[str, str], **_: Any
    ) -> Any:
        group = self._group(where)
        self._must_be_ready(group.ready, group.name)
        if group.deleting:
            text = f"The resource 'instanceGroupManagers/{group.name}' is not ready"
            raise ApiError(400, "resourceNotReady", text)
        group.deleting, group.size = True, 0
        key = (group.region, group.name)
        return self._operation(
            "delete", self._place(group), query, done=lambda: self.groups.get(key) is not group
        )

    def regionInstanceGroupManagers_resize(
        self, where: dict[str, str], query: dict[str, str], **_: Any
    ) -> Any:
        group = self._group(where)
        self._must_be_ready(group.ready, group.name)
        group.size, group.paused = int(query["size"]), 0
        return self._operation("compute.instanceGroupManagers.resize", self._place(group), query)

    def regionInstanceGroupManagers_setInstanceTemplate(
        self, where: dict[str, str], body: Any, query: dict[str, str], **_: Any
    ) -> Any:
        group, name = self._group(where), body["instanceTemplate"].rpartition("/")[2]
        self._named(self.templates, name, "instanceTemplates")
        self._must_be_ready(self._ready[name], name)
        group.template = name
        return self._operation("setInstanceTemplate", self._place(group), query)

    def regionInstanceGroupManagers_deleteInstances(
        self, where: dict[str, str], body: Any, query: dict[str, str], **_: Any
    ) -> Any:
        group = self._group(where)
        for name in self._members(group, body, skip=body.get("skipInstancesOnValidationError")):
            group.leaving.add(name)
            group.size -= 1
        return self._operation("deleteInstances", self._place(group), query)

    def regionInstanceGroupManagers_recreateInstances(
        self, where: dict[str, str], body: Any, query: dict[str, str], **_: Any
    ) -> Any:
        group = self._group(where)
        group.renewing |= {*self._members(group, body)}
        return self._operation("recreateInstances", self._place(group), query)

    def regionInstanceGroupManagers_abandonInstances(
        self, where: dict[str, str], body: Any, query: dict[str, str], **_: Any
    ) -> Any:
        group = self._group(where)
        for name in self._members(group, body):
            del group.members[name]
            group.size -= 1
        return self._operation("abandonInstances", self._place(group), query)

    def regionInstanceGroupManagers_listManagedInstances(
        self, where: dict[str, str], **_: Any
    ) -> Any:
        group = self._group(where)
        found = [
            {"instance": self._link(self.instances[number]), "id": number}
            for number in group.members.values()
            if number in self.instances
        ]
        return {"managedInstances": found} if found else {}

    def regionInstanceGroupManagers_listErrors(self, where: dict[str, str], **_: Any) -> Any:
        found = self._group(where).errors
        return {"items": found} if found else {}

    def instances_aggregatedList(self, query: dict[str, str], **_: Any) -> Any:
        label, wanted = query["filter"].removeprefix("labels.").split(" = ")
        found: dict[str, Any] = {}
        for one in self.alive():
            if one.labels.get(label) == wanted:
                scope = found.setdefault(f"zones/{one.zone}", {"instances": []})
                scope["instances"].append(self._described(one))
        return {"kind": "compute#instanceAggregatedList", "items": found | _nothing(found)}

    def instances_setMetadata(
        self, where: dict[str, str], body: Any, query: dict[str, str], **_: Any
    ) -> Any:
        one = self._instance(where)
        if body.get("fingerprint") != _fingerprint(one):
            raise ApiError(412, "conditionNotMet", "Supplied fingerprint does not match current.")
        one.metadata = {item["key"]: item["value"] for item in body.get("items", [])}
        one.version += 1
        return self._operation("setMetadata", self._where(one), query, one.id)

    def instances_setTags(
        self, where: dict[str, str], body: Any, query: dict[str, str], **_: Any
    ) -> Any:
        one = self._instance(where)
        if body.get("fingerprint") != _mark(one):
            raise ApiError(412, "conditionNotMet", "Supplied fingerprint does not match current.")
        one.tags = body.get("items", [])
        return self._operation("setTags", self._where(one), query, one.id)

    def instances_getSerialPortOutput(self, where: dict[str, str], **_: Any) -> Any:
        text = self._instance(where).console
        return {"kind": "compute#serialPortOutput", "contents": text, "start": "0", "next": "0"}

    def instances_simulateMaintenanceEvent(
        self, where: dict[str, str], query: dict[str, str], **_: Any
    ) -> Any:
        one = self._instance(where)
        self.preempt(one.id, NOTICE)
        return self._operation("simulateMaintenanceEvent", self._where(one), query, one.id)

    def instances_delete(self, where: dict[str, str], query: dict[str, str], **_: Any) -> Any:
        one = self._instance(where)
        self.remove(one.id)
        return self._operation("delete", self._where(one), query, one.id)

    def globalOperations_aggregatedList(self, query: dict[str, str], **_: Any) -> Any:
        pattern = query["filter"].removeprefix('targetLink eq "').removesuffix('"')
        found: dict[str, Any] = {}
        for one in self.operations.values():
            if re.fullmatch(pattern, one["targetLink"]):
                scope = one.get("zone", one.get("region", "global")).partition(f"{PROJECT}/")[2]
                found.setdefault(scope or "global", {"operations": []})["operations"].append(one)
        return {"kind": "compute#operationAggregatedList", "items": found | _nothing(found)}

    def globalOperations_wait(self, where: dict[str, str], **_: Any) -> Any:
        return self._wait(where)

    def regionOperations_wait(self, where: dict[str, str], **_: Any) -> Any:
        return self._wait(where)

    def zoneOperations_wait(self, where: dict[str, str], **_: Any) -> Any:
        return self._wait(where)

    # What happens by itself

    def _run(self) -> None:
        while not self._over.wait(TURN):
            with self.lock:
                for one in self.alive():
                    if one.end and one.end <= _now():
                        self.remove(one.id)
                for group in list(self.groups.values()):
                    for name in group.renewing & group.members.keys():
                        self._renew(group, name)
                    self._keep(group)

    def _keep(self, group: Group) -> None:
        for name, number in list(group.members.items()):
            one = self.instances.get(number)
            if one and one.status == "STAGING" and _now() > one.created + timedelta(seconds=TURN):
                one.status = "RUNNING"
            ended = one and one.status in ("TERMINATED", "GONE") and time.monotonic() > one.repair
            if ended and name not in group.leaving:
                self.remove(number)
                group.members[name] = ""  # it will be made anew
            if name in group.leaving or group.deleting:
                self._drop(group, name)
        for name in list(group.members)[group.size :]:
            self._drop(group, name)
        if time.monotonic() > group.paused and not group.deleting:
            self._grow(group)
        if group.deleting and not group.members:
            self.groups.pop((group.region, group.name), None)

    def _renew(self, group: Group, name: str) -> None:
        """End a machine, so that it will be made anew."""
        group.renewing.remove(name)
        if number := group.members[name]:
            self._tell("delete", self.instances[number])
            self.remove(number)
            group.members[name] = ""

    def _drop(self, group: Group, name: str) -> None:
        if number := group.members.pop(name):
            self._tell("delete", self.instances[number])
            self.remove(number)
        group.leaving.discard(name)

    def _grow(self, group: Group) -> None:
        while len(group.members) < group.size:
            group.members[f"{group.base}-{next(self._numbers):04x}"] = ""
        for name, number in list(group.members.items()):
            if not number:
                try:
                    self._make(group, name)
                except ApiError:
                    group.paused = time.monotonic() + AGAIN
                    return

    def _make(self, group: Group, name: str) -> None:
        """Start a machine in whichever zone has one. Raises ApiError."""
        properties = self.templates[group.template]["properties"]
        spot = properties["scheduling"].get("provisioningModel") == "SPOT"
        end = properties["scheduling"].get("terminationTime")
        for type_ in group.choices:
            for zone in group.zones:
                code = self.hinder(zone, type_, spot)
                if end and datetime.fromisoformat(end.replace("Z", "+00:00")) <= _now():
                    code = "CONDITION_NOT_MET"
                if not code:
                    self._born(group, name, zone, type_, properties)
                    return
                self._failed(group, name, zone, code)
        raise ApiError(503, code, code)

    def _failed(self, group: Group, name: str, zone: str, code: str) -> None:
        text = MESSAGES.get(code, code)
        link = f"{BASE}/{PROJECT}/zones/{zone}/instances/{name}"
        group.errors.append(
            {
                "error": {
                    "code": code,
                    "message": text.format(zone=zone, region=group.region, project=PROJECT),
                },
                "instanceActionDetails": {"action": "CREATING", "instance": link},
                "timestamp": _text(_now()),
            }
        )

    def _born(
        self, group: Group, name: str, zone: str, type_: str, properties: dict[str, Any]
    ) -> None:
        number = next(self._numbers)
        account = properties["serviceAccounts"][0]
        end = properties["scheduling"].get("terminationTime")
        items = properties["metadata"].get("items", [])
        one = Instance(
            id=str(4000000000000000000 + number),
            name=name,
            zone=zone,
            type=type_,
            spot=properties["scheduling"].get("provisioningModel") == "SPOT",
            metadata={item["key"]: item["value"] for item in items},
            labels=dict(properties.get("labels", {})),
            tags=properties.get("tags", {}).get("items", []),
            address=f"10.138.{number // 250}.{number % 250 + 2}",
            account=account["email"],
            scopes=account["scopes"],
            end=datetime.fromisoformat(end.replace("Z", "+00:00")) if end else None,
            created=_now(),
        )
        self.instances[one.id] = one
        group.members[name] = one.id
        self._tell("insert", one)
        self._machines.start(one)

    # Words

    def _operation(
        self,
        kind: str,
        place: str,
        query: dict[str, str],
        target: str = "1",
        *,
        code: str = "",
        done: Callable[[], bool] | None = None,
    ) -> dict[str, Any]:
        name = f"operation-{next(self._numbers)}"
        scope, _, more = place.partition("/")
        where = f"{scope}/{more.partition('/')[0]}" if scope != "global" else scope
        link = f"{BASE}/{PROJECT}/{where}"
        now = _text(_now())
        found: dict[str, Any] = {
            "kind": "compute#operation",
            "id": str(next(self._numbers)),
            "name": name,
            "operationType": kind,
            "status": "RUNNING",
            "progress": 0,
            "targetLink": f"{BASE}/{PROJECT}/{place}",
            "targetId": target,
            "insertTime": now,
            "startTime": now,
            "selfLink": f"{link}/operations/{name}",
            **({scope.removesuffix("s"): link} if scope != "global" else {}),
        }
        if code:
            found["error"] = {"errors": [{"code": code, "message": MESSAGES.get(code, code)}]}
            found["httpErrorStatusCode"], found["httpErrorMessage"] = 503, "SERVICE UNAVAILABLE"
        ready = time.monotonic() + MOMENT
        self._done[name] = done or (lambda: time.monotonic() > ready)
        self.operations[name] = found
        if number := query.get("requestId"):
            self._requests[number] = name
        return found

    def repeated(self, number: str) -> dict[str, Any] | None:
        """Return the operation that was begun for this request already."""
        return self.operations.get(self._requests.get(number, ""))

    def _wait(self, where: dict[str, str]) -> dict[str, Any]:
        """Return an operation when it is done, or after a while; others go on meanwhile."""
        found: dict[str, Any] = self._named(self.operations, where["operation"], "operations")
        end = time.monotonic() + 5
        self.lock.release()
        try:
            while not self._done[where["operation"]]() and time.monotonic() < end:
                time.sleep(0.005)
        finally:
            self.lock.acquire()
        if self._done[where["operation"]]():
            found |= {"status": "DONE", "progress": 100, "endTime": _text(_now())}
        return found

    def _tell(self, kind: str, one: Instance) -> None:
        """Write down what the system does to a machine."""
        found = self._operation(kind, self._where(one), {}, one.id)
        found |= {"status": "DONE", "progress": 100, "endTime": found["startTime"]}

    def _described(self, one: Instance) -> dict[str, Any]:
        card = {
            "networkIP": one.address,
            "accessConfigs": [{"type": "ONE_TO_ONE_NAT", "natIP": f"203.0.113.{one.id[-2:]}"}],
        }
        items = [{"key": key, "value": value} for key, value in one.metadata.items()]
        return {
            "kind": "compute#instance",
            "id": one.id,
            "name": one.name,
            "zone": f"{BASE}/{PROJECT}/zones/{one.zone}",
            "status": one.status,
            "creationTimestamp": _text(one.created),
            "networkInterfaces": [card],
            "labels": one.labels,
            "tags": {"fingerprint": _mark(one), "items": one.tags},
            "scheduling": {"provisioningModel": "SPOT" if one.spot else "STANDARD"},
            "metadata": {"fingerprint": _fingerprint(one), "items": items},
        }

    def _everywhere(self, what: str, names: set[str], query: dict[str, str]) -> dict[str, Any]:
        wanted = set(re.findall(r"name = ([a-z0-9-]+)", query["filter"]))
        found = {}
        for region, letters in ZONES.items():
            for zone in (f"{region}-{letter}" for letter in letters):
                here = [
                    _described(name)
                    for name in sorted(wanted & names)
                    if (name, zone) not in self.missing
                ]
                found[f"zones/{zone}"] = {what: here} if here else _warning(zone)
        return {"kind": f"compute#{what[:-1]}AggregatedList", "items": found}

    def _image(self, project: str, name: str, *, family: bool) -> Any:
        for (owner, own), one in self.images.items():
            if owner == project and name == (one["family"] if family else own):
                return {"kind": "compute#image", "name": own, **one}
        what = "images/family" if family else "images"
        raise _absent(f"projects/{project}/global/{what}/{name}")

    def _instance(self, where: dict[str, str]) -> Instance:
        for one in self.alive():
            if where["instance"] in (one.name, one.id) and one.zone == where["zone"]:
                return one
        raise _absent(f"projects/{PROJECT}/zones/{where['zone']}/instances/{where['instance']}")

    def _group(self, where: dict[str, str]) -> Group:
        found = self.groups.get((where["region"], where["instanceGroupManager"]))
        if not found:
            name = where["instanceGroupManager"]
            place = f"regions/{where['region']}/instanceGroupManagers/{name}"
            raise _absent(f"projects/{PROJECT}/{place}")
        return found

    def _members(self, group: Group, body: Any, *, skip: bool = False) -> list[str]:
        """Read which machines are meant; the others are skipped, or the request is refused."""
        names = [one.rpartition("/")[2] for one in body["instances"]]
        for name in list(names):
            if name in group.members and name not in group.leaving:
                continue
            if not skip:
                text = f"Instance '{name}' is not a member of '{group.name}'."
                raise ApiError(400, "invalid", text)
            names.remove(name)
        return names

    def _place(self, group: Group) -> str:
        return f"regions/{group.region}/instanceGroupManagers/{group.name}"

    def _where(self, one: Instance) -> str:
        return f"zones/{one.zone}/instances/{one.name}"

    def _link(self, one: Instance) -> str:
        return f"{BASE}/{PROJECT}/{self._where(one)}"

    def _named(self, there: dict[str, Any], name: str, what: str) -> Any:
        if name not in there:
            raise _absent(f"projects/{PROJECT}/global/{what}/{name}")
        return there[name]

    def _new(self, there: dict[str, Any], name: str, what: str) -> None:
        if name in there:
            text = f"The resource 'projects/{PROJECT}/global/{what}/{name}' already exists"
            raise ApiError(409, "alreadyExists", text)

    def _must_be_ready(self, when: float, name: str) -> None:
        if time.monotonic() < when:
            raise ApiError(400, "resourceNotReady", f"The resource '{name}' is not ready")


def _absent(path: str) -> ApiError:
    return ApiError(404, "notFound", f"The resource '{path}' was not found")


def _warning(scope: str) -> dict[str, Any]:
    text = f"There are no results for scope '{scope}' on this page."
    return {"warning": {"code": "NO_RESULTS_ON_PAGE", "message": text}}


def _nothing(found: dict[str, Any]) -> dict[str, Any]:
    return {} if found else {"global": _warning("global")}


def _mark(one: Instance) -> str:
    return f"tags{len(one.tags):02}="


def _fingerprint(one: Instance) -> str:
    return f"fp{one.version:06}="


def _text(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds")


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _told(quotas: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    return [
        {"metric": name, "usage": usage, "limit": limit} for name, (usage, limit) in quotas.items()
    ]


def _described(name: str) -> dict[str, Any]:
    """Tell of a type how many cores it has, which its name says, and the GPUs built into it."""
    number = name.rpartition("-")[2]
    if not number.isdigit():
        return {"name": name}
    gpu = {"g2": "nvidia-l4"}.get(name.partition("-")[0])
    built = [{"guestAcceleratorType": gpu, "guestAcceleratorCount": 1}] if gpu else []
    memory = 4096 * int(number)
    return {
        "name": name,
        "guestCpus": int(number),
        "memoryMb": memory,
        **({"accelerators": built} if built else {}),
    }
