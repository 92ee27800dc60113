"""What a launch needs of a project and region, looked at before anything is paid for."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cml_runner import checkup
from cml_runner.checkup import Probe
from cml_runner.clouds.gcp import account
from cml_runner.clouds.gcp.account import IAM, NETWORK, PROJECTS, STORAGE, Shared
from cml_runner.errors import CredentialsError, NotFound
from cml_runner.model import Check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from cml_runner.clouds.gcp.catalogue import Type
    from cml_runner.clouds.gcp.session import Session
    from cml_runner.clouds.gcp.site import Site
    from cml_runner.model import Task

LOGIN = "log in: gcloud auth application-default login"
SETUP = "make it: cml-runner setup gcp"
ROLE = (
    "give it the role: cml-runner permissions gcp > role.json && gcloud iam roles update"
    f" {account.LAUNCHER} --file role.json --project "
)
AT_ONCE = 100  # permissions in one question
SSH = ("compute.firewalls.create", "compute.networks.updatePolicy")
GPUS = ("compute.acceleratorTypes.list",)
OBJECTS = "storage.objects."
OLD = ("n1", "e2", "f1", "g1", "custom")  # families whose quota is just CPUS


def checks(session: Session, task: Task, read: Callable[[Task], Site]) -> Iterator[Check]:
    """Look at all of it."""
    rights = _Rights(session)
    found, well = checkup.login(rights.login, session.clock, LOGIN)
    yield from found
    site, mistakes = checkup.understood(lambda: read(task))
    yield from mistakes
    if well:
        session.open()
        yield from checkup.made(_Project(session, rights, site).probes())
        yield from checkup.made(_Region(session, task, site).probes() if site else ())


class _Rights:
    """What we may do; anybody may ask that."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._had: set[str] = set()  # in the project

    def login(self) -> str:
        """The first question shows if our credentials are good."""
        url = f"{PROJECTS}/{self._session.project}"
        self._had = self._test(url, account.LAUNCHER_PERMISSIONS)
        return f"{self._session.who}, project {self._session.project}"

    def look(self, site: Site | None) -> Iterator[Check]:
        """Name what is missing. Objects' permissions may be those of our bucket alone."""
        missing = set(account.LAUNCHER_PERMISSIONS) - self._had
        if any(name.startswith(OBJECTS) for name in missing):
            with suppress(NotFound):
                missing -= self._lent(sorted(one for one in missing if one.startswith(OBJECTS)))
        if not (site and any(one.gpu for one in site.types)):
            missing -= {*GPUS}
        hint = f"{ROLE}{self._session.project}"
        ssh = sorted(missing & {*SSH})
        number = len(account.LAUNCHER_PERMISSIONS)
        yield from checkup.allowed(ssh, 0, hint, "only --cloud-ssh-private needs it")
        yield from checkup.allowed(sorted(missing - {*SSH}), number, hint)

    def act(self, address: str) -> Check | str:
        """See if we may give machines their service account."""
        url = f"{IAM}/projects/-/serviceAccounts/{address}"
        wanted = "iam.serviceAccounts.actAs"
        if wanted in self._test(url, [wanted]):
            return f"machines may be {address}"
        message = f"we may not give machines {address}, or there is no such account"
        hint = (
            f"{SETUP}; then: gcloud iam service-accounts add-iam-policy-binding {address}"
            f" --project {self._session.project} --role roles/iam.serviceAccountUser --member WHO"
        )
        return checkup.failed(f"permission {wanted}", message, hint, CredentialsError)

    def _test(self, url: str, names: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for start in range(0, len(names), AT_ONCE):
            body = {"permissions": list(names[start : start + AT_ONCE])}
            answer = self._session.rest("POST", f"{url}:testIamPermissions", body)
            found |= set(answer.get("permissions", ()))
        return found

    def _lent(self, names: Sequence[str]) -> set[str]:
        bucket = Shared(self._session).bucket
        query = "&".join(f"permissions={name}" for name in names)
        answer = self._session.rest("GET", f"{STORAGE}/b/{bucket}/iam/testPermissions?{query}")
        return set(answer.get("permissions", ()))


class _Project:
    """What doesn't depend on the region."""

    def __init__(self, session: Session, rights: _Rights, site: Site | None) -> None:
        self._session, self._rights, self._site = session, rights, site
        self._shared = Shared(session)

    def probes(self) -> Iterator[Probe]:
        """Name what is looked at."""
        yield Probe(what="permissions", look=lambda: self._rights.look(self._site), own=True)
        yield checkup.piece(f"bucket {self._shared.bucket}", self._bucket, SETUP)
        yield checkup.piece(f"firewall rule {account.FIREWALL}", self._firewall, SETUP)
        yield Probe(what="service account", look=self._identity, own=True)
        hint = f"make it: gcloud compute networks create {NETWORK}"
        yield Probe(what=f"network {NETWORK}", look=self._network, hint=hint, own=True)

    def _bucket(self) -> None:
        if not self._shared.has_bucket():
            raise NotFound(self._shared.bucket)

    def _firewall(self) -> None:
        if not self._shared.has_firewall():
            raise NotFound(account.FIREWALL)

    def _identity(self) -> Check | str:
        wanted = self._site.identity.account if self._site else ""
        if wanted and "@" not in wanted:
            wanted = f"{wanted}@{self._session.project}.iam.gserviceaccount.com"
        return self._rights.act(wanted or account.address(self._session.project))

    def _network(self) -> Check | str:
        """Machines have addresses of their own in it, so it leads to the internet."""
        found = self._session.call("Networks", "get", network=NETWORK)
        region = f"/regions/{self._session.region}/"
        if not any(region in one for one in found.subnetworks):
            hint = (
                f"make one: gcloud compute networks subnets create {NETWORK} --network {NETWORK}"
                f" --range 10.128.0.0/20 --region {self._session.region}"
            )
            message = f"it has no subnet in {self._session.region}"
            return checkup.failed(f"network {NETWORK}", message, hint, NotFound)
        return f"it has a subnet in {self._session.region}; machines get addresses of their own"


class _Region:
    """What depends on it."""

    def __init__(self, session: Session, task: Task, site: Site) -> None:
        self._session, self._task, self._site = session, task, site

    def probes(self) -> Iterator[Probe]:
        """Name what is looked at."""
        other = "try another --cloud-type or --cloud-region"
        yield Probe(what="type", look=self._type, hint=other)
        yield Probe(what="image", look=self._image, hint="name another --cloud-image")
        yield Probe(what="quota", look=self._quota, own=True)

    def _type(self) -> str:
        zones = ", ".join(self._site.zones)
        return f"{', '.join(map(str, self._site.types))} in {zones}"

    def _image(self) -> str:
        return self._site.image.url

    def _quota(self) -> Iterable[Check]:
        """Compare what is used with what may be, of the type that comes first."""
        if not self._site.types:
            return
        wanted, count = self._site.types[0], self._task.count
        shape = self._shape(wanted)
        quotas = {one.metric: one for one in self._session.call("Regions", "get").quotas}
        for name in ("INSTANCES", "IN_USE_ADDRESSES"):
            yield from self._compared(quotas, [name], count)
        if shape:
            yield from self._compared(quotas, self._cores(wanted), shape.guest_cpus * count)
        for kind, number in _gpus(wanted, shape).items():
            yield from self._compared(quotas, self._named(kind), number * count)
        yield from self._everywhere(wanted, shape)

    def _shape(self, wanted: Type) -> Any:
        """Find the type as it is in one of the zones."""
        listed = self._session.pages(
            "MachineTypes", "aggregated_list", filter=f"(name = {wanted.name})"
        )
        found = [one for _, several in listed for one in several.machine_types]
        return next((one for one in found if one.name == wanted.name), None)

    def _cores(self, wanted: Type) -> list[str]:
        family = wanted.name.partition("-")[0]
        return self._markets("CPUS" if family in OLD else f"{family.upper()}_CPUS", "CPUS")

    def _named(self, gpu: str) -> list[str]:
        name = gpu.removeprefix("nvidia-").removeprefix("tesla-").upper().replace("-", "_")
        return self._markets(f"NVIDIA_{name}_GPUS", f"NVIDIA_{name}_GPUS")

    def _markets(self, name: str, spot: str) -> list[str]:
        """Of spot machines a quota of their own counts; where none was granted, the usual one.

        https://cloud.google.com/compute/docs/instances/spot
        """
        return [f"PREEMPTIBLE_{spot}", name] if self._task.machine.spot else [name]

    def _compared(self, quotas: dict[str, Any], names: list[str], wanted: float) -> list[Check]:
        """Compare with the first of these quotas that is granted, or is the last."""
        name = next((one for one in names if one in quotas and quotas[one].limit), names[-1])
        if name not in quotas:
            message = "Compute Engine doesn't tell it here: see gcloud beta quotas info list"
            return [Check(what=f"quota {name}", state="unknown", message=message)]
        found = quotas[name]
        where = "https://console.cloud.google.com/iam-admin/quotas?project="
        hint = f"ask for more of {name} in {self._session.region}: {where}{self._session.project}"
        return [checkup.room(f"quota {name}", found.usage, found.limit, wanted, hint)]

    def _everywhere(self, wanted: Type, shape: Any) -> list[Check]:
        """Compare with the quotas that a project has over all regions, if it has any."""
        quotas = {one.metric: one for one in self._session.call("Projects", "get").quotas}
        count = self._task.count
        amounts = {"GPUS_ALL_REGIONS": sum(_gpus(wanted, shape).values()) * count}
        if shape:
            amounts["CPUS_ALL_REGIONS"] = shape.guest_cpus * count
        return [
            check
            for name, amount in amounts.items()
            if amount and name in quotas
            for check in self._compared(quotas, [name], amount)
        ]


def _gpus(wanted: Type, shape: Any) -> dict[str, int]:
    """Count the GPUs of a machine: those that are attached, or built in."""
    if wanted.gpu:
        return {wanted.gpu: wanted.count}
    built = shape.accelerators if shape else ()
    return {one.guest_accelerator_type: one.guest_accelerator_count for one in built}
