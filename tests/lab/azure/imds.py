"""The metadata service of a machine.

https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from email.utils import format_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tests.lab.azure.manager import SUBSCRIPTION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tests.lab.azure.machines import Fleet, Life

COMPUTE = "/metadata/instance/compute"
EVENTS = "/metadata/scheduledevents"
TOKEN = "/metadata/identity/oauth2/token"


@dataclass
class Trouble:
    """What is wrong with metadata services, for some requests to paths that begin like this."""

    path: str
    status: int  # 0: the connection ends without an answer
    times: float

    def strikes(self, path: str) -> bool:
        """Say if it is this request's turn."""
        fits = path.startswith(self.path) and self.times > 0
        self.times -= fits
        return fits


class Metadata:
    """A WSGI application for one machine."""

    def __init__(
        self,
        fleet: Fleet,
        name: str,
        login: Callable[[str, str], str],
        troubles: Sequence[Trouble] = (),
    ) -> None:
        self._fleet, self._name, self._login = fleet, name, login
        self._troubles = troubles

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        query = {key: one[0] for key, one in parse_qs(environ.get("QUERY_STRING", "")).items()}
        life = self._fleet.lives[self._name]
        if environ.get("HTTP_METADATA", "").lower() != "true" or environ.get(
            "HTTP_X_FORWARDED_FOR"
        ):
            return _answer(start, 400, {"error": "Bad request. Required metadata header"})
        if "api-version" not in query:
            return _answer(start, 400, {"error": "Bad request. api-version was not specified"})
        path = environ["PATH_INFO"].rstrip("/")
        for trouble in self._troubles:
            if trouble.strikes(path):
                if not trouble.status:
                    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                return _answer(start, trouble.status or 500, {"error": "the fake says so"})
        if path == TOKEN:
            return self._token(life, query, start)
        documents: dict[str, Callable[[Life], Any]] = {
            COMPUTE: self._compute,
            EVENTS: _events,
            "/metadata/instance": lambda life: {
                "compute": self._compute(life),
                "network": {"interface": []},
            },
        }
        if path not in documents:
            return _answer(start, 404, {"error": "Not found"})
        return _answer(start, 200, documents[path](life))

    def _token(
        self, life: Life, query: dict[str, str], start: Callable[..., Any]
    ) -> Iterable[bytes]:
        identities = life.instance.identities
        wanted = query.get("msi_res_id", identities[0] if len(identities) == 1 else "")
        known = [one for one in identities if one.lower() == wanted.lower()]
        if not known:
            text = "Multiple user assigned identities exist, please specify the clientId"
            return _answer(start, 400, {"error": "invalid_request", "error_description": text})
        return _answer(
            start,
            200,
            {
                "access_token": self._login(known[0], query["resource"]),
                "expires_in": "86399",
                "expires_on": "4102444800",
                "resource": query["resource"],
                "token_type": "Bearer",
            },
        )

    def _compute(self, life: Life) -> dict[str, Any]:
        """Describe a machine of a scale set in Flexible mode; what doesn't apply is empty."""
        parts = life.path.split("/")
        return {
            "azEnvironment": "AzurePublicCloud",
            "name": life.instance.id,
            "resourceId": life.path,
            "resourceGroupName": parts[4],
            "subscriptionId": SUBSCRIPTION,
            "tagsList": [{"name": key, "value": value} for key, value in life.tags.items()],
            "virtualMachineScaleSet": {"id": life.owner},
            "vmId": life.instance.unique,
            "vmScaleSetName": life.owner.rpartition("/")[2] if self._fleet.named else "",
            "vmSize": life.instance.type,
            "zone": life.instance.zone,
        }


def _events(life: Life) -> dict[str, Any]:
    if not life.notice:
        return {"DocumentIncarnation": 1, "Events": []}
    event = {
        "EventId": "A1",
        "EventType": "Preempt",
        "ResourceType": "VirtualMachine",
        "Resources": [life.instance.id],
        "EventStatus": "Scheduled",
        "NotBefore": format_datetime(life.notice, usegmt=True),
    }
    return {"DocumentIncarnation": 2, "Events": [event]}


def _answer(start: Callable[..., Any], status: int, body: Any) -> list[bytes]:
    content = json.dumps(body).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
    start(f"{status} {HTTPStatus(status).phrase}", headers)
    return [content]
