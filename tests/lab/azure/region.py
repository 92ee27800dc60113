"""A region of Azure with machines that really boot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.lab import machines
from tests.lab.azure import Azure
from tests.lab.azure.azurite import PROGRAM, Azurite
from tests.lab.azure.manager import SUBSCRIPTION
from tests.lab.region import Region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import ExitStack

    from tests.lab.machines import Instance


class AzureRegion(Region):
    """All of it."""

    def open(self) -> None:
        """Have the cloud, with the vendor's own blobs if they are there."""
        directory = self.directory / "azurite"
        self.azurite = Azurite(PROGRAM, directory, SUBSCRIPTION) if PROGRAM else None
        self.azure = Azure(self, real=True, azurite=self.azurite)

    def enter(self, stack: ExitStack) -> Mapping[str, Callable[..., Iterable[bytes]]]:
        """Start it; say who answers for which of its hosts."""
        if self.azurite:
            stack.enter_context(self.azurite)
        self.azure = stack.enter_context(self.azure)
        hosts = (
            "management.azure.com",
            "blob.core.windows.net",
            "login.microsoftonline.com",
            "prices.azure.com",
        )
        return dict.fromkeys(hosts, self.azure.app)

    def login(self, keys: dict[str, str]) -> dict[str, str]:
        """Name the variables with somebody's keys; empty: an administrator's."""
        return self.azure.environment(keys or None)

    def metadata(self, instance: str) -> Callable[..., Iterable[bytes]]:
        """Serve a machine's metadata."""
        return self.azure.metadata(instance)

    def powered_off(self, instance: str) -> None:
        """Tell the cloud that a machine has ended by itself."""
        self.azure.fleet.powered_off(instance)

    def life(self, instance: str) -> Any:
        """Return what the cloud knows of a machine."""
        return self.azure.fleet.lives[instance]

    def files(self, instance: Instance) -> Mapping[str, str]:
        """Have cloud-init find its user data; Azure's own way takes a DVD drive."""
        return machines.seeded(instance)
