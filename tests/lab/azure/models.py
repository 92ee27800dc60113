"""Compare what is sent, and what our fake answers, with the vendor's machine-readable models."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from tests.lab.azure.descriptions import Property, model, properties

if TYPE_CHECKING:
    from collections.abc import Iterator

USES = {"PUT": "create", "PATCH": "update"}
READ = "read"
PLAIN: dict[Any, Any] = {str: str, bool: bool, int: int, float: (int, float)}
OPEN = {"VirtualMachineSizeTypes"}  # enumerations that are known to be behind
BLOBS = "Microsoft.Storage/storageAccounts/blobServices/containers"
SENT = {  # service and model of what isn't put or patched as it is answered
    ("PUT", "Microsoft.Authorization/roleAssignments"): (
        "authorization",
        "RoleAssignmentCreateParameters",
    ),
    ("PUT", "Microsoft.Storage/storageAccounts"): ("storage", "StorageAccountCreateParameters"),
    ("PATCH", "Microsoft.Compute/virtualMachineScaleSets"): (
        "compute",
        "VirtualMachineScaleSetUpdate",
    ),
    ("PATCH", "Microsoft.Resources/tags"): ("resource.resources", "TagsPatchResource"),
}
IMAGES = "Microsoft.Compute/locations/publishers/artifacttypes/offers/skus/versions"
ANSWERED = {
    "Microsoft.Authorization/permissions": ("authorization", "Permission"),
    "Microsoft.Authorization/roleAssignments": ("authorization", "RoleAssignment"),
    "Microsoft.Authorization/roleDefinitions": ("authorization", "RoleDefinition"),
    "Microsoft.Compute/locations/usages": ("compute", "Usage"),
    "Microsoft.Compute/skus": ("compute", "ResourceSku"),
    "Microsoft.Compute/virtualMachineScaleSets": ("compute", "VirtualMachineScaleSet"),
    "Microsoft.Compute/virtualMachines": ("compute", "VirtualMachine"),
    "Microsoft.Insights/autoscalesettings": ("monitor", "AutoscaleSettingResource"),
    "Microsoft.Insights/eventtypes/values": ("monitor", "EventData"),
    "Microsoft.ManagedIdentity/userAssignedIdentities": ("msi", "Identity"),
    "Microsoft.Network/networkInterfaces": ("network", "NetworkInterface"),
    "Microsoft.Network/networkSecurityGroups": ("network", "NetworkSecurityGroup"),
    "Microsoft.Network/publicIPAddresses": ("network", "PublicIPAddress"),
    "Microsoft.Network/virtualNetworks": ("network", "VirtualNetwork"),
    "Microsoft.Resources/subscriptions": ("resource.subscriptions", "Subscription"),
    "Microsoft.Resources/subscriptions/resourceGroups": ("resource.resources", "ResourceGroup"),
    "Microsoft.Resources/tags": ("resource.resources", "TagsResource"),
    "Microsoft.Storage/storageAccounts": ("storage", "StorageAccount"),
    "Microsoft.Storage/storageAccounts/managementPolicies": ("storage", "ManagementPolicy"),
    BLOBS: ("storage", "BlobContainer"),
}


def problems(method: str, kind: str, body: Any) -> list[str]:
    """List what the vendor's model of such a request doesn't know or misses."""
    found = SENT.get((method, kind)) or ANSWERED.get(kind)
    if not found:
        return [f"nobody knows what {method} {kind} takes"]
    return list(_composite(model(*found), body, USES[method], ""))


def mistakes(kind: str, posted: str, body: Any) -> list[str]:
    """List what the vendor's model of an answer of ours doesn't know or misses."""
    if "/" not in kind:
        found = ("resource.resources", "Provider")
    elif posted == "retrieveBootDiagnosticsData":
        found = ("compute", "RetrieveBootDiagnosticsDataResult")
    elif kind == IMAGES:
        listed = isinstance(body, list)
        found = ("compute", "VirtualMachineImageResource" if listed else "VirtualMachineImage")
    elif kind in ANSWERED:
        found = ANSWERED[kind]
    else:
        return [f"nobody knows what {kind} answers"]
    whole = body["value"] if isinstance(body, dict) and set(body) == {"value"} else body
    parts = whole if isinstance(whole, list) else [whole]
    return [one for part in parts for one in _composite(model(*found), part, READ, "")]


def _composite(kind: Any, body: Any, use: str, where: str) -> Iterator[str]:
    yield from _nested(properties(kind), body, use, where)


def _nested(known: dict[str, Any], body: Any, use: str, where: str) -> Iterator[str]:
    if not isinstance(body, dict):
        yield f"{where}: {body!r} is no object"
        return
    for name, value in body.items():
        here, found = f"{where}.{name}", known.get(name)
        if found is None:
            yield f"{here}: unknown"
        elif isinstance(found, dict):
            yield from _nested(found, value, use, here)
        elif use not in found.uses:
            yield f"{here}: can't be sent, only {', '.join(sorted(found.uses))}"
        else:
            yield from _value(found.kind, value, use, here)
    for name, found in known.items():
        if name not in body and _required(found, use):
            yield f"{where}.{name}: missing"


def _required(found: Any, use: str) -> bool:
    if isinstance(found, Property):
        return found.required and use in found.uses
    return any(_required(one, use) for one in found.values())


def _value(kind: Any, value: Any, use: str, where: str) -> Iterator[str]:
    if get_origin(kind) is list:
        yield from _list(get_args(kind)[0], value, use, where)
    elif get_origin(kind) is Literal:
        if value not in get_args(kind):
            yield f"{where}: {value!r} is none of {get_args(kind)}"
    elif get_origin(kind) is dict:
        for name, one in value.items():
            yield from _value(get_args(kind)[1], one, use, f"{where}.{name}")
    elif kind in PLAIN or (isinstance(kind, type) and issubclass(kind, Enum)):
        yield from _plain(kind, value, where)
    elif kind is not object:
        yield from _composite(kind, value, use, where)


def _plain(kind: Any, value: Any, where: str) -> Iterator[str]:
    known = PLAIN.get(kind)
    right = isinstance(value, known) if known else value in [one.value for one in kind]
    if isinstance(value, bool) and kind is not bool:
        right = False
    if not right and kind.__name__ not in OPEN:
        yield f"{where}: {value!r} is no {kind.__name__}"


def _list(kind: Any, value: Any, use: str, where: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{where}: {value!r} is no list"
        return
    for one in value:
        yield from _value(kind, one, use, f"{where}[]")
