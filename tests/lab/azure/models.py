"""Compare requests with the vendor's machine-readable models.

models.json is an excerpt of the mappers in the vendor's npm packages, whose names and versions are
in it: of each model its properties, [type, "required"?, "readOnly"?]; a type in a list is that of
elements, {"of": type} that of values.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

PLAIN = {
    "String": str,
    "DateTime": str,
    "Date": str,
    "Uuid": str,
    "TimeSpan": str,
    "Enum": str,
    "Boolean": bool,
    "Number": (int, float),
}
BODIES = {  # of what is put or patched there: service and model
    ("PUT", "Microsoft.Compute/virtualMachineScaleSets"): ("compute", "VirtualMachineScaleSet"),
    ("PATCH", "Microsoft.Compute/virtualMachineScaleSets"): (
        "compute",
        "VirtualMachineScaleSetUpdate",
    ),
    ("PUT", "Microsoft.Insights/autoscalesettings"): ("monitor", "AutoscaleSettingResource"),
    ("PUT", "Microsoft.Network/networkSecurityGroups"): ("network", "NetworkSecurityGroup"),
    ("PUT", "Microsoft.Network/virtualNetworks"): ("network", "VirtualNetwork"),
    ("PUT", "Microsoft.ManagedIdentity/userAssignedIdentities"): ("msi", "Identity"),
    ("PUT", "Microsoft.Authorization/roleDefinitions"): ("authorization", "RoleDefinition"),
    ("PUT", "Microsoft.Authorization/roleAssignments"): (
        "authorization",
        "RoleAssignmentCreateParameters",
    ),
    ("PUT", "Microsoft.Storage/storageAccounts"): ("storage", "StorageAccountCreateParameters"),
    ("PUT", "Microsoft.Storage/storageAccounts/managementPolicies"): (
        "storage",
        "ManagementPolicy",
    ),
    ("PUT", "Microsoft.Storage/storageAccounts/blobServices/containers"): (
        "storage",
        "BlobContainer",
    ),
    ("PUT", "Microsoft.Resources/subscriptions/resourceGroups"): ("resources", "ResourceGroup"),
    ("PATCH", "Microsoft.Resources/tags"): ("resources", "TagsPatchResource"),
}


def problems(method: str, kind: str, body: Any) -> list[str]:
    """List what the vendor's model of such a request doesn't know or misses."""
    if (method, kind) not in BODIES:
        return [f"nobody knows what {method} {kind} takes"]
    service, model = BODIES[method, kind]
    return list(_composite(service, model, body, ""))


@cache
def _models() -> Any:
    return json.loads(Path(__file__).with_name("models.json").read_text())


@cache
def _tree(service: str, model: str) -> dict[str, Any]:
    """Nest properties whose names have dots in them, as they are on the wire."""
    tree: dict[str, Any] = {}
    for name, (kind, *more) in _models()[service]["models"][model].items():
        *outer, last = name.split(".")
        place = tree
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = (kind, more)
    return tree


def _composite(service: str, model: str, body: Any, where: str) -> Iterator[str]:
    if not _tree(service, model):  # of which nothing is known
        return
    yield from _nested(service, _tree(service, model), body, where)


def _nested(service: str, tree: dict[str, Any], body: Any, where: str) -> Iterator[str]:
    if not isinstance(body, dict):
        yield f"{where}: {body!r} is no object"
        return
    for name, value in body.items():
        known = tree.get(name)
        if known is None:
            yield f"{where}.{name}: unknown"
        elif isinstance(known, dict):
            yield from _nested(service, known, value, f"{where}.{name}")
        elif "readOnly" in known[1]:
            yield f"{where}.{name}: can only be read"
        else:
            yield from _value(service, known[0], value, f"{where}.{name}")
    for name, known in tree.items():
        if isinstance(known, tuple) and "required" in known[1] and name not in body:
            yield f"{where}.{name}: missing"


def _value(service: str, kind: Any, value: Any, where: str) -> Iterator[str]:
    if isinstance(kind, list):
        yield from _list(service, kind[0], value, where)
    elif isinstance(kind, dict):
        for name, one in value.items():
            yield from _value(service, kind["of"], one, f"{where}.{name}")
    elif kind in PLAIN:
        wrong = isinstance(value, bool) and kind != "Boolean"
        if wrong or not isinstance(value, PLAIN[kind]):  # type: ignore[arg-type]
            yield f"{where}: {value!r} is no {kind}"
    elif kind in _models()[service]["models"]:
        yield from _composite(service, kind, value, where)


def _list(service: str, kind: Any, value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{where}: {value!r} is no list"
        return
    for one in value:
        yield from _value(service, kind, one, f"{where}[]")
