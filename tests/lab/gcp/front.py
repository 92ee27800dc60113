"""What stands before all services: it writes down calls, checks rights, and makes faults."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass, field
from socket import SHUT_RDWR
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from tests.lab.gcp import billing, discovery
from tests.lab.gcp.compute import PROJECT
from tests.lab.gcp.discovery import ApiError, Call
from tests.lab.gcp.iam import RIGHTS, lent
from tests.lab.gcp.login import CREDENTIALS, STS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.lab.gcp import GCP

APIS = {
    "compute.googleapis.com": "compute.v1",
    "iam.googleapis.com": "iam.v1",
    "cloudresourcemanager.googleapis.com": "cloudresourcemanager.v1",
}
TEST = ".testIamPermissions"
LOST = "lost"  # the reason of a fault: the call is carried out, but its answer never comes
OFF = (
    "{name} has not been used in project 123456789012 before or it is disabled. Enable it by"
    " visiting https://console.developers.google.com/apis/api/{name}/overview then retry."
)


@dataclass
class Fault:
    """An error to answer with, some times, to some method."""

    action: str  # as in the descriptions, or storage.objects.create, or metadata; * for all
    status: int
    reason: str
    message: str
    times: float = 1
    after: int = 0  # calls that go well before

    def strikes(self, action: str) -> bool:
        """Say if it is this call's turn."""
        if self.action not in ("*", action) or self.times <= 0:
            return False
        if self.after:
            self.after -= 1
            return False
        self.times -= 1
        return True


@dataclass
class Principal:
    """Who asks."""

    name: str
    rights: Callable[[Call], set[str]] | None = None  # None: may do everything
    expired: bool = False
    acts_as: bool = True  # may give machines our service account


@dataclass(frozen=True)
class Entry:
    """One call that was made."""

    action: str
    who: str
    began: float
    ended: float
    error: str = ""


@dataclass
class Front:
    """A WSGI application in front of all services."""

    gcp: GCP
    latency: float = 0  # seconds that every call takes longer
    ahead: float = 0  # seconds that the clock is
    watch: Callable[[str], None] = lambda _: None  # is told of every call before it is served
    calls: list[Entry] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    principals: dict[str, Principal] = field(default_factory=dict)
    tokens: dict[str, Principal] = field(default_factory=dict)
    off: set[str] = field(default_factory=set)  # services that aren't enabled

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        began = time.monotonic()
        host = environ["HTTP_HOST"].partition(":")[0]
        path = environ["PATH_INFO"]
        query: dict[str, str] = {}
        for key, value in parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True):
            query[key] = f"{query[key]},{value}" if key in query else value
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        who = self._who(environ.get("HTTP_AUTHORIZATION", ""))
        if host == billing.HOST:
            code, content = billing.answer(query, environ.get("HTTP_X_GOOG_API_KEY", ""))
            length = ("Content-Length", str(len(content)))
            start(f"{code} X", [("Content-Type", "application/json"), length])
            return [content]
        if host in (STS, CREDENTIALS):
            return self._log_in(host, path, environ, body, start)
        plain = host == "storage.googleapis.com" and not path.startswith("/storage/v1/")
        serve = self._object if plain else self._method
        verb = environ["REQUEST_METHOD"]
        action, status, headers, content = serve(host, verb, path, query, environ, body, who)
        name = who.name if who else "nobody"
        error = content.decode(errors="replace") if status >= 400 else ""
        self.calls.append(Entry(action, name, began, time.monotonic(), error))
        if status == 0:
            environ["werkzeug.socket"].shutdown(SHUT_RDWR)
            raise ConnectionError(LOST)
        if not any(one[0].lower() == "content-length" for one in headers):
            headers = [*headers, ("Content-Length", str(len(content)))]
        start(f"{status} {'OK' if status < 400 else 'Error'}", headers)
        return [b"" if verb == "HEAD" else content]

    def _log_in(
        self, host: str, path: str, environ: dict[str, Any], body: bytes, start: Callable[..., Any]
    ) -> list[bytes]:
        try:
            found = self.gcp.login_service.serve(
                host, path, environ.get("HTTP_AUTHORIZATION", ""), body
            )
            status, content = "200 OK", json.dumps(found).encode()
        except ApiError as error:
            status, content = f"{error.status} Error", _refusal(error)
        length = ("Content-Length", str(len(content)))
        start(status, [("Content-Type", "application/json"), length])
        return [content]

    def _who(self, header: str) -> Principal | None:
        token = header.removeprefix("Bearer ")
        if token in self.tokens:
            return self.tokens[token]
        parts = token.split(".")
        if len(parts) != 3:
            return None
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=="))
        scoped = "cloud-platform" in claims.get("scope", "")
        return (
            self.principals.get(claims["iss"]) if scoped and claims["exp"] > time.time() else None
        )

    def _method(
        self,
        host: str,
        verb: str,
        path: str,
        query: dict[str, str],
        environ: dict[str, Any],
        body: bytes,
        who: Principal | None,
    ) -> tuple[str, int, list[tuple[str, str]], bytes]:
        """Serve one of the described methods."""
        assert environ
        json_type = [("Content-Type", "application/json; charset=UTF-8")]
        action = f"{verb} {host}{path}"
        try:
            if host not in APIS and not path.startswith("/storage/v1/"):
                raise ApiError(404, "notFound", f"nobody is at {host}{path}")
            api = discovery.api(APIS.get(host, "storage.v1"))
            call = api.read(verb, path, query, body)
            action = call.method.id
            time.sleep(self.latency)
            self.watch(action)
            self._check(action, call, host, who)
            found = self._tested(call, who) if action.endswith(TEST) else self._serve(call)
            if call.method.response:
                api.check(found, {"$ref": call.method.response}, f"our answer to {action}")
            if self._strikes(action, lost=True):
                return action, 0, json_type, b""
        except ApiError as error:
            return action, error.status, json_type, _refusal(error)
        return action, 200, json_type, json.dumps(found).encode()

    def _tested(self, call: Call, who: Principal | None) -> Any:
        """Say which of some permissions somebody has; of what isn't there, none."""
        assert who
        wanted = call.body["permissions"] if call.body else call.query["permissions"].split(",")
        had = None if who.rights is None else who.rights(_nothing())
        if address := call.where.get("serviceAccountsId"):
            able = who.acts_as and address in self.gcp.iam.accounts
            had = {"iam.serviceAccounts.actAs"} if able else set()
        elif bucket := call.where.get("bucket"):
            if bucket not in self.gcp.storage.buckets:
                raise ApiError(404, "notFound", "The specified bucket does not exist.")
            had = None if had is None else had | self._lent(who.name, bucket)
        granted = [one for one in wanted if had is None or one in had]
        return {"permissions": granted} if granted else {}

    def _serve(self, call: Call) -> Any:
        service, _, name = call.method.id.partition(".")
        if service == "compute":
            compute = self.gcp.compute
            with compute.lock:
                if found := compute.repeated(call.query.get("requestId", "")):
                    return found
                method = getattr(compute, name.replace(".", "_"), None)
                if method is None:
                    raise ApiError(501, "notImplemented", f"the fake doesn't know {name}")
                return method(where=call.where, query=call.query, body=call.body)
        if service == "storage":
            storage = self.gcp.storage
            bucket = call.where.get("bucket")
            if bucket and bucket not in storage.buckets:
                raise ApiError(404, "notFound", "The specified bucket does not exist.")
            serve: dict[str, Callable[[Call], Any]] = {
                "buckets.insert": storage.insert,
                "buckets.list": storage.list,
                "buckets.patch": storage.patch,
                "buckets.getIamPolicy": storage.get_policy,
                "buckets.setIamPolicy": storage.set_policy,
            }
            return serve[name](call)
        own = name.removeprefix("projects.") if service == "iam" else name
        return getattr(self.gcp.iam, own.replace(".", "_"))(call)

    def _object(
        self,
        host: str,
        verb: str,
        path: str,
        query: dict[str, str],
        environ: dict[str, Any],
        body: bytes,
        who: Principal | None,
    ) -> tuple[str, int, list[tuple[str, str]], bytes]:
        """Serve an object."""
        assert host
        headers = {
            name[5:].replace("_", "-").lower(): str(value)
            for name, value in environ.items()
            if name.startswith("HTTP_")
        }
        kinds = {"GET": "get", "HEAD": "get", "PUT": "create", "DELETE": "delete"}
        is_object = "/" in path.strip("/")
        action = f"storage.objects.{kinds[verb] if is_object else 'list'}"
        time.sleep(self.latency)
        self.watch(action)
        for fault in self.faults:
            if fault.reason != LOST and fault.strikes(action):
                text = f"<Error><Code>{fault.reason}</Code><Message>{fault.message}"
                return action, fault.status, [], f"{text}</Message></Error>".encode()
        if who is None or who.expired:
            text = "<Error><Code>AuthenticationRequired</Code><Message>Authentication required."
            return action, 401, [], f"{text}</Message></Error>".encode()

        def allowed(right: str, bucket: str, key: str) -> bool:
            return who.rights is None or right in (
                who.rights(_nothing()) | self._lent(who.name, bucket, key)
            )

        found = self.gcp.storage.object(verb, path, query, headers, body, allowed)
        if self._strikes(action, lost=True):
            return action, 0, [], b""
        return action, found.status, list(found.headers), found.content

    def _lent(self, account: str, bucket: str, key: str = "") -> set[str]:
        """Say what a bucket's own policy lets somebody do with an object, or with itself."""
        name = f"projects/_/buckets/{bucket}" + (f"/objects/{key}" if key else "")
        return lent(self.gcp.storage.buckets[bucket].policy, account, name)

    def _check(self, action: str, call: Call, host: str, who: Principal | None) -> None:
        for fault in self.faults:
            if fault.reason != LOST and fault.strikes(action):
                raise ApiError(fault.status, fault.reason, fault.message)
        if who is None or who.expired:
            text = "Request had invalid authentication credentials. Expected OAuth 2 access token."
            raise ApiError(401, "authError", text)
        if host in self.off:
            raise ApiError(403, "accessNotConfigured", OFF.format(name=host), host)
        rights = who.rights(call) if who.rights else None
        for right in RIGHTS[action]:
            own = call.where.get("project", PROJECT) == PROJECT
            if rights is not None and right not in rights and (own or "images" not in right):
                raise ApiError(403, "forbidden", f"Required '{right}' permission for 'projects/x'")
        if action.endswith("GroupManagers.insert") and not who.acts_as:
            text = "The user does not have access to service account 'cml-runner@x'."
            more = " Ask a project owner to grant you the iam.serviceAccountUser role"
            raise ApiError(400, "SERVICE_ACCOUNT_ACCESS_DENIED", text + more)

    def _strikes(self, action: str, *, lost: bool) -> bool:
        return any(one.reason == LOST and one.strikes(action) for one in self.faults if lost)


def _nothing() -> Call:
    """A call about nothing that a condition could name."""
    method = discovery.api("storage.v1").methods[0]
    return Call(method, {}, {}, None)


def _refusal(error: ApiError) -> bytes:
    body: dict[str, Any] = {
        "code": error.status,
        "message": error.message,
        "errors": [{"message": error.message, "domain": "global", "reason": error.reason}],
    }
    if error.service:
        body["status"] = "PERMISSION_DENIED"
        body["details"] = [
            {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": "SERVICE_DISABLED",
                "domain": "googleapis.com",
                "metadata": {"service": error.service, "consumer": "projects/123456789012"},
            }
        ]
    return json.dumps({"error": body}).encode()
