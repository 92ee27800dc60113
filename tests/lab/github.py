"""A stateful GitHub on loopback: its REST API, and a runner protocol of its own.

What programs and people see of GitHub is as its documentation and its official description have
it. The protocol between GitHub and its runner program is not documented, so the one below
/_runner is made up; only the stand-in in actions_runner.py speaks it.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl, urlsplit

from tests.lab import actions_runner, github_api, github_runners
from tests.lab.github_api import Answer, Call
from tests.lab.github_shapes import Address
from tests.lab.github_state import Refused, Run, State, Token, WorkflowJob

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["GitHub", "Request", "Run", "WorkflowJob"]
DOCUMENTATION = "https://docs.github.com/rest"
SECONDARY = (
    "You have exceeded a secondary rate limit. Please wait a few minutes before you try again."
)


@dataclass(frozen=True)
class Request:
    """What was asked, with what kind of credential, and what came of it (0: nothing)."""

    method: str
    path: str  # without /api/v3
    query: Mapping[str, str]
    authorization: str  # "classic", "installation", "app", "RemoteAuth", "bad", "none", …
    body: Any
    headers: Mapping[str, str]
    status: int = 0
    answer: Any = field(default=None, repr=False)


@dataclass
class Fault:
    """Something that goes wrong; `hits` says how often it did."""

    method: str
    path: str
    left: float
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    drop: bool = False
    delay: float = 0
    after: bool = False
    hits: int = 0


class GitHub(State):
    """The server runs between __enter__ and __exit__, which complains about its own bugs."""

    def __init__(self) -> None:
        super().__init__()
        self.version = "2.337.0"  # of the newest runner program
        self.python = sys.executable  # where the runner program is started
        self.address = ""  # by which programs know it, if there is a proxy before it
        self.checksum = ""  # given for it in place of the right one
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.bugs: list[str] = []
        self.ahead: float = 0  # seconds that its clock is
        self.limited: tuple[float, bool] = (0.0, False)
        self._server = _Server(self)
        self._thread = Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """What people type; repositories are found right below it."""
        return self.address or self.own_url

    @property
    def own_url(self) -> str:
        """Where it really is."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def api_url(self) -> str:
        return f"{self.url}/api/v3"

    def __enter__(self) -> GitHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        self._thread.join()
        if self.bugs:
            raise AssertionError("\n".join(self.bugs))

    def fault(
        self,
        method: str,
        path: str,
        times: float = 1,
        *,
        status: int = 0,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        drop: bool = False,
        delay: float = 0,
        after: bool = False,
    ) -> Fault:
        """Let some requests go wrong; `path` is a regular expression for all of a path.

        A status is answered in place of the right one; with `drop` the connection is broken;
        `delay` (seconds) comes before that, or before the right answer. With `after` the request
        is first obeyed: only its answer is lost.
        """
        fault = Fault(method, path, times, status, headers or {}, body, drop, delay, after)
        with self.changed:
            self.faults.append(fault)
        return fault

    def limit(self, seconds: float, *, secondary: bool = False) -> None:
        """Refuse every call of the API for a while because there were too many."""
        self.limited = time.time() + seconds, secondary

    def package(self, version: str = "", arch: str = "x64") -> tuple[bytes, str]:
        """Return the stand-in's tarball and its SHA-256."""
        return actions_runner.build(version or self.version, arch, self.python)

    def sums(self) -> dict[str, str]:
        """Return the checksums which are published for the newest version."""
        arches = ("x64", "arm64")
        return {f"linux-{one}": self.checksum or self.package(arch=one)[1] for one in arches}

    def owner_kind(self, owner: str) -> str:
        return "Organization" if f"orgs/{owner}".lower() in self.places else "User"

    def asked(self, method: str, path: str) -> list[Request]:
        """Return the requests so far whose path matches a regular expression."""
        with self.changed:
            seen = list(self.requests)
        return [one for one in seen if one.method == method and re.fullmatch(path, one.path)]

    # One request

    def take_fault(self, call: Call) -> Fault | None:
        with self.changed:
            for fault in self.faults:
                fits = re.fullmatch(fault.path, call.path) and fault.method == call.method
                if fits and fault.left > 0:
                    fault.left -= 1
                    fault.hits += 1
                    return fault
        return None

    def answer(self, call: Call) -> Answer:
        """Do what it asks for; never fails."""
        try:
            return self._route(call)
        except Refused as refusal:
            body = {"message": refusal.message, "status": str(refusal.status)}
            body["documentation_url"] = DOCUMENTATION
            return Answer(refusal.status, body, refusal.headers)
        except Exception:
            self.bugs.append(traceback.format_exc())
            return Answer(500, {"message": "Server Error"})

    def authorization(self, call: Call) -> str:
        """Name the kind of the credential; the credential itself is kept nowhere."""
        kind = call.authorization.partition(" ")[0]
        if not kind or kind == "RemoteAuth" or call.path.startswith("/_runner/"):
            return kind or "none"
        try:
            caller = github_api.identify(self, call.authorization)
        except Refused:
            return "bad"
        return caller.kind if isinstance(caller, Token) else "app"

    def _route(self, call: Call) -> Answer:
        if call.path.startswith("/_runner/"):
            return github_runners.answer(call)
        if match := re.fullmatch(r"/_downloads/([^/]+)/actions-runner-linux-(\w+)-.*", call.path):
            return Answer(200, self.package(match[1], match[2])[0])
        self._check_limit()
        return github_api.answer(call)

    def _check_limit(self) -> None:
        until, secondary = self.limited
        if (left := until - time.time()) <= 0:
            return
        if secondary:
            raise Refused(403, SECONDARY, Retry_After=str(int(left) + 1))
        reset = str(int(until) + 1)
        message = "API rate limit exceeded for user ID 1."
        raise Refused(403, message, X_RateLimit_Remaining="0", X_RateLimit_Reset=reset)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, gh: GitHub) -> None:
        self.gh = gh
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def stop(self) -> None:
        """Stop at once, and break the connections which are still open."""
        self.shutdown()
        self.server_close()
        with self.gh.changed:
            for runner in self.gh.found.values():
                runner.session = ""
            self.gh.changed.notify_all()
        for connection in list(self.open):
            _break(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no fault of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        cast("_Server", self.server).open.add(self.connection)

    def finish(self) -> None:
        cast("_Server", self.server).open.discard(self.connection)
        super().finish()

    def handle_any(self) -> None:
        gh = cast("_Server", self.server).gh
        call = self._call(gh)
        kind = gh.authorization(call)
        fault = gh.take_fault(call)
        answer = None
        if fault:
            time.sleep(fault.delay)
        if not fault or fault.after or not (fault.status or fault.drop):
            answer = gh.answer(call)
        if fault and fault.drop:
            answer = None
        elif fault and fault.status:
            body = {"message": "Server Error"} if fault.body is None else fault.body
            answer = Answer(fault.status, body, fault.headers)
        self._log(gh, call, kind, answer)
        if answer:
            self._send(answer, call)
        else:
            self.close_connection = True
            _break(self.connection)

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = handle_any

    def date_time_string(self, timestamp: float | None = None) -> str:
        ahead = cast("_Server", self.server).gh.ahead
        return super().date_time_string((timestamp or time.time()) + ahead)

    def log_message(self, *_: Any) -> None:
        """Be silent."""

    def _call(self, gh: GitHub) -> Call:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        split = urlsplit(self.path)
        html = gh.address or f"http://{self.headers.get('Host') or gh.own_url.partition('//')[2]}"
        prefix = "/api/v3" if split.path.startswith("/api/v3") else ""
        is_json = "json" in self.headers.get("Content-Type", "json")
        return Call(
            gh,
            self.command,
            split.path[len(prefix) :] or "/",
            dict(parse_qsl(split.query)),
            _parsed(content) if is_json else content,
            self.headers.get("Authorization") or "",
            Address(html, html + prefix),
            self._alive,
        )

    def _alive(self) -> bool:
        """Tell if the client still waits for an answer."""
        try:
            seen: bytes = self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return seen != b""

    def _log(self, gh: GitHub, call: Call, kind: str, answer: Answer | None) -> None:
        shown = {name: value for name, value in self.headers.items() if name != "Authorization"}
        status = answer.status if answer else 0
        body = answer.body if answer else None
        seen = (call.method, call.path, call.query, kind, call.body, shown, status, body)
        with gh.changed:
            gh.requests.append(Request(*seen))
            gh.changed.notify_all()

    def _send(self, answer: Answer, call: Call) -> None:
        used = len(call.gh.requests)
        raw = isinstance(answer.body, bytes)
        content = cast("bytes", answer.body) if raw else json.dumps(answer.body).encode()
        headers = {
            "Content-Type": "application/octet-stream" if raw else "application/json",
            "X-GitHub-Request-Id": secrets.token_hex(8).upper(),
            "X-RateLimit-Limit": "5000",
            "X-RateLimit-Remaining": str(max(5000 - used, 1)),
            "X-RateLimit-Used": str(used),
            "X-RateLimit-Reset": str(int(time.time()) + 3600),
            "X-RateLimit-Resource": "core",
            **(answer.headers or {}),
        }
        if isinstance(call.caller, Token) and call.caller.kind == "classic":
            headers["X-OAuth-Scopes"] = ", ".join(sorted(call.caller.scopes))
        self.send_response(answer.status)
        if answer.status != 204:
            headers["Content-Length"] = str(len(content))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if answer.status != 204:
            self.wfile.write(content)


def _break(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the other side was faster


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content) if content else None
    except ValueError:
        return content
