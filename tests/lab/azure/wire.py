"""What requests to Resource Manager mean: which action on what, and how it refuses."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote


class ApiError(Exception):
    """What Azure refuses, with its code."""

    def __init__(self, code: str, message: str = "", status: int = 400, inner: Any = None) -> None:
        super().__init__(code)
        self.code, self.status = code, status
        self.message = message or f"the fake says {code}"
        self.inner = inner  # details

    def body(self) -> dict[str, Any]:
        """Say it as Resource Manager does."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.inner:
            error["details"] = self.inner
        return {"error": error}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request."""

    method: str
    target: str  # as it was sent, with its query
    path: str  # without its query
    kind: str  # PROVIDER/TYPE/…, of what the path names
    action: str  # as roles name it
    token: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any = field(repr=False)
    raw: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


def read(environ: dict[str, Any], raw: bytes) -> Call:
    """Understand a request."""
    target = environ.get("RAW_URI", environ["PATH_INFO"])
    path = unquote(target.partition("?")[0])
    method = environ["REQUEST_METHOD"]
    kind, posted = _kind(path, method)
    try:
        body = json.loads(raw) if raw else None
    except ValueError:
        body = None
    return Call(
        method=method,
        target=target,
        path=path,
        kind=kind,
        action=_action(kind, method, posted),
        token=environ.get("HTTP_AUTHORIZATION", "").removeprefix("Bearer "),
        query={key: values[0] for key, values in parse_qs(environ.get("QUERY_STRING")).items()},
        headers={
            key.removeprefix("HTTP_").replace("_", "-").lower(): value
            for key, value in environ.items()
            if key.startswith("HTTP_") or key == "CONTENT_TYPE"
        },
        body=body,
        raw=raw,
    )


def _kind(path: str, method: str) -> tuple[str, str]:
    """Name the type of what a path leads to, and what is POSTed there."""
    base, _, own = path.rpartition("/providers/")
    if not base:
        parts = path.strip("/").split("/")
        kinds = ["subscriptions", "resourceGroups"][: (len(parts) + 1) // 2]
        return "/".join(["Microsoft.Resources", *kinds]), ""
    provider, *parts = own.split("/")
    posted = parts.pop() if method == "POST" and parts else ""
    return "/".join([provider, *parts[::2]]), posted


def _action(kind: str, method: str, posted: str) -> str:
    verb = {"GET": "read", "PUT": "write", "PATCH": "write", "DELETE": "delete"}.get(method)
    if "/" not in kind:  # a provider itself
        verb = verb and f"subscriptions/providers/{verb}"
        return f"Microsoft.Resources/{verb}" if verb else f"{kind}/{posted}/action"
    return f"{kind}/{verb}" if verb else f"{kind}/{posted}/action"
