"""Microsoft Azure: a scale set for each task, and one resource group for all of a region.

What a task consists of, all of it named after its identifier:

    lease            object leases/ID.json in the region's container: the claim on the name
    settings         object tasks/ID/settings.json, which only our machines may read; beside it the
                     machines' logs and status
    scale set        in Flexible mode, over all zones; its machines' start script says where the
                     settings are
    autoscale        holds the scale set at its size until the deadline, and at nothing after it;
    setting          comes with the first machines

The pieces that all tasks share are in account.py.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cml_runner import clouds, leases, store, wait, web
from cml_runner.boot import azure as boot
from cml_runner.boot.first_azure import manager
from cml_runner.clouds.azure import account, catalogue, checks, machine, prices, virtual
from cml_runner.clouds.azure.account import Place
from cml_runner.clouds.azure.group import Group
from cml_runner.clouds.azure.resources import (
    Bucket,
    Program,
    Settings,
    exists,
    lease_url,
)
from cml_runner.clouds.azure.session import Session
from cml_runner.clouds.azure.site import Site
from cml_runner.errors import ConfigurationError, RunnerError
from cml_runner.model import Identifier, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime

    from cml_runner.model import Check, Lease, Notice, Quote

TAG_KEY = re.compile(r"(?!(microsoft|azure|windows))[^<>%&\\?/]{1,512}", re.IGNORECASE)
CONTAINER = re.compile(r"[a-z0-9]([a-z0-9-]{1,61}[a-z0-9])")
IDENTITY = re.compile(
    r"/subscriptions/[\w-]+/resourceGroups/[^/]+/providers/Microsoft\.ManagedIdentity/"
    r"userAssignedIdentities/[\w-]+",
    re.IGNORECASE,
)
NOWHERE = Place("0" * 36, "australiasoutheast")  # with the longest names that there are


class Cloud:
    """One subscription, that of the credentials which the SDK finds, in one region."""

    dedicated = keeps = metadata_service = True

    def __init__(self, region: str) -> None:
        self.region = catalogue.region(region)
        self._session = Session()

    def plan(self, task: Task) -> clouds.Plan:
        """Name a task's resources; what must be known of the subscription is asked later."""
        alone = task == Task(id=task.id)  # which will do for all but creation
        site = None if alone else self._site(task)
        bucket = Bucket(task, self._session, self.region, site)
        parts = (bucket, Settings(bucket), Program(bucket))
        group = Group(bucket, site, parts)
        arch = catalogue.arch(site.types) if site else "x64"
        return clouds.Plan(resources=(*parts, group), group=group, bucket=bucket, arch=arch)

    def container(self, address: str, options: Mapping[str, str]) -> store.Store:
        """Open a container of any storage account, with our own login and that of the machines."""
        name, _, path = address.partition("/")
        account_ = options.get("account", "")
        if not CONTAINER.fullmatch(name) or set(options) != {"account"}:
            msg = f"--storage-container {address}: NAME/PATH of a container; the option account too"
            raise ConfigurationError(msg)
        url = f"az://{name}/{quote(path)}?account_name={account_}"
        return store.Store(url, self._session.credentials)

    def tasks(self) -> list[Lease]:
        """Read the leases."""
        objects = self._leases()
        return leases.listed(objects) if objects else []

    def lease(self, identifier: Identifier) -> Lease | None:
        """Read it."""
        objects = self._leases()
        return leases.found(objects, identifier) if objects else None

    def older(self) -> list[Lease]:
        """Know none."""
        return []

    def now(self) -> datetime:
        """Read the date of an answer, which may be a refusal."""
        return web.clock(manager())

    def setup(self) -> list[str]:
        """Make resource group, network, identity with its role, and storage."""
        place = Place(self._session.subscription, self.region)
        return account.Shared(self._session, place).setup()

    def permissions(self, *, doctor: bool = False) -> Mapping[str, Any]:
        """Write a custom role definition."""
        return account.launcher_role(self.region, doctor=doctor)

    def checks(self, task: Task) -> Iterator[Check]:
        """Look at subscription, region, and what the machines are to be."""
        return checks.checks(self._session, self.region, task, self._site)

    def quotes(self, task: Task) -> list[Quote]:
        """Ask the list of retail prices."""
        return prices.quotes(self.region, self._site(task).types, spot=task.machine.spot)

    @staticmethod
    def rank() -> None:
        """A group's machines have no numbers."""

    @staticmethod
    def forgotten() -> None:
        """The bucket keeps it all."""

    @staticmethod
    def machine() -> str:
        """Return the machine's own identifier. Raises RunnerError where it can't be had."""
        try:
            return str(boot.compute()["vmId"])
        except OSError as error:
            raise RunnerError(str(error)) from error

    @staticmethod
    def notice() -> Notice | None:
        """Ask the metadata service."""
        return machine.notice()

    def leave(self, identifier: Identifier, url: str, *, last: bool) -> None:
        """Delete this machine and have none in its place or, as the last, delete everything.

        It goes on trying: a machine that just powered itself off would be paid for.
        """
        place = url.partition("#")[0]
        own = boot.Machine(f"{place}#azure/{self.region}/{identifier}")
        wait.insist(own.finish if last else own.dismiss)

    def _leases(self) -> store.Store | None:
        """Open what says which tasks there are; None where there have never been any."""
        place = Place(self._session.subscription, self.region)
        self._session.credentials()  # or it is told that there are none
        if not exists(place):
            return None
        return store.Store(lease_url(place), self._session.credentials)

    def _site(self, task: Task) -> Site:
        """Understand what machines are asked for. Raises ConfigurationError with every mistake."""
        wanted = task.machine
        mistakes: list[str] = []
        types: tuple[str, ...] = ()
        image = None
        for reading in ("types", "image"):
            try:
                if reading == "types":
                    types = catalogue.types(wanted.types, wanted.gpu, spot=wanted.spot)
                elif types:
                    image = catalogue.image(wanted.image, types)
            except ConfigurationError as error:
                mistakes += error.mistakes
        mistakes += _mistakes(task)
        if mistakes or image is None:
            raise ConfigurationError(*mistakes)
        return Site(self._session, task, types, image)


def _mistakes(task: Task) -> list[str]:
    """List what is wrong but for types and image."""
    machine = task.machine
    identities = virtual.identity_ids(NOWHERE, machine.permissions)
    found = [f"--cloud-{one} makes no sense on Azure: leave it out" for one in machine.options]
    found += [
        f"--cloud-metadata {key}: keys are without < > % & \\ ? and /"
        for key in task.tags
        if not TAG_KEY.fullmatch(key)
    ]
    found += [
        f"--cloud-permission-set {one}: write resource IDs of identities"
        for one in identities
        if not IDENTITY.fullmatch(one)
    ]
    found += leases.mistakes(task, account.KEPT)
    try:
        if machine.ssh_key:
            virtual.public_key(machine.ssh_key)
    except ValueError as error:
        found.append(f"--cloud-ssh-private: {error}")
    try:
        virtual.script(NOWHERE, task, identities[0])
    except ConfigurationError as error:
        found += error.mistakes
    return found
