"""Tasks that terraform-provider-iterative has left on AWS."""

from __future__ import annotations

from typing import TYPE_CHECKING

import boto3
import pytest

from cml_runner.errors import ConfigurationError
from cml_runner.model import Identifier, Task

if TYPE_CHECKING:
    from typing import Any

    from tests.clouds.aws_rig import AwsRig
    from tests.conftest import Cli

OLD = Identifier.fixed("test", prefix="tpi")
HERE = ("--cloud", "aws", "--cloud-region", "us-west")


def client(service: str, region: str = "us-west-2") -> Any:
    return boto3.Session(region_name=region).client(service)


def make(identifier: Identifier = OLD, region: str = "us-west-2") -> None:
    """Do what that program does, as far as it matters here."""
    name, ec2, s3 = str(identifier), client("ec2", region), client("s3", region)
    s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": region})
    s3.put_object(Bucket=name, Key="data/result.txt", Body=b"result")
    s3.put_object(Bucket=name, Key="reports/task-1", Body=b"log")
    network = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    ec2.create_security_group(GroupName=name, Description=name, VpcId=network)
    ec2.create_key_pair(KeyName=name)
    template = {"ImageId": "ami-0aaaaaaaaaaaaaaa1", "InstanceType": "m5.2xlarge"}
    ec2.create_launch_template(LaunchTemplateName=name, LaunchTemplateData=template)
    subnets = [one["SubnetId"] for one in ec2.describe_subnets()["Subnets"]]
    client("autoscaling", region).create_auto_scaling_group(
        AutoScalingGroupName=name,
        MinSize=0,
        MaxSize=1,
        DesiredCapacity=0,
        VPCZoneIdentifier=",".join(subnets),
        MixedInstancesPolicy={
            "LaunchTemplate": {
                "LaunchTemplateSpecification": {
                    "LaunchTemplateName": name,
                    "Version": "$Latest",
                },
                "Overrides": [{"InstanceType": "m5.2xlarge"}],
            },
            "InstancesDistribution": {
                "OnDemandBaseCapacity": 0,
                "OnDemandPercentageAboveBaseCapacity": 100,
            },
        },
    )


def test_the_identifier_is_that_programs() -> None:
    assert str(OLD) == "tpi-test-3z4xlzwq-3u0vweb4"


def test_they_are_listed_and_deleted(aws_rig: AwsRig, cli: Cli) -> None:
    environment = aws_rig.aws.environment()
    make()
    make(Identifier.fixed("elsewhere", prefix="tpi"), "eu-west-1")
    client("s3").create_bucket(
        Bucket="tpi-somebody-elses-bucket",
        CreateBucketConfiguration={"LocationConstraint": "us-west-2"},
    )
    (row,) = cli.run("task", "list", *HERE, "--output", "json", environment=environment).json
    assert (row["id"], row["name"], row["status"]) == (str(OLD), "test", {"stopped": 1})
    assert cli.run("list", *HERE, "--output", "json", environment=environment).json == []
    gc = ("gc", *HERE, "--older-than", "0.001", "--output", "json")
    assert cli.run(*gc, environment=environment).json["found"] == []
    destroy = ("task", "destroy", str(OLD), *HERE)
    done = cli.run(*destroy, environment=environment, code=2)
    assert f"s3://{OLD}/data" in done.err
    cli.run(*destroy, "--no-pull", environment=environment)
    assert aws_rig.aws.left() == []
    names = {one["Name"] for one in client("s3").list_buckets()["Buckets"]}
    assert str(OLD) not in names
    assert "tpi-somebody-elses-bucket" in names
    filters = [{"Name": "group-name", "Values": [str(OLD)]}]
    assert client("ec2").describe_security_groups(Filters=filters)["SecurityGroups"] == []
    assert cli.run("task", "list", *HERE, "--output", "json", environment=environment).json == []


def test_who_may_not_list_buckets_sees_none(aws_rig: AwsRig, cli: Cli) -> None:
    make()
    environment = aws_rig.aws.environment(aws_rig.aws.add_user(dict(aws_rig.cloud.permissions())))
    done = cli.run("task", "list", *HERE, "--output", "json", environment=environment)
    assert (done.json, done.err) == ([], "")


def test_there_will_be_no_new_ones(aws_rig: AwsRig) -> None:
    with pytest.raises(ConfigurationError, match="only be deleted"):
        aws_rig.cloud.plan(Task(id=OLD)).bucket.create()
