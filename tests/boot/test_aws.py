"""What a machine of AWS does with nothing but its own Python."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from cml_runner.boot.first_aws import signed

if TYPE_CHECKING:
    from collections.abc import Mapping

KEYS = {"AccessKeyId": "AKIDEXAMPLE", "SecretAccessKey": "wJalrXUtnFEMI/K7MDENG", "Token": "t/o=k"}
FORM = "application/x-www-form-urlencoded; charset=utf-8"
BUCKET = "https://cml-runner-1.s3.us-west-2.amazonaws.com"


@pytest.mark.parametrize(
    ("method", "url", "content", "headers", "service"),
    [
        ("GET", f"{BUCKET}/programs/abc.whl", b"", {}, "s3"),
        ("PUT", f"{BUCKET}/tasks/cml-x/a%20b~%2B", b"text", {"If-None-Match": "*"}, "s3"),
        ("GET", f"{BUCKET}/?prefix=tasks%2Fx%2F&list-type=2&delimiter=%2F", b"", {}, "s3"),
        ("DELETE", "http://127.0.0.1:5000/bucket/tasks/x", b"", {}, "s3"),
        (
            "POST",
            "https://autoscaling.us-west-2.amazonaws.com/",
            b"Action=DeleteAutoScalingGroup&AutoScalingGroupName=cml-x",
            {"Content-Type": FORM},
            "autoscaling",
        ),
        ("POST", "https://ec2.us-west-2.amazonaws.com/", b"Action=X", {}, "ec2"),
    ],
)
def test_the_signature_is_botocores(
    method: str, url: str, content: bytes, headers: Mapping[str, str], service: str
) -> None:
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    ours = signed(method, url, content, dict(headers), service, "us-west-2", KEYS)
    assert ours["host"] == urlsplit(url).netloc

    at = datetime.strptime(ours["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
    plain = {**headers, "x-amz-content-sha256": ours["x-amz-content-sha256"]}
    request = AWSRequest(method, url, headers=plain, data=content)
    oracle = Oracle(Credentials(*KEYS.values()), service, "us-west-2")
    oracle.sign(request, at)
    assert ours["authorization"] == request.headers["Authorization"]


def _oracle() -> type:
    from botocore.auth import S3SigV4Auth

    class Oracle(S3SigV4Auth):  # type: ignore[misc]
        """botocore's signer, at a time of ours; paths are sent as they are."""

        def sign(self, request: object, at: datetime) -> None:
            request.context["timestamp"] = f"{at:%Y%m%dT%H%M%SZ}"  # type: ignore[attr-defined]
            self._modify_request_before_signing(request)
            canonical = self.canonical_request(request)
            text = self.string_to_sign(request, canonical)
            self._inject_signature_to_request(request, self.signature(text, request))

    return Oracle


Oracle = _oracle()
