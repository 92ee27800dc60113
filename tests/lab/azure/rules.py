"""What Azure refuses of a scale set, though its models allow it."""

from __future__ import annotations

import base64
from typing import Any

from tests.lab.azure import skus
from tests.lab.azure.wire import ApiError

LONGEST_DATA = 64 * 1024  # of customData


def scale_set(body: Any) -> None:
    """Refuse one that could have no machines. Raises ApiError, as all here."""
    properties = body["properties"]
    profile = properties["virtualMachineProfile"]
    if properties.get("orchestrationMode") != "Flexible":
        raise ApiError("InvalidParameter", "this lab has Flexible scale sets only")
    if "networkApiVersion" not in profile["networkProfile"]:
        raise ApiError("InvalidParameter", "networkApiVersion must be specified")
    system = profile["osProfile"]
    if not system["linuxConfiguration"]["ssh"]["publicKeys"][0]["keyData"].startswith("ssh-"):
        raise ApiError("InvalidParameter", "linuxConfiguration.ssh.publicKeys is invalid")
    if len(base64.b64decode(system["customData"])) > LONGEST_DATA:
        raise ApiError("InvalidParameter", "customData is too long")
    image = profile["storageProfile"]["imageReference"]
    if image.get("publisher", "Canonical") not in skus.PUBLISHERS:
        raise ApiError(
            "PlatformImageNotFound", f"The platform image '{image}' is not available.", 404
        )
    sizes(body)


def sizes(body: Any) -> None:
    """Refuse sizes that there aren't, that can't be mixed, or not as spot machines."""
    sku, properties = body["sku"], body["properties"]
    names = [sku["name"]]
    if names == ["Mix"]:
        names = [one["name"] for one in properties["skuProfile"]["vmSizes"]]
        if not skus.mixable(names):
            raise ApiError("InvalidParameter", f"can't mix {names}")
    spot = properties["virtualMachineProfile"].get("priority") == "Spot"
    for name in names:
        if name not in skus.NAMES:
            raise ApiError("InvalidParameter", f"The value {name} of sku.name is invalid.")
        if spot and name in skus.NO_SPOT:
            raise ApiError("OperationNotAllowed", f"{name} can't be of priority Spot", 409)


def tags(found: dict[str, str]) -> None:
    """Refuse tags that Azure wouldn't take; their names are the same whatever their case is."""
    names = [name.lower() for name in found]
    if len(set(names)) < len(names) or len(names) > 50:
        raise ApiError("InvalidTagNameOrValue", f"duplicate tags, or too many: {names}")
    for name, value in found.items():
        if set(name) & set("<>%&\\?/") or len(value) > 256:
            raise ApiError("InvalidTagNameOrValue", f"{name}: {value}")
