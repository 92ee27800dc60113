"""What is AWS's own: its errors, its rights, what a machine of it is like."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner import inventory, steps, wait
from cml_runner.clouds.aws import Cloud, account
from cml_runner.clouds.aws.session import Session
from cml_runner.errors import (
    AlreadyExists,
    CleanupFailed,
    ConfigurationError,
    CredentialsError,
    MissingDependency,
    NoCapacity,
    NotFound,
    RunnerError,
)
from cml_runner.model import Machine, Program, Task
from cml_runner.wait import until
from tests.lab.aws import sessions
from tests.lab.aws.front import LOST
from tests.lab.aws.instances import ACCOUNT

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.clouds import Plan
    from tests.clouds.aws_rig import AwsRig

SOON = datetime.now(timezone.utc) + timedelta(hours=1)


def task(rig: AwsRig, **machine: Any) -> Task:
    own = rig.task(tags={"name": "train", "team": "vision"})
    return replace(own, expires=SOON, machine=Machine(**{"spot": True, "disk": 20, **machine}))


def launch(rig: AwsRig, wanted: Task | None = None) -> Plan:
    """Do as `cml-runner launch` does."""
    plan = Cloud("us-west").plan(wanted or task(rig))
    steps.create(plan.resources, claim=plan.bucket)
    try:
        plan.group.resize((wanted or plan.bucket.task).count)  # type: ignore[attr-defined]
        plan.group.expire(SOON)
    except BaseException:
        steps.delete(plan.resources)
        raise
    return plan


def template(rig: AwsRig, wanted: Task) -> dict[str, Any]:
    return rig.aws.instances.template("us-west-2", str(wanted.id))


def market(rig: AwsRig) -> list[tuple[str, str, bool]]:
    lives = rig.aws.instances.lives.values()
    return [(one.instance.zone, one.instance.type, one.instance.spot) for one in lives]


# What a machine is like


def test_a_machine_is_closed_encrypted_and_tagged(aws_rig: AwsRig) -> None:
    wanted = task(aws_rig)
    launch(aws_rig, wanted)
    data = template(aws_rig, wanted)
    assert (
        data["MetadataOptions"].items()
        >= {
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": 1,
            "InstanceMetadataTags": "enabled",
        }.items()
    )
    (disk,) = data["BlockDeviceMappings"]
    assert (
        disk["Ebs"].items()
        >= {
            "VolumeType": "gp3",
            "Encrypted": True,
            "DeleteOnTermination": True,
            "VolumeSize": 20,
        }.items()
    )
    assert data["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert data["IamInstanceProfile"] == {"Name": "cml-runner"}
    assert "KeyName" not in data
    kinds = {one["ResourceType"]: one["Tags"] for one in data["TagSpecifications"]}
    assert set(kinds) >= {"instance", "volume", "network-interface"}
    expected = {"Name": "train", "team": "vision", "cml-runner-id": str(wanted.id)}
    for tags in kinds.values():
        assert {one["Key"]: one["Value"] for one in tags}.items() >= expected.items()
    script = base64.b64decode(data["UserData"]).decode()
    url = f"s3://cml-runner-{ACCOUNT}-us-west-2/tasks/{wanted.id}?region=us-west-2"
    assert f"{url}#aws/us-west-2/{wanted.id}" in script


def test_nothing_comes_in(aws_rig: AwsRig) -> None:
    wanted = task(aws_rig)
    launch(aws_rig, wanted)
    session = Session("us-west-2")
    (group,) = template(aws_rig, wanted)["SecurityGroupIds"]
    (found,) = session.call("ec2", "describe_security_groups", GroupIds=[group])["SecurityGroups"]
    assert (found["GroupName"], found["IpPermissions"]) == ("cml-runner", [])


def test_a_key_opens_one_port_for_one_address(
    aws_rig: AwsRig, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    import requests

    class Answer:
        text = "203.0.113.7\n"

        def raise_for_status(self) -> None: ...

    monkeypatch.setattr(requests, "get", lambda *_, **__: Answer())
    wanted = task(aws_rig, ssh_key=key)
    plan = launch(aws_rig, wanted)
    assert template(aws_rig, wanted)["KeyName"] == str(wanted.id)
    session = Session("us-west-2")
    _, own = template(aws_rig, wanted)["SecurityGroupIds"]
    (found,) = session.call("ec2", "describe_security_groups", GroupIds=[own])["SecurityGroups"]
    (rule,) = found["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert [one["CidrIp"] for one in rule["IpRanges"]] == ["203.0.113.7/32"]
    assert key not in repr(aws_rig.aws.app.calls)
    launch(aws_rig, task(aws_rig, ssh_key=key))  # the group is there already
    steps.delete(plan.resources)
    assert f"key {wanted.id}" not in aws_rig.aws.left()


@pytest.fixture(params=["PKCS8", "OpenSSH", "TraditionalOpenSSL"])
def key(request: pytest.FixtureRequest) -> str:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    made = rsa.generate_private_key(65537, 2048)
    kind = getattr(serialization.PrivateFormat, request.param)
    none = serialization.NoEncryption()
    return made.private_bytes(serialization.Encoding.PEM, kind, none).decode()


def test_the_users_own_choices(aws_rig: AwsRig) -> None:
    session = Session("us-west-2")
    (subnet, *_) = session.pages("ec2", "describe_subnets", "Subnets")
    groups = session.pages("ec2", "describe_security_groups", "SecurityGroups")
    default = next(one for one in groups if one["GroupName"] == "default")
    arn = f"arn:aws:iam::{ACCOUNT}:instance-profile/cml-runner"
    wanted = task(
        aws_rig,
        types=("m5.large", "s"),
        permissions=arn,
        spot_price=0.25,
        image="debian@136693071363:x86_64:debian-13-*",
        options={"aws-security-group": "default", "aws-subnet": subnet["SubnetId"]},
    )
    launch(aws_rig, wanted)
    data = template(aws_rig, wanted)
    assert data["IamInstanceProfile"] == {"Arn": arn}
    assert data["SecurityGroupIds"] == [default["GroupId"]]
    assert data["BlockDeviceMappings"][0]["DeviceName"] == "/dev/xvda"
    assert data["ImageId"] == "ami-0aaaaaaaaaaaaaaa5"
    (group,) = aws_rig.aws.groups.groups.values()
    assert group.subnets == [subnet["SubnetId"]]
    assert group.types == ["m5.large", "t3.small", "t3a.small"]
    distribution = group.policy["InstancesDistribution"]
    assert distribution["SpotAllocationStrategy"] == "price-capacity-optimized"
    assert distribution["SpotMaxPrice"] == "0.25"


def test_of_several_images_the_newest_of_this_owner(aws_rig: AwsRig) -> None:
    wanted = task(aws_rig, image="ubuntu@099720109477:x86_64:ubuntu/images/*noble*")
    launch(aws_rig, wanted)
    assert template(aws_rig, wanted)["ImageId"] == "ami-0aaaaaaaaaaaaaaa1"
    with pytest.raises(NotFound, match="has no image"):
        launch(aws_rig, task(aws_rig, image="x@136693071363:x86_64:ubuntu/images/*noble*"))


def test_the_group_is_never_balanced_and_has_an_end(aws_rig: AwsRig) -> None:
    launch(aws_rig)
    (group,) = aws_rig.aws.groups.groups.values()
    assert group.suspended == ["AZRebalance"]
    assert group.schedule["deadline"]["StartTime"] == SOON
    assert group.schedule["deadline"]["MaxSize"] == 0


# What can't be had


def test_every_mistake_is_told_before_anything_is_sent(aws_rig: AwsRig) -> None:
    wanted = replace(
        task(aws_rig, types=("huge",), ssh_key="no key", options={"kubernetes-namespace": "x"}),
        tags={"two words": "x"},
        program=Program(sha256="1", index="https://me:secret@x/"),
    )
    before = len(aws_rig.aws.app.calls)
    with pytest.raises(ConfigurationError) as caught:
        aws_rig.cloud.plan(wanted)
    told = "\n".join(caught.value.mistakes)
    for part in ("huge", "--cloud-ssh-private", "kubernetes-namespace", "two words", "credentials"):
        assert part in told
    assert len(aws_rig.aws.app.calls) == before


def test_a_script_that_is_too_long(aws_rig: AwsRig) -> None:
    program = Program(sha256="1", index=f"https://x/{'y' * 16384}")
    with pytest.raises(ConfigurationError, match="16384 are allowed"):
        aws_rig.cloud.plan(replace(task(aws_rig), program=program))


@pytest.mark.parametrize(
    ("machine", "error"),
    [
        ({"types": ("m99.large",)}, NoCapacity),
        ({"image": "ami-0123456789abcdef0"}, RunnerError),
        ({"image": "ami-0aaaaaaaaaaaaaaa2"}, ConfigurationError),  # for ARM
        ({"options": {"aws-subnet": "subnet-0123456789abcdef0"}}, NotFound),
        ({"options": {"aws-security-group": "nobody's"}}, NotFound),
    ],
)
def test_what_isnt_there_is_found_out_before_anything_is_made(
    aws_rig: AwsRig, machine: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        launch(aws_rig, task(aws_rig, **machine))
    assert aws_rig.aws.left() == []
    assert aws_rig.cloud.tasks() == []
    assert "PutObject" not in [one.action for one in aws_rig.aws.app.calls]


# Capacity


def test_zone_after_zone_until_one_has_a_machine(aws_rig: AwsRig) -> None:
    zones = aws_rig.aws.zones("us-west-2")
    aws_rig.aws.instances.hinder = lambda zone, type_, _: (
        "" if (zone, type_) == (zones[-1], "m6i.2xlarge") else "InsufficientInstanceCapacity"
    )
    launch(aws_rig)
    assert market(aws_rig) == [(zones[-1], "m6i.2xlarge", True)]


def test_every_attempt_is_told(aws_rig: AwsRig, caplog: pytest.LogCaptureFixture) -> None:
    aws_rig.aws.instances.hinder = lambda *_: "InsufficientInstanceCapacity"
    with pytest.raises(NoCapacity, match="InsufficientInstanceCapacity"):
        launch(aws_rig)
    assert aws_rig.aws.left() == []
    for zone in aws_rig.aws.zones("us-west-2"):
        assert f"{zone} m7i.2xlarge spot: There is no capacity" in caplog.text


def test_several_machines_from_several_zones(aws_rig: AwsRig) -> None:
    rooms = dict.fromkeys(aws_rig.aws.zones("us-west-2"), 2)

    def hinder(zone: str, _type: str, _spot: bool) -> str:
        rooms[zone] -= 1
        return "InsufficientInstanceCapacity" if rooms[zone] < 0 else ""

    aws_rig.aws.instances.hinder = hinder
    launch(aws_rig, replace(task(aws_rig), count=5))
    assert len(market(aws_rig)) == 5
    assert len({zone for zone, *_ in market(aws_rig)}) == 3


def test_a_quota_is_not_tried_in_other_zones(aws_rig: AwsRig) -> None:
    aws_rig.aws.instances.hinder = lambda *_: "VcpuLimitExceeded"
    with pytest.raises(NoCapacity, match="VcpuLimitExceeded"):
        launch(aws_rig)
    actions = [one.action for one in aws_rig.aws.app.calls]
    assert actions.count("LaunchInstances") == 1
    assert aws_rig.aws.left() == []


def test_fifty_machines_cost_no_more_calls_than_one(aws_rig: AwsRig) -> None:
    def calls(count: int) -> list[str]:
        before = len(aws_rig.aws.app.calls)
        launch(aws_rig, replace(task(aws_rig), count=count))
        return sorted(one.action for one in aws_rig.aws.app.calls[before:])

    calls(1)  # the first one puts the program there
    assert calls(1) == calls(50)


def test_what_hinders_the_group_later_is_told(aws_rig: AwsRig) -> None:
    plan = launch(aws_rig)
    aws_rig.aws.instances.hinder = lambda *_: "VcpuLimitExceeded"
    (machine,) = aws_rig.running(plan)
    aws_rig.aws.instances.powered_off(machine)
    until(lambda: "quota" in {one.kind for one in plan.group.events()}, "the event", 10)
    assert "error" in {one.kind for one in plan.group.events()}  # it ended by itself


# Faults


def test_throttling_is_waited_for(aws_rig: AwsRig) -> None:
    for action in ("ec2:CreateLaunchTemplate", "autoscaling:CreateAutoScalingGroup"):
        aws_rig.aws.fail(action, "RequestLimitExceeded", times=2)
    launch(aws_rig)
    assert len(market(aws_rig)) == 1


def test_an_answer_that_is_lost_launches_nothing_twice(aws_rig: AwsRig) -> None:
    aws_rig.aws.fail("autoscaling:LaunchInstances", LOST)
    launch(aws_rig)
    assert len(market(aws_rig)) == 1


def test_expired_credentials_in_the_middle(aws_rig: AwsRig) -> None:
    principal = aws_rig.aws.app.principals[aws_rig.aws.admin["id"]]

    def expire(*_: object) -> str:
        principal.expired = True
        return "InsufficientInstanceCapacity"

    aws_rig.aws.instances.hinder = expire
    with pytest.raises(CleanupFailed, match="xpired") as caught:
        launch(aws_rig)
    assert isinstance(caught.value.__context__, CredentialsError)
    principal.expired = False
    (lease,) = aws_rig.cloud.tasks()
    steps.delete(aws_rig.cloud.plan(Task(id=lease.id)).resources)
    assert aws_rig.aws.left() == []


def test_no_credentials_at_all(aws_rig: AwsRig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert aws_rig
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    with pytest.raises(CredentialsError, match="AWS_ACCESS_KEY_ID"):
        Cloud("us-west").tasks()


def test_without_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("boto3", "botocore"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"pip install .*\[aws\]'"):
        Cloud("us-west").tasks()
    assert Cloud("us-west").permissions()  # takes nothing


def test_a_bucket_that_is_somebody_elses_gets_nothing(aws_rig: AwsRig) -> None:
    aws_rig.aws.owners[f"cml-runner-{ACCOUNT}-us-west-2"] = "210987654321"
    with pytest.raises(CredentialsError):
        launch(aws_rig)
    assert aws_rig.aws.left() == []
    written = [one for one in aws_rig.aws.app.calls if one.action == "PutObject"]
    assert all(one.error for one in written)


def test_of_two_launches_of_one_name_one_wins(aws_rig: AwsRig) -> None:
    wanted = task(aws_rig)
    launch(aws_rig, wanted)
    plan = Cloud("us-west").plan(wanted)
    with pytest.raises(AlreadyExists):
        steps.create(plan.resources, claim=plan.bucket)
    assert len(market(aws_rig)) == 1


def test_records_of_an_older_task_of_this_name_go(aws_rig: AwsRig) -> None:
    wanted = task(aws_rig)
    store = aws_rig.cloud.plan(wanted).bucket.store
    store.write("status-000.json", b"{}")
    store.write("settings.json", b"old")
    launch(aws_rig, wanted)
    assert store.keys("") == ["settings.json"]
    assert store.read("settings.json") == b"{}"


# Rights


def least(rig: AwsRig, monkeypatch: pytest.MonkeyPatch, without: str = "") -> None:
    """Be somebody who may do what our own policy says, less one thing."""
    policy = json.loads(json.dumps(Cloud("us-west").permissions()))
    for statement in policy["Statement"]:
        statement["Action"] = [one for one in statement["Action"] if one != without]
    keys = rig.aws.add_user(policy)
    for name, value in rig.aws.environment(keys).items():
        monkeypatch.setenv(name, value)


def needed(rig: AwsRig) -> list[str]:
    """List what our policy allows."""
    assert rig
    parts = Cloud("us-west").permissions()["Statement"]
    return sorted({one for part in parts for one in part["Action"]})


def launch_and_delete(rig: AwsRig) -> None:
    steps.delete(launch(rig).resources)


ONLY_AT_TIMES = {
    "ec2:DescribeSpotPriceHistory",  # prices
    "pricing:GetProducts",
    "autoscaling:DeleteScheduledAction",  # expire(None)
    "autoscaling:DescribeScalingActivities",  # while waiting
    "autoscaling:UpdateAutoScalingGroup",  # resize()
    "ec2:AuthorizeSecurityGroupIngress",  # --cloud-ssh-private
    "ec2:CreateSecurityGroup",
    "ec2:DeleteKeyPair",
    "ec2:DescribeKeyPairs",
    "ec2:DescribeImages",  # other images than the default
    "ec2:DescribeInstances",
    "ec2:GetConsoleOutput",
    "ec2:ImportKeyPair",
    "s3:GetObject",
    "ssm:ResumeSession",  # shell()
    "ssm:StartSession",
    "ssm:TerminateSession",
}


def test_the_least_policy_suffices(aws_rig: AwsRig, monkeypatch: pytest.MonkeyPatch) -> None:
    least(aws_rig, monkeypatch)
    plan = launch(aws_rig)
    (lease,) = Cloud("us-west").tasks()
    assert plan.group.instances()
    assert plan.group.events()
    plan.group.interrupt("", 100)
    assert plan.group.console() == ""
    plan.group.expire(None)
    steps.delete(Cloud("us-west").plan(Task(id=lease.id)).resources)
    assert aws_rig.aws.left() == []
    assert [one.action for one in aws_rig.aws.app.calls if "Unauthorized" in one.error] == []


def test_each_right_is_needed_and_named_when_it_is_missing(
    aws_rig: AwsRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for action in sorted(set(needed(aws_rig)) - ONLY_AT_TIMES):
        with monkeypatch.context() as patch:
            least(aws_rig, patch, without=action)
            with pytest.raises(RunnerError) as caught:
                launch_and_delete(aws_rig)
            assert isinstance(caught.value, CredentialsError | CleanupFailed), action
            assert action.rpartition(":")[2] in str(caught.value), action
        for lease in aws_rig.cloud.tasks():
            steps.delete(aws_rig.cloud.plan(Task(id=lease.id)).resources)
        assert aws_rig.aws.left() == [], action


def test_a_machine_may_only_touch_what_is_ours(aws_rig: AwsRig) -> None:
    plan = launch(aws_rig)
    (machine,) = aws_rig.running(plan)
    with aws_rig.on(machine):
        session = Session("us-west-2")
        for service, operation, arguments in (
            ("ec2", "describe_instances", {}),
            ("ec2", "terminate_instances", {"InstanceIds": [machine]}),
            ("iam", "list_roles", {}),
            ("autoscaling", "delete_auto_scaling_group", {"AutoScalingGroupName": "theirs"}),
            ("s3", "get_object", {"Bucket": "theirs", "Key": "x"}),
        ):
            with pytest.raises((CredentialsError, NotFound)):
                session.call(service, operation, **arguments)


def test_a_machine_trusts_no_bucket_of_another_account_whatever_its_name(aws_rig: AwsRig) -> None:
    plan = launch(aws_rig)
    (machine,) = aws_rig.running(plan)
    theirs = f"cml-runner-{ACCOUNT}-eu-west-1"
    aws_rig.aws.owners[theirs] = "210987654321"
    with aws_rig.on(machine):
        session = Session("us-west-2")
        for operation, arguments in (
            ("get_object", {"Key": "programs/x.whl"}),
            ("get_object", {"Key": "tasks/x/settings.json"}),
            ("put_object", {"Key": "tasks/x/log", "Body": b""}),
            ("delete_object", {"Key": "leases/x.json"}),
            ("list_objects_v2", {}),
        ):
            with pytest.raises(CredentialsError):
                session.call("s3", operation, Bucket=theirs, **arguments)


def test_an_account_that_nobody_has_set_up(
    aws_rig: AwsRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = Cloud("us-east")
    with monkeypatch.context() as patch:
        keys = aws_rig.aws.add_user(account.launcher_policy("*", "us-east-1"))
        for name, value in aws_rig.aws.environment(keys).items():
            patch.setenv(name, value)
        plan = cloud.plan(task(aws_rig))
        with pytest.raises(CredentialsError, match="cml-runner setup aws --cloud-region us-east-1"):
            steps.create(plan.resources, claim=plan.bucket)
    assert aws_rig.aws.left("us-east-1") == []
    plan = Cloud("us-east").plan(task(aws_rig))  # by whoever may
    steps.create(plan.resources, claim=plan.bucket)
    assert Cloud("us-east").setup() == []


def test_setting_up_twice_changes_nothing(aws_rig: AwsRig) -> None:
    assert aws_rig.cloud.setup() == []
    policy = aws_rig.aws.bucket_policies[f"cml-runner-{ACCOUNT}-us-west-2"]
    assert policy["Statement"][0]["Effect"] == "Deny"


@pytest.mark.parametrize("policy", [account.launcher_policy, account.machine_policy])
def test_policies_name_what_exists(policy: Callable[..., dict[str, Any]]) -> None:
    """Compare with the descriptions of the services, where an action is an operation."""
    import boto3

    arguments = ("1", "us-west-2") if policy is account.launcher_policy else ("1",)
    for statement in policy(*arguments)["Statement"]:
        for action in statement["Action"]:
            service, _, name = action.partition(":")
            if action in sessions.AGENT:
                continue  # of an API that no SDK has
            client = boto3.client(
                service, region_name="us-west-2", aws_access_key_id="-", aws_secret_access_key="-"
            )
            names = set(client.meta.service_model.operation_names)
            assert name in names | {"ListBucket", "PassRole"}, action


# Ends


def test_a_machine_without_settings_ends_its_group(aws_rig: AwsRig) -> None:
    from cml_runner import supervise

    plan = launch(aws_rig)
    plan.bucket.store.delete("settings.json")
    (machine,) = aws_rig.running(plan)
    script = aws_rig.aws.instances.lives[machine].instance.user_data
    url = next(word for word in script.split("'") if word.startswith("s3://"))
    with aws_rig.on(machine), pytest.raises(NotFound, match="this task is over"):
        supervise.run(url)
    until(lambda: aws_rig.aws.left() == [], "all to go", 10)
    assert aws_rig.cloud.tasks() == []


def test_a_machine_whose_bucket_is_gone_ends_its_group(aws_rig: AwsRig) -> None:
    plan = launch(aws_rig)
    session = Session("us-west-2")
    for key in (*aws_rig.aws.objects(), *aws_rig.aws.programs()):
        session.call("s3", "delete_object", Bucket=account.Shared(session).bucket, Key=key)
    session.call("s3", "delete_bucket", Bucket=account.Shared(session).bucket)
    (machine,) = aws_rig.running(plan)
    aws_rig.leave(plan, machine)
    until(lambda: aws_rig.aws.left() == [], "all to go", 30)


def test_before_it_can_speak_a_machine_has_its_console(aws_rig: AwsRig) -> None:
    wanted = task(aws_rig)
    plan = launch(aws_rig, wanted)
    (machine,) = aws_rig.running(plan)
    aws_rig.aws.instances.lives[machine].console = "Booting\nStill booting\n"
    found = inventory.find(str(wanted.id), "aws", "us-west-2")
    assert list(inventory.logs(found, follow=False)) == [(0, "Booting\nStill booting\n")]


def test_leaving_goes_on_until_it_is_done(aws_rig: AwsRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "PAUSES", (0.01,))
    plan = launch(aws_rig)
    for action in ("autoscaling:DeleteAutoScalingGroup", "ec2:DeleteLaunchTemplate"):
        aws_rig.aws.fail(action, "InternalFailure", times=7, status=500)
    (machine,) = aws_rig.running(plan)
    aws_rig.leave(plan, machine)
    until(lambda: aws_rig.aws.left() == [], "all to go", 30)


def test_a_machine_that_may_be_anothers_goes_on_looking(
    aws_rig: AwsRig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan, other = launch(aws_rig), launch(aws_rig)
    (machine,) = aws_rig.running(plan)

    def give_up(_: float) -> None:
        raise InterruptedError

    monkeypatch.setattr(wait, "insist", partial(wait.insist, sleep=give_up))
    identifier, url = other.bucket.task.id, other.bucket.store.url  # type: ignore[attr-defined]
    with aws_rig.on(machine), pytest.raises(InterruptedError):
        Cloud("us-west-2").leave(identifier, url, last=True)
    assert f"isn't one of {identifier}" in caplog.text
    assert len(aws_rig.cloud.tasks()) == 2


def test_a_rebalance_recommendation_is_no_deadline(aws_rig: AwsRig) -> None:
    plan = launch(aws_rig)
    (machine,) = aws_rig.running(plan)
    aws_rig.aws.instances.lives[machine].rebalance = "2026-11-01T00:00:00Z"
    notice = aws_rig.notice(plan, machine)
    assert notice
    assert notice.deadline is None
    aws_rig.aws.instances.interrupt(machine, after=100)
    notice = aws_rig.notice(plan, machine)
    assert notice
    assert notice.deadline


# The far side


class Checked(Session):
    """Compares every answer with what the service's own description says of it."""

    def _new(self, service: str) -> Any:
        client = super()._new(service)
        client.meta.events.register("after-call", self.check)
        return client

    @staticmethod
    def check(parsed: dict[str, Any], model: Any, **_: Any) -> None:
        from botocore.validate import ParamValidator

        decoded = model.service_model.service_name == "iam"  # policies are objects already
        if model.output_shape and "Error" not in parsed and not decoded:
            answer = {key: value for key, value in parsed.items() if key != "ResponseMetadata"}
            if streamed := model.get_streaming_output():
                answer.pop(streamed.name, None)
            report = ParamValidator().validate(answer, model.output_shape)
            assert not report.has_errors(), f"{model.name}: {report.generate_report()}"


def test_what_the_fake_answers_is_as_described(aws_rig: AwsRig) -> None:
    cloud = Cloud("us-west")
    cloud._session = Checked("us-west-2")
    cloud.setup()
    plan = cloud.plan(task(aws_rig, image="ubuntu@099720109477:x86_64:ubuntu/images/*noble*"))
    steps.create(plan.resources, claim=plan.bucket)
    plan.group.resize(1)
    plan.group.expire(SOON)
    assert plan.group.instances()
    plan.group.interrupt("", 100)
    plan.group.console()
    assert plan.group.events()
    plan.group.expire(None)
    steps.delete(plan.resources)
