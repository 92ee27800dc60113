"""What a machine learns from its metadata service, and how it speaks to Resource Manager.

Nothing here needs an SDK. The service and its paths:
https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

from cml_runner.clouds.azure import arm
from cml_runner.errors import RunnerError
from cml_runner.model import Notice

SERVICE = "http://169.254.169.254"
VARIABLE = "AZURE_INSTANCE_METADATA_ENDPOINT"  # to put it elsewhere
COMPUTE, EVENTS, TOKENS = "2021-12-13", "2020-07-01", "2018-02-01"  # versions
TIMEOUT = 5  # seconds
PATIENCE = 30  # seconds for Resource Manager
TAG = "cml-runner-id"  # on everything that belongs to one task; the value is its identifier
INTERRUPT = "cml-runner-interrupt"  # tag of a machine: when it has to be gone
IDENTITY = "cml-runner-identity"  # tag of a machine that has several: the first


def metadata(path: str, **query: str) -> Any:
    """Read one document. Raises OSError."""
    service = (os.environ.get(VARIABLE) or SERVICE).rstrip("/")
    request = Request(f"{service}/metadata/{path}?{urlencode(query)}")  # noqa: S310
    request.add_header("Metadata", "true")
    opener = build_opener(ProxyHandler({}))  # it is never behind a proxy
    with opener.open(request, timeout=TIMEOUT) as answer:
        content = answer.read()
    try:
        return json.loads(content)
    except ValueError as error:
        msg = f"the metadata service answers {content[:80]!r}"
        raise OSError(msg) from error


def compute() -> dict[str, Any]:
    """Say which machine this is; empty if it isn't one of Azure."""
    try:
        found: dict[str, Any] = metadata("instance/compute", **{"api-version": COMPUTE})
    except OSError:
        return {}
    return found


def tags(machine: dict[str, Any]) -> dict[str, str]:
    """Read a machine's tags."""
    return {one["name"]: one["value"] for one in machine.get("tagsList", [])}


def notice() -> Notice | None:
    """Ask whether this machine will be taken away.

    There are at least 30 seconds' notice of an eviction, once the service has been asked for the
    first time; and `cml-runner interrupt` leaves a tag. Raises OSError.
    """
    me = metadata("instance/compute", **{"api-version": COMPUTE})
    if text := tags(me).get(INTERRUPT):
        return Notice(reason="interruption on demand", deadline=datetime.fromisoformat(text))
    found = metadata("scheduledevents", **{"api-version": EVENTS})
    for event in found.get("Events", []):
        if event["EventType"] == "Preempt" and me["name"] in event["Resources"]:
            return Notice(reason="spot eviction", deadline=_time(event.get("NotBefore", "")))
    return None


class Manager:
    """Resource Manager, as the identity of this machine sees it."""

    def __init__(self, machine: dict[str, Any]) -> None:
        self.machine = machine
        self._token = ""

    def call(self, method: str, path: str, body: Any = None, **query: str) -> dict[str, Any]:
        """Make one call, and don't wait for what it begins.

        Raises NotFound, CredentialsError, or RunnerError.
        """
        try:
            return self._send(method, path, body, query)
        except HTTPError as error:
            with error:
                if error.code == HTTPStatus.UNAUTHORIZED:
                    self._token = ""  # the next attempt has a new one
                content = arm.parsed(error.read())
                raise arm.failure(error.code, content, f"{method} {path}") from error
        except (OSError, ValueError) as error:
            msg = f"can't {method} {path}: {error}"
            raise RunnerError(msg) from error

    def _send(self, method: str, path: str, body: Any, query: dict[str, str]) -> dict[str, Any]:
        asked = urlencode({**query, "api-version": arm.version(path)})
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{arm.endpoint()}{path}?{asked}", data, method=method)  # noqa: S310
        request.add_header("Authorization", f"Bearer {self._login()}")
        request.add_header("Content-Type", "application/json")
        with build_opener().open(request, timeout=PATIENCE) as answer:
            found: dict[str, Any] = json.loads(answer.read() or b"{}")
            return found

    def _login(self) -> str:
        if not self._token:
            identity = tags(self.machine).get(IDENTITY)
            which = {"msi_res_id": identity} if identity else {}
            asked = {"api-version": TOKENS, "resource": arm.RESOURCE, **which}
            self._token = metadata("identity/oauth2/token", **asked)["access_token"]
        return self._token


def _time(text: str) -> datetime:
    """Read when an event begins; one that has begun doesn't say it any more."""
    if not text:
        return datetime.now(timezone.utc)
    return parsedate_to_datetime(text).replace(tzinfo=timezone.utc)
