"""Calls to Google Cloud: one session per process and region, and our errors in place of the SDK's.

Compute Engine is spoken to through its SDK; Cloud Storage, IAM and the Resource Manager, which
only `setup` asks for more than objects, through google-auth's own HTTP session.
"""

from __future__ import annotations

import json
import os
import re
import threading
import uuid
import warnings
from contextlib import contextmanager
from datetime import timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cml_runner import installer, web
from cml_runner.checkup import Clock
from cml_runner.errors import (
    AlreadyExists,
    CredentialsError,
    MissingDependency,
    NoCapacity,
    NoCredentials,
    NotFound,
    RunnerError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
PROJECT = ("GOOGLE_CLOUD_PROJECT", "GCP_PROJECT")  # variables that name it
DATA = "GOOGLE_APPLICATION_CREDENTIALS_DATA"  # what the file of credentials holds
PLACE = "GOOGLE_APPLICATION_CREDENTIALS"
CALL, WAIT = 60, 150  # seconds; an operation's own wait ends after two minutes
PATIENCE = 60  # seconds in which a call that fails is made again
PRODUCT = Path("/sys/class/dmi/id/product_name")
ON_GOOGLE = ("GCE_METADATA_HOST", "GCE_METADATA_IP", "K_SERVICE")  # set there; design 53

# Codes of operations and of what groups can't do, and reasons of errors:
# https://cloud.google.com/compute/docs/troubleshooting/troubleshooting-vm-creation
KINDS = (
    ("capacity", re.compile(r"POOL_EXHAUSTED|insufficientCapacity|STOCKOUT|UNSUPPORTED_OPERATION")),
    ("quota", re.compile(r"QUOTA_EXCEEDED|quotaExceeded|LIMIT_EXCEEDED|limitExceeded")),
    (
        "permission",
        re.compile(
            r"PERMISSION|FORBIDDEN|forbidden|ACCESS_DENIED|SERVICE_DISABLED|accessNotConfigured"
        ),
    ),
)
WORDS = (  # what the message says where the code says little
    ("quota", re.compile(r"quota '?\w+'? exceeded|quota .*exceeded", re.IGNORECASE)),
    (
        "capacity",
        re.compile(r"not have enough resources|is currently unavailable in the", re.IGNORECASE),
    ),
    (
        "permission",
        re.compile(
            r"required '[\w.]+' permission|does not have .* access|permission .* denied",
            re.IGNORECASE,
        ),
    ),
    ("image", re.compile(r"/images/|source ?image", re.IGNORECASE)),
)
OFF = re.compile(r"SERVICE_DISABLED|accessNotConfigured")
SERVICE = re.compile(r"\b([a-z]+\.googleapis\.com)")
PASSING = ("rateLimitExceeded", "userRateLimitExceeded")


class Session:
    """One project in one region. Nothing is imported or sent before the first call."""

    def __init__(self, region: str) -> None:
        self.region = region
        self._clients: dict[str, Any] = {}
        self._lock = threading.RLock()
        self.clock = Clock()

    @property
    def project(self) -> str:
        """The project in which we are."""
        return str(self._login[1])

    @property
    def who(self) -> str:
        """The address of the service account that we are; people's isn't told."""
        found = str(getattr(self._login[0], "service_account_email", None) or "")
        return found if "@" in found else "a user's login"

    def open(self) -> None:
        """Log in and load the SDK, which takes a second: what is asked next goes out at once."""
        _ = self._login, self._sdk

    def call(self, service: str, method: str, **fields: Any) -> Any:
        """Ask Compute Engine for something, in the SDK's words. Raises our errors."""
        with translated(f"{service}.{method}"):
            return self._send(service, method, fields)

    def pages(self, service: str, method: str, **fields: Any) -> list[Any]:
        """Collect a list which comes in pages."""
        with translated(f"{service}.{method}"):
            return list(self._send(service, method, fields))

    def begin(self, service: str, method: str, **fields: Any) -> Any:
        """Ask for a change; return the operation that makes it, which may fail yet.

        It is made once, however often it must be asked for until there is an answer.
        """
        with translated(f"{service}.{method}"):
            given = {**fields, "request_id": str(uuid.uuid4())}
            return self._send(service, f"{method}_unary", given)

    def finish(self, operation: Any) -> None:
        """Wait for the end of an operation. Raises what it fails with; done isn't success."""
        kind = "Global"
        where: dict[str, str] = {}
        if operation.zone:
            kind, where = "Zone", {"zone": last(operation.zone)}
        elif operation.region:
            kind, where = "Region", {"region": last(operation.region)}
        with translated(f"{kind}Operations.wait"):
            while operation.status != self._sdk.Operation.Status.DONE:
                operation = self._send(
                    f"{kind}Operations", "wait", {"operation": operation.name, **where}, WAIT
                )
        for error in operation.error.errors:
            raise _error(error.code, error.message, str(operation.operation_type))
        if operation.http_error_status_code >= 400:
            raise _error("", operation.http_error_message, str(operation.operation_type))

    def change(self, service: str, method: str, **fields: Any) -> None:
        """Make a change, and wait until it is made."""
        self.finish(self.begin(service, method, **fields))

    def rest(self, method: str, url: str, body: Any = None, **query: str) -> dict[str, Any]:
        """Make one call to an API of which we have no SDK."""
        with translated(url):
            from google.api_core import exceptions

            answer = self._http.request(method, url, json=body, params=query, timeout=CALL)
            self.clock.hear(answer.headers.get("Date"))
            if answer.status_code >= 400:
                raise exceptions.from_http_response(answer)
            found: dict[str, Any] = answer.json() if answer.content else {}
            return found

    def credentials(self) -> dict[str, Any]:
        """Return what opens Cloud Storage, in obstore's terms; it asks again when that expires."""
        with translated("login"), self._lock:
            from google.auth.transport.requests import Request

            found = self._login[0]
            if not found.valid:
                found.refresh(Request())
            expires = found.expiry.replace(tzinfo=timezone.utc) if found.expiry else None
            return {"token": found.token, "expires_at": expires}

    @cached_property
    def _login(self) -> tuple[Any, str]:
        with self._lock, translated("login"):
            credentials, own = _credentials()
        named = next((os.environ[name] for name in PROJECT if os.environ.get(name)), "")
        if not (named or own):
            msg = "which project? The credentials don't say: set GOOGLE_CLOUD_PROJECT"
            raise CredentialsError(msg)
        return credentials, named or own

    @cached_property
    def _http(self) -> Any:
        from google.auth.transport.requests import AuthorizedSession

        return AuthorizedSession(self._login[0])

    @cached_property
    def _sdk(self) -> Any:
        try:
            with _quiet():
                from google.cloud import compute_v1
        except ImportError as error:
            raise MissingDependency(installer.lacking("gcp")) from error
        return compute_v1

    @cached_property
    def _retry(self) -> Any:
        from google.api_core import retry

        return retry.Retry(
            predicate=_passes, initial=0.2, maximum=10, multiplier=2, timeout=PATIENCE
        )

    def _send(
        self, service: str, method: str, fields: dict[str, Any], timeout: float = CALL
    ) -> Any:
        request = {"project": self.project, **fields}
        if service.startswith("Region") and "region" not in request:
            request["region"] = self.region
        call = getattr(self._client(service), method)
        return call(request=request, retry=self._retry, timeout=timeout)

    def _client(self, service: str) -> Any:
        with self._lock:
            if service not in self._clients:
                new = getattr(self._sdk, f"{service}Client")
                self._clients[service] = new(credentials=self._login[0])
            return self._clients[service]


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise our errors in place of the SDK's."""
    try:
        with _quiet():
            import requests
            from google.api_core import exceptions
            from google.auth import exceptions as logins
    except ImportError as error:
        raise MissingDependency(installer.lacking("gcp")) from error
    try:
        yield
    except exceptions.RetryError as error:
        with translated(what):
            raise error.cause from None
    except exceptions.GoogleAPICallError as error:
        raise _refused(error, what) from error
    except logins.TransportError as error:
        raise _unreachable(error) from error
    except (logins.GoogleAuthError, ValueError) as error:
        if isinstance(error, ValueError) and what != "login":
            raise
        msg = f"Google Cloud takes no credentials of ours: {error}. Set {PLACE} or {DATA}"
        raise CredentialsError(msg) from error
    except requests.RequestException as error:
        raise _unreachable(error) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Import without the warning that some day a Python will be too old for the SDK."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def kind(code: str, message: str) -> str:
    """Say what a code and its message mean, in the terms of model.Happening."""
    for name, codes in KINDS:
        if codes.search(code):
            return name
    return next((name for name, words in WORDS if words.search(message)), "error")


def told(code: str, message: str) -> str:
    """Say it to people; of an API that isn't enabled, with the command that does it."""
    text = f"{message} ({code})" if code else message
    if OFF.search(code) or "it is disabled" in message:
        match = SERVICE.search(message)
        service = match[1] if match else "compute.googleapis.com"
        text += f"; to enable it: gcloud services enable {service}"
    return text


def _credentials() -> tuple[Any, str]:
    """Find credentials, and the project that they are of, if they say so."""
    import google.auth

    if data := os.environ.get(DATA):
        found, project = _read(json.loads(data))
    elif _anywhere():
        found, project = google.auth.default(scopes=SCOPES)
    else:
        msg = (
            f"no Google Cloud credentials: set {PLACE} to a file of them, or {DATA} to its"
            " contents, or run gcloud auth application-default login; in a CI job, use the"
            " provider's OIDC login with workload identity federation"
        )
        raise NoCredentials(msg)
    if hasattr(found, "with_always_use_jwt_access"):  # a key signs its tokens by itself
        found = found.with_always_use_jwt_access(True)
    return found, project or ""


def _read(info: dict[str, Any]) -> tuple[Any, str]:
    """Understand what would be in a file of credentials. Raises ValueError."""
    from google.auth import aws, identity_pool
    from google.oauth2 import credentials, service_account

    kind, source = info.get("type"), info.get("credential_source", {})
    if kind == "service_account":
        key = service_account.Credentials.from_service_account_info(info, scopes=SCOPES)
        return key, key.project_id
    if kind == "authorized_user":
        user = credentials.Credentials.from_authorized_user_info(info, scopes=SCOPES)
        return user, info.get("quota_project_id", "")
    if kind == "external_account":  # workload identity federation
        pool = aws if "environment_id" in source else identity_pool
        return pool.Credentials.from_info(info, scopes=SCOPES), ""
    msg = f"{DATA} is of a type that isn't known here: {kind}"
    raise ValueError(msg)


def _anywhere() -> bool:
    """Say if there may be credentials; the SDK would ask a network that hasn't got them."""
    home = os.environ.get("CLOUDSDK_CONFIG") or Path.home() / ".config" / "gcloud"
    on_google = any(os.environ.get(name) for name in ON_GOOGLE)
    if not on_google and PRODUCT.exists():
        on_google = PRODUCT.read_text().startswith("Google")
    there = Path(home, "application_default_credentials.json").exists()
    return bool(os.environ.get(PLACE)) or there or on_google


def _passes(error: Exception) -> bool:
    """Say if the same call may succeed a moment later."""
    from google.api_core import exceptions, retry

    if isinstance(error, exceptions.BadGateway | exceptions.GatewayTimeout):
        return True
    if isinstance(error, exceptions.Forbidden):
        return _reason(error) in PASSING
    return bool(retry.if_transient_error(error))


def _reason(error: Any) -> str:
    """Return the one word that says most."""
    for one in error.details or ():
        found = one.get("reason") if isinstance(one, dict) else getattr(one, "reason", "")
        if found:
            return str(found)
    for one in error.errors or ():
        if isinstance(one, dict) and one.get("reason"):
            return str(one["reason"])
    return ""


def _refused(error: Any, what: str) -> RunnerError:
    reason, text = _reason(error), re.sub(r"^[A-Z]+ https?://\S+: ", "", str(error.message))
    if error.code == 401:
        return CredentialsError(f"Google Cloud refuses our credentials: {text}. Renew them")
    if error.code == 404:
        return NotFound(f"{text} ({what})")
    if error.code == 409 and kind(reason, "") == "error":
        return AlreadyExists(f"{text} ({what})")
    return _error(reason, text, what)


def _error(code: str, text: str, what: str) -> RunnerError:
    found = kind(code, text)
    if found in ("capacity", "quota"):
        return NoCapacity(told(code, text))
    if found == "permission":
        msg = f"not allowed: {what}: {told(code, text)}"
        if not OFF.search(code):
            msg += ". What is needed is printed by: cml-runner permissions gcp"
        return CredentialsError(msg)
    if code in ("RESOURCE_NOT_FOUND", "notFound"):
        return NotFound(f"{text} ({what})")
    if code in ("RESOURCE_ALREADY_EXISTS", "alreadyExists"):
        return AlreadyExists(f"{text} ({what})")
    return RunnerError(f"{what}: {told(code, text)}")


def _unreachable(error: Exception) -> RunnerError:
    return RunnerError(f"Google Cloud {web.trouble(error)}")


def last(url: str) -> str:
    """Return the name at the end of a resource's address."""
    return url.rpartition("/")[2]
