"""AWS, as a launcher and its machines see it, in this process.

moto keeps EC2's, IAM's and S3's books; Auto Scaling, the life of instances, their metadata service,
rights and faults are ours. What requests and answers look like is read from the vendor's own
description, which botocore carries.

    with AWS() as aws:
        os.environ.update(aws.environment())     # boto3 and obstore speak to it now
        aws.instances.interrupt("i-…", after=5)  # a spot interruption
        aws.fail("autoscaling:LaunchInstances", "Throttling")
        aws.left()                               # what costs money or is secret

One at a time: moto's books are the process's.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.lab.aws.autoscaling import AutoScaling
from tests.lab.aws.front import Fault, Front, Principal
from tests.lab.aws.imds import Metadata
from tests.lab.aws.instances import ACCOUNT, Instances, Nobody
from tests.lab.aws.oracle import Oracle
from tests.lab.aws.sessions import Sessions

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.aws.instances import Machines
    from tests.lab.aws.wire import Call

REGION = "us-west-2"
# moto reads these when it is imported.
VALIDATION = {
    "MOTO_AMIS_PATH": str(Path(__file__).with_name("amis.json")),
    "MOTO_ENABLE_AMI_VALIDATION": "1",
    "MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION": "1",
}


class AWS:
    """One account."""

    def __init__(self, machines: Machines | None = None) -> None:
        os.environ.update(VALIDATION)
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._moto = DomainDispatcherApplication(create_backend_app)
        self.instances = Instances(self._client, machines or Nobody())
        self.groups = AutoScaling(self.instances)
        self.sessions = Sessions(self.instances, self._policies)
        self.app = Front(self, self._moto)
        self.oracle = Oracle(self)
        self.owners: dict[str, str] = {}  # of buckets that are somebody else's
        self.bucket_policies: dict[str, Any] = {}
        self.missing: set[tuple[str, str]] = set()  # types that a zone hasn't got
        self._keys: dict[str, dict[str, str]] = {}  # of profiles
        self._servers: list[Any] = []

    def __enter__(self) -> AWS:
        from moto.iam import models
        from moto.moto_api._internal.models import moto_api_backend

        models.SERVICE_NAME_CONVERSION["spot"] = "EC2Spot"

        moto_api_backend.reset()
        self.raw = self.serve(self._moto)
        self.url = self.serve(self.app)
        self.admin = self.add_user()
        self._lead_out()
        self.groups.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.groups.stop()
        self.instances.stop()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _lead_out(self) -> None:
        """Give default networks their gateway to the internet, as AWS does and moto doesn't."""
        for region in (REGION, "us-east-1"):
            ec2 = self._client("ec2", region)
            (table,) = ec2.describe_route_tables()["RouteTables"]
            gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
            ec2.attach_internet_gateway(InternetGatewayId=gateway, VpcId=table["VpcId"])
            everywhere = {"DestinationCidrBlock": "0.0.0.0/0", "GatewayId": gateway}
            ec2.create_route(RouteTableId=table["RouteTableId"], **everywhere)

    def environment(self, keys: dict[str, str] | None = None) -> dict[str, str]:
        """Name the variables with which the SDKs speak to this."""
        found = keys or self.admin
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": found["id"],
            "AWS_SECRET_ACCESS_KEY": found["secret"],
            "AWS_SESSION_TOKEN": found["token"],
        }

    def add_user(self, policy: dict[str, Any] | None = None) -> dict[str, str]:
        """Make a key for somebody who may do this much; everything by default."""
        keys = _new_keys()
        arn = f"arn:aws:iam::{ACCOUNT}:user/user-{len(self.app.principals)}"
        self.app.principals[keys["id"]] = Principal(arn, (lambda: [policy]) if policy else None)
        return keys

    def fail(self, action: str, code: str, message: str = "", **more: Any) -> Fault:
        """Answer the next call of this action, or more of them, with an error."""
        fault = Fault(action, code, message or f"the fake says {code}", **more)
        self.app.faults.append(fault)
        return fault

    def metadata(self, name: str, *, first: bool = False) -> Metadata:
        """Serve an instance's metadata; with `first`, to those who know but IMDSv1, too."""
        return Metadata(self.instances, name, self._login, first)

    def zones(self, region: str) -> list[str]:
        """Name a region's zones."""
        found = self._client("ec2", region).describe_availability_zones()["AvailabilityZones"]
        return [one["ZoneName"] for one in found]

    def offered(self, type_: str, zone: str) -> bool:
        """Say if there are machines of a type in a zone."""
        return type_ in self._types and (type_, zone) not in self.missing

    def role_of(self, region: str, template: str) -> str:
        """Name the role that a template's machines have."""
        profile = self.instances.template(region, template).get("IamInstanceProfile", {})
        name = profile.get("Name") or profile.get("Arn", "").rpartition("/")[2]
        return self._role(name)

    def tags_of(self, call: Call) -> dict[str, str]:
        """Read the tags of the launch template or key pair which a call is about."""
        things = self.named(call)
        return {one["Key"]: one["Value"] for thing in things for one in thing.get("Tags", [])}

    def named(self, call: Call) -> list[dict[str, Any]]:
        """Find the launch template or key pair which a call is about."""
        client = self._client("ec2", call.region)
        if template := call.form.get("LaunchTemplateName"):
            filters = [{"Name": "launch-template-name", "Values": [template]}]
            found = client.describe_launch_templates(Filters=filters)["LaunchTemplates"]
        else:
            filters = [{"Name": "key-name", "Values": [call.form["KeyName"]]}]
            found = client.describe_key_pairs(Filters=filters)["KeyPairs"]
        return list(found)

    def left(self, region: str = REGION) -> list[str]:
        """List what costs money, or is secret."""
        ec2 = self._client("ec2", region)
        lives = [one for one in self.instances.lives.values() if one.instance.region == region]
        found = [f"instance {life.instance.id}" for life in lives if not life.ended]
        found += [
            f"volume {one['VolumeId']}"
            for one in ec2.describe_volumes()["Volumes"]
            if one["State"] != "deleted"
        ]
        found += [
            f"template {one['LaunchTemplateName']}"
            for one in ec2.describe_launch_templates()["LaunchTemplates"]
        ]
        found += [f"key {one['KeyName']}" for one in ec2.describe_key_pairs()["KeyPairs"]]
        found += [f"group {name}" for place, name in self.groups.groups if place == region]
        objects = self.objects(region)
        return found + [f"object {key}" for key in objects if not _record(key)]

    def objects(self, region: str = REGION) -> dict[str, bytes]:
        """Read every object of our bucket but the programs."""
        found = self._objects(region)
        return {key: found[key] for key in found if not key.startswith("programs/")}

    def programs(self, region: str = REGION) -> dict[str, bytes]:
        """Read every program."""
        found = self._objects(region)
        return {key: found[key] for key in found if key.startswith("programs/")}

    def _objects(self, region: str) -> dict[str, bytes]:
        s3 = self._client("s3", region)
        name = f"cml-runner-{ACCOUNT}-{region}"
        if name not in [one["Name"] for one in s3.list_buckets()["Buckets"]]:
            return {}
        keys = [one["Key"] for one in s3.list_objects_v2(Bucket=name).get("Contents", [])]
        found = {}
        for key in keys:
            with suppress(s3.exceptions.NoSuchKey):  # it has just been deleted
                found[key] = s3.get_object(Bucket=name, Key=key)["Body"].read()
        return found

    @cached_property
    def _types(self) -> set[str]:
        """Every type that EC2 has."""
        from tests.lab.aws.wire import _model

        return set(_model("ec2").shape_for("InstanceType").enum)

    def _login(self, profile: str) -> dict[str, str]:
        """Return the keys of a machine with this profile, which may do what its role may."""
        if profile not in self._keys:
            self._keys[profile] = keys = _new_keys()
            arn = f"arn:aws:sts::{ACCOUNT}:assumed-role/{self._role(profile)}/machine"
            self.app.principals[keys["id"]] = Principal(arn, lambda: self._policies(profile))
        return self._keys[profile]

    def _role(self, profile: str) -> str:
        iam = self._client("iam", "us-east-1")
        found = iam.get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Roles"]
        return str(found[0]["RoleName"])

    def _policies(self, profile: str) -> list[dict[str, Any]]:
        iam, role = self._client("iam", "us-east-1"), self._role(profile)
        names = iam.list_role_policies(RoleName=role)["PolicyNames"]
        return [
            iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"] for name in names
        ]

    def _client(self, service: str, region: str) -> Any:
        """Speak to moto directly, past rights and faults."""
        import boto3

        keys = {"aws_access_key_id": "lab", "aws_secret_access_key": "lab"}
        with self._lock:
            if (service, region) not in self._clients:
                self._clients[service, region] = boto3.Session(region_name=region, **keys).client(
                    service, endpoint_url=self.raw
                )
            return self._clients[service, region]

    @cached_property
    def _clients(self) -> dict[tuple[str, str], Any]:
        return {}

    @cached_property
    def _lock(self) -> threading.Lock:
        return threading.Lock()

    def serve(self, app: Callable[..., Any]) -> str:
        """Serve one more application on this computer, until the end; return its address."""
        from werkzeug.serving import WSGIRequestHandler, make_server

        front = self.app

        class Handler(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def date_time_string(self, timestamp: float | None = None) -> str:
                """Tell the time by a clock which may be wrong."""
                return super().date_time_string((timestamp or time.time()) + front.ahead)

            def log(self, *_: object) -> None:
                """Keep quiet."""

        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self._servers.append(server)
        return f"http://127.0.0.1:{server.port}"


def _new_keys() -> dict[str, str]:
    return {
        "id": f"ASIA{secrets.token_hex(8).upper()}",
        "secret": secrets.token_urlsafe(30),
        "token": secrets.token_urlsafe(40),
    }


def _record(key: str) -> bool:
    """Say if it is what may remain of a runner that is over."""
    return key.rpartition("/")[2].startswith(("log-", "status-", "events", "price"))
