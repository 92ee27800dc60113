"""What a scale set and its machines look like, in Resource Manager's terms; nothing is sent.

https://learn.microsoft.com/azure/virtual-machine-scale-sets/virtual-machine-scale-sets-orchestration-modes
"""

from __future__ import annotations

import base64
import logging
from typing import TYPE_CHECKING, Any

from cml_runner import bootstrap, keys
from cml_runner.clouds.azure.resources import tags, task_url

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cml_runner.clouds.azure.account import Place
    from cml_runner.clouds.azure.site import Site
    from cml_runner.model import Task

log = logging.getLogger(__name__)

USER = "azureuser"  # who has the user's key; nobody's otherwise
NETWORK = "2022-11-01"  # of the API that makes the machines' interfaces


def scale_set(place: Place, task: Task, site: Site) -> dict[str, Any]:
    """Describe it, without a machine."""
    identities = identity_ids(place, task.machine.permissions)
    kind = sizes(site.rungs[0], spot=task.machine.spot, capacity=0)
    return {
        "location": place.region,
        "tags": tags(task),
        "sku": kind["sku"],
        **({"zones": list(site.zones)} if site.zones else {}),
        **({"plan": dict(site.image.plan)} if site.image.plan else {}),
        "identity": {
            "type": "UserAssigned",
            "userAssignedIdentities": {one: {} for one in identities},
        },
        "properties": {
            **kind.get("properties", {}),
            "orchestrationMode": "Flexible",
            "platformFaultDomainCount": 1,
            "singlePlacementGroup": False,
            "virtualMachineProfile": _machine(place, task, site, identities[0]),
        },
    }


def sizes(names: Sequence[str], *, spot: bool, capacity: int) -> dict[str, Any]:
    """Ask for machines of one size, or of a mixture."""
    if len(names) == 1:
        return {"sku": {"name": names[0], "tier": "Standard", "capacity": capacity}}
    profile = {
        "vmSizes": [{"name": name} for name in names],
        "allocationStrategy": "CapacityOptimized" if spot else "LowestPrice",
    }
    # A mixture has no tier.
    return {"sku": {"name": "Mix", "capacity": capacity}, "properties": {"skuProfile": profile}}


def identity_ids(place: Place, permissions: str) -> list[str]:
    """List the machines' identities; the first is that with which they speak."""
    return [one.strip() for one in permissions.split(",") if one.strip()] or [place.identity]


def script(place: Place, task: Task, identity: str) -> str:
    """Write what a machine runs first: where the task's objects are, and which task this is.

    Raises ConfigurationError.
    """
    url = f"{task_url(place, task.id, identity)}#azure/{place.region}/{task.id}"
    return bootstrap.machine(url, task.program, task.expires, task.count)


def addresses(
    interfaces: Sequence[Mapping[str, Any]], public: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Find the machines' addresses: by their identifiers in small letters."""
    outside = {one["id"].lower(): one["properties"].get("ipAddress") for one in public}
    found: dict[str, str] = {}
    for one in interfaces:
        machine = (one["properties"].get("virtualMachine") or {}).get("id", "").lower()
        for each in one["properties"].get("ipConfigurations", ()):
            inside = each["properties"].get("privateIPAddress", "")
            own = (each["properties"].get("publicIPAddress") or {}).get("id", "").lower()
            found[machine] = outside.get(own) or inside
    return found


def public_key(private: str) -> str:
    """Derive the public half of a PEM; of none, that of a key which nobody has.

    Azure makes no machine without a key or a password. Raises ValueError.
    """
    if private:
        return keys.public_key(private).decode()
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 - as slow as an SDK
    from cryptography.hazmat.primitives.asymmetric import rsa  # noqa: PLC0415

    key = rsa.generate_private_key(65537, 2048)
    made = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return made.decode()


def _machine(place: Place, task: Task, site: Site, identity: str) -> dict[str, Any]:
    machine = task.machine
    spot = {
        "priority": "Spot",
        "evictionPolicy": "Delete",
        "billingProfile": {"maxPrice": machine.spot_price if machine.spot_price > 0 else -1},
    }
    return {
        **(spot if machine.spot else {}),
        "osProfile": _system(place, task, identity),
        "storageProfile": {
            "imageReference": dict(site.image.reference),
            "osDisk": _disk(task, site),
        },
        "networkProfile": _network(place),
        "diagnosticsProfile": {"bootDiagnostics": {"enabled": True}},
    }


def _system(place: Place, task: Task, identity: str) -> dict[str, Any]:
    key = {
        "path": f"/home/{USER}/.ssh/authorized_keys",
        "keyData": public_key(task.machine.ssh_key),
    }
    return {
        "computerNamePrefix": f"cml{task.id.salt}",
        "adminUsername": USER,
        "customData": base64.b64encode(script(place, task, identity).encode()).decode(),
        "linuxConfiguration": {
            "disablePasswordAuthentication": True,
            "ssh": {"publicKeys": [key]},
        },
    }


def _disk(task: Task, site: Site) -> dict[str, Any]:
    size = max(task.machine.disk, site.image.disk)
    if task.machine.disk and size > task.machine.disk:
        log.warning("the image needs a disk of %d GB", size)
    return {
        "createOption": "FromImage",
        "deleteOption": "Delete",
        "managedDisk": {"storageAccountType": "StandardSSD_LRS"},
        **({"diskSizeGB": size} if size else {}),
    }


def _network(place: Place) -> dict[str, Any]:
    """Give a machine an address of its own, with which it gets out; nothing gets in."""
    address = {
        "name": "public",
        "sku": {"name": "Standard"},
        "properties": {"deleteOption": "Delete", "idleTimeoutInMinutes": 30},
    }
    inside = {
        "name": "own",
        "properties": {
            "primary": True,
            "subnet": {"id": place.subnet},
            "publicIPAddressConfiguration": address,
        },
    }
    interface = {
        "name": "interface",
        "properties": {
            "primary": True,
            "deleteOption": "Delete",
            "ipConfigurations": [inside],
        },
    }
    return {"networkApiVersion": NETWORK, "networkInterfaceConfigurations": [interface]}
