"""The only file that knows the SDK: who we are, and one call to Resource Manager.

Requests and answers are the API's own JSON, https://learn.microsoft.com/rest/api/azure/; the SDK
finds the credentials, keeps them fresh, tries again, and speaks TLS.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cml_runner.clouds.azure import arm
from cml_runner.errors import CredentialsError, MissingDependency, NotReady, RunnerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from azure.core import PipelineClient
    from azure.core.credentials import TokenCredential

STORAGE = "https://storage.azure.com/.default"
CONNECT, READ = 5, 60  # seconds for a connection, and for an answer
REPEATED = frozenset({"GET", "PUT", "PATCH", "POST", "DELETE"})  # all that we send may be
POLL = 1  # second between two looks at what Azure is doing
LONGEST = 900  # seconds that it may take
ELSEWHERE = "AZURE_POD_IDENTITY_AUTHORITY_HOST"  # the SDK's, for a metadata service
CHASSIS = Path("/sys/class/dmi/id/chassis_asset_tag")
OF_AZURE = "7783-7084-3265-9085-8269-3286-77"  # what every machine of Azure says there
GITHUB = ("ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN")
AUDIENCE = "api://AzureADTokenExchange"
HELP = (
    "set AZURE_CLIENT_ID, AZURE_TENANT_ID, AZURE_SUBSCRIPTION_ID and AZURE_CLIENT_SECRET (in a CI"
    " job with OIDC the secret isn't needed), or run: az login"
)


@dataclass(frozen=True)
class Answer:
    """What came back, and where to look at what goes on after it."""

    body: dict[str, Any]
    operation: str = ""  # URL


class Session:
    """One subscription. Nothing is imported or sent before the first call."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @property
    def subscription(self) -> str:
        """The one that is named, or az's, or the only one that there is."""
        with self._lock:
            return self._subscription

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Make one call, and wait for what it begins.

        Raises NotFound, AlreadyExists, NoCapacity, CredentialsError, or RunnerError.
        """
        found = self.begin(method, path, body, headers=headers, query=query)
        self.finish(found.operation, f"{method} {path}")
        return found.body

    def begin(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Answer:
        """Make one call; tried again where that makes sense. Raises the same."""
        asked = {**(query or {}), "api-version": arm.version(path)}
        answer = self._send(method, f"{arm.endpoint()}{path}", body, headers or {}, asked)
        return Answer(arm.parsed(answer.content), _operation(answer.headers))

    def finish(self, operation: str, what: str, longest: float = LONGEST) -> None:
        """Wait until an operation is done. Raises NotReady, or what became of it."""
        end = time.monotonic() + longest
        while operation and not self.done(operation, what):
            if time.monotonic() > end:
                msg = f"gave up after {longest:.0f} s waiting for Azure to {what}"
                raise NotReady(msg)
            time.sleep(POLL)

    def done(self, operation: str, what: str) -> bool:
        """Say if an operation is done. Raises what became of it if it failed."""
        state, content = self.state(operation)
        if state == "Failed":
            raise arm.typed(*arm.details(content), what)
        return state == "Succeeded"

    def state(self, operation: str) -> tuple[str, Any]:
        """Say how far an operation is: InProgress, Succeeded or Failed; and what it says."""
        answer = self._send("GET", operation, None, {}, {})
        content = arm.parsed(answer.content)
        if answer.status_code == HTTPStatus.ACCEPTED:
            return "InProgress", content
        # What has no status of its own is done when its answer isn't "202 Accepted" any more.
        status = content.get("status") if isinstance(content, dict) else None
        known = {"Succeeded": "Succeeded", "Failed": "Failed", "Canceled": "Failed"}
        return known.get(status, "InProgress") if status else "Succeeded", content

    def pages(self, path: str, query: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Collect a list which comes in pages."""
        page = self.call("GET", path, query=query)
        found: list[dict[str, Any]] = list(page.get("value", ()))
        while following := page.get("nextLink"):
            page = arm.parsed(self._send("GET", following, None, {}, {}).content)
            found += page.get("value", ())
        return found

    def read(self, url: str) -> str:
        """Read what has its permission in its URL."""
        import requests

        try:
            answer = requests.get(url, timeout=30)
            answer.raise_for_status()
        except requests.RequestException as error:
            raise RunnerError(str(error).partition("?")[0]) from error
        return answer.text

    def credentials(self) -> dict[str, Any]:
        """Return what opens the storage account, in obstore's terms; it asks when that expires."""
        with translated():
            with self._lock:
                credential = self._credential
            found = credential.get_token(STORAGE)
        return {
            "token": found.token,
            "expires_at": datetime.fromtimestamp(found.expires_on, timezone.utc),
        }

    def _send(
        self,
        method: str,
        url: str,
        body: Any,
        headers: Mapping[str, str],
        query: Mapping[str, str],
    ) -> Any:
        with translated():
            from azure.core.rest import HttpRequest

            with self._lock:
                client = self._client
            content = None if body is None else json.dumps(body).encode()
            own = {"Content-Type": "application/json"} if content else {}
            request = HttpRequest(
                method, url, params=dict(query), headers={**own, **headers}, content=content
            )
            secure = url.startswith("https:")
            answer = client.send_request(request, enforce_https=secure, retry_on_methods=REPEATED)
        if answer.status_code >= HTTPStatus.BAD_REQUEST:
            path = url.partition("?")[0].removeprefix(arm.endpoint())
            raise arm.failure(answer.status_code, arm.parsed(answer.content), f"{method} {path}")
        return answer

    @cached_property
    def _client(self) -> PipelineClient[Any, Any]:
        from azure.core import PipelineClient
        from azure.core.pipeline import policies

        scope = f"{arm.RESOURCE}/.default"
        return PipelineClient(
            arm.endpoint(),
            connection_timeout=CONNECT,
            read_timeout=READ,
            policies=[
                policies.RequestIdPolicy(),
                policies.UserAgentPolicy(base_user_agent="cml-runner"),
                policies.RetryPolicy(retry_total=6, retry_backoff_factor=0.5),
                policies.BearerTokenCredentialPolicy(self._credential, scope),
            ],
        )

    @cached_property
    def _credential(self) -> TokenCredential:
        try:
            return _credential()
        except ImportError as error:
            raise MissingDependency("azure") from error

    @cached_property
    def _subscription(self) -> str:
        if found := os.environ.get("AZURE_SUBSCRIPTION_ID") or _of_cli():
            return found
        names = [str(one["subscriptionId"]) for one in self.pages("/subscriptions")]
        if len(names) != 1:
            msg = f"which subscription? set AZURE_SUBSCRIPTION_ID: {', '.join(names) or 'none'}"
            raise CredentialsError(msg)
        return names[0]


@contextmanager
def translated() -> Iterator[None]:
    """Raise our errors in place of the SDK's."""
    try:
        from azure.core import exceptions
    except ImportError as error:
        raise MissingDependency("azure") from error
    try:
        yield
    except exceptions.ClientAuthenticationError as error:
        msg = f"no access to Azure: {_first_line(error)}. To get it, {HELP}"
        raise CredentialsError(msg) from error
    except (exceptions.ServiceRequestError, exceptions.ServiceResponseError) as error:
        msg = f"can't reach Azure; is there a network? {_first_line(error)}"
        raise RunnerError(msg) from error
    except exceptions.AzureError as error:
        raise RunnerError(_first_line(error)) from error


def _operation(headers: Mapping[str, str]) -> str:
    return headers.get("Azure-AsyncOperation") or headers.get("Location") or ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _credential() -> TokenCredential:
    """Choose by what is there, so that nobody waits for what isn't. Raises CredentialsError."""
    from azure import identity

    tenant, client = (os.environ.get(f"AZURE_{name}_ID", "") for name in ("TENANT", "CLIENT"))
    named = bool(tenant and client)
    secrets = ("AZURE_CLIENT_SECRET", "AZURE_CLIENT_CERTIFICATE_PATH")
    if named and any(map(os.environ.get, secrets)):
        return identity.EnvironmentCredential()
    if named and os.environ.get("AZURE_FEDERATED_TOKEN_FILE"):
        return identity.WorkloadIdentityCredential()
    if named and all(map(os.environ.get, GITHUB)):
        return identity.ClientAssertionCredential(tenant, client, _of_github)
    if _of_cli() and shutil.which("az"):
        return identity.AzureCliCredential()
    if _on_azure():
        return identity.ManagedIdentityCredential(client_id=client or None)
    msg = f"no credentials for Azure: {HELP}"
    raise CredentialsError(msg)


def _on_azure() -> bool:
    """Say if there may be a metadata service with our identity; an empty variable denies it."""
    if ELSEWHERE in os.environ:
        return bool(os.environ[ELSEWHERE])
    variables = ("IDENTITY_ENDPOINT", "MSI_ENDPOINT")
    try:
        return any(map(os.environ.get, variables)) or CHASSIS.read_text().strip() == OF_AZURE
    except OSError:
        return False


def _of_github() -> str:
    """Ask GitHub for what proves which workflow this is."""
    import requests

    url, token = (os.environ[name] for name in GITHUB)
    headers = {"Authorization": f"Bearer {token}"}
    try:
        answer = requests.get(url, headers=headers, params={"audience": AUDIENCE}, timeout=30)
        answer.raise_for_status()
        return str(answer.json()["value"])
    except (requests.RequestException, ValueError, KeyError) as error:
        msg = f"GitHub doesn't say who we are; has the job `id-token: write`? {error}"
        raise CredentialsError(msg) from error


def _of_cli() -> str:
    """Name the subscription that az has been told to use."""
    home = os.environ.get("AZURE_CONFIG_DIR") or "~/.azure"
    try:
        text = Path(home, "azureProfile.json").expanduser().read_text(encoding="utf-8-sig")
        listed = json.loads(text)["subscriptions"]
        return str(next(one["id"] for one in listed if one.get("isDefault")))
    except (OSError, ValueError, KeyError, StopIteration, TypeError):
        return ""
