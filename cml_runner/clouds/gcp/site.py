"""What a launch finds in a project and region: a bucket, an image, zones which have the machines.

All of it is looked up at the same time, and before anything of the task is created: who asks for
what isn't there learns it at once, and nothing has to be undone.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from cml_runner import keys
from cml_runner.clouds.gcp import catalogue
from cml_runner.clouds.gcp.account import Shared, ssh
from cml_runner.clouds.gcp.session import last
from cml_runner.errors import ConfigurationError, NoCapacity, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cml_runner.clouds.gcp.session import Session
    from cml_runner.model import Task


@dataclass(frozen=True, kw_only=True)
class Image:
    """What a machine boots from."""

    url: str
    size: int  # GB, at least


class Site:
    """Lookups, each made once, for one task."""

    def __init__(
        self,
        session: Session,
        task: Task,
        zone: str,
        types: tuple[catalogue.Type, ...],
        image: catalogue.Image,
        identity: catalogue.Identity,
    ) -> None:
        self._session, self._task, self._zone = session, task, zone
        self._wanted, self._image, self.identity = types, image, identity
        self.user = image.user

    def look(self) -> None:
        """Look everything up, and raise what stands against a launch.

        The project's shared pieces are made if they are missing and if we may.
        """
        shared = Shared(self._session)
        self._session.open()
        lookups: tuple[Callable[[], object], ...] = (
            shared.has_bucket,
            shared.has_firewall,
            lambda: self.image,
            lambda: self._machines,
            lambda: self._gpus,
            lambda: self.address,
        )
        with ThreadPoolExecutor(len(lookups), thread_name_prefix="lookup") as pool:
            found = [pool.submit(look) for look in lookups]
        _settle(found)
        _ = self.zones
        if not all(one.result() for one in found[:2]):
            shared.setup()
        if self.address and not shared.has_firewall(ssh(self.address)):
            shared.open_ssh(self.address)

    @cached_property
    def address(self) -> str:
        """Ours on the internet, if people want to log in from here."""
        return keys.own_address() if self._task.machine.ssh_key else ""

    @cached_property
    def image(self) -> Image:
        """What to boot from. Raises NotFound."""
        wanted = self._image
        found = None
        with suppress(NotFound):
            found = self._session.call(
                "Images", "get_from_family", project=wanted.project, family=wanted.name
            )
        if not found and not wanted.family:
            with suppress(NotFound):
                found = self._session.call(
                    "Images", "get", project=wanted.project, image=wanted.name
                )
        if not found:
            msg = f"{wanted.project} has no image, nor a family of images, {wanted.name}"
            raise NotFound(msg)
        self._must_fit(found)
        url = f"projects/{wanted.project}/global/images/{found.name}"
        return Image(url=url, size=int(found.disk_size_gb))

    @property
    def arch(self) -> Literal["x64", "arm64"]:
        """Of the machines."""
        return catalogue.arch(self._wanted)

    @property
    def wanted(self) -> tuple[catalogue.Type, ...]:
        """What was asked for, be it to be had or not."""
        return self._wanted

    @property
    def types(self) -> tuple[catalogue.Type, ...]:
        """Those of the types which can be had somewhere."""
        there = {name for names in self._there.values() for name in names}
        return tuple(one for one in self._wanted if one.name in there)

    @property
    def zones(self) -> tuple[str, ...]:
        """Where any of the types can be had. Raises NoCapacity if that is nowhere."""
        found = tuple(sorted(self._there))
        if not found:
            where = self._zone or self._session.region
            msg = f"{where} has no {' or '.join(map(str, self._wanted))}"
            raise NoCapacity(msg)
        return found

    @property
    def _there(self) -> dict[str, set[str]]:
        """The types of each zone."""
        gpus = self._gpus
        return {
            zone: types
            for zone, types in self._machines.items()
            if gpus is None or gpus.get(zone, set()) >= {one.gpu for one in self._wanted}
        }

    @cached_property
    def _machines(self) -> dict[str, set[str]]:
        return self._by_zone("MachineTypes", "machine_types", {one.name for one in self._wanted})

    @cached_property
    def _gpus(self) -> dict[str, set[str]] | None:
        """Of what is to be attached, what each zone has; None if that is nothing."""
        names = {one.gpu for one in self._wanted if one.gpu}
        return self._by_zone("AcceleratorTypes", "accelerator_types", names) if names else None

    def _by_zone(self, service: str, what: str, names: set[str]) -> dict[str, set[str]]:
        """List which of some things each of our zones has."""
        found = self._session.pages(
            service,
            "aggregated_list",
            filter=" OR ".join(f"(name = {name})" for name in sorted(names)),
        )
        ours: dict[str, set[str]] = {}
        for scope, listed in found:
            zone = last(scope)
            here = {one.name for one in getattr(listed, what)} & names
            fits = zone == self._zone if self._zone else self._is_ours(zone)
            if here and fits:
                ours[zone] = here
        return ours

    def _is_ours(self, zone: str) -> bool:
        return zone.rpartition("-")[0] == self._session.region

    def _must_fit(self, image: Any) -> None:
        there = {"X86_64": "x64", "ARM64": "arm64"}.get(image.architecture, "")
        needed = catalogue.arch(self._wanted)
        if there and there != needed:
            msg = f"image {image.name} is for {there}, but {self._wanted[0]} is {needed}"
            raise ConfigurationError(msg)


def _settle(lookups: Sequence[Future[Any]]) -> None:
    """Raise everything that people can mend in one go, or else the first error."""
    errors = [error for one in lookups if (error := one.exception())]
    mistakes = [
        text for one in errors if isinstance(one, ConfigurationError) for text in one.mistakes
    ]
    if len(mistakes) > 1:
        raise ConfigurationError(*mistakes)
    for error in errors:
        raise error
