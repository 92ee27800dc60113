"""The metadata service of an instance.

https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from socket import SHUT_RDWR
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tests.lab.gcp.compute import Compute
    from tests.lab.gcp.front import Fault

NUMBER = "123456789012"
ROOT = "/computeMetadata/v1"


class Metadata:
    """A WSGI application for one instance.

    A fault of the action "metadata" is one of every question, one of "metadata.token" of that for
    a token; of status 0, nobody answers.
    """

    def __init__(
        self,
        compute: Compute,
        number: str,
        login: Callable[[str], str],
        faults: Sequence[Fault] = (),
    ) -> None:
        self._compute, self._number, self._login = compute, number, login
        self._faults = faults

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("HTTP_METADATA_FLAVOR") != "Google":
            return _answer(start, "403 Forbidden", "Missing Metadata-Flavor:Google header.")
        path = environ["PATH_INFO"]
        query = dict(parse_qsl(environ.get("QUERY_STRING", "")))
        if fault := self._fault(path):
            if not fault.status:
                environ["werkzeug.socket"].shutdown(SHUT_RDWR)
                raise ConnectionError(fault.message)
            return _answer(start, f"{fault.status} Error", fault.message)
        if path in ("", "/"):
            return _answer(start, "200 OK", "computeMetadata/\n")
        text, tag = self._read(path, query)
        end = time.monotonic() + float(query.get("timeout_sec", 60))
        while query.get("wait_for_change") == "true" and tag == query.get("last_etag"):
            if time.monotonic() > end:
                break
            time.sleep(0.02)
            text, tag = self._read(path, query)
        if text is None:
            return _answer(start, "404 Not Found", "not found")
        kind = "application/json" if "recursive" in query or "token" in path else "text/plain"
        return _answer(start, "200 OK", text, [("ETag", tag), ("Content-Type", kind)])

    def _fault(self, path: str) -> Fault | None:
        token = path.endswith("/token") and "metadata.token"
        ours = [one for one in self._faults if one.action in ("metadata", token)]
        return next((one for one in ours if one.strikes(one.action)), None)

    def _read(self, path: str, query: dict[str, str]) -> tuple[str | None, str]:
        value: Any = self._tree()
        for part in path.removeprefix(ROOT).strip("/").split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if callable(value):
            value = value()
        if isinstance(value, dict) and query.get("recursive", "").lower() == "true":
            value = json.dumps(_plain(value, own="attributes" in path))
        elif isinstance(value, dict):
            value = "".join(f"{key}{'/' * isinstance(one, dict)}\n" for key, one in value.items())
        text = None if value is None else str(value)
        return text, hashlib.sha256((text or "").encode()).hexdigest()[:16]

    def _tree(self) -> dict[str, Any]:
        one = self._compute.instances[self._number]
        account = {
            "email": one.account,
            "aliases": "default",
            "scopes": "\n".join(one.scopes),
            "token": lambda: self._token(one.account),
        }
        return {
            "instance": {
                "id": one.id,
                "name": one.name,
                "hostname": f"{one.name}.c.{self._compute.project}.internal",
                "zone": f"projects/{NUMBER}/zones/{one.zone}",
                "machine-type": f"projects/{NUMBER}/machineTypes/{one.type}",
                "preempted": "TRUE" if one.preempted else "FALSE",
                "maintenance-event": one.maintenance,
                "attributes": dict(one.metadata),
                "service-accounts": {"default": account, one.account: account},
                "scheduling": {"preemptible": str(one.spot).upper()},
            },
            "project": {
                "project-id": self._compute.project,
                "numeric-project-id": NUMBER,
                "attributes": {},
            },
        }

    def _token(self, account: str) -> str:
        found = {"access_token": self._login(account), "expires_in": 3000, "token_type": "Bearer"}
        return json.dumps(found)


def _plain(value: Any, *, own: bool = False) -> Any:
    """Write names as JSON has them; those that people chose stay."""
    if not isinstance(value, dict):
        return value
    return {
        key if own else re.sub("-([a-z])", lambda one: one[1].upper(), key): _plain(
            one, own=key == "attributes"
        )
        for key, one in value.items()
        if not callable(one)
    }


def _answer(
    start: Callable[..., Any], status: str, text: str, headers: list[tuple[str, str]] | None = None
) -> list[bytes]:
    content = text.encode()
    own = [("Metadata-Flavor", "Google"), ("Content-Length", str(len(content)))]
    start(status, [*own, *(headers or [])])
    return [content]
