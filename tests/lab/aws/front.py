"""What stands before all services: it writes down calls, checks rights, and makes faults."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass, field
from io import BytesIO
from socket import SHUT_RDWR
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from tests.lab.aws import wire
from tests.lab.aws.instances import ACCOUNT
from tests.lab.aws.policies import Request, allowed
from tests.lab.aws.wire import ApiError, Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.lab.aws import AWS

UBUNTU = "/aws/service/canonical/ubuntu/server/24.04/stable/current/{}/hvm/ebs-gp3/ami-id"
NVIDIA = "/aws/service/deeplearning/ami/{}/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
PARAMETERS = {
    UBUNTU.format("amd64"): "ami-0aaaaaaaaaaaaaaa1",
    UBUNTU.format("arm64"): "ami-0aaaaaaaaaaaaaaa2",
    NVIDIA.format("x86_64"): "ami-0aaaaaaaaaaaaaaa4",
}
LOST = "lost"  # the code of a fault: the call is carried out, but its answer never comes


@dataclass
class Fault:
    """An error to answer with, some times, to some action."""

    action: str  # service:Action, * for all
    code: str
    message: str
    times: float = 1
    status: int = 400
    after: int = 0  # calls that go well before

    def strikes(self, call: Call) -> bool:
        """Say if it is this call's turn."""
        if self.action not in ("*", f"{call.service}:{call.action}") or self.times <= 0:
            return False
        if self.after:
            self.after -= 1
            return False
        self.times -= 1
        return True


@dataclass
class Principal:
    """Whose key it is."""

    arn: str
    policies: Callable[[], list[dict[str, Any]]] | None = None  # None: may do everything
    expired: bool = False


@dataclass(frozen=True)
class Entry:
    """One call that was made."""

    service: str
    action: str
    who: str
    began: float
    ended: float
    error: str = ""


@dataclass
class Front:
    """A WSGI application in front of moto's."""

    aws: AWS
    moto: Callable[..., Any]
    latency: float = 0  # seconds that every call takes longer
    ahead: float = 0  # seconds that the clock is
    watch: Callable[[Call], None] = lambda _: None  # is told of every call before it is served
    calls: list[Entry] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    principals: dict[str, Principal] = field(default_factory=dict)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        began = time.monotonic()
        body = _body(environ)
        call = wire.read(environ, body)
        principal = self.principals.get(call.key)
        who, problem = principal.arn if principal else "nobody", ""
        if self.latency:
            time.sleep(self.latency)
        self.watch(call)
        try:
            self._check(call, principal)
            status, headers, content = self._serve(call, environ, body)
            problem = "" if status < "4" else status
        except ApiError as error:
            problem = error.code
            status, content = f"{error.status} Error", wire.refusal(call, error)
            headers = [("Content-Type", "text/xml")]
        self.calls.append(Entry(call.service, call.action, who, began, time.monotonic(), problem))
        if problem == LOST:
            if connection := environ.get("werkzeug.socket"):
                connection.shutdown(SHUT_RDWR)  # or the client would wait for a minute
            raise ConnectionError(LOST)
        headers = [one for one in headers if one[0].lower() not in ("content-length", "date")]
        length = str(len(content)) if environ["REQUEST_METHOD"] != "HEAD" else "0"
        start(status, [*headers, ("Content-Length", length)])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else content]

    def _check(self, call: Call, principal: Principal | None) -> None:
        for fault in self.faults:
            if fault.code != LOST and fault.strikes(call):
                raise ApiError(fault.code, fault.message, fault.status)
        if principal is None:
            code = "InvalidAccessKeyId" if call.service == "s3" else "InvalidClientTokenId"
            raise ApiError(code, "The security token included in the request is invalid.", 403)
        if principal.expired:
            code = "ExpiredToken" if call.service != "ec2" else "RequestExpired"
            raise ApiError(code, "The security token included in the request is expired", 403)
        if principal.policies:
            for request in self._requests(call):
                if not allowed(principal.policies(), request):
                    raise _denied(call, principal, request)

    def _serve(
        self, call: Call, environ: dict[str, Any], body: bytes
    ) -> tuple[str, list[tuple[str, str]], bytes]:
        xml = [("Content-Type", "text/xml")]
        lost = any(fault.code == LOST and fault.strikes(call) for fault in self.faults)
        if call.service == "autoscaling":
            given = wire.arguments(call)
            result = self.aws.groups.call(call.region, call.action, given)
            found = "200 OK", xml, wire.answer(call.service, call.action, result)
        elif call.action == "GetConsoleOutput":
            found = "200 OK", xml, self._console(call)
        elif call.action == "DescribeInstanceTypeOfferings":
            found = "200 OK", xml, self._offers(call)
        elif call.action == "PutBucketPolicy":  # moto would apply it without its conditions
            self.aws.bucket_policies[call.bucket] = json.loads(body)
            found = "204 No Content", xml, b""
        elif call.service == "ssm" and call.action == "GetParameter":
            found = "200 OK", [("Content-Type", "application/x-amz-json-1.1")], _parameter(body)
        else:
            found = self._elsewhere(call, environ, body)
        if lost:
            raise ApiError(LOST, LOST)
        return found

    def _elsewhere(
        self, call: Call, environ: dict[str, Any], body: bytes
    ) -> tuple[str, list[tuple[str, str]], bytes]:
        if call.action in self.aws.oracle.ANSWERS:
            kind = "text/xml" if call.form else "application/x-amz-json-1.1"
            content = self.aws.oracle.answer(call, self.principals[call.key])
            return "200 OK", [("Content-Type", kind)], content
        self._refuse(call)
        found = self._ask_moto(environ, body)
        if call.action == "TerminateInstances":
            self.aws.instances.sweep()
        return found

    def _refuse(self, call: Call) -> None:
        """Refuse what moto lets pass, or refuses with other words."""
        if call.action == "DeleteLaunchTemplate" and not self.aws.named(call):
            code = "InvalidLaunchTemplateName.NotFoundException"
            raise ApiError(code, "At least one of the launch templates specified does not exist.")
        if call.service == "s3":
            from moto.s3.models import s3_backends

            there = call.bucket in s3_backends[ACCOUNT]["aws"].buckets
            if not there and call.action != "CreateBucket" and call.bucket not in self.aws.owners:
                raise ApiError("NoSuchBucket", "The specified bucket does not exist", 404)
            owner = self.aws.owners.get(call.bucket, ACCOUNT)
            expected = call.headers.get("x-amz-expected-bucket-owner", owner)
            if expected != owner:
                raise ApiError("AccessDenied", "Access Denied", 403)
            if call.action == "CreateBucket" and owner != ACCOUNT:
                raise ApiError(
                    "BucketAlreadyExists", "The requested bucket name is not available.", 409
                )

    def _console(self, call: Call) -> bytes:
        name = call.form["InstanceId"]
        if name not in self.aws.instances.lives:
            raise ApiError("InvalidInstanceID.NotFound", f"The instance ID '{name}' does not exist")
        text = self.aws.instances.lives[name].console
        result = {"InstanceId": name, "Output": base64.b64encode(text.encode()).decode()}
        return wire.answer("ec2", call.action, result)

    def _offers(self, call: Call) -> bytes:
        types = [value for key, value in call.form.items() if key.startswith("Filter.1.Value.")]
        zones = self.aws.zones(call.region)
        offers = [
            {"InstanceType": name, "LocationType": "availability-zone", "Location": zone}
            for name in types
            for zone in zones
            if self.aws.offered(name, zone)
        ]
        return wire.answer("ec2", call.action, {"InstanceTypeOfferings": offers})

    def _ask_moto(
        self, environ: dict[str, Any], body: bytes
    ) -> tuple[str, list[tuple[str, str]], bytes]:
        environ["wsgi.input"] = BytesIO(body)
        environ["CONTENT_LENGTH"] = str(len(body))
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        seen: list[Any] = []
        answer = self.moto(environ, lambda status, headers, _=None: seen.extend([status, headers]))
        content = b"".join(answer)
        if hasattr(answer, "close"):
            answer.close()
        return seen[0], list(seen[1]), content

    def _requests(self, call: Call) -> Iterator[Request]:
        """Say what a call amounts to, in IAM's terms."""
        action = f"{call.service}:{call.action}"
        if call.service == "s3":
            yield from _objects(call, self.aws.owners.get(call.bucket, ACCOUNT))
        elif call.service == "autoscaling":
            yield from self._groups(call, action)
        elif call.service == "ec2":
            yield from self._ec2(call, action)
        elif call.service == "ssm":
            name = json.loads(call.body)["Name"]
            yield Request(action, f"arn:aws:ssm:{call.region}::parameter{name}")
        elif call.service == "iam":
            yield Request(action, f"arn:aws:iam::{ACCOUNT}:role/{call.form.get('RoleName', '*')}")
        elif call.service != "sts":  # to which everybody may say who they are
            yield Request(action, "*")

    def _groups(self, call: Call, action: str) -> Iterator[Request]:
        if call.action.startswith("Describe"):
            yield Request(action, "*")
            return
        name = call.form.get("AutoScalingGroupName")
        for group in self.aws.groups.groups.values():
            if call.form.get("InstanceId") in [one.id for one in group.members]:
                name = group.name
        place = f"arn:aws:autoscaling:{call.region}:{ACCOUNT}:autoScalingGroup:uuid"
        yield Request(action, f"{place}:autoScalingGroupName/{name}")
        if call.action == "LaunchInstances":
            yield Request("ec2:CreateFleet", f"arn:aws:ec2:{call.region}:{ACCOUNT}:fleet/*")
            yield Request("ec2:DescribeLaunchTemplateVersions", "*")
        if call.action == "CreateAutoScalingGroup":  # it acts in the caller's name
            arn = f"{place}:autoScalingGroupName/{name}"
            yield Request("autoscaling:CreateOrUpdateTags", arn)
            ec2 = f"arn:aws:ec2:{call.region}:{ACCOUNT}"
            yield Request(
                "ec2:RunInstances",
                f"{ec2}:instance/*",
                {"ec2:LaunchTemplate": f"{ec2}:launch-template/lt-1"},
            )
            role = self.aws.role_of(call.region, str(name))
            passed = {"iam:PassedToService": "ec2.amazonaws.com"}
            yield Request("iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/{role}", passed)

    def _ec2(self, call: Call, action: str) -> Iterator[Request]:
        arn = f"arn:aws:ec2:{call.region}:{ACCOUNT}"
        if call.action.startswith("Describe"):
            yield Request(action, "*")
            return
        asked = {f"aws:RequestTag/{key}": value for key, value in _tags(call.form).items()}
        name = call.form.get("ResourceId.1") or call.form.get("InstanceId")
        if call.action == "AuthorizeSecurityGroupIngress":
            yield Request(action, f"{arn}:security-group/{call.form['GroupId']}", asked)
        elif name:
            tags = self.aws.instances.tags(name) if name in self.aws.instances.lives else {}
            yield Request(action, f"{arn}:instance/{name}", {**asked, **_owned(tags)})
        elif call.action.startswith("Delete"):
            yield Request(action, f"{arn}:thing/x", _owned(self.aws.tags_of(call)))
        else:
            kind = {"CreateSecurityGroup": "security-group", "ImportKeyPair": "key-pair"}
            resource = f"{arn}:{kind.get(call.action, 'launch-template')}/*"
            yield Request(action, resource, asked)
            if asked:
                yield Request(
                    "ec2:CreateTags", resource, {**asked, "ec2:CreateAction": call.action}
                )


def _objects(call: Call, owner: str) -> Iterator[Request]:
    arn = f"arn:aws:s3:::{call.bucket}"
    context = {"s3:ResourceAccount": owner}
    if call.object:
        yield Request(f"s3:{call.action}", f"{arn}/{call.object}", context)
    elif call.action == "DeleteObject":  # many at once
        from xml.etree import ElementTree

        for key in ElementTree.fromstring(call.body).iter():
            if key.tag.endswith("Key"):
                yield Request("s3:DeleteObject", f"{arn}/{key.text}", context)
    else:
        query = dict(parse_qsl(call.query))
        if "prefix" in query:
            context["s3:prefix"] = query["prefix"]
        yield Request(f"s3:{call.action}", arn, context)


def _denied(call: Call, principal: Principal, request: Request) -> ApiError:
    text = (
        f"User: {principal.arn} is not authorized to perform: {request.action} on resource:"
        f" {request.resource} because no identity-based policy allows the {request.action} action"
    )
    if call.service == "ec2":
        hidden = "Encoded authorization failure message: x"
        text = f"You are not authorized to perform this operation. {text}. {hidden}"
        return ApiError("UnauthorizedOperation", text, 403)
    target = call.headers.get("x-amz-target")
    return ApiError("AccessDeniedException" if target else "AccessDenied", text, 403)


def _tags(form: dict[str, str]) -> dict[str, str]:
    """Collect the tags that a request of EC2 asks for."""
    return {
        value: form[f"{key.rpartition('.')[0]}.Value"]
        for key, value in form.items()
        if "Tag." in key and key.endswith(".Key")
    }


def _owned(tags: dict[str, str]) -> dict[str, str]:
    return {f"aws:ResourceTag/{key}": value for key, value in tags.items()}


def _parameter(body: bytes) -> bytes:

    name = json.loads(body)["Name"]
    if name not in PARAMETERS:
        raise ApiError("ParameterNotFound", f"Parameter {name} not found.")
    return json.dumps(
        {"Parameter": {"Name": name, "Type": "String", "Value": PARAMETERS[name]}}
    ).encode()


def _body(environ: dict[str, Any]) -> bytes:
    length = environ.get("CONTENT_LENGTH")
    if length:
        return bytes(environ["wsgi.input"].read(int(length)))
    chunked = "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "")
    return bytes(environ["wsgi.input"].read()) if chunked else b""
