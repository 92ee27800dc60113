"""A machine of AWS: its metadata service, its objects in S3, and the calls that end it.

The metadata service: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.parse import parse_qsl, urlencode, urlsplit
from urllib.request import ProxyHandler, Request, build_opener
from xml.etree import ElementTree

from cml_runner.boot import bucket, objects, web
from cml_runner.boot.first_aws import host, signed
from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVICE = "http://169.254.169.254"
VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"  # the SDKs' own, to put it elsewhere
ENDPOINT = "AWS_ENDPOINT_URL"  # likewise, for all services
LIFETIME = 21600  # seconds of a token, the most that there is
TIMEOUT = 2  # seconds
KIND = "binary/octet-stream"  # of an object
TAG = "cml-runner-id"  # on everything that belongs to one task; the value is its identifier
VERSIONS = {"autoscaling": "2011-01-01", "ec2": "2016-11-15"}  # of the APIs
# What Auto Scaling and EC2 say of what isn't there; the first has one code for all mistakes.
ABSENT = re.compile(r"name not found|Instance Id not found|NotFound|pending delete")


class Metadata:
    """The metadata of the machine that we are on, read with a session token (IMDSv2)."""

    def __init__(self, service: str) -> None:
        self._service = service.rstrip("/")
        self._token = ""
        self._opener = build_opener(ProxyHandler({}))  # it is never behind a proxy

    def get(self, path: str) -> str | None:
        """Read one document; None if there is none. Raises OSError."""
        for _ in range(2):
            try:
                return self._ask("GET", f"meta-data/{path}", {"token": self._login()})
            except HTTPError as error:
                error.close()
                if error.code == HTTPStatus.NOT_FOUND:
                    return None
                if error.code != HTTPStatus.UNAUTHORIZED:
                    raise
                self._token = ""  # it has expired
        msg = f"the metadata service refuses our token for {path}"
        raise PermissionError(msg)

    def _login(self) -> str:
        if not self._token:
            self._token = self._ask("PUT", "api/token", {"token-ttl-seconds": str(LIFETIME)})
        return self._token

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = Request(f"{self._service}/latest/{path}", method=method)  # noqa: S310
        for name, value in headers.items():
            request.add_header(f"X-aws-ec2-metadata-{name}", value)
        with self._opener.open(request, timeout=TIMEOUT) as answer:
            text: str = answer.read().decode()
            return text


def metadata() -> Metadata:
    """Return this machine's, with the token that it has already."""
    return _metadata(os.environ.get(VARIABLE) or SERVICE)


@cache
def _metadata(service: str) -> Metadata:
    return Metadata(service)


def instance() -> str:
    """Ask which instance this is. Raises RunnerError where nobody says it."""
    try:
        found = metadata().get("instance-id")
    except OSError as error:
        msg = f"the metadata service doesn't say which machine this is: {error}"
        raise RunnerError(msg) from error
    if not found:
        msg = "the metadata service doesn't say which machine this is"
        raise RunnerError(msg)
    return found


class Bucket(bucket.Bucket):
    """A part of a bucket of S3."""

    def __init__(self, name: str, prefix: str, region: str) -> None:
        super().__init__(prefix)
        self._name, self._region = name, region

    def send(
        self, method: str, path: str, content: bytes | None, headers: Mapping[str, str]
    ) -> web.Answer:
        """Make one request."""
        place = host(f"{self._name}.s3", self._region)
        if ENDPOINT in os.environ:
            place += f"/{self._name}"
        own = {"Content-Type": KIND, **headers}
        return _call(method, f"{place}{path}", content or b"", own, "s3", self._region)


class Machine:
    """The machine that we are on."""

    ends_with_power = True

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        _, self._region, self.task = parts.fragment.split("/")
        place = dict(parse_qsl(parts.query))["region"]
        prefix = parts.path.strip("/")
        self.url = url
        self.objects = Bucket(parts.netloc, prefix, place)
        self.leases = Bucket(parts.netloc, "leases", place)

    def name(self) -> str:
        """Ask the metadata service."""
        return instance()

    def check(self) -> None:
        """Look at this instance's tag."""
        found = metadata().get(f"tags/instance/{TAG}")
        if found != self.task:
            msg = f"this machine isn't one of {self.task}: its tag {TAG} is {found}"
            raise RunnerError(msg)

    def replace(self) -> None:
        """Terminate this instance; waiting for the group to notice takes minutes.

        https://docs.aws.amazon.com/autoscaling/ec2/APIReference/API_TerminateInstanceInAutoScalingGroup.html
        """
        self._terminate(fewer=False)

    def dismiss(self) -> None:
        """Terminate this instance, and lower the number of machines that there should be."""
        self._terminate(fewer=True)

    def finish(self) -> None:
        """Delete all, the group nearly last, since this machine ends with it."""
        objects.clear(self.objects)
        self._delete("KeyPair", "key-name", "keySet")
        self._delete("LaunchTemplate", "launch-template-name", "launchTemplates")
        group = {"AutoScalingGroupName": self.task, "ForceDelete": "true"}
        self._change("autoscaling", "DeleteAutoScalingGroup", group)
        objects.finish(self.leases, self.task)

    def _terminate(self, *, fewer: bool) -> None:
        what = {"InstanceId": self.name(), "ShouldDecrementDesiredCapacity": str(fewer).lower()}
        self._change("autoscaling", "TerminateInstanceInAutoScalingGroup", what)

    def _delete(self, kind: str, name: str, found: str) -> None:
        """Delete one of EC2's things if it is there: we may delete nothing but what has our tag."""
        wanted = {"Filter.1.Name": name, "Filter.1.Value.1": self.task}
        listed = ElementTree.fromstring(self._query("ec2", f"Describe{kind}s", wanted).content)  # noqa: S314
        if listed.find(f"{{*}}{found}/{{*}}item") is not None:
            key = "".join(map(str.capitalize, name.split("-")))
            self._change("ec2", f"Delete{kind}", {key: self.task})

    def _change(self, service: str, action: str, arguments: Mapping[str, str]) -> None:
        """Make a change; what is gone needs none."""
        try:
            self._query(service, action, arguments)
        except web.Refused as error:
            if not ABSENT.search(error.text):
                raise

    def _query(self, service: str, action: str, arguments: Mapping[str, str]) -> web.Answer:
        form = {"Action": action, "Version": VERSIONS[service], **arguments}
        url = f"{host(service, self._region)}/"
        kind = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}
        try:
            return _call("POST", url, urlencode(form).encode(), kind, service, self._region)
        except web.Refused as error:
            raise web.Refused(f"{service}:{action}", error.status, _message(error.text)) from error


def _call(
    method: str,
    url: str,
    content: bytes,
    headers: Mapping[str, str],
    service: str,
    region: str,
) -> web.Answer:
    own = signed(method, url, content, dict(headers), service, region, _keys())
    return web.ask(method, url, own, content if method in ("PUT", "POST") else None)


def _keys() -> dict[str, str]:
    """Read the current keys of the machine's role. Raises RunnerError."""
    place = "iam/security-credentials/"
    try:
        role = (metadata().get(place) or "").partition("\n")[0]
        found = json.loads(metadata().get(place + role) or "{}") if role else {}
    except (OSError, ValueError) as error:
        msg = f"the metadata service tells no keys: {error}"
        raise RunnerError(msg) from error
    if "AccessKeyId" not in found:
        msg = "this machine has no role, or the metadata service doesn't know it yet"
        raise RunnerError(msg)
    return dict(found)


def _message(text: str) -> str:
    """Read an error of a query API, in XML."""
    with suppress(ElementTree.ParseError):
        found = ElementTree.fromstring(text)  # noqa: S314
        code, message = (found.findtext(f".//{{*}}{one}") for one in ("Code", "Message"))
        if code:
            return f"{message} ({code})"
    return text
