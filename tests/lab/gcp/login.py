"""Workload identity federation: a CI's own token becomes a service account's.

https://cloud.google.com/iam/docs/reference/sts/rest/v1/TopLevel/token
"""

from __future__ import annotations

import json
import secrets
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from tests.lab.gcp.discovery import ApiError, api

if TYPE_CHECKING:
    from collections.abc import Callable

STS, CREDENTIALS = "sts.googleapis.com", "iamcredentials.googleapis.com"


class Login:
    """What knows the CI's tokens; `login` makes a token for a service account."""

    def __init__(self, login: Callable[[str], str]) -> None:
        self._login = login
        self.accepted: set[str] = set()  # tokens of a CI
        self._exchanged: set[str] = set()

    def serve(self, host: str, path: str, header: str, body: bytes) -> Any:
        """Answer one request. Raises ApiError."""
        if host == STS:
            return self._exchange(dict(parse_qsl(body.decode())))
        call = api("iamcredentials.v1").read("POST", path, {}, body)
        if header.removeprefix("Bearer ") not in self._exchanged:
            raise ApiError(401, "authError", "Request had invalid authentication credentials.")
        account = call.where["serviceAccountsId"]
        end = datetime.now(timezone.utc) + timedelta(hours=1)
        answer = {"accessToken": self._login(account), "expireTime": f"{end:%Y-%m-%dT%H:%M:%SZ}"}
        api("iamcredentials.v1").check(answer, {"$ref": call.method.response}, "our answer")
        return answer

    def _exchange(self, form: dict[str, str]) -> Any:
        if (
            form["subject_token"] not in self.accepted
            or "workloadIdentityPools" not in form["audience"]
        ):
            raise ApiError(400, "invalid_grant", json.dumps("The given credential is rejected"))
        token = secrets.token_urlsafe(30)
        self._exchanged.add(token)
        kind = "urn:ietf:params:oauth:token-type:access_token"
        return {
            "access_token": token,
            "issued_token_type": kind,
            "token_type": "Bearer",
            "expires_in": 3600,
        }
