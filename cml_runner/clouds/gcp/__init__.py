"""Google Cloud: a regional managed instance group for each task, and one bucket for all.

What a task consists of, all of it named after its identifier:

    lease              object leases/REGION/ID.json in the project's bucket: the claim on the name
    settings           object tasks/REGION/ID/settings.json, which only our machines may read;
                       beside it the machines' logs and status
    program            object programs/SHA256.whl, which tasks share
    instance template  what machines are like; their end is in it, and their user data says where
                       the settings are
    instance group     over all zones in which one of the types can be had

The pieces that all tasks share are in account.py.
"""

from __future__ import annotations

import logging
import re
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cml_runner import clouds, keys, leases, wait, web
from cml_runner.boot import gcp as boot
from cml_runner.clouds.gcp import account, catalogue, checks, machine, prices
from cml_runner.clouds.gcp.group import Group
from cml_runner.clouds.gcp.resources import (
    Bucket,
    Template,
    opened,
    start_script,
)
from cml_runner.clouds.gcp.session import Session
from cml_runner.clouds.gcp.site import Site
from cml_runner.errors import ConfigurationError, RunnerError
from cml_runner.model import Identifier, Task
from cml_runner.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cml_runner.model import Check, Lease, Notice, Quote

log = logging.getLogger(__name__)

BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
LONGEST = timedelta(days=120)  # that Compute Engine lets a machine have an end ahead


class Cloud:
    """One project, that of the credentials, in one region."""

    dedicated = keeps = metadata_service = True

    def __init__(self, region: str) -> None:
        self.region, self.zone = catalogue.region(region)
        self._session = Session(self.region)

    def plan(self, task: Task) -> clouds.Plan:
        """Name a task's resources; what must be known of project and region is asked later."""
        alone = task == Task(id=task.id)  # which will do for all but creation
        return self._plan(task, None if alone else self._understood(task))

    def container(self, address: str, options: Mapping[str, str]) -> Store:
        """Open any bucket that our credentials open, and those of the machines."""
        name, _, path = address.partition("/")
        if not BUCKET.fullmatch(name) or options:
            msg = f"--storage-container {address}: NAME/PATH of a bucket; there are no options"
            raise ConfigurationError(msg)
        return Store(f"gs://{name}/{quote(path)}", self._session.credentials)

    def tasks(self) -> list[Lease]:
        """Read the leases."""
        return leases.listed(self._leases)

    def lease(self, identifier: Identifier) -> Lease | None:
        """Read it."""
        return leases.found(self._leases, identifier)

    def older(self) -> list[Lease]:
        """Know none."""
        return []

    def now(self) -> datetime:
        """Read the date of an answer, which may be a refusal."""
        return web.clock("https://storage.googleapis.com/")

    def setup(self) -> list[str]:
        """Make service account, role, firewall rule and bucket."""
        return account.Shared(self._session).setup()

    def permissions(self, *, doctor: bool = False) -> Mapping[str, Any]:
        """Write a custom role, as `gcloud iam roles create` takes it."""
        return account.launcher_role(doctor=doctor)

    def checks(self, task: Task) -> Iterator[Check]:
        """Look at project, region, and what the machines are to be."""
        return checks.checks(self._session, task, self._understood)

    def quotes(self, task: Task) -> list[Quote]:
        """Ask the billing catalogue, if there is a key for it."""
        wanted = self._understood(task).wanted
        return prices.quotes(self._session, wanted, spot=task.machine.spot)

    @staticmethod
    def rank() -> None:
        """A group's machines have no numbers."""

    @staticmethod
    def forgotten() -> None:
        """The bucket keeps it all."""

    @staticmethod
    def machine() -> str:
        """Return the instance's number. Raises RunnerError where it can't be had."""
        try:
            return boot.instance()
        except OSError as error:
            msg = f"the metadata server doesn't say which machine this is: {error}"
            raise RunnerError(msg) from error

    @staticmethod
    def notice() -> Notice | None:
        """Ask the metadata server, which answers as soon as there is news."""
        return machine.notice()

    def leave(self, identifier: Identifier, url: str, *, last: bool) -> None:
        """Delete this machine and have none in its place or, as the last, delete everything.

        It goes on trying: a machine that just powered itself off would be made anew.
        """
        place = url.partition("#")[0]
        own = boot.Machine(f"{place}#gcp/{self.region}/{identifier}")
        wait.insist(own.finish if last else own.dismiss)

    @property
    def _leases(self) -> Store:
        place = (self._session.project, leases.LEASES, self.region)
        return opened(*place, credentials=self._session.credentials)

    def _plan(self, task: Task, site: Site | None) -> clouds.Plan:
        bucket = Bucket(task, self._session, site)
        template = Template(bucket, site)
        parts = (leases.Settings(bucket), leases.Program(bucket), template)
        group = Group(bucket, site, template, parts)
        return clouds.Plan(
            resources=(bucket, *parts, group),
            group=group,
            bucket=bucket,
            arch=site.arch if site else "x64",
        )

    def _understood(self, task: Task) -> Site:
        """Understand what machines are asked for. Raises ConfigurationError with every mistake."""
        wanted = task.machine
        mistakes: list[str] = []

        def read(reading: Callable[[], Any]) -> Any:
            try:
                return reading()
            except ConfigurationError as error:
                mistakes.extend(error.mistakes)
                return None

        types = read(lambda: catalogue.types(wanted.types, wanted.gpu))
        image = types and read(lambda: catalogue.image(wanted.image, types))
        identity = read(lambda: catalogue.identity(wanted.permissions))
        mistakes += _mistakes(task)
        read(lambda: _write_script(task))
        if mistakes:
            raise ConfigurationError(*mistakes)
        return Site(self._session, task, self.zone, types, image, identity)


def _mistakes(task: Task) -> list[str]:
    """List what is wrong but for types, image and identity."""
    found = [
        f"--cloud-{name} makes no sense on Google Cloud: leave it out"
        for name in task.machine.options
    ]
    if task.machine.ssh_key:
        try:
            keys.public_key(task.machine.ssh_key)
        except ValueError as error:
            found.append(f"--cloud-ssh-private: {error}")
    if task.machine.spot_price > 0:
        found.append("--cloud-spot-price: Google Cloud has but its own price: leave it out")
    found += leases.mistakes(task, account.KEPT)
    if task.expires and task.expires > datetime.now(timezone.utc) + LONGEST:
        found.append("--max-lifetime: Google Cloud ends machines in 120 days at most")
    return found


def _write_script(task: Task) -> None:
    """Write a start script for a project and a region whose names we don't know yet."""
    region = "0" * 24
    place = f"gs://cml-runner-{'0' * 30}/{leases.TASKS}/{region}/{task.id}"
    start_script(task, place, region)
