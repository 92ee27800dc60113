"""The login service: tokens for applications, and for managed identities."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tests.lab.azure.front import Principal
from tests.lab.azure.tokens import TENANT, signed

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.azure.front import Role
    from tests.lab.azure.wire import Call

AUTHORITY = "https://login.microsoftonline.com"
IMDS = "/metadata/identity/oauth2/token"


class Logins:
    """Who there is."""

    def __init__(self, principals: dict[str, Principal]) -> None:
        self._principals = principals
        self.secrets: dict[str, str] = {}  # of applications
        self._known: dict[str, Principal] = {}  # by client identifier
        self._tokens: dict[tuple[str, str], str] = {}  # by name, and what they are for

    def add(self, name: str, roles: Callable[[], list[Role]] | None = None) -> dict[str, str]:
        """Make an application; return its client identifier, secret and tenant."""
        client = f"{secrets.token_hex(4)}-0000-0000-0000-{secrets.token_hex(6)}"
        self.secrets[client] = secrets.token_urlsafe(20)
        self._known[client] = Principal(name, roles)
        return {"client": client, "secret": self.secrets[client], "tenant": TENANT}

    def principal(self, client: str) -> Principal:
        """Find one."""
        return self._known[client]

    def token(self, who: Principal, resource: str) -> str:
        """Return what opens a service to somebody."""
        resource = resource.rstrip("/")
        if (who.name, resource) not in self._tokens:
            self._tokens[who.name, resource] = token = signed(resource, who.name)
            self._principals[token] = who
        return self._tokens[who.name, resource]

    @staticmethod
    def serves(call: Call) -> bool:
        """Say if a request is for this service."""
        parts = ("/oauth2/", "/.well-known/", "/discovery/")
        return any(part in call.path for part in parts)

    def answer(self, call: Call) -> tuple[int, list[tuple[str, str]], bytes]:
        """Answer one."""
        status, found = self._answer(call)
        return status, [], json.dumps(found).encode()

    def _answer(self, call: Call) -> tuple[int, dict[str, Any]]:
        if call.path == IMDS:
            return self._token(call.query.get("client_id", ""), call.query["resource"])
        if "/.well-known/" in call.path:
            base = f"{AUTHORITY}/{TENANT}"
            return 200, {
                "issuer": f"{base}/v2.0",
                "token_endpoint": f"{base}/oauth2/v2.0/token",
                "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                "device_authorization_endpoint": f"{base}/oauth2/v2.0/devicecode",
            }
        if "/discovery/" in call.path:
            host = AUTHORITY.removeprefix("https://")
            hosts = {"preferred_network": host, "preferred_cache": host, "aliases": [host]}
            return 200, {
                "tenant_discovery_endpoint": f"{AUTHORITY}/{TENANT}/v2.0/.well-known",
                "metadata": [hosts],
            }
        form = {key: values[0] for key, values in parse_qs(call.raw.decode()).items()}
        client = form.get("client_id", "")
        if form.get("client_secret") != self.secrets.get(client):
            text = "AADSTS7000215: Invalid client secret provided."
            return 401, {"error": "invalid_client", "error_description": text}
        return self._token(client, form["scope"])

    def _token(self, client: str, resource: str) -> tuple[int, dict[str, Any]]:
        if client not in self._known:
            return 400, {"error": "invalid_request", "error_description": "Identity not found"}
        resource = resource.removesuffix("/.default")
        return 200, {
            "access_token": self.token(self._known[client], resource),
            "token_type": "Bearer",
            "expires_in": "3600",
            "resource": resource,
        }
