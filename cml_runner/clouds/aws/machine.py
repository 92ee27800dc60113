"""What a machine learns from its metadata service; nothing here needs an SDK.

The service and its paths: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-categories.html
"""

from __future__ import annotations

import json
import os
from datetime import datetime
from functools import cache
from http import HTTPStatus
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from cml_runner.model import Notice

SERVICE = "http://169.254.169.254"
VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"  # the SDKs' own, to put it elsewhere
LIFETIME = 21600  # seconds of a token, the most that there is
TIMEOUT = 2  # seconds
INTERRUPT = "cml-runner-interrupt"  # tag of an instance: when it has to be gone


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
    """Return this instance's identifier; empty if this isn't an EC2 instance."""
    try:
        return metadata().get("instance-id") or ""
    except OSError:
        return ""


def tag(name: str) -> str:
    """Return the value of one of this instance's tags."""
    return metadata().get(f"tags/instance/{name}") or ""


def belongs(name: str, value: str) -> bool:
    """Say if this instance has a tag; if nobody answers, nothing speaks against it."""
    try:
        return tag(name) == value
    except OSError:
        return True


def notice() -> Notice | None:
    """Ask whether this instance will be taken away.

    There are two minutes' notice of an interruption; a rebalance recommendation, without a
    deadline, may come earlier; and `cml-runner interrupt` leaves a tag.
    """
    if text := metadata().get("spot/instance-action"):
        action = json.loads(text)
        return Notice(reason="spot interruption", deadline=_time(action["time"]))
    if text := tag(INTERRUPT):
        return Notice(reason="interruption on demand", deadline=_time(text))
    if metadata().get("events/recommendations/rebalance"):
        return Notice(reason="elevated risk of a spot interruption")
    return None


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
