"""Amazon Web Services: an Auto Scaling group for each task, and one bucket for all.

What a task consists of, all of it named after its identifier:

    lease            object leases/ID.json in the account's bucket: the claim on the name
    settings         object tasks/ID/settings.json, which only our machines may read; beside it the
                     machines' logs and status
    launch template  what machines are like; its user data says where the settings are
    key pair         only with --cloud-ssh-private
    scaling group    over all subnets; its scheduled action ends it at the deadline

The pieces that all tasks share are in account.py.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cml_runner import clouds, keys, leases, wait
from cml_runner.boot import aws as boot
from cml_runner.clouds.aws import account, catalogue, checks, machine, older, prices
from cml_runner.clouds.aws.group import Group
from cml_runner.clouds.aws.resources import (
    Bucket,
    KeyPair,
    LaunchTemplate,
    claims,
    start_script,
)
from cml_runner.clouds.aws.session import Session
from cml_runner.clouds.aws.site import SECURITY_GROUP_OPTION, SUBNET_OPTION, Site
from cml_runner.errors import ConfigurationError
from cml_runner.model import OLDER, Identifier, Task
from cml_runner.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime

    from cml_runner.model import Check, Lease, Notice, Quote

log = logging.getLogger(__name__)

TAG_KEY = re.compile(r"(?!aws:|_index$|\.{1,2}$)[A-Za-z0-9+\-=.,_:@]{1,128}")
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


class Cloud:
    """One account, that of the credentials which the SDK finds, in one region."""

    dedicated = keeps = metadata_service = True

    def __init__(self, region: str) -> None:
        self.region = catalogue.region(region)
        self._session = Session(self.region)

    def plan(self, task: Task) -> clouds.Plan:
        """Name a task's resources; what must be known of account and region is asked later."""
        alone = task == Task(id=task.id)  # which will do for all but creation
        return self._plan(task, None if alone else self._site(task))

    def container(self, address: str, options: Mapping[str, str]) -> Store:
        """Open a bucket in this region or another one; machines need an identity that may use it.

        What is sent there isn't ours to guess: its owner is whoever has the name.
        """
        name, _, path = address.partition("/")
        region = options.get("region", self.region)
        if not BUCKET.fullmatch(name) or set(options) - {"region"}:
            msg = f"--storage-container {address}: NAME/PATH of a bucket; its only option is region"
            raise ConfigurationError(msg)
        return Store(f"s3://{name}/{quote(path)}?region={region}", self._session.credentials)

    def tasks(self) -> list[Lease]:
        """Read the leases."""
        return leases.listed(claims(self._session))

    def lease(self, identifier: Identifier) -> Lease | None:
        """Read it."""
        return leases.found(claims(self._session), identifier)

    def older(self) -> list[Lease]:
        """Know them by their buckets."""
        return older.tasks(self._session)

    def now(self) -> datetime:
        """Read the date of an answer."""
        return self._session.now()

    def setup(self) -> list[str]:
        """Make role, instance profile, security group and bucket."""
        return account.Shared(self._session).setup()

    def permissions(self, *, doctor: bool = False) -> Mapping[str, Any]:
        """Write an IAM policy for this region, and for whatever account it's given to."""
        policy = account.launcher_policy("*", self.region)
        if doctor:
            policy["Statement"].append(account.doctor_policy())
        return policy

    def checks(self, task: Task) -> Iterator[Check]:
        """Look at account, region, and what the machines are to be."""
        return checks.checks(self._session, task, self._site)

    def quotes(self, task: Task) -> list[Quote]:
        """Ask the price list and, of spot machines, the market."""
        return prices.quotes(self._session, self._site(task).wanted, spot=task.machine.spot)

    @staticmethod
    def rank() -> None:
        """A group's machines have no numbers."""

    @staticmethod
    def forgotten() -> None:
        """The bucket keeps it all."""

    @staticmethod
    def machine() -> str:
        """Return the instance's identifier. Raises RunnerError where it can't be had."""
        return boot.instance()

    @staticmethod
    def notice() -> Notice | None:
        """Ask the metadata service."""
        return machine.notice()

    def leave(self, identifier: Identifier, url: str, *, last: bool) -> None:
        """Terminate this instance and have none in its place or, as the last, delete everything.

        It goes on trying: a machine that just powered itself off would be replaced.
        """
        place = url.partition("#")[0]
        own = boot.Machine(f"{place}#aws/{self.region}/{identifier}")
        wait.insist(own.check)
        wait.insist(own.finish if last else own.dismiss)

    def _plan(self, task: Task, site: Site | None) -> clouds.Plan:
        if task.id.prefix == OLDER:
            return older.plan(self._session, task)
        bucket = Bucket(task, self._session, site)
        settings = leases.Settings(bucket)
        # Whoever deletes doesn't know if there is a key.
        key = KeyPair(bucket) if task.machine.ssh_key or not site else None
        template = LaunchTemplate(bucket, site, key)
        program = leases.Program(bucket)
        parts: tuple[clouds.Resource, ...] = (settings, program, *([key] if key else []), template)
        group = Group(bucket, site, parts)
        arch = catalogue.arch(site.wanted) if site else "x64"
        return clouds.Plan(resources=(bucket, *parts, group), group=group, bucket=bucket, arch=arch)

    def _site(self, task: Task) -> Site:
        """Understand what machines are asked for. Raises ConfigurationError with every mistake."""
        wanted = task.machine
        mistakes: list[str] = []
        types: tuple[str, ...] = ()
        image = None
        for reading in ("types", "image"):
            try:
                if reading == "types":
                    types = catalogue.types(wanted.types, wanted.gpu)
                elif types:
                    image = catalogue.image(wanted.image, types)
            except ConfigurationError as error:
                mistakes += error.mistakes
        mistakes += _mistakes(task)
        mistakes += _too_long(task)
        if mistakes or image is None:
            raise ConfigurationError(*mistakes)
        return Site(self._session, task, types, image)


def _mistakes(task: Task) -> list[str]:
    """List what is wrong but for types and image."""
    found = []
    for name in task.machine.options:
        if name not in (SECURITY_GROUP_OPTION, SUBNET_OPTION):
            found.append(f"--cloud-{name} makes no sense on AWS: leave it out")
    for key in task.tags:
        if not TAG_KEY.fullmatch(key):
            found.append(f"--cloud-metadata {key}: keys are letters, digits and + - = . , _ : @")
    found += leases.mistakes(task, account.KEPT)
    if task.machine.ssh_key:
        try:
            keys.public_key(task.machine.ssh_key)
        except ValueError as error:
            found.append(f"--cloud-ssh-private: {error}")
    return found


def _too_long(task: Task) -> list[str]:
    """Write a start script for an account whose number we don't know yet."""
    try:
        start_script(task, f"s3://cml-runner-{'0' * 12}/{leases.TASKS}/{task.id}", "us-west-2")
    except ConfigurationError as error:
        return list(error.mistakes)
    return []
