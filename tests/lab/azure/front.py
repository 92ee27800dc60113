"""What stands before all services: it writes down calls, checks rights, and makes faults."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from tests.lab.azure import models, retail, wire
from tests.lab.azure.tokens import MANAGER, STORAGE, audience
from tests.lab.azure.wire import ApiError, Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.lab.azure import Azure

VERSION = re.compile(r"20\d\d-\d\d-\d\d(-preview)?")
# The codes of two faults: the call is carried out, but its answer never comes; nor does the call.
LOST, CUT = "lost", "cut"


@dataclass(frozen=True, kw_only=True)
class Role:
    """What somebody may do, and where."""

    actions: tuple[str, ...]
    data: tuple[str, ...]
    scopes: tuple[str, ...]

    def allows(self, action: str, path: str, *, data: bool = False) -> bool:
        """Say if it covers an action on what a path names."""
        names = self.data if data else self.actions
        return any(fnmatchcase(action.lower(), name.lower()) for name in names) and any(
            f"{path}/".lower().startswith(f"{scope}/".lower()) for scope in self.scopes
        )


@dataclass
class Principal:
    """Who has a token."""

    name: str
    roles: Callable[[], list[Role]] | None = None  # None: may do everything
    expired: bool = False


@dataclass
class Fault:
    """An error to answer with, some times, to some action."""

    action: str
    code: str
    message: str
    times: float = 1
    status: int = 409
    method: str = ""  # only this one
    later: bool = False  # the call is taken, but what it begins ends like this

    def strikes(self, call: Call, *, later: bool) -> bool:
        """Say if it is this call's turn."""
        fits = self.action in ("*", call.action) and self.method in ("", call.method)
        fits = fits and self.later == later and self.times > 0
        self.times -= fits
        return fits


@dataclass(frozen=True)
class Entry:
    """One call that was made."""

    action: str
    path: str
    who: str
    began: float
    ended: float
    body: Any = None
    error: str = ""


@dataclass
class Front:
    """A WSGI application: Resource Manager, the login service and blobs, by host or by path."""

    azure: Azure
    latency: float = 0  # seconds that every call takes longer
    ahead: float = 0  # seconds that the clock is
    watch: Callable[[Call], None] = lambda _: None  # is told of every call before it is served
    calls: list[Entry] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    principals: dict[str, Principal] = field(default_factory=dict)  # by token
    bugs: list[str] = field(default_factory=list)  # of this fake
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        began = time.monotonic()
        call = _read(environ)
        if self.latency:
            time.sleep(self.latency)
        if call.path == retail.PATH:
            listed = retail.answer(call.query, self.azure.prices_url)
            return _plain(start, 200, [], json.dumps(listed).encode())
        if self.azure.logins.serves(call):
            return _plain(start, *self.azure.logins.answer(call))
        serve = self._manage
        if not call.path.lower().startswith(("/subscriptions", "/operations/", "/serial/")):
            call = self.azure.blobs.understood(call)
            serve = self.azure.blobs.serve
        self.watch(call)
        if self._is_hit(call, CUT):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return _plain(start, 500, [], b"")
        who, problem = self.principals.get(call.token), ""
        try:
            self._check(call, who)
            status, headers, content = serve(call)
        except ApiError as error:
            problem, status = error.code, error.status
            headers, content = self._refused(call, error)
        name = who.name if who else "nobody"
        ended = time.monotonic()
        self.calls.append(Entry(call.action, call.path, name, began, ended, call.body, problem))
        if self._is_hit(call, LOST):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return _plain(start, status, headers, content, head=call.method == "HEAD")

    def may(self, call: Call, action: str, path: str, *, data: bool = False) -> None:
        """Raise ApiError unless who calls has this right."""
        who = self.principals.get(call.token)
        if (
            who
            and who.roles
            and not any(one.allows(action, path, data=data) for one in who.roles())
        ):
            code = "AuthorizationPermissionMismatch" if data else "AuthorizationFailed"
            linked = "" if action == call.action else "linked "
            text = (
                f"The client '{who.name}' does not have authorization to perform {linked}action"
                f" '{action}' over scope '{path}' or the scope is invalid."
            )
            raise ApiError("LinkedAuthorizationFailed" if linked and not data else code, text, 403)

    def struck(self, call: Call) -> Fault | None:
        """Take the fault that awaits what a call has begun."""
        return next((one for one in self.faults if one.strikes(call, later=True)), None)

    def _check(self, call: Call, who: Principal | None) -> None:
        for fault in self.faults:
            if fault.code not in (LOST, CUT) and fault.strikes(call, later=False):
                raise ApiError(fault.code, fault.message, fault.status)
        if call.path.startswith("/serial/"):  # has its permission in its URL
            return
        blob = call.kind == "blob"
        if who is None:
            code = "InvalidAuthenticationInfo" if blob else "InvalidAuthenticationToken"
            raise ApiError(code, "The access token is invalid.", 401)
        if who.expired:
            code = "InvalidAuthenticationInfo" if blob else "ExpiredAuthenticationToken"
            raise ApiError(code, "The access token expired.", 401)
        if audience(call.token) != (STORAGE if blob else MANAGER):
            code = "InvalidAuthenticationInfo" if blob else "InvalidAuthenticationTokenAudience"
            raise ApiError(code, "The access token is for another audience.", 401)

    def _manage(self, call: Call) -> tuple[int, list[tuple[str, str]], bytes]:
        if not call.path.startswith(("/operations/", "/serial/")):
            if call.path != "/subscriptions":  # where everybody is told what they see
                self.may(call, call.action, _scope(call))
            if "api-version" not in call.query:
                raise ApiError("MissingApiVersionParameter", "api-version is required")
            if not VERSION.fullmatch(call.query["api-version"]):
                raise ApiError("InvalidApiVersionParameter", "api-version is no version")
        with self.lock:
            status, headers, body = self.azure.manager.call(call)
            self._right(call, body)
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        return status, headers, b"" if body is None else content

    def _right(self, call: Call, body: Any) -> None:
        """Note what no answer of Azure's would be."""
        if call.path.startswith("/operations/") or not isinstance(body, dict | list):
            return
        posted = call.name if call.method == "POST" else ""
        wrong = models.mistakes(call.kind, posted, body)
        self.bugs += [f"{call.method} {call.kind} answers {one}" for one in wrong]

    def _refused(self, call: Call, error: ApiError) -> tuple[list[tuple[str, str]], bytes]:
        if call.kind == "blob":
            text = f"<Error><Code>{error.code}</Code><Message>{error.message}</Message></Error>"
            return [("Content-Type", "application/xml"), ("x-ms-error-code", error.code)], (
                text.encode()
            )
        return [("Content-Type", "application/json")], json.dumps(error.body()).encode()

    def _is_hit(self, call: Call, code: str) -> bool:
        return any(one.code == code and one.strikes(call, later=False) for one in self.faults)


def _read(environ: dict[str, Any]) -> Call:
    """Understand a request; the account of blobs is in its path, or else in its host's name."""
    raw = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    host = environ.get("HTTP_HOST", "").partition(":")[0]
    if host.endswith(".blob.core.windows.net"):
        account = host.partition(".")[0]
        environ = {**environ, "RAW_URI": f"/{account}{environ['RAW_URI']}"}
    return wire.read(environ, raw)


def _scope(call: Call) -> str:
    """Say on what a right is needed: for the activity log, on the group that is asked about."""
    _, named, group = call.query.get("$filter", "").partition("resourceGroupName eq ")
    if not named:
        return call.path
    return call.path.replace("/providers/", f"/resourceGroups/{group.strip(chr(39))}/providers/")


def _plain(
    start: Callable[..., Any],
    status: int,
    headers: list[tuple[str, str]],
    content: bytes,
    *,
    head: bool = False,
) -> list[bytes]:
    usual = {"Content-Type": "application/json", "Content-Length": str(len(content))}
    if status == HTTPStatus.NO_CONTENT:
        del usual["Content-Length"]
    given = {name.lower() for name, _ in headers}
    more = [(name, value) for name, value in usual.items() if name.lower() not in given]
    start(f"{status} {HTTPStatus(status).phrase}", [*headers, *more])
    return [b"" if head else content]
