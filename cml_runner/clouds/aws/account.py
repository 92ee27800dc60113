"""What all tasks of an account and region share, and what permissions they need.

The pieces are made once and never deleted by us; making them again changes nothing:

    security group cml-runner            lets nothing in
    role and instance profile cml-runner may touch our bucket and our groups, and nothing else
    bucket cml-runner-ACCOUNT-REGION     private, encrypted, forgets everything after 30 days

The bucket is made last, so that its existence stands for all of them.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cml_runner.boot.aws import TAG
from cml_runner.boot.objects import PROGRAMS
from cml_runner.errors import AlreadyExists, CredentialsError, NotFound
from cml_runner.leases import LEASES, TASKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.clouds.aws.session import Account, Session

log = logging.getLogger(__name__)

SECURITY_GROUP = ROLE = "cml-runner"
OURS = "cml-*"  # all identifiers of runners
KEPT = 30  # days
PROGRAMS_KEPT = 60  # days; a launch puts its program again at half of that
VERSION = "2012-10-17"


def bucket(account: Account, region: str) -> str:
    """Name the bucket."""
    return f"cml-runner-{account.id}-{region}"


class Shared:
    """The shared pieces of one account and region."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def setup(self, network: str = "") -> list[str]:
        """Make what is missing, for the default VPC unless another is named; say what is new.

        Raises CredentialsError if we may not, with all that there should be.
        """
        new: list[str] = []
        steps: list[tuple[str, Callable[[], bool]]] = [
            ("service-linked roles", self._service_roles),
            (f"role {ROLE}", self._role),
            (f"instance profile {ROLE}", self._profile),
            (f"security group {SECURITY_GROUP}", lambda: self._security_group(network)),
            (f"bucket {self.bucket}", self._bucket),
        ]
        for label, make in steps:
            try:
                if make():
                    log.info("made %s", label)
                    new.append(label)
            except CredentialsError as error:
                msg = (
                    f"this account isn't set up for {self._session.region}: {label} is missing,"
                    f" and we may not make it: {error}\nAsk somebody who may to run:"
                    f" cml-runner setup aws --cloud-region {self._session.region}"
                )
                raise CredentialsError(msg) from error
        return new

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return bucket(self._session.account, self._session.region)

    @staticmethod
    def ssh(address: str) -> str:
        """Name the security group that lets one address in, to port 22."""
        return f"{SECURITY_GROUP}-ssh-{address.replace('.', '-').replace(':', '-')}"

    def open_ssh(self, network: str, address: str) -> None:
        """Make that security group; only machines with a key pair belong to it."""
        group = self._new_group(self.ssh(address), f"port 22 from {address}", network)
        if not group:
            return
        version = 6 if ":" in address else 4
        key, name, length = {4: ("IpRanges", "CidrIp", 32), 6: ("Ipv6Ranges", "CidrIpv6", 128)}[
            version
        ]
        source = {key: [{name: f"{address}/{length}", "Description": "cml-runner"}]}
        rule = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, **source}
        self._session.make(
            "ec2", "authorize_security_group_ingress", GroupId=group, IpPermissions=[rule]
        )

    def _service_roles(self) -> bool:
        """Have AWS make its own roles now, so that a launcher doesn't need the right to."""
        new = False
        for service in ("autoscaling.amazonaws.com", "spot.amazonaws.com"):
            with suppress(AlreadyExists):
                self._session.call("iam", "create_service_linked_role", AWSServiceName=service)
                new = True
        return new

    def _role(self) -> bool:
        trust = {
            "Effect": "Allow",
            "Principal": {"Service": "ec2.amazonaws.com"},
            "Action": "sts:AssumeRole",
        }
        new = self._session.make(
            "iam",
            "create_role",
            RoleName=ROLE,
            AssumeRolePolicyDocument=_document(trust),
            Description="What a machine of cml-runner may do",
        )
        policy = json.dumps(
            machine_policy(self._session.account.id, self._session.account.partition)
        )
        self._session.call(
            "iam", "put_role_policy", RoleName=ROLE, PolicyName=ROLE, PolicyDocument=policy
        )
        return new

    def _profile(self) -> bool:
        new = self._session.make("iam", "create_instance_profile", InstanceProfileName=ROLE)
        found = self._session.call("iam", "get_instance_profile", InstanceProfileName=ROLE)
        if not found["InstanceProfile"]["Roles"]:
            self._session.call(
                "iam", "add_role_to_instance_profile", InstanceProfileName=ROLE, RoleName=ROLE
            )
        return new

    def _security_group(self, network: str) -> bool:
        network = network or self._default_network()
        return bool(network and self._new_group(SECURITY_GROUP, "nothing comes in", network))

    def _new_group(self, name: str, description: str, network: str) -> str:
        """Make one that lets nothing in; return nothing if it is there."""
        tags = [{"Key": "Name", "Value": name}, {"Key": "cml-runner", "Value": "shared"}]
        try:
            found = self._session.call(
                "ec2",
                "create_security_group",
                GroupName=name,
                Description=f"cml-runner: {description}",
                VpcId=network,
                TagSpecifications=[{"ResourceType": "security-group", "Tags": tags}],
            )
        except AlreadyExists:
            return ""
        return str(found["GroupId"])

    def _default_network(self) -> str:
        filters = [{"Name": "is-default", "Values": ["true"]}]
        found = self._session.pages("ec2", "describe_vpcs", "Vpcs", Filters=filters)
        if not found:
            log.info("no default VPC: each launch needs --cloud-aws-subnet")
        return str(found[0]["VpcId"]) if found else ""

    def _bucket(self) -> bool:
        new = not self._has_bucket()
        if new:
            # The oldest region has no name here.
            region = self._session.region
            place = {} if region == "us-east-1" else {"LocationConstraint": region}
            self._session.call(
                "s3",
                "create_bucket",
                Bucket=self.bucket,
                ObjectOwnership="BucketOwnerEnforced",
                **({"CreateBucketConfiguration": place} if place else {}),
            )
        self._configure()
        return new

    def _has_bucket(self) -> bool:
        """Look for it. Raises CredentialsError if it is somebody else's."""
        owner = self._session.account.id
        try:
            self._session.call("s3", "head_bucket", Bucket=self.bucket, ExpectedBucketOwner=owner)
        except NotFound:
            return False
        return True

    def _configure(self) -> None:
        """Close the bucket to the world, and have it forget."""
        mine = {"Bucket": self.bucket, "ExpectedBucketOwner": self._session.account.id}
        blocked = dict.fromkeys(
            (
                *("BlockPublicAcls", "IgnorePublicAcls"),
                *("BlockPublicPolicy", "RestrictPublicBuckets"),
            ),
            True,
        )
        encrypted = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
        rules = [
            {
                "ID": name,
                "Status": "Enabled",
                "Filter": {"Prefix": f"{prefix}/"},
                "Expiration": {"Days": days},
                "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
            }
            for name, prefix, days in (
                ("last-net", TASKS, KEPT),
                (PROGRAMS, PROGRAMS, PROGRAMS_KEPT),
            )
        ]
        arn = f"arn:{self._session.account.partition}:s3:::{self.bucket}"
        plain = {
            "Effect": "Deny",
            "Principal": "*",
            "Action": "s3:*",
            "Resource": [arn, f"{arn}/*"],
            "Condition": {"Bool": {"aws:SecureTransport": "false"}},
        }
        call = self._session.call
        call("s3", "put_public_access_block", PublicAccessBlockConfiguration=blocked, **mine)
        rule = {"Rules": [encrypted]}
        call("s3", "put_bucket_encryption", ServerSideEncryptionConfiguration=rule, **mine)
        call(
            "s3",
            "put_bucket_lifecycle_configuration",
            LifecycleConfiguration={"Rules": rules},
            **mine,
        )
        call("s3", "put_bucket_policy", Policy=_document(plain), **mine)


def machine_policy(account: str, partition: str = "aws") -> dict[str, Any]:
    """Write what a machine may do; the same for all, so tasks of one account trust each other."""
    groups = f"arn:{partition}:autoscaling:*:{account}:autoScalingGroup:*"
    ours = f"arn:{partition}:s3:::cml-runner-{account}-*"
    mine = {"StringEquals": {"s3:ResourceAccount": account}}
    return {
        "Version": VERSION,
        "Statement": [
            {
                "Sid": "Objects",
                "Effect": "Allow",
                "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"],
                "Resource": [f"{ours}/{TASKS}/*", f"{ours}/{LEASES}/*"],
                "Condition": mine,
            },
            {
                "Sid": "Program",
                "Effect": "Allow",
                "Action": ["s3:GetObject"],
                "Resource": f"{ours}/{PROGRAMS}/*",
                "Condition": mine,
            },
            {
                "Sid": "ListObjects",
                "Effect": "Allow",
                "Action": ["s3:ListBucket"],
                "Resource": ours,
                "Condition": mine,
            },
            {
                "Sid": "Leave",
                "Effect": "Allow",
                "Action": [
                    "autoscaling:TerminateInstanceInAutoScalingGroup",
                    "autoscaling:DeleteAutoScalingGroup",
                ],
                "Resource": f"{groups}:autoScalingGroupName/{OURS}",
            },
            {
                "Sid": "Look",
                "Effect": "Allow",
                "Action": ["ec2:DescribeKeyPairs", "ec2:DescribeLaunchTemplates"],
                "Resource": "*",
            },
            {
                "Sid": "LeaveNothing",
                "Effect": "Allow",
                "Action": ["ec2:DeleteLaunchTemplate", "ec2:DeleteKeyPair"],
                "Resource": "*",
                "Condition": {"StringLike": {f"aws:ResourceTag/{TAG}": OURS}},
            },
            {  # the least with which its agent lets in whoever may call StartSession
                "Sid": "Shell",
                "Effect": "Allow",
                "Action": [
                    "ssm:UpdateInstanceInformation",
                    "ssmmessages:CreateControlChannel",
                    "ssmmessages:CreateDataChannel",
                    "ssmmessages:OpenControlChannel",
                    "ssmmessages:OpenDataChannel",
                ],
                "Resource": "*",
            },
        ],
    }


def launcher_policy(account: str, region: str, partition: str = "aws") -> dict[str, Any]:
    """Write the least that a launcher must be allowed, once the account is set up."""
    ec2 = f"arn:{partition}:ec2:{region}:{account}"
    image = f"arn:{partition}:ec2:{region}::image/*"
    groups = f"arn:{partition}:autoscaling:{region}:{account}:autoScalingGroup:*"
    objects = f"arn:{partition}:s3:::cml-runner-{account}-{region}"
    mine = {"StringEquals": {"s3:ResourceAccount": account}} if account != "*" else {}
    requested = {"StringLike": {f"aws:RequestTag/{TAG}": OURS}}
    tagged = {"StringLike": {f"aws:ResourceTag/{TAG}": OURS}}
    documents = [
        f"arn:{partition}:ssm:{region}:{account}:document/SSM-SessionManagerRunShell",
        f"arn:{partition}:ssm:{region}::document/AWS-StartInteractiveCommand",
    ]
    making = [
        *("CreateLaunchTemplate", "ImportKeyPair", "CreateSecurityGroup"),
        *("RunInstances", "CreateFleet"),
    ]
    parts: list[tuple[str, list[str], Any, dict[str, Any]]] = [
        (
            "Look",
            [
                *("ec2:DescribeImages", "ec2:DescribeInstances", "ec2:DescribeSecurityGroups"),
                *("ec2:DescribeInstanceTypeOfferings", "ec2:DescribeSubnets"),
                *("ec2:DescribeKeyPairs", "ec2:DescribeLaunchTemplates"),
                "ec2:DescribeLaunchTemplateVersions",
                *("autoscaling:DescribeAutoScalingGroups", "autoscaling:DescribeScalingActivities"),
            ],
            "*",
            {},
        ),
        ("Prices", ["ec2:DescribeSpotPriceHistory", "pricing:GetProducts"], "*", {}),
        (
            "Images",
            ["ssm:GetParameter"],
            f"arn:{partition}:ssm:{region}::parameter/aws/service/*",
            {},
        ),
        ("Make", ["ec2:CreateLaunchTemplate", "ec2:ImportKeyPair"], "*", requested),
        ("Tag", ["ec2:CreateTags"], f"{ec2}:*/*", {"StringEquals": {"ec2:CreateAction": making}}),
        (
            "Machines",
            ["ec2:RunInstances"],
            [f"{ec2}:*/*", image],
            {"ArnLike": {"ec2:LaunchTemplate": f"{ec2}:launch-template/*"}},
        ),
        # https://docs.aws.amazon.com/autoscaling/ec2/userguide/launch-instances-synchronously.html
        ("Fleet", ["ec2:CreateFleet"], [f"{ec2}:*/*", image], {}),
        ("Interrupt", ["ec2:CreateTags"], f"{ec2}:instance/*", tagged),
        (
            "Shell",
            ["ssm:StartSession"],
            f"{ec2}:instance/*",
            {"StringLike": {f"ssm:resourceTag/{TAG}": OURS}},
        ),
        ("ShellKind", ["ssm:StartSession"], documents, {}),
        (
            "OwnShells",
            ["ssm:TerminateSession", "ssm:ResumeSession"],
            "*",
            {"StringLike": {"ssm:resourceTag/aws:ssmmessages:session-id": "${aws:userid}"}},
        ),
        ("Console", ["ec2:GetConsoleOutput"], f"{ec2}:instance/*", tagged),
        ("Delete", ["ec2:DeleteLaunchTemplate", "ec2:DeleteKeyPair"], "*", tagged),
        (
            "Group",
            [
                f"autoscaling:{action}"
                for action in (
                    *("CreateAutoScalingGroup", "UpdateAutoScalingGroup", "LaunchInstances"),
                    *("DeleteAutoScalingGroup", "SuspendProcesses", "CreateOrUpdateTags"),
                    *("PutScheduledUpdateGroupAction", "DeleteScheduledAction"),
                )
            ],
            f"{groups}:autoScalingGroupName/{OURS}",
            {},
        ),
        (
            "Identity",
            ["iam:PassRole"],
            f"arn:{partition}:iam::{account}:role/{ROLE}",
            {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
        ),
        (
            "Objects",
            ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"],
            [f"{objects}/{TASKS}/*", f"{objects}/{LEASES}/*"],
            mine,
        ),
        ("Program", ["s3:GetObject", "s3:PutObject"], f"{objects}/{PROGRAMS}/*", mine),
        ("ListObjects", ["s3:ListBucket"], objects, mine),
        (
            "Ssh",
            ["ec2:CreateSecurityGroup", "ec2:AuthorizeSecurityGroupIngress"],
            [f"{ec2}:security-group/*", f"{ec2}:vpc/*"],
            {},
        ),
    ]
    return {
        "Version": VERSION,
        "Statement": [
            {
                "Sid": name,
                "Effect": "Allow",
                "Action": actions,
                "Resource": resource,
                **({"Condition": condition} if condition else {}),
            }
            for name, actions, resource, condition in parts
        ],
    }


def doctor_policy() -> dict[str, Any]:
    """Write what `doctor` reads besides; none of it changes anything."""
    return {
        "Sid": "Doctor",
        "Effect": "Allow",
        "Action": [
            *("ec2:DescribeInstanceTypes", "ec2:DescribeRouteTables"),
            *("iam:GetInstanceProfile", "iam:GetRole", "iam:SimulatePrincipalPolicy"),
            "servicequotas:ListServiceQuotas",
        ],
        "Resource": "*",
    }


def _document(*statements: dict[str, Any]) -> str:
    return json.dumps({"Version": VERSION, "Statement": list(statements)})
