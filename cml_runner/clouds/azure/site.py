"""What a launch finds in a region: sizes, and the zones in which they can be had.

It is asked for before anything of the task is created. Who may not ask (it is a right on the whole
subscription, Microsoft.Compute/skus/read) launches wherever Azure finds room.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from cml_runner.clouds.azure import catalogue
from cml_runner.errors import ConfigurationError, CredentialsError, NoCapacity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cml_runner.clouds.azure.account import Place
    from cml_runner.clouds.azure.session import Session
    from cml_runner.model import Task

log = logging.getLogger(__name__)

ARCHITECTURES = {"x64": "x64", "Arm64": "arm64"}


class Site:
    """Where the machines of one task may be, and of which sizes."""

    def __init__(
        self, session: Session, task: Task, types: tuple[str, ...], image: catalogue.Image
    ) -> None:
        self._session, self._task = session, task
        self.types, self.image = types, image
        self.zones: tuple[str, ...] = ()  # empty: Azure chooses

    @property
    def rungs(self) -> list[tuple[str, ...]]:
        """What to try, one after the other: mixtures of sizes, or one size."""
        return catalogue.rungs(self.types)

    def look(self, place: Place) -> None:
        """See what there is. Raises NoCapacity if it is nothing of what is wanted."""
        try:
            there = self.sizes(place)
        except CredentialsError as error:
            log.debug("not looking which sizes %s has: %s", place.region, error)
            return
        self.choose(place, there)

    def sizes(self, place: Place) -> dict[str, Mapping[str, Any]]:
        """List the sizes of a region. Raises CredentialsError if we may not ask."""
        where = f"location eq '{place.region}'"
        listed = self._session.pages("compute", "resource_skus", "list", filter=where)
        return {one["name"]: one for one in listed if one["resourceType"] == "virtualMachines"}

    def choose(self, place: Place, there: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep those of the sizes that can be had, and the zones of all of them."""
        found = tuple(name for name in self.types if self._offered(there.get(name)))
        if not found:
            market = "spot " if self._task.machine.spot else ""
            names = " or ".join(self.types)
            msg = f"{place.region} has no {market}{names} for this subscription (SkuNotAvailable)"
            raise NoCapacity(msg)
        self._must_fit(there[found[0]])
        self.types = found
        common = set.intersection(*(_zones(there[name]) for name in found))
        self.zones = tuple(sorted(common))

    def _offered(self, size: Mapping[str, Any] | None) -> bool:
        if size is None or any(one["type"] == "Location" for one in size.get("restrictions", ())):
            return False
        return not self._task.machine.spot or _can(size, "LowPriorityCapable") != "False"

    def _must_fit(self, size: Mapping[str, Any]) -> None:
        """Compare with what was taken for granted, by its name."""
        arch = ARCHITECTURES.get(_can(size, "CpuArchitectureType"))
        needed = catalogue.arch(self.types)
        if arch and arch != needed:
            msg = f"--cloud-type {size['name']}: it is {arch}, which its name doesn't tell"
            raise ConfigurationError(msg)


def _can(size: Mapping[str, Any], name: str) -> str:
    found = (one["value"] for one in size.get("capabilities", ()) if one["name"] == name)
    return str(next(found, ""))


def _zones(size: Mapping[str, Any]) -> set[str]:
    found = {zone for one in size.get("locationInfo", ()) for zone in one.get("zones", ())}
    for one in size.get("restrictions", ()):
        if one["type"] == "Zone":
            found -= set(one.get("restrictionInfo", {}).get("zones", ()))
    return found
