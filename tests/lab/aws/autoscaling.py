"""EC2 Auto Scaling, as far as it can be told from outside.

moto's launches but one type in one subnet, never fires a scheduled action and tells of no
activity; so this one is ours, on top of moto's EC2. A thread keeps each group as large as wanted.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import count
from typing import TYPE_CHECKING, Any

from tests.lab.aws.wire import ApiError

if TYPE_CHECKING:
    from tests.lab.aws.instances import Instances

TURN = 0.05  # seconds between two looks at all groups
AGAIN = 1.0  # seconds before a group that could launch nothing tries again
WENT = (
    "an instance was taken out of service in response to an EC2 health check indicating"
    " it has been terminated or stopped."
)
NOT_EMPTY = (
    "You cannot delete an AutoScalingGroup while there are instances or pending Spot instance"
    " request(s) still in the group."
)
NO_LESS = (
    "Currently, desiredSize equals minSize. Terminating instance without replacement will"
    " violate group's min size constraint."
)


@dataclass
class Member:
    """A machine of a group."""

    id: str
    zone: str
    type: str


@dataclass
class Group:
    """One group."""

    name: str
    region: str
    bounds: tuple[int, int]
    desired: int
    subnets: list[str]
    policy: dict[str, Any]
    tags: list[dict[str, Any]]
    created: datetime
    members: list[Member] = field(default_factory=list)
    suspended: list[str] = field(default_factory=list)
    schedule: dict[str, dict[str, Any]] = field(default_factory=dict)
    status: str = ""
    paused: float = 0

    @property
    def spot(self) -> bool:
        """Whether it starts spot machines."""
        share = self.policy["InstancesDistribution"].get("OnDemandPercentageAboveBaseCapacity", 100)
        return int(share) == 0

    @property
    def types(self) -> list[str]:
        """What it may start, in order of preference."""
        return [one["InstanceType"] for one in self.policy["LaunchTemplate"]["Overrides"]]


class AutoScaling:
    """The service, in every region."""

    def __init__(self, instances: Instances) -> None:
        self._instances = instances
        self.groups: dict[tuple[str, str], Group] = {}
        self.activities: list[tuple[str, dict[str, Any]]] = []  # newest last; by group name
        self._tokens: dict[str, dict[str, Any]] = {}
        self._numbers = count(1)
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="groups", daemon=True)

    def start(self) -> None:
        """Begin to keep groups."""
        self._thread.start()

    def stop(self) -> None:
        """Keep nothing any more."""
        self._over.set()
        self._thread.join()

    def call(self, region: str, action: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request. Raises ApiError."""
        method = getattr(self, f"_{action}", None)
        if method is None:
            raise ApiError("InvalidAction", f"the fake doesn't know {action}")
        with self._lock:
            found: dict[str, Any] = method(region, **arguments) or {}
            return found

    # What can be asked for

    def _CreateAutoScalingGroup(self, region: str, **given: Any) -> None:
        name = given["AutoScalingGroupName"]
        old = self.groups.get((region, name))
        if old:
            more = ", and it is pending delete" if old.status else ""
            raise ApiError("AlreadyExists", f"AutoScalingGroup by this name already exists{more}")
        policy = given["MixedInstancesPolicy"]
        template = policy["LaunchTemplate"]["LaunchTemplateSpecification"]
        self._instances.template(region, template["LaunchTemplateName"])
        group = Group(
            name=name,
            region=region,
            bounds=(given["MinSize"], given["MaxSize"]),
            desired=given.get("DesiredCapacity", given["MinSize"]),
            subnets=given["VPCZoneIdentifier"].split(","),
            policy=policy,
            tags=given.get("Tags", []),
            created=_now(),
        )
        self._instances.zones(region, group.subnets)
        self.groups[region, name] = group

    def _UpdateAutoScalingGroup(self, region: str, **given: Any) -> None:
        group = self._group(region, given["AutoScalingGroupName"])
        low, high = group.bounds
        group.bounds = given.get("MinSize", low), given.get("MaxSize", high)
        group.policy = given.get("MixedInstancesPolicy", group.policy)
        self._wish(group, given.get("DesiredCapacity", group.desired))

    def _DeleteAutoScalingGroup(self, region: str, **given: Any) -> None:
        group = self._group(region, given["AutoScalingGroupName"])
        if group.members and not given.get("ForceDelete"):
            raise ApiError("ResourceInUse", NOT_EMPTY)
        group.status, group.desired, group.bounds = "Delete in progress", 0, (0, 0)

    def _DescribeAutoScalingGroups(self, region: str, **given: Any) -> dict[str, Any]:
        names = given.get("AutoScalingGroupNames")
        found = [one for (place, _), one in self.groups.items() if place == region]
        return {
            "AutoScalingGroups": [
                _described(one) for one in found if not names or one.name in names
            ]
        }

    def _SuspendProcesses(self, region: str, **given: Any) -> None:
        self._group(region, given["AutoScalingGroupName"]).suspended += given["ScalingProcesses"]

    def _PutScheduledUpdateGroupAction(self, region: str, **given: Any) -> None:
        group = self._group(region, given["AutoScalingGroupName"])
        if given["StartTime"] < _now():
            raise ApiError("ValidationError", "Given start time is in the past")
        group.schedule[given["ScheduledActionName"]] = given

    def _DeleteScheduledAction(self, region: str, **given: Any) -> None:
        group = self._group(region, given["AutoScalingGroupName"])
        if not group.schedule.pop(given["ScheduledActionName"], None):
            raise ApiError("ValidationError", "Scheduled action name not found")

    def _LaunchInstances(self, region: str, **given: Any) -> dict[str, Any]:
        group = self._group(region, given["AutoScalingGroupName"])
        token = given["ClientToken"]
        if token in self._tokens:
            return self._tokens[token]
        subnets = given.get("SubnetIds", group.subnets)
        if len(subnets) != 1 or subnets[0] not in group.subnets:
            raise ApiError("ValidationError", "one of the group's subnets must be specified")
        wanted = given["RequestedCapacity"]
        if wanted > 100 or group.desired + wanted > group.bounds[1]:
            raise ApiError("ValidationError", "the requested capacity is too large for the group")
        started, errors = self._start(group, subnets[0], wanted)
        group.desired += len(started)
        zone = self._instances.zones(region, subnets)[0]
        market = "Spot" if group.spot else "OnDemand"
        where = {"SubnetId": subnets[0], "AvailabilityZone": zone, "MarketType": market}
        by_type: dict[str, list[str]] = {}
        for one in started:
            by_type.setdefault(one.type, []).append(one.id)
        self._tokens[token] = {
            "AutoScalingGroupName": group.name,
            "ClientToken": token,
            "Instances": [
                {**where, "InstanceType": type_, "InstanceIds": ids}
                for type_, ids in by_type.items()
            ],
            "Errors": [
                {
                    **where,
                    "InstanceType": type_,
                    "ErrorCode": error.code,
                    "ErrorMessage": error.message,
                }
                for type_, error in errors
            ]
            if len(started) < wanted
            else [],
        }
        return self._tokens[token]

    def _TerminateInstanceInAutoScalingGroup(self, region: str, **given: Any) -> dict[str, Any]:
        for group in self.groups.values():
            for member in group.members:
                if member.id == given["InstanceId"] and group.region == region:
                    if given["ShouldDecrementDesiredCapacity"]:
                        if group.desired - 1 < group.bounds[0]:
                            raise ApiError("ValidationError", NO_LESS)
                        group.desired -= 1
                    self._end(group, member, "at the user's request")
                    return {"Activity": self.activities[-1][1]}
        raise ApiError(
            "ValidationError",
            f"Instance Id not found - No managed instance found for {given['InstanceId']}",
        )

    def _DescribeScalingActivities(self, region: str, **given: Any) -> dict[str, Any]:
        name = given["AutoScalingGroupName"]
        known = (region, name) in self.groups or given.get("IncludeDeletedGroups")
        if not known:
            raise ApiError(
                "ValidationError",
                f"AutoScalingGroup name not found - AutoScalingGroup {name} not found",
            )
        found = [one for whose, one in reversed(self.activities) if whose == name]
        return {"Activities": found}

    # What happens by itself

    def _run(self) -> None:
        while not self._over.wait(TURN):
            with self._lock:
                for group in list(self.groups.values()):
                    self._keep(group)

    def _keep(self, group: Group) -> None:
        for name, action in list(group.schedule.items()):
            if action["StartTime"] <= _now():
                del group.schedule[name]
                group.bounds = action.get("MinSize", 0), action.get("MaxSize", group.bounds[1])
                self._wish(group, action.get("DesiredCapacity", group.desired))
        states = self._instances.states(group.region, [one.id for one in group.members])
        for member in list(group.members):
            if states.get(member.id, "terminated") not in ("pending", "running"):
                group.members.remove(member)
                self._tell(group, f"Terminating EC2 instance: {member.id}", WENT)
        for member in group.members[group.desired :]:
            self._end(group, member, f"the desired capacity is {group.desired}")
        if len(group.members) < group.desired and time.monotonic() > group.paused:
            self._grow(group)
        if group.status and not group.members:
            del self.groups[group.region, group.name]

    def _grow(self, group: Group) -> None:
        """Start what is missing, in whichever zone has it."""
        errors: list[tuple[str, ApiError]] = []
        for subnet in group.subnets:
            missing = group.desired - len(group.members)
            if missing:
                errors += self._start(group, subnet, missing)[1]
        if len(group.members) < group.desired:
            group.paused = time.monotonic() + AGAIN
            _, error = errors[-1]
            market = "Spot Instances" if group.spot else "On-Demand Instances"
            why = f"{error.code} - {error.message} Launching EC2 instance failed."
            message = f"Could not launch {market}. {why}"
            self._tell(group, "Launching a new EC2 instance. ", "the group needs more", message)

    def _start(
        self, group: Group, subnet: str, wanted: int
    ) -> tuple[list[Member], list[tuple[str, ApiError]]]:
        started: list[Member] = []
        errors: list[tuple[str, ApiError]] = []
        for type_ in group.types:
            while len(started) < wanted:
                try:
                    member = self._instances.launch(group, subnet, type_)
                except ApiError as error:
                    errors.append((type_, error))
                    break
                started.append(member)
                group.members.append(member)
                self._tell(
                    group, f"Launching a new EC2 instance: {member.id}", "capacity was asked for"
                )
        return started, errors

    def _end(self, group: Group, member: Member, cause: str) -> None:
        self._tell(group, f"Terminating EC2 instance: {member.id}", cause)
        group.members.remove(member)
        self._instances.terminate(group.region, member.id)

    def _wish(self, group: Group, desired: int) -> None:
        low, high = group.bounds
        if not low <= desired <= high:
            raise ApiError(
                "ValidationError", f"Desired capacity:{desired} must be between {low} and {high}"
            )
        group.desired, group.paused = desired, 0

    def _group(self, region: str, name: str) -> Group:
        if (region, name) not in self.groups:
            raise ApiError(
                "ValidationError",
                f"AutoScalingGroup name not found - AutoScalingGroup '{name}' not found",
            )
        if self.groups[region, name].status:
            raise ApiError(
                "ScalingActivityInProgress", f"AutoScalingGroup {name} is pending delete"
            )
        return self.groups[region, name]

    def _tell(self, group: Group, description: str, cause: str, failure: str = "") -> None:
        now = _now()
        activity = {
            "ActivityId": f"activity-{next(self._numbers)}",
            "AutoScalingGroupName": group.name,
            "Description": description,
            "Cause": f"At {now:%Y-%m-%dT%H:%M:%SZ} {cause}",
            "StartTime": now,
            "EndTime": now,
            "StatusCode": "Failed" if failure else "Successful",
            "Progress": 100,
            **({"StatusMessage": failure} if failure else {}),
        }
        self.activities.append((group.name, activity))


def _described(group: Group) -> dict[str, Any]:
    return {
        "AutoScalingGroupName": group.name,
        "MinSize": group.bounds[0],
        "MaxSize": group.bounds[1],
        "DesiredCapacity": group.desired,
        "DefaultCooldown": 300,
        "AvailabilityZones": sorted({one.zone for one in group.members}) or ["none"],
        "HealthCheckType": "EC2",
        "CreatedTime": group.created,
        "VPCZoneIdentifier": ",".join(group.subnets),
        "Instances": [
            {
                "InstanceId": one.id,
                "InstanceType": one.type,
                "AvailabilityZone": one.zone,
                "LifecycleState": "InService",
                "HealthStatus": "Healthy",
                "ProtectedFromScaleIn": False,
            }
            for one in group.members
        ],
        "SuspendedProcesses": [{"ProcessName": name} for name in group.suspended],
        **({"Status": group.status} if group.status else {}),
    }


def _now() -> datetime:
    return datetime.now(timezone.utc)
