"""The login service: tokens for applications, and for the managed identities of launchers.

A token is a secret that nobody else has, and says whose it is; nobody has signed it.
"""

from __future__ import annotations

import base64
import json
import secrets
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tests.lab.azure.front import Principal

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.azure.front import Role
    from tests.lab.azure.wire import Call

TENANT = "11111111-2222-3333-4444-555555555555"
AUTHORITY = "https://login.microsoftonline.com"
IMDS = "/metadata/identity/oauth2/token"


class Logins:
    """Who there is."""

    def __init__(self, principals: dict[str, Principal]) -> None:
        self._principals = principals
        self.secrets: dict[str, str] = {}  # of applications
        self._tokens: dict[str, str] = {}

    def add(self, name: str, roles: Callable[[], list[Role]] | None = None) -> dict[str, str]:
        """Make an application; return its client identifier, secret and tenant."""
        client = f"{secrets.token_hex(4)}-0000-0000-0000-{secrets.token_hex(6)}"
        self.secrets[client], token = secrets.token_urlsafe(20), _token(client)
        self._tokens[client] = token
        self._principals[token] = Principal(name, roles)
        return {"client": client, "secret": self.secrets[client], "tenant": TENANT}

    def principal(self, client: str) -> Principal:
        """Find one."""
        return self._principals[self._tokens[client]]

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
        if client not in self._tokens:
            return 400, {"error": "invalid_request", "error_description": "Identity not found"}
        return 200, {
            "access_token": self._tokens[client],
            "token_type": "Bearer",
            "expires_in": "3600",
            "resource": resource.removesuffix("/.default"),
        }


def _token(client: str) -> str:
    """Make a token that says whose it is, as those of Azure do."""
    said = base64.urlsafe_b64encode(json.dumps({"appid": client}).encode()).decode().rstrip("=")
    return f"eyJ.{said}.{secrets.token_urlsafe(30)}"
