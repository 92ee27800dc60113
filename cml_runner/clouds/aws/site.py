"""What a launch finds in an account and region: an image, subnets, security groups.

All of it is looked up at the same time, and before anything of the task is created: who asks for
what isn't there learns it at once, and nothing has to be undone.
"""

from __future__ import annotations

import logging
import random
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cml_runner import keys
from cml_runner.clouds.aws import catalogue
from cml_runner.clouds.aws.account import SECURITY_GROUP, Shared
from cml_runner.errors import ConfigurationError, NoCapacity, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cml_runner.clouds.aws.session import Session
    from cml_runner.model import Task

log = logging.getLogger(__name__)

ROOT = "/dev/sda1"  # of Canonical's images
SECURITY_GROUP_OPTION, SUBNET_OPTION = "aws-security-group", "aws-subnet"


@dataclass(frozen=True, kw_only=True)
class Subnet:
    """Where machines may start, and of which types."""

    id: str
    zone: str
    network: str  # VPC
    types: tuple[str, ...]  # in order of preference


@dataclass(frozen=True, kw_only=True)
class Image:
    """What a machine boots from."""

    id: str
    device: str = ROOT  # of the root volume
    size: int = 0  # GB, at least


class Site:
    """Lookups, each made once, for one task."""

    def __init__(
        self,
        session: Session,
        task: Task,
        types: tuple[str, ...],
        image: catalogue.Image,
    ) -> None:
        self._session, self._task, self.wanted, self._image = session, task, types, image

    def look(self) -> None:
        """Look everything up, and raise what stands against a launch.

        The account's shared pieces are made if they are missing and if we may.
        """
        lookups: tuple[Callable[[], object], ...] = (
            lambda: self.image,
            lambda: self._all_subnets,
            lambda: self._offers,
            lambda: self._groups,
            lambda: self.address,
            lambda: self._session.account,
        )
        with ThreadPoolExecutor(len(lookups), thread_name_prefix="lookup") as pool:
            _settle([pool.submit(look) for look in lookups])
        self._make_shared(self.network)
        _ = self.security_groups  # now all of them must be there

    @cached_property
    def image(self) -> Image:
        """What to boot from."""
        wanted = self._image
        if wanted.parameter:
            found = self._session.call("ssm", "get_parameter", Name=wanted.parameter)
            image = Image(id=found["Parameter"]["Value"])
            return self._described({"ImageIds": [image.id]}) if wanted.large else image
        if wanted.id:
            return self._described({"ImageIds": [wanted.id]})
        name = {"name": wanted.name, "architecture": wanted.architecture, "state": "available"}
        return self._described({"Owners": [wanted.owner], "Filters": _filters(name)})

    @property
    def network(self) -> str:
        """The VPC in which the subnets are."""
        return self.subnets[0].network

    @cached_property
    def subnets(self) -> tuple[Subnet, ...]:
        """Where any of the types can be had, the best place first.

        Raises NoCapacity if that is nowhere.
        """
        found = []
        for one in self._all_subnets:
            zone = one["AvailabilityZone"]
            types = tuple(name for name in self.wanted if (name, zone) in self._offers)
            if types:
                network = one["VpcId"]
                found.append(Subnet(id=one["SubnetId"], zone=zone, network=network, types=types))
        if not found:
            where = ", ".join(sorted({one["AvailabilityZone"] for one in self._all_subnets}))
            msg = f"{self._session.region} has no {' or '.join(self.wanted)} in {where}"
            raise NoCapacity(msg)
        # Many launches should be spread over the zones; this isn't for secrecy.
        random.Random(str(self._task.id)).shuffle(found)  # noqa: S311
        return tuple(sorted(found, key=lambda one: self.wanted.index(one.types[0])))

    @property
    def types(self) -> tuple[str, ...]:
        """Those of the types which can be had somewhere."""
        there = {name for one in self.subnets for name in one.types}
        return tuple(name for name in self.wanted if name in there)

    @property
    def security_groups(self) -> list[str]:
        """What the machines' interfaces belong to. Raises NotFound."""
        own = [Shared.ssh(self.address)] if self.address else []
        return [self._group(name) for name in (*self._names, *own)]

    @cached_property
    def address(self) -> str:
        """Ours on the internet, if people want to log in from here."""
        if not self._task.machine.ssh_key:
            return ""
        return keys.own_address()

    def _group(self, name: str) -> str:
        if name.startswith("sg-"):
            return name
        for one in self._groups:
            if one["GroupName"] == name and one["VpcId"] == self.network:
                return str(one["GroupId"])
        msg = f"{self.network} in {self._session.region} has no security group {name}"
        raise NotFound(msg)

    def _make_shared(self, network: str) -> None:
        shared = Shared(self._session)
        there = {one["GroupName"] for one in self._groups if one["VpcId"] == network}
        new = {SECURITY_GROUP} & set(self._names) - there
        if new:
            shared.setup(network)
        if self.address and shared.ssh(self.address) not in there:
            shared.open_ssh(network, self.address)
            new.add(shared.ssh(self.address))
        if new:
            del self._groups  # they will be looked up again

    @property
    def _names(self) -> list[str]:
        """Names, or identifiers, of the groups that are asked for."""
        asked = self._task.machine.options.get(SECURITY_GROUP_OPTION, "")
        return [name.strip() for name in asked.split(",") if name.strip()] or [SECURITY_GROUP]

    @cached_property
    def _groups(self) -> list[Any]:
        """Find them in all networks; which is ours isn't known yet."""
        names = [*self._names, Shared.ssh("*")]
        filters = [{"Name": "group-name", "Values": names}]
        return self._session.pages(
            "ec2", "describe_security_groups", "SecurityGroups", Filters=filters
        )

    @cached_property
    def _all_subnets(self) -> list[Any]:
        asked = self._task.machine.options.get(SUBNET_OPTION)
        if asked:
            ids = [name.strip() for name in asked.split(",")]
            found = self._session.pages("ec2", "describe_subnets", "Subnets", SubnetIds=ids)
            if len({one["VpcId"] for one in found}) > 1:
                msg = f"--cloud-aws-subnet {asked}: they are in different VPCs"
                raise ConfigurationError(msg)
            return found
        default = _filters({"default-for-az": "true", "state": "available"})
        found = self._session.pages("ec2", "describe_subnets", "Subnets", Filters=default)
        if not found:
            msg = f"{self._session.region} has no default VPC: use --cloud-aws-subnet"
            raise ConfigurationError(msg)
        return found

    @cached_property
    def _offers(self) -> set[tuple[str, str]]:
        """List which types there are in which zones."""
        found = self._session.pages(
            "ec2",
            "describe_instance_type_offerings",
            "InstanceTypeOfferings",
            LocationType="availability-zone",
            Filters=[{"Name": "instance-type", "Values": list(self.wanted)}],
        )
        return {(one["InstanceType"], one["Location"]) for one in found}

    def _described(self, which: dict[str, Any]) -> Image:
        """Ask for an image; of several, take the newest."""
        found = self._session.pages("ec2", "describe_images", "Images", **which)
        if not found:
            msg = f"{self._session.region} has no image {self._task.machine.image}"
            raise NotFound(msg)
        newest = max(found, key=lambda one: str(one.get("CreationDate", "")))
        self._must_fit(newest)
        device = newest.get("RootDeviceName") or ROOT
        sizes = [
            one["Ebs"].get("VolumeSize", 0)
            for one in newest.get("BlockDeviceMappings", [])
            if "Ebs" in one and one.get("DeviceName") == device
        ]
        return Image(id=newest["ImageId"], device=device, size=max(sizes, default=0))

    def _must_fit(self, image: dict[str, Any]) -> None:
        arch = {"x86_64": "x64", "arm64": "arm64"}.get(image.get("Architecture", ""), "")
        needed = catalogue.arch(self.wanted)
        if arch and arch != needed:
            msg = f"image {image['ImageId']} is for {arch}, but {self.wanted[0]} is {needed}"
            raise ConfigurationError(msg)


def _settle(lookups: Sequence[Future[Any]]) -> None:
    """Wait for all of them, and raise everything that people can mend in one go."""
    errors = [error for one in lookups if (error := one.exception())]
    mistakes = [
        text for one in errors if isinstance(one, ConfigurationError) for text in one.mistakes
    ]
    if mistakes and len(mistakes) > 1:
        raise ConfigurationError(*mistakes)
    for error in errors:
        raise error


def _filters(values: dict[str, str]) -> list[dict[str, Any]]:
    return [{"Name": name, "Values": [value]} for name, value in values.items()]
