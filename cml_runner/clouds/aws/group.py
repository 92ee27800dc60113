"""The Auto Scaling group: it holds a task's machines, and replaces those that die."""

from __future__ import annotations

import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Literal

from cml_runner import clouds, wait
from cml_runner.clouds.aws import session as sessions
from cml_runner.clouds.aws import shell
from cml_runner.clouds.aws.machine import INTERRUPT
from cml_runner.clouds.aws.resources import tags
from cml_runner.errors import (
    AlreadyExists,
    ConfigurationError,
    CredentialsError,
    NoCapacity,
    NotFound,
    RunnerError,
)
from cml_runner.model import Happening, Instance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from cml_runner.clouds import Resource
    from cml_runner.clouds.aws.resources import Bucket
    from cml_runner.clouds.aws.session import Session
    from cml_runner.clouds.aws.site import Site, Subnet
    from cml_runner.terminal import Program

log = logging.getLogger(__name__)

AT_ONCE = 100  # machines that LaunchInstances starts in one call
DEADLINE = "deadline"  # the scheduled action that ends it
LONGEST = 900  # seconds for a group to vanish with its machines
PROFILE_AGE = 30  # seconds until a new instance profile is known everywhere
GROUP_TAG = "tag:aws:autoscaling:groupName"
STATUS: Mapping[str, Literal["starting", "running", "stopping"]] = {
    "pending": "starting",
    "running": "running",
    "shutting-down": "stopping",
    "stopping": "stopping",
}
CODE = re.compile(r"\b([A-Z][A-Za-z]+(?:\.[A-Za-z]+)?) - |\(([A-Za-z.]+)\)")
IDENTIFIER = re.compile(r"\bi-[0-9a-f]+\b")
WORDS = (  # what failed activities say, where they give no code
    ("permission", re.compile(r"not authorized|not allowed|permission|access denied", re.I)),
    ("quota", re.compile(r"limit exceeded|quota|more (vCPU|instances) .*limit|exceed", re.I)),
    ("capacity", re.compile(r"capacity|not supported in your requested", re.I)),
    ("image", re.compile(r"image|snapshot|block device", re.I)),
)


@dataclass(eq=False)
class Group:
    """One group over all subnets in which one of the types can be had."""

    bucket: Bucket
    site: Site | None
    needs: Sequence[Resource]
    label: str = "scaling group"
    fresh: bool = field(default=False, init=False)  # it was created here
    empty: bool = field(default=False, init=False)  # and holds nothing yet
    expires: datetime | None = field(default=None, init=False)  # as the cloud was told

    def create(self) -> bool:
        """Create it without a machine, and with its end."""
        try:
            self._create()
        except AlreadyExists:
            found = self._describe()
            if found and not found.get("Status"):
                return False
            self._gone()  # an older one of this name is about to vanish
            self._create()
        self.fresh = self.empty = True
        with ThreadPoolExecutor(1) as pool:
            balanced = pool.submit(self._suspend)
            if self.bucket.task.expires:
                self._schedule(self.bucket.task.expires)
            balanced.result()
        return True

    def delete(self) -> None:
        """Delete it with its machines, and wait until they are gone."""
        self.discard()
        self._gone()

    def discard(self) -> None:
        """Begin to delete it with its machines."""
        try:
            self.call("delete_auto_scaling_group", ForceDelete=True)
        except NotFound:
            return
        except RunnerError:
            found = self._describe()
            if found and not found.get("Status"):  # it isn't being deleted already
                raise

    def resize(self, count: int) -> None:
        """Start machines now, and see why not; of a group that has some, change the number."""
        if self.empty and 0 < count <= self.bucket.task.count:
            Ladder(self, count).climb()
            self.empty = False
            return
        bounds = {"MinSize": 0, "MaxSize": max(count, self.bucket.task.count)}
        self.call("update_auto_scaling_group", DesiredCapacity=count, **bounds)

    def instances(self) -> list[Instance]:
        """List those which are not terminated yet."""
        found = []
        for one in self._instances():
            state = one["State"]["Name"]
            if state in STATUS:
                address = one.get("PublicIpAddress") or one.get("PrivateIpAddress") or ""
                found.append(Instance(id=one["InstanceId"], status=STATUS[state], address=address))
        return found

    def events(self) -> list[Happening]:
        """Read the group's activities, also of one that is gone, and why machines ended."""
        try:
            activities = self.session.pages(
                "autoscaling",
                "describe_scaling_activities",
                "Activities",
                AutoScalingGroupName=self.name,
                IncludeDeletedGroups=True,
            )
        except NotFound:
            return []
        reasons = {one["InstanceId"]: one for one in self._instances()}
        return sorted((_happening(one, reasons) for one in activities), key=lambda one: one.at)

    def expire(self, at: datetime | None) -> None:
        """Set the group's end, if it is another than before; with that, the task is launched."""
        if not self.fresh or at != self.expires:
            self._schedule(at)
        self.bucket.renew(at)

    def interrupt(self, instance: str, after: float) -> None:
        """Tag a machine, which learns of it at once, ends its job and itself."""
        name = self._running(instance)
        at = datetime.now(timezone.utc) + timedelta(seconds=after)
        tag = {"Key": INTERRUPT, "Value": at.isoformat(timespec="milliseconds")}
        self.session.call("ec2", "create_tags", Resources=[name], Tags=[tag])

    def evict(self, instance: str) -> None:
        """Refuse: AWS's Fault Injection Service does it in the name of a role of its own only."""
        msg = (
            "--real: on AWS it takes a role and a template of the Fault Injection Service, with the"
            f" action aws:ec2:send-spot-instance-interruptions for {self._running(instance)};"
            " without --real the machine gets its notice all the same"
        )
        raise ConfigurationError(msg)

    def shell(self, instance: str, command: Sequence[str]) -> AbstractContextManager[Program]:
        """Begin a session of Session Manager, which needs neither a port nor a key."""
        return shell.opened(self.session, self._running(instance), command)

    def console(self) -> str:
        """Ask for one console after the other, until one has anything written on it."""

        def order(one: dict[str, Any]) -> tuple[bool, str]:
            return one["State"]["Name"] not in STATUS, str(one["LaunchTime"])

        for one in sorted(self._instances(), key=order, reverse=True):
            if text := self._console(one["InstanceId"]):
                return text
        return ""

    def _running(self, instance: str) -> str:
        return clouds.running(self.instances(), instance, self.name)

    @property
    def session(self) -> Session:
        """The bucket's."""
        return self.bucket.session

    @property
    def name(self) -> str:
        """The task's."""
        return str(self.bucket.task.id)

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Call Auto Scaling about this group."""
        return self.session.call(
            "autoscaling", operation, AutoScalingGroupName=self.name, **arguments
        )

    def _create(self) -> None:
        assert self.site
        task = self.bucket.task
        listed = tags(task, "group")[0]["Tags"]
        self.call(
            "create_auto_scaling_group",
            MinSize=0,
            MaxSize=task.count,
            DesiredCapacity=0,
            VPCZoneIdentifier=",".join(one.id for one in self.site.subnets),
            MixedInstancesPolicy=self._policy(),
            HealthCheckType="EC2",
            HealthCheckGracePeriod=0,
            DefaultInstanceWarmup=0,
            Tags=[{**one, "PropagateAtLaunch": False} for one in listed],
        )

    def _policy(self) -> dict[str, Any]:
        """Say of which types, and on which market."""
        assert self.site
        machine = self.bucket.task.machine
        distribution = {
            "OnDemandAllocationStrategy": "prioritized",
            "OnDemandBaseCapacity": 0,
            "OnDemandPercentageAboveBaseCapacity": 0 if machine.spot else 100,
            "SpotAllocationStrategy": "price-capacity-optimized",
        }
        if machine.spot and machine.spot_price > 0:
            distribution["SpotMaxPrice"] = str(machine.spot_price)
        template = {"LaunchTemplateName": self.name, "Version": "$Latest"}
        return {
            "LaunchTemplate": {
                "LaunchTemplateSpecification": template,
                "Overrides": [{"InstanceType": name} for name in self.site.types],
            },
            "InstancesDistribution": distribution,
        }

    def _suspend(self) -> None:
        """Never move a machine with a job on it to another zone, for balance."""
        self.call("suspend_processes", ScalingProcesses=["AZRebalance"])  # design 18

    def _schedule(self, at: datetime | None) -> None:
        if at is None:
            with suppress(NotFound):
                self.call("delete_scheduled_action", ScheduledActionName=DEADLINE)
        else:
            self.call(
                "put_scheduled_update_group_action",
                ScheduledActionName=DEADLINE,
                StartTime=at,
                MinSize=0,
                MaxSize=0,
                DesiredCapacity=0,
            )
        self.expires = at

    def _describe(self) -> dict[str, Any] | None:
        found = self.session.call(
            "autoscaling", "describe_auto_scaling_groups", AutoScalingGroupNames=[self.name]
        )
        groups: list[dict[str, Any]] = found["AutoScalingGroups"]
        return groups[0] if groups else None

    def _gone(self) -> None:
        """Wait until it has vanished, which is when its last machine is terminated."""
        what = f"{self.name} to vanish with its machines"
        wait.until(lambda: self._describe() is None, what, LONGEST, every=1)

    def _instances(self) -> list[Any]:
        """Ask for all machines of this group; those which ended are there for about an hour."""
        found = self.session.pages(
            "ec2",
            "describe_instances",
            "Reservations",
            Filters=[{"Name": GROUP_TAG, "Values": [self.name]}],
        )
        return [one for several in found for one in several["Instances"]]

    def _console(self, instance: str) -> str:
        for latest in (True, False):  # which only some types can tell
            with suppress(RunnerError):
                found = self.session.call(
                    "ec2", "get_console_output", InstanceId=instance, Latest=latest
                )
                return str(found.get("Output") or "")
        return ""


@dataclass
class Ladder:
    """The way to the wanted number of machines: zone after zone."""

    group: Group
    wanted: int
    tried: list[str] = field(default_factory=list)

    def climb(self) -> None:
        """Start them all. Raises NoCapacity, with all that was tried."""
        assert self.group.site
        for subnet in self.group.site.subnets:
            if "quota" in self._use_up(subnet):  # it is the region's
                break
        if self.wanted:
            raise NoCapacity("; ".join(self.tried) or "no capacity")

    def _use_up(self, subnet: Subnet) -> set[str]:
        """Start all that can be had in one zone; return what hindered more."""
        hindrances: set[str] = set()
        while self.wanted and not hindrances:
            started, hindrances = self._start(subnet)
            self.wanted -= started
            if not started:
                break
        return hindrances

    def _start(self, subnet: Subnet) -> tuple[int, set[str]]:
        """Make one call; return how many machines it started, and what hindered more."""
        found = self._launch(subnet)
        started = sum(len(one["InstanceIds"]) for one in found.get("Instances", []))
        kinds = set()
        market = "spot" if self.group.bucket.task.machine.spot else "on demand"
        for one in found.get("Errors", []):
            code, text = one.get("ErrorCode", ""), one.get("ErrorMessage", "")
            kind = sessions.kind(code)
            told = f"{subnet.zone} {one.get('InstanceType', '')} {market}: {text} ({code})"
            if kind == "permission":
                raise CredentialsError(told)
            if kind not in ("capacity", "quota"):
                raise RunnerError(told)
            log.warning("%s", told)
            self.tried.append(told)
            kinds.add(kind)
        if started:
            log.info("started %d in %s (%s)", started, subnet.zone, market)
        return started, kinds

    def _launch(self, subnet: Subnet) -> dict[str, Any]:
        end = time.monotonic() + PROFILE_AGE
        while True:
            try:
                return self.group.call(
                    "launch_instances",
                    RequestedCapacity=min(self.wanted, AT_ONCE),
                    SubnetIds=[subnet.id],
                    RetryStrategy="none",
                )
            except NoCapacity as error:
                code = str(error).rpartition("(")[2].rstrip(")")
                return {"Errors": [{"ErrorCode": code, "ErrorMessage": str(error)}]}
            except RunnerError as error:
                if "nstance profile" not in str(error).lower() or time.monotonic() > end:
                    raise
                time.sleep(1)


def _happening(activity: Mapping[str, Any], instances: Mapping[str, Any]) -> Happening:
    text = activity.get("StatusMessage") or activity.get("Description") or ""
    at = activity["StartTime"]
    if activity["StatusCode"] in ("Failed", "Cancelled"):
        return Happening(at=at, kind=_kind(text), message=text)
    found = IDENTIFIER.search(activity.get("Description", ""))
    ended = activity.get("Description", "").startswith("Terminating")
    if ended and found and (instance := instances.get(found[0])):
        return _end(at, instance, text)
    return Happening(at=at, kind="info", message=text)


def _end(at: datetime, instance: Mapping[str, Any], text: str) -> Happening:
    reason = instance.get("StateReason", {})
    code, name = reason.get("Code", ""), instance["InstanceId"]
    if code.startswith("Server.Spot") or any(
        tag["Key"] == INTERRUPT for tag in instance.get("Tags", [])
    ):
        return Happening(at=at, kind="interruption", message=f"{name} was interrupted")
    if code in ("Client.InstanceInitiatedShutdown", "Server.InternalError"):
        return Happening(at=at, kind="error", message=f"{name} ended by itself: {code}")
    return Happening(at=at, kind="info", message=text)


def _kind(text: str) -> Any:
    """Say what a failed activity is about."""
    for match in CODE.finditer(text):
        if (kind := sessions.kind(match[1] or match[2])) != "error":
            return kind
    return next((kind for kind, words in WORDS if words.search(text)), "error")
