"""What a launch needs of a subscription and region, looked at before anything is paid for."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cml_runner import checkup, store
from cml_runner.checkup import Probe
from cml_runner.clouds.azure import account, catalogue
from cml_runner.clouds.azure.account import NAME, PROGRAMS, SUBNET, Place
from cml_runner.clouds.azure.resources import exists, lease_url, program_url
from cml_runner.errors import ConfigurationError, CredentialsError, NotFound
from cml_runner.model import Check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from cml_runner.checkup import Seen
    from cml_runner.clouds.azure.session import Session
    from cml_runner.clouds.azure.site import Site
    from cml_runner.model import Task

LOGIN = "log in: az login"
ROLE = (
    "give it the role: cml-runner permissions azure > role.json && az role definition update"
    " --role-definition @role.json"
)
READER = "only who may read the whole subscription, as the role Reader does, can look at it"
ALL, SPOT = "cores", "lowPriorityCores"  # vCPUs of a region, on demand and spot
ARCHITECTURES = {"x64": "x64", "Arm64": "arm64"}


def checks(
    session: Session, region: str, task: Task, read: Callable[[Task], Site]
) -> Iterator[Check]:
    """Look at all of it."""
    found, well = checkup.login(lambda: _login(session), session.clock, LOGIN)
    yield from found
    site, mistakes = checkup.understood(lambda: read(task))
    yield from mistakes
    if well:
        place = Place(session.subscription, region)
        yield from checkup.made(_Subscription(session, place, task).probes())
        yield from checkup.made(_Region(session, place, task, site).probes() if site else ())


def _login(session: Session) -> Check | str:
    """Every login may list the subscriptions that it sees."""
    listed = session.pages("subscriptions", "subscriptions", "list")
    own = session.subscription
    if own.lower() not in [str(one["subscriptionId"]).lower() for one in listed]:
        message = f"{session.who} sees no subscription {own}"
        hint = "set AZURE_SUBSCRIPTION_ID to one of: az account list --output table"
        return checkup.failed("login", message, hint, CredentialsError)
    return f"{session.who}, subscription {own}"


class _Subscription:
    """What doesn't depend on what the machines are to be."""

    def __init__(self, session: Session, place: Place, task: Task) -> None:
        self._session, self._place, self._task = session, place, task

    def probes(self) -> Iterator[Probe]:
        """Name what is looked at; what was made last, a container, stands for all the rest."""
        hint = f"make it: cml-runner setup azure --cloud-region {self._place.region}"
        yield Probe(what="permissions", look=self._permissions, hint=hint, own=True)
        for name, url in ((NAME, lease_url), (PROGRAMS, program_url)):
            what = f"container {name} of {self._place.storage}"
            yield checkup.piece(what, self._container(url(self._place)), hint)
        yield checkup.piece(f"network {NAME}", self._network, hint, own=True)
        for one in self._identities():
            mend = "name one that exists" if self._task.machine.permissions else hint
            what = f"identity {one.rpartition('/')[2]}"
            yield checkup.piece(what, self._identity(one), mend, own=True)

    def _permissions(self) -> Iterable[Check]:
        """Compare what we may do in the resource group with what a launch does there."""
        group = self._place.group
        try:
            had = self._session.pages(
                "authorization", "permissions", "list_for_resource_group", group
            )
        except NotFound:
            message = f"the resource group {group} isn't there yet"
            return [Check(what="permissions", state="unknown", message=message)]
        missing = [one for one in account.LAUNCHER if not _allows(had, one, "actions")]
        missing += [one for one in account.OBJECTS if not _allows(had, one, "dataActions")]
        number = len(account.LAUNCHER) + len(account.OBJECTS)
        return checkup.allowed(missing, number, ROLE)

    def _container(self, url: str) -> Callable[[], None]:
        def look() -> None:
            found = store.Store(url, self._session.credentials)
            if not exists(self._place) or not found.there():
                raise NotFound(self._place.storage)

        return look

    def _network(self) -> None:
        """Machines have public addresses in it, so it leads to the internet."""
        found = self._session.call("network", "virtual_networks", "get", self._place.group, NAME)
        if SUBNET not in [one["name"] for one in found["properties"].get("subnets", ())]:
            raise NotFound(SUBNET)

    def _identities(self) -> list[str]:
        listed = self._task.machine.permissions.split(",")
        return [one.strip() for one in listed if one.strip()] or [self._place.identity]

    def _identity(self, path: str) -> Callable[[], object]:
        parts = path.split("/")
        names = (parts[4], parts[-1]) if len(parts) > 4 else (self._place.group, path)
        group = "user_assigned_identities"
        return lambda: self._session.call("msi", group, "get", *names)


class _Region:
    """What depends on it."""

    def __init__(self, session: Session, place: Place, task: Task, site: Site) -> None:
        self._session, self._place, self._task, self._site = session, place, task, site

    def probes(self) -> Iterator[Probe]:
        """Name what is looked at."""
        other = "try another --cloud-type or --cloud-region"
        looks = (
            ("type", self._type, other),
            ("image", self._image, "name another --cloud-image"),
            ("quota", self._quota, ""),
        )
        for what, look, hint in looks:
            yield Probe(what=what, look=_readable(what, look), hint=hint)

    @cached_property
    def _sizes(self) -> dict[str, Mapping[str, Any]]:
        """List the region's sizes, and have the site choose among them."""
        found = self._site.sizes(self._place)
        self._site.choose(self._place, found)
        return found

    def _type(self) -> str:
        _ = self._sizes
        zones = f"zones {', '.join(self._site.zones)}" if self._site.zones else "no zones"
        return f"{', '.join(self._site.types)} in {self._place.region}, {zones}"

    def _image(self) -> Check | str:
        """Only a marketplace's can be looked up; the architecture stands in its versions."""
        image = self._site.image.reference
        if "publisher" not in image:
            message = "whether machines may use it, Azure says when they start"
            return Check(what="image", state="unknown", message=message)
        names = [image[part] for part in ("publisher", "offer", "sku")]
        listed: Any = self._session.call(
            "compute", "virtual_machine_images", "list", self._place.region, *names
        )
        there = [one["name"] for one in listed]
        version = image["version"]
        if not there or version not in ("latest", *there):
            raise NotFound(f"{self._place.region} has no image {':'.join([*names, version])}")
        newest = max(there, key=_number) if version == "latest" else version
        self._must_fit(names, newest)
        return f"{':'.join(names)}:{newest}"

    def _must_fit(self, names: list[str], version: str) -> None:
        found = self._session.call(
            "compute", "virtual_machine_images", "get", self._place.region, *names, version
        )
        arch = ARCHITECTURES.get(found.get("properties", {}).get("architecture", ""))
        needed = catalogue.arch(self._site.types)
        if arch and arch != needed:
            msg = f"the image is for {arch}, but {self._site.types[0]} is {needed}"
            raise ConfigurationError(msg)

    def _quota(self) -> Iterator[Check]:
        """Compare what is used with what may be, of the size that comes first."""
        size = self._sizes[self._site.types[0]]
        capable = {one["name"]: one["value"] for one in size.get("capabilities", ())}
        wanted = int(capable.get("vCPUs", 0)) * self._task.count
        listed = self._session.pages("compute", "usage", "list", self._place.region)
        usages = {one["name"]["value"].lower(): one for one in listed}
        for name in [SPOT] if self._task.machine.spot else [ALL, str(size.get("family", ""))]:
            found = usages.get(name.lower())
            if found and wanted:
                told = f"quota {found['name'].get('localizedValue') or name}"
                used, limit = found["currentValue"], found["limit"]
                yield checkup.room(told, used, limit, wanted, self._more(name, used + wanted))

    def _more(self, name: str, enough: float) -> str:
        scope = (
            f"/subscriptions/{self._place.subscription}/providers/Microsoft.Compute/locations"
            f"/{self._place.region}"
        )
        return (
            f"ask for more: az quota update --resource-name '{name}' --scope {scope}"
            f" --limit-object value={enough:.0f}"
        )


def _readable(what: str, look: Callable[[], Seen]) -> Callable[[], Seen]:
    """Say who may look; a launch does without."""

    def seen() -> Seen:
        try:
            found = look()
            return found if isinstance(found, str | Check) else list(found)
        except CredentialsError:
            return Check(what=what, state="unknown", message=READER)

    return seen


def _allows(had: list[dict[str, Any]], action: str, kind: str) -> bool:
    """Evaluate roles: each one's actions, less those that it takes away again."""
    without = f"not{kind[0].upper()}{kind[1:]}"
    return any(
        _matches(one.get(kind), action) and not _matches(one.get(without), action) for one in had
    )


def _matches(patterns: list[str] | None, action: str) -> bool:
    """Compare with patterns, in which * stands for anything; case is nothing to Azure."""
    return any(
        re.fullmatch(".*".join(map(re.escape, one.split("*"))), action, re.IGNORECASE)
        for one in patterns or ()
    )


def _number(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]
