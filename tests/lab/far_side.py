"""What the fakes of forges have in common: a server on loopback, its faults, what it was asked."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException
from werkzeug.serving import WSGIRequestHandler, make_server

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Asked:
    """One request, and the status that came of it (0: no answer)."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Any
    status: int
    answer: Any = None  # if it was JSON


@dataclass
class Fault:
    """Something that goes wrong; `hits` says how often it did."""

    method: str
    path: str
    left: float
    status: int
    headers: Mapping[str, str]
    body: Any
    drop: bool
    after: bool
    hits: int = 0


@dataclass
class FarSide:
    """The server runs between __enter__ and __exit__, which complains about its own bugs."""

    prefix: str = ""  # of all paths
    faults: list[Fault] = field(default_factory=list)
    requests: list[Asked] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)
    changed: threading.RLock = field(default_factory=threading.RLock)
    address: str = ""  # by which programs know it, if there is a proxy before it
    ahead: float = 0  # seconds that its clock is

    def __post_init__(self) -> None:
        self.app = Flask(type(self).__name__)
        self.app.before_request(self._before)
        self.app.after_request(self._after)
        self.app.register_error_handler(Exception, self._failed)
        self.routes()
        self._server = make_server(
            "127.0.0.1", 0, self.app, threaded=True, request_handler=self._handler()
        )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def routes(self) -> None:
        """Register what it answers, in self.app."""
        raise NotImplementedError

    @property
    def own_url(self) -> str:
        """Where it really is."""
        return f"http://127.0.0.1:{self._server.server_port}{self.prefix}"

    @property
    def url(self) -> str:
        """What people type."""
        return self.address or self.own_url

    def __enter__(self) -> Any:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
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
        after: bool = False,
    ) -> Fault:
        """Let some requests go wrong; `path` is a regular expression for all of a path.

        A status is answered in place of the right one; with `drop` the connection is broken. With
        `after` the request is first obeyed: only its answer is lost.
        """
        fault = Fault(method, path, times, status, headers or {}, body, drop, after)
        with self.changed:
            self.faults.append(fault)
        return fault

    def asked(self, method: str, path: str) -> list[Asked]:
        """Return the requests so far whose path matches a regular expression."""
        with self.changed:
            return [o for o in self.requests if o.method == method and re.fullmatch(path, o.path)]

    def _handler(self) -> type[WSGIRequestHandler]:
        far = self

        class Handler(_Quiet):
            def date_time_string(self, timestamp: float | None = None) -> str:
                return super().date_time_string((timestamp or time.time()) + far.ahead)

        return Handler

    # One request

    def _path(self) -> str:
        return str(request.environ.get("RAW_URI", request.path)).partition("?")[0]

    def _fault(self) -> Fault | None:
        with self.changed:
            for fault in self.faults:
                fits = fault.method == request.method and re.fullmatch(fault.path, self._path())
                if fits and fault.left > 0:
                    fault.left -= 1
                    fault.hits += 1
                    return fault
        return None

    def _before(self) -> Response | None:
        fault = request.environ["lab.fault"] = self._fault()
        return self._spoilt(fault) if fault and not fault.after else None

    def _after(self, response: Response) -> Response:
        fault: Fault | None = request.environ.get("lab.fault")
        if fault and fault.after:
            response = self._spoilt(fault)
        self._log(response.status_code, response.get_json(silent=True))
        return response

    def _spoilt(self, fault: Fault) -> Response:
        if fault.drop:
            self._log(0)
            connection = request.environ["werkzeug.socket"]
            connection.shutdown(socket.SHUT_RDWR)
        body = fault.body if isinstance(fault.body, str) else json.dumps(fault.body)
        found = Response(body, fault.status or 500, mimetype="application/json")
        for name, value in fault.headers.items():
            found.headers[name] = value
        return found

    def _log(self, status: int, answer: Any = None) -> None:
        body = request.get_json(silent=True) if request.is_json else request.form.to_dict()
        seen = (request.method, self._path(), request.args.to_dict(), dict(request.headers))
        with self.changed:
            self.requests.append(Asked(*seen, body, status, answer))

    def _failed(self, error: Exception) -> Any:
        if isinstance(error, HTTPException):
            return self.refusal(error.code or 500, str(error.description))
        self.bugs.append(traceback.format_exc())
        return self.refusal(500, "Internal Server Error")

    def refusal(self, status: int, message: str) -> Response:
        """Say no, in the words of this forge."""
        raise NotImplementedError


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        """Be silent."""
