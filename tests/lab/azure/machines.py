"""Virtual machines, and the scale sets and autoscale settings which make and end them.

As documented: a machine that is deleted or evicted lowers its scale set's capacity, and one that
is stopped doesn't; one that can't be allocated stays, as failed. Autoscale looks at each setting
again and again, takes the profile of the hour, and moves the capacity into its bounds.
"""

from __future__ import annotations

import base64
import secrets
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from tests.lab.azure.wire import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.azure.manager import Manager

IDLE = 0.5  # seconds until a setting that was written is looked at; it takes Azure minutes
TURN = 0.05  # seconds between two looks at all settings
AGAIN = 1.0  # seconds before one that could start nothing tries again
SHORT = 0.1  # seconds that a machine takes to start, and to go
SCALE_SET = "/providers/microsoft.compute/virtualmachinescalesets/"
SETTING = "/providers/microsoft.insights/autoscalesettings/"
EVICTION = "Microsoft.Compute/virtualMachines/evictSpotVM/action"
MESSAGES = {
    "AllocationFailed": "Allocation failed. We do not have sufficient capacity for the requested"
    " VM size in this region.",
    "SkuNotAvailable": "The requested VM size is currently not available in location.",
    "OperationNotAllowed": "Operation could not be completed as it results in exceeding approved"
    " standardDASv5Family Cores quota.",
}
AT_ONCE = ("SkuNotAvailable", "OperationNotAllowed")  # what is told when machines are asked for


@dataclass(frozen=True, kw_only=True)
class Instance:
    """A machine, as it is handed to whoever plays machines."""

    id: str  # name
    unique: str  # vmId
    type: str
    zone: str
    spot: bool
    user_data: str
    address: str
    identities: tuple[str, ...]


class Machines(Protocol):
    """Who plays machines."""

    def start(self, instance: Instance) -> None:
        """Boot one; returns at once."""

    def end(self, instance: str) -> None:
        """Take its power away."""


class Nobody:
    """Machines that just are there."""

    def start(self, instance: Instance) -> None: ...
    def end(self, instance: str) -> None: ...


@dataclass
class Life:
    """One machine, also after its end."""

    instance: Instance
    owner: str  # the scale set's identifier, in small letters
    path: str
    tags: dict[str, str]
    made: datetime
    provisioning: str = "Succeeded"
    failure: tuple[str, str] | None = None
    power: str = "running"
    notice: datetime | None = None
    console: str = ""
    ended: bool = False
    born: float = field(default_factory=time.monotonic)


class Fleet:
    """All machines of the subscription."""

    def __init__(self, manager: Manager, machines: Machines) -> None:
        self._manager, self._machines = manager, machines
        self.lives: dict[str, Life] = {}
        self.named = True  # whether metadata name the scale set besides its identifier
        self.hinder: Callable[[str, str, bool], str] = lambda _zone, _size, _spot: ""
        self._numbers = count(10)
        self._paused: dict[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autoscale", daemon=True)
        self._timers: list[threading.Timer] = []

    def start(self) -> None:
        """Begin to keep scale sets at their sizes."""
        self._thread.start()

    def stop(self) -> None:
        """Keep nothing any more."""
        self._over.set()
        self._thread.join()
        for timer in self._timers:
            timer.cancel()

    def of(self, owner: str) -> list[Life]:
        """List a scale set's machines."""
        return [one for one in self.lives.values() if one.owner == owner.lower() and not one.ended]

    def fit(self, owner: str) -> ApiError | None:
        """Make as many machines as the scale set should have; return what hindered that."""
        scale_set = self._manager.resources[owner.lower()]
        error = None
        while len(self.of(owner)) < scale_set["sku"]["capacity"]:
            life = self._make(owner, scale_set)
            error = self._begun(life) or error
        newest = sorted(self.of(owner), key=lambda one: one.made, reverse=True)
        for one in newest[: len(newest) - scale_set["sku"]["capacity"]]:
            self._end(one)
        return error

    def refused(self, owner: str) -> str:
        """Say which error is told at once when machines are asked for."""
        scale_set = self._manager.resources[owner.lower()]
        missing = scale_set["sku"]["capacity"] - len(self.of(owner))
        code = self._choose(scale_set)[2] if missing > 0 else ""
        return code if code in AT_ONCE else ""

    def delete(self, name: str) -> None:
        """Delete one, of which its scale set has none in its place by itself."""
        with self._manager.lock:
            life = self.lives[name]
            if not life.ended:
                scale_set = self._manager.resources.get(life.owner)
                if scale_set and scale_set["sku"]["capacity"]:
                    scale_set["sku"]["capacity"] -= 1
                self._end(life)

    def powered_off(self, name: str) -> None:
        """Play what happens when a machine powers itself off: it is paid for, and stays."""
        with self._manager.lock:
            if not self.lives[name].ended:
                self.lives[name].power = "stopped"

    def evict(self, name: str, after: float = 30) -> None:
        """Take a spot machine away, with notice; or without, and at once."""
        life = self.lives[name]
        if not after:
            self._evict(name)
            return
        life.notice = datetime.now(timezone.utc) + timedelta(seconds=after)
        timer = threading.Timer(after, self._evict, (name,))
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def shown(self, life: Life) -> dict[str, Any]:
        """Describe one as Resource Manager does, with its instance view."""
        young = time.monotonic() < life.born + SHORT
        power = "starting" if young and life.power == "running" else life.power
        statuses = [{"code": "ProvisioningState/succeeded", "time": _text(life.made)}]
        if life.failure:
            code, text = life.failure
            failed = f"ProvisioningState/failed/{code}"
            statuses = [{"code": failed, "message": text, "time": _text(life.made)}]
        else:
            statuses.append({"code": f"PowerState/{power}"})
        return {
            "id": life.path,
            "name": life.instance.id,
            "location": "lab",
            "tags": life.tags,
            "properties": {
                "vmId": life.instance.unique,
                "provisioningState": life.provisioning,
                "timeCreated": _text(life.made),
                "virtualMachineScaleSet": {"id": life.owner},
                "hardwareProfile": {"vmSize": life.instance.type},
                "priority": "Spot" if life.instance.spot else "Regular",
                "instanceView": {"statuses": statuses},
            },
        }

    def _evict(self, name: str) -> None:
        with self._manager.lock:
            if not self.lives[name].ended:
                self._manager.write_down(self.lives[name].path, EVICTION, "Succeeded")
                self.delete(name)

    def _end(self, life: Life) -> None:
        life.ended = True
        self._machines.end(life.instance.id)

    def _choose(self, scale_set: dict[str, Any]) -> tuple[str, str, str]:
        """Find a zone and a size that can be had; else say why not."""
        profile = scale_set["properties"].get("skuProfile")
        sizes = [scale_set["sku"]["name"]]
        if sizes == ["Mix"]:
            sizes = [one["name"] for one in profile["vmSizes"]]
        spot = scale_set["properties"]["virtualMachineProfile"].get("priority") == "Spot"
        code = ""
        for zone in scale_set.get("zones") or [""]:
            for size in sizes:
                code = self.hinder(zone, size, spot)
                if not code:
                    return zone, size, ""
        return zone, size, code

    def _make(self, owner: str, scale_set: dict[str, Any]) -> Life:
        zone, size, code = self._choose(scale_set)
        profile = scale_set["properties"]["virtualMachineProfile"]
        name = f"{scale_set['name']}_{secrets.token_hex(4)}"
        base = scale_set["id"].rpartition("/providers/")[0]
        data = profile["osProfile"].get("customData", "")
        instance = Instance(
            id=name,
            unique=secrets.token_hex(16),
            type=size,
            zone=zone,
            spot=profile.get("priority") == "Spot",
            user_data=base64.b64decode(data).decode(),
            address=f"10.0.0.{next(self._numbers)}",
            identities=tuple(scale_set["identity"]["userAssignedIdentities"]),
        )
        self.lives[name] = life = Life(
            instance,
            owner.lower(),
            f"{base}/providers/Microsoft.Compute/virtualMachines/{name}",
            dict(scale_set.get("tags", {})),
            datetime.now(timezone.utc),
        )
        if code:
            life.provisioning, life.power = "Failed", ""
            life.failure = (code, MESSAGES.get(code, f"the fake says {code}"))
        return life

    def _begun(self, life: Life) -> ApiError | None:
        if life.failure is None:
            self._machines.start(life.instance)
            return None
        code, text = life.failure
        inner = [{"code": code, "message": text, "target": life.path}]
        return ApiError("VMSSFlexProvisioningFailed", "Some machines failed.", inner=inner)

    def _run(self) -> None:
        while not self._over.wait(TURN):
            with self._manager.lock:
                self._manager.go_on()
                for path, setting in list(self._manager.resources.items()):
                    if SETTING in path and self._manager.age(path) > IDLE:
                        self._keep(setting["properties"])

    def _keep(self, setting: dict[str, Any]) -> None:
        owner = setting["targetResourceUri"].lower()
        scale_set = self._manager.resources.get(owner)
        gone = not scale_set or scale_set["properties"]["provisioningState"] == "Deleting"
        if gone or not setting["enabled"] or self._paused.get(owner, 0) > time.monotonic():
            return
        assert scale_set
        capacity = _profile(setting["profiles"])["capacity"]
        now = scale_set["sku"]["capacity"]
        wanted = min(max(now, int(capacity["minimum"])), int(capacity["maximum"]))
        if wanted == now:
            return
        scale_set["sku"]["capacity"] = wanted
        if error := self.fit(owner):
            self._paused[owner] = time.monotonic() + AGAIN
            action = "Microsoft.Compute/virtualMachineScaleSets/write"
            self._manager.write_down(scale_set["id"], action, "Failed", error.body())


def _profile(profiles: list[dict[str, Any]]) -> dict[str, Any]:
    """Choose the one whose hour it is; else the one that has none."""
    now = datetime.now(timezone.utc)
    for one in profiles:
        if window := one.get("fixedDate"):
            start, end = (_time(window[name]) for name in ("start", "end"))
            if start <= now < end:
                return one
    return next(one for one in profiles if "fixedDate" not in one and "recurrence" not in one)


def _time(text: str) -> datetime:
    whole, _, part = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}.{part.ljust(6, '0')[:6]}+00:00")


def _text(at: datetime) -> str:
    return f"{at:%Y-%m-%dT%H:%M:%S.%f}0Z"
