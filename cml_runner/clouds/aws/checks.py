"""What a launch needs of an account and region, looked at before anything is paid for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cml_runner import checkup
from cml_runner.checkup import Probe
from cml_runner.clouds.aws import rights
from cml_runner.clouds.aws.account import ROLE, SECURITY_GROUP, Shared
from cml_runner.clouds.aws.resources import profile
from cml_runner.clouds.aws.site import SECURITY_GROUP_OPTION
from cml_runner.errors import ConfigurationError, NotFound
from cml_runner.model import Check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from cml_runner.clouds.aws.session import Session
    from cml_runner.clouds.aws.site import Site, Subnet
    from cml_runner.model import Task

LOGIN = (
    "log in: aws sso login, or set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
)
SERVICE_ROLES = {"AWSServiceRoleForAutoScaling": False, "AWSServiceRoleForEC2Spot": True}
# Quotas are of vCPUs, over families of types whose letters are in their names:
# https://docs.aws.amazon.com/ec2/latest/instancetypes/ec2-instance-quotas.html
ON_DEMAND = re.compile(r"Running On-Demand (?P<families>.+) instances")
SPOT = re.compile(r"All (?P<families>.+) Spot Instance Requests")
FAMILY = re.compile(r"(?P<letters>[a-z]+)(?P<generation>\d+)?")
STANDARD = {"IS": "I", "IM": "I"}  # families that count as others


def checks(session: Session, task: Task, read: Callable[[Task], Site]) -> Iterator[Check]:
    """Look at all of it."""
    found, well = checkup.login(lambda: _login(session), session.clock, LOGIN)
    yield from found
    site, mistakes = checkup.understood(lambda: read(task))
    yield from mistakes
    if well:
        yield from checkup.made(_Account(session, task).probes())
        yield from checkup.made(_Region(session, task, site).probes() if site else ())


def _login(session: Session) -> str:
    return session.account.who


class _Account:
    """What doesn't depend on what the machines are to be."""

    def __init__(self, session: Session, task: Task) -> None:
        self._session, self._task = session, task
        self._shared = Shared(session)
        self._hint = f"make it: cml-runner setup aws --cloud-region {session.region}"

    def probes(self) -> Iterator[Probe]:
        """Name what is looked at."""
        wanted, hint = self._task.machine, self._hint
        bucket = f"bucket {self._shared.bucket}"
        yield Probe(what="permissions", look=lambda: rights.look(self._session), own=True)
        yield checkup.piece(bucket, self._bucket, hint)
        if not wanted.options.get(SECURITY_GROUP_OPTION):
            yield checkup.piece(f"security group {SECURITY_GROUP}", self._group, hint)
        named = next(iter(profile(wanted.permissions).values()))
        mend = "name one that exists" if wanted.permissions else hint
        yield checkup.piece(f"instance profile {named}", self._identity, mend, own=True)
        for name, only_spot in SERVICE_ROLES.items():
            if wanted.spot or not only_spot:  # AWS makes it with a first machine, if it may
                yield checkup.piece(f"role {name}", self._role(name), hint, own=True, vital=False)

    def _bucket(self) -> None:
        """Its owner is looked at, too: names of buckets can be guessed."""
        own = {"ExpectedBucketOwner": self._session.account.id, "MaxKeys": 1}
        self._session.call("s3", "list_objects_v2", Bucket=self._shared.bucket, **own)

    def _group(self) -> None:
        filters = [{"Name": "group-name", "Values": [SECURITY_GROUP]}]
        pages = self._session.pages
        if not pages("ec2", "describe_security_groups", "SecurityGroups", Filters=filters):
            raise NotFound(SECURITY_GROUP)

    def _identity(self) -> None:
        name = (self._task.machine.permissions or ROLE).rpartition("/")[2]
        found = self._session.call("iam", "get_instance_profile", InstanceProfileName=name)
        if not found["InstanceProfile"]["Roles"]:
            raise NotFound(name)

    def _role(self, name: str) -> Callable[[], object]:
        return lambda: self._session.call("iam", "get_role", RoleName=name)


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
        yield Probe(what="network", look=self._network, own=True)

    def _type(self) -> str:
        zones = ", ".join(sorted({one.zone for one in self._site.subnets}))
        return f"{', '.join(self._site.types)} in {zones}"

    def _image(self) -> str:
        return self._site.image.id

    def _quota(self) -> Iterator[Check]:
        """Compare what runs with what may, of the type that comes first."""
        wanted, spot = self._site.types[0], self._task.machine.spot
        pages = self._session.pages
        listed = pages("service-quotas", "list_service_quotas", "Quotas", ServiceCode="ec2")
        quota = _quota(listed, wanted, spot=spot)
        if not quota:
            message = f"AWS doesn't list any for {wanted}"
            yield Check(what="quota", state="unknown", message=message)
            return
        (shape,) = pages("ec2", "describe_instance_types", "InstanceTypes", InstanceTypes=[wanted])
        used = sum(_cores(one) for one in self._running() if self._counts(one, quota))
        yield checkup.room(
            f"quota {quota['QuotaName']}",
            used,
            quota["Value"],
            shape["VCpuInfo"]["DefaultVCpus"] * self._task.count,
            "ask for more: aws service-quotas request-service-quota-increase --service-code ec2"
            f" --quota-code {quota['QuotaCode']} --desired-value N --region {self._session.region}",
        )

    def _running(self) -> list[Mapping[str, Any]]:
        filters = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
        pages = self._session.pages("ec2", "describe_instances", "Reservations", Filters=filters)
        return [one for several in pages for one in several["Instances"]]

    def _counts(self, instance: Mapping[str, Any], quota: Mapping[str, Any]) -> bool:
        spot = instance.get("InstanceLifecycle") == "spot"
        return spot == self._task.machine.spot and bool(
            _quota([quota], instance["InstanceType"], spot=spot)
        )

    def _network(self) -> Iterator[Check]:
        """See that machines get out: by an address of their own, or through something else."""
        tables = self._tables()
        public = self._public()
        shut = [one for one in self._site.subnets if not _leads_out(tables, one, public)]
        if len(shut) < len(self._site.subnets):
            names = sorted(one.id for one in self._site.subnets if one not in shut)
            message = f"{', '.join(names)}: there is a way to the internet"
            yield Check(what="network", state="ok", message=message)
        for one in shut:
            message = "no way to the internet: machines can't install anything, nor reach the forge"
            hint = f"give {one.id} a route to a NAT gateway, or use another --cloud-aws-subnet"
            what = f"subnet {one.id}"
            yield checkup.failed(what, message, hint, ConfigurationError)

    def _tables(self) -> list[Mapping[str, Any]]:
        filters = [{"Name": "vpc-id", "Values": [self._site.network]}]
        found = self._session.pages("ec2", "describe_route_tables", "RouteTables", Filters=filters)
        return list(found)

    def _public(self) -> set[str]:
        """List the subnets whose machines have public addresses."""
        ids = [one.id for one in self._site.subnets]
        found = self._session.pages("ec2", "describe_subnets", "Subnets", SubnetIds=ids)
        return {str(one["SubnetId"]) for one in found if one["MapPublicIpOnLaunch"]}


def _quota(listed: Sequence[Mapping[str, Any]], wanted: str, *, spot: bool) -> Any:
    """Find the quota of a type: that of its generation, if there is one, or of its family."""
    match = FAMILY.match(wanted)
    assert match
    letters = match["letters"].upper()
    for name in (f"{letters}{match['generation']}", STANDARD.get(letters, letters)):
        for one in listed:
            told = (SPOT if spot else ON_DEMAND).fullmatch(one["QuotaName"])
            if told and name in re.findall(r"\b[A-Z]+\d*\b", told[1]):
                return one
    return None


def _cores(instance: Mapping[str, Any]) -> int:
    options = instance.get("CpuOptions", {})
    return int(options.get("CoreCount", 1)) * int(options.get("ThreadsPerCore", 1))


def _leads_out(tables: Sequence[Mapping[str, Any]], subnet: Subnet, public: set[str]) -> bool:
    own = [one for one in tables if _belongs(one, subnet.id)]
    main = [one for one in tables if any(a.get("Main") for a in one.get("Associations", ()))]
    for table in own or main:
        for route in table.get("Routes", ()):
            everywhere = route.get("DestinationCidrBlock") == "0.0.0.0/0"
            gateway = str(route.get("GatewayId", ""))
            if everywhere and route.get("State") != "blackhole":
                return subnet.id in public or not gateway.startswith("igw-")
    return False


def _belongs(table: Mapping[str, Any], subnet: str) -> bool:
    return any(one.get("SubnetId") == subnet for one in table.get("Associations", ()))
