"""EC2 instances: moto keeps the books, this gives them a life of their own."""

from __future__ import annotations

import base64
import threading
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Protocol

from tests.lab.aws.wire import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.aws.autoscaling import Group, Member

ACCOUNT = "123456789012"
IMAGE = 8  # GB
MESSAGES = {
    "InsufficientInstanceCapacity": "There is no capacity available that matches your request.",
    "VcpuLimitExceeded": "You have requested more vCPU capacity than your current limit allows.",
    "MaxSpotInstanceCountExceeded": "Max spot instance count exceeded",
    "UnauthorizedOperation": "You are not authorized to perform this operation.",
}


@dataclass(frozen=True, kw_only=True)
class Instance:
    """A machine, as it is handed to whoever plays machines."""

    id: str
    region: str
    zone: str
    type: str
    spot: bool
    user_data: str
    address: str
    profile: str  # name of its instance profile
    tags: dict[str, str]


class Machines(Protocol):
    """Who plays machines."""

    def start(self, instance: Instance) -> None:
        """Boot one; returns at once."""

    def end(self, instance: str) -> None:
        """Take its power away."""


class Nobody:
    """Instances that just are there."""

    def start(self, instance: Instance) -> None: ...
    def end(self, instance: str) -> None: ...


@dataclass
class Life:
    """What moto doesn't know of an instance."""

    instance: Instance
    notice: dict[str, Any] | None = None  # spot/instance-action
    rebalance: str = ""
    console: str = ""
    ended: bool = False
    timers: list[threading.Timer] = field(default_factory=list)


class Instances:
    """All instances of the account."""

    def __init__(self, client: Callable[[str, str], Any], machines: Machines) -> None:
        self._client, self._machines = client, machines
        self.lives: dict[str, Life] = {}
        self.hinder: Callable[[str, str, bool], str] = lambda _zone, _type, _spot: ""
        self._lock = threading.RLock()

    def stop(self) -> None:
        """Forget all timers."""
        for life in self.lives.values():
            for timer in life.timers:
                timer.cancel()

    def template(self, region: str, name: str) -> dict[str, Any]:
        """Read the newest version of a launch template. Raises ApiError."""
        found = self._ask(
            region,
            "describe_launch_template_versions",
            LaunchTemplateName=name,
            Versions=["$Latest"],
        )
        data: dict[str, Any] = found["LaunchTemplateVersions"][0]["LaunchTemplateData"]
        return data

    def zones(self, region: str, subnets: list[str]) -> list[str]:
        """Say in which zones subnets are. Raises ApiError."""
        found = self._ask(region, "describe_subnets", SubnetIds=subnets)["Subnets"]
        zone = {one["SubnetId"]: one["AvailabilityZone"] for one in found}
        return [zone[name] for name in subnets]

    def states(self, region: str, ids: list[str]) -> dict[str, str]:
        """Say what state instances are in."""
        if not ids:
            return {}
        backend = self._backend(region)
        return {name: backend.get_instance(name)._state.name for name in ids}

    def launch(self, group: Group, subnet: str, type_: str) -> Member:
        """Start one machine of a group. Raises ApiError."""
        from tests.lab.aws.autoscaling import Member

        zone = self.zones(group.region, [subnet])[0]
        if code := self.hinder(zone, type_, group.spot):
            raise ApiError(code, MESSAGES.get(code, code))
        spec = group.policy["LaunchTemplate"]["LaunchTemplateSpecification"]
        data = self.template(group.region, spec["LaunchTemplateName"])
        tags = {
            "aws:autoscaling:groupName": group.name,
            **{one["Key"]: one["Value"] for one in group.tags if one.get("PropagateAtLaunch")},
        }
        found = self._ask(
            group.region, "run_instances", **_request(data, subnet, type_, group.spot, tags)
        )
        instance = self._born(found["Instances"][0], group, data)
        self._machines.start(instance)
        return Member(instance.id, zone, type_)

    def terminate(
        self, region: str, name: str, reason: str = "Client.UserInitiatedShutdown"
    ) -> None:
        """End one, for whatever reason."""
        life = self.lives[name]
        with self._lock:
            if life.ended:
                return
            life.ended = True
        backend = self._backend(region)
        backend.terminate_instances([name])
        state = backend.get_instance(name)
        state.state_reason = type(state.state_reason)(f"{reason}: {reason}", reason)
        self._machines.end(name)

    def powered_off(self, name: str) -> None:
        """Hear that a machine has ended by itself; its template says that this terminates it."""
        self.terminate(self.lives[name].instance.region, name, "Client.InstanceInitiatedShutdown")

    def interrupt(self, name: str, after: float = 120) -> None:
        """Take a spot instance away, with notice."""
        life = self.lives[name]
        at = datetime.now(timezone.utc) + timedelta(seconds=after)
        life.notice = {"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%S.%f}Z"}
        reason = "Server.SpotInstanceTermination"
        timer = threading.Timer(after, self.terminate, (life.instance.region, name, reason))
        timer.daemon = True
        life.timers.append(timer)
        timer.start()

    def tags(self, name: str) -> dict[str, str]:
        """Say how an instance is tagged now."""
        region = self.lives[name].instance.region
        return {
            one["key"]: one["value"] for one in self._backend(region).get_instance(name).get_tags()
        }

    def sweep(self) -> None:
        """End the machines of instances that were terminated by whoever asked EC2."""
        for name, life in list(self.lives.items()):
            if not life.ended and self.states(life.instance.region, [name])[name] == "terminated":
                life.ended = True
                self._machines.end(name)

    def _born(self, found: dict[str, Any], group: Group, data: dict[str, Any]) -> Instance:
        profile = data.get("IamInstanceProfile", {})
        instance = Instance(
            id=found["InstanceId"],
            region=group.region,
            zone=found["Placement"]["AvailabilityZone"],
            type=found["InstanceType"],
            spot=group.spot,
            user_data=base64.b64decode(data.get("UserData", "")).decode(),
            address=found["PrivateIpAddress"],
            profile=profile.get("Name") or profile.get("Arn", "").rpartition("/")[2],
            tags={one["Key"]: one["Value"] for one in found.get("Tags", [])},
        )
        self.lives[instance.id] = Life(instance)
        return instance

    def _ask(self, region: str, operation: str, **arguments: Any) -> dict[str, Any]:
        from botocore.exceptions import ClientError

        try:
            found: dict[str, Any] = getattr(self._client("ec2", region), operation)(**arguments)
        except ClientError as error:
            details = error.response["Error"]
            raise ApiError(details["Code"], details["Message"]) from error
        return found

    def _backend(self, region: str) -> Any:
        from moto.ec2.models import ec2_backends

        return ec2_backends[ACCOUNT][region]


def _request(
    data: dict[str, Any], subnet: str, type_: str, spot: bool, tags: dict[str, str]
) -> dict[str, Any]:
    """Say all that moto doesn't take from a template by itself."""
    kept = (
        "ImageId",
        "UserData",
        "KeyName",
        "SecurityGroupIds",
        "BlockDeviceMappings",
        "IamInstanceProfile",
        "MetadataOptions",
        "InstanceInitiatedShutdownBehavior",
    )
    request: dict[str, Any] = {key: data[key] for key in kept if key in data}
    for one in request.get("BlockDeviceMappings", []):
        one["Ebs"].setdefault("VolumeSize", IMAGE)
    request["UserData"] = base64.b64decode(data.get("UserData", "")).decode()
    request["MetadataOptions"] = {
        key: value for key, value in data.get("MetadataOptions", {}).items() if key != "State"
    }
    own = [{"Key": key, "Value": value} for key, value in tags.items()]
    specifications = []
    for one in data.get("TagSpecifications", []):
        more = own if one["ResourceType"] == "instance" else []
        specifications.append({**one, "Tags": one["Tags"] + more})
    request["TagSpecifications"] = specifications or [{"ResourceType": "instance", "Tags": own}]
    market = {"InstanceMarketOptions": {"MarketType": "spot"}} if spot else {}
    return {
        **request,
        **market,
        "MinCount": 1,
        "MaxCount": 1,
        "SubnetId": subnet,
        "InstanceType": type_,
    }
