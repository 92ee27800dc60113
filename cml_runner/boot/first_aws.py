"""Stage 0 on AWS: requests signed with the machine's role. See `cml_runner.boot.first`.

This is embedded into start scripts, so it is short, and it imports nothing of ours.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import ProxyHandler, Request, build_opener


def signed(
    method: str,
    url: str,
    content: bytes,
    headers: dict[str, str],
    service: str,
    region: str,
    keys: dict[str, str],
) -> dict[str, str]:
    """Return the headers with what makes a request ours: Signature Version 4.

    Path and query must be encoded as they are sent; keys are as the metadata service tells them.
    https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
    """
    parts, now = urlsplit(url), time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    digest = hashlib.sha256(content).hexdigest()
    sent = {name.lower(): value for name, value in headers.items()}
    sent.update({"host": parts.netloc, "x-amz-date": now, "x-amz-security-token": keys["Token"]})
    sent["x-amz-content-sha256"] = digest  # S3 wants it, others don't mind
    names = ";".join(sorted(sent))
    lines = [method, parts.path, "&".join(sorted(parts.query.split("&")))]
    lines += [f"{name}:{sent[name]}" for name in sorted(sent)] + ["", names, digest]
    scope = f"{now[:8]}/{region}/{service}/aws4_request"
    request = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{request}"
    key = ("AWS4" + keys["SecretAccessKey"]).encode()
    for part in (*scope.split("/"), text):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    who = keys["AccessKeyId"] + "/" + scope
    sent["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={who}, SignedHeaders={names}, Signature={key.hex()}"
    )
    return sent


def metadata(path: str, method: str = "GET") -> str:
    """Ask the metadata service, with a session token (IMDSv2). Raises OSError."""
    sent = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    if method == "GET":
        sent = {"X-aws-ec2-metadata-token": metadata("api/token", "PUT")}
    service = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")
    request = Request(f"{service}/latest/{path}", None, sent, method=method)  # noqa: S310
    with build_opener(ProxyHandler({})).open(request, timeout=5) as answer:
        return str(answer.read(), "utf-8")


def call(
    method: str, url: str, content: bytes, headers: dict[str, str], service: str, region: str
) -> bytes:
    """Make one request in the name of this machine's role. Raises OSError."""
    place = "meta-data/iam/security-credentials/"
    keys = json.loads(metadata(place + metadata(place).split()[0]))
    own = signed(method, url, content, headers, service, region, keys)
    request = Request(url, content or None, own, method=method)  # noqa: S310
    with build_opener().open(request, timeout=60) as answer:
        return bytes(answer.read())


def host(service: str, region: str) -> str:
    """Say where a service is; everything is elsewhere if the SDKs' own variable says so."""
    return os.environ.get("AWS_ENDPOINT_URL", f"https://{service}.{region}.amazonaws.com")


def ask(url: str, path: str, content: bytes = b"", once: bool = False) -> bytes:
    """Read or put an object of the bucket in a task's URL; `once` only if there is none.

    Raises OSError, or HTTPException.
    """
    bucket, region = urlsplit(url).netloc, urlsplit(url).fragment.split("/")[1]
    address = host(f"{bucket}.s3", region)
    if "AWS_ENDPOINT_URL" in os.environ:
        address += f"/{bucket}"
    headers = {"If-None-Match": "*"} if once else {}
    headers["Content-Type"] = "binary/octet-stream"
    method = "PUT" if content else "GET"
    return call(method, f"{address}/{quote(path)}", content, headers, "s3", region)


def end(url: str, last: bool) -> None:
    """End this machine and, unless it is the last, have another one in its place.

    Raises OSError, or HTTPException.
    """
    region, service = urlsplit(url).fragment.split("/")[1], "autoscaling"
    form = {"Version": "2011-01-01", "Action": "TerminateInstanceInAutoScalingGroup"}
    form["InstanceId"] = metadata("meta-data/instance-id")
    form["ShouldDecrementDesiredCapacity"] = str(last).lower()
    kind, content = {"Content-Type": "application/x-www-form-urlencoded"}, urlencode(form).encode()
    call("POST", host(service, region) + "/", content, kind, service, region)
