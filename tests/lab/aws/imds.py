"""The metadata service of an instance.

https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html
"""

from __future__ import annotations

import json
import secrets
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from tests.lab.aws.instances import ACCOUNT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.lab.aws.instances import Instances


class Metadata:
    """A WSGI application for one instance."""

    def __init__(
        self, instances: Instances, name: str, login: Callable[[str], dict[str, str]], first: bool
    ) -> None:
        self._instances, self._name, self._login = instances, name, login
        self._tokens: set[str] = set()
        self._first = first  # IMDSv1 is answered too

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"].strip("/")
        if environ["REQUEST_METHOD"] == "PUT" and path == "latest/api/token":
            token = secrets.token_urlsafe(40)
            self._tokens.add(token)
            headers = [
                (
                    "X-aws-ec2-metadata-token-ttl-seconds",
                    environ["HTTP_X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS"],
                )
            ]
            return _answer(start, "200 OK", token, headers)
        known = environ.get("HTTP_X_AWS_EC2_METADATA_TOKEN") in self._tokens
        if not known and not self._first:
            return _answer(start, "401 Unauthorized", "")
        if not path or path.count("/") == 0:
            return _answer(
                start,
                "200 OK",
                "1.0\n2009-04-04\n2021-03-23\nlatest"
                if not path
                else "dynamic\nmeta-data\nuser-data",
            )
        found = self._documents().get(path.partition("/")[2])
        if found is None:
            return _answer(start, "404 Not Found", "")
        return _answer(start, "200 OK", found)

    def _documents(self) -> dict[str, str]:
        life = self._instances.lives[self._name]
        instance = life.instance
        tags = self._instances.tags(self._name)
        documents = {
            "meta-data/instance-id": instance.id,
            "meta-data/ami-id": "ami-1",
            "meta-data/hostname": instance.id,
            "meta-data/local-hostname": instance.id,
            "meta-data/local-ipv4": instance.address,
            "meta-data/instance-type": instance.type,
            "meta-data/placement/availability-zone": instance.zone,
            "meta-data/placement/region": instance.region,
            "meta-data/services/domain": "amazonaws.com",
            "meta-data/autoscaling/target-lifecycle-state": "InService",
            "dynamic/instance-identity/document": json.dumps(
                {"accountId": ACCOUNT, "region": instance.region, "instanceId": instance.id}
            ),
            "user-data": instance.user_data,
            **{f"meta-data/tags/instance/{key}": value for key, value in tags.items()},
        }
        if life.notice:
            documents["meta-data/spot/instance-action"] = json.dumps(life.notice)
        if life.rebalance:
            documents["meta-data/events/recommendations/rebalance"] = json.dumps(
                {"noticeTime": life.rebalance}
            )
        if instance.profile:
            documents |= self._identity(instance.profile)
        return _with_listings(documents)

    def _identity(self, profile: str) -> dict[str, str]:
        keys = self._login(profile)
        expires = datetime.now(timezone.utc) + timedelta(hours=6)
        document = {
            "Code": "Success",
            "LastUpdated": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
            "Type": "AWS-HMAC",
            "AccessKeyId": keys["id"],
            "SecretAccessKey": keys["secret"],
            "Token": keys["token"],
            "Expiration": f"{expires:%Y-%m-%dT%H:%M:%SZ}",
        }
        return {f"meta-data/iam/security-credentials/{profile}": json.dumps(document)}


def _with_listings(documents: dict[str, str]) -> dict[str, str]:
    found = dict(documents)
    for path in documents:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            child = parts[depth] + ("/" if depth + 1 < len(parts) else "")
            lines = found.get(parent, "").split("\n") if parent in found else []
            if child not in lines:
                found[parent] = "\n".join([*lines, child])
    return found


def _answer(
    start: Callable[..., Any], status: str, text: str, headers: list[tuple[str, str]] | None = None
) -> list[bytes]:
    content = text.encode()
    start(
        status,
        [("Content-Type", "text/plain"), ("Content-Length", str(len(content))), *(headers or [])],
    )
    return [content]
