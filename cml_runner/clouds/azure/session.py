"""The only file that knows the SDK: who we are, and one call of a management client.

Calls have the SDK's own names, https://learn.microsoft.com/python/api/overview/azure/; what goes
in and what comes out are dictionaries as in https://learn.microsoft.com/rest/api/azure/.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import shutil
import threading
import time
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cml_runner import installer
from cml_runner.boot.first_azure import MANAGER, manager
from cml_runner.checkup import Clock
from cml_runner.clouds.azure import arm
from cml_runner.errors import (
    CredentialsError,
    MissingDependency,
    NoCredentials,
    NotReady,
    RunnerError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from azure.core.credentials import AccessToken, TokenCredential
    from azure.core.polling import LROPoller

    Operation: TypeAlias = LROPoller[Any]  # what Azure has begun

CLIENTS = {  # each is imported when it is first called
    "authorization": ("azure.mgmt.authorization", "AuthorizationManagementClient"),
    "compute": ("azure.mgmt.compute", "ComputeManagementClient"),
    "monitor": ("azure.mgmt.monitor", "MonitorManagementClient"),
    "msi": ("azure.mgmt.msi", "ManagedServiceIdentityClient"),
    "network": ("azure.mgmt.network", "NetworkManagementClient"),
    "resource": ("azure.mgmt.resource.resources", "ResourceManagementClient"),
    "storage": ("azure.mgmt.storage", "StorageManagementClient"),
    "subscriptions": ("azure.mgmt.resource.subscriptions", "SubscriptionClient"),
}
CLAIMS = ("upn", "unique_name", "app_displayname", "appid", "oid")  # of tokens, who it is
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


class Session:
    """One subscription. Nothing is imported or sent before the first call."""

    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}
        self._lock = threading.RLock()  # clients are safe among threads, their making isn't
        self.clock = Clock()

    @property
    def subscription(self) -> str:
        """The one that is named, or az's, or the only one that there is."""
        with self._lock:
            return self._subscription

    @property
    def who(self) -> str:
        """Who we are, as the token says: a person's name, or the number of an application."""
        with translated("log in"), self._lock:
            token = self._login.get_token(f"{MANAGER}/.default").token
        with suppress(ValueError, IndexError):
            claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
            return str(next(claims[name] for name in CLAIMS if claims.get(name)))
        return "somebody"

    def call(
        self, service: str, group: str, method: str, *arguments: Any, **named: Any
    ) -> dict[str, Any]:
        """Make one call, and wait for what it begins; then there is nothing to return.

        Raises NotFound, AlreadyExists, NoCapacity, CredentialsError, or RunnerError.
        """
        if method.startswith("begin_"):
            operation = self.begin(service, group, method, *arguments, **named)
            self.finish(operation, _action(group, method))
            return {}
        with translated(_action(group, method)):
            ask = self._method(service, group, method)
            found: dict[str, Any] = ask(*arguments, cls=_answer, **_options(), **named)
        return found

    def begin(
        self, service: str, group: str, method: str, *arguments: Any, **named: Any
    ) -> Operation:
        """Begin an operation, and don't wait for it. Raises the same."""
        with translated(_action(group, method)):
            ask = self._method(service, group, method)
            found: Operation = ask(*arguments, polling=_watched(), **_options(), **named)
        return found

    def finish(self, operation: Operation, action: str, longest: float = LONGEST) -> None:
        """Wait until an operation is done. Raises NotReady, or what became of it."""
        end = time.monotonic() + longest
        while not self.done(operation, action):
            if time.monotonic() > end:
                msg = f"gave up after {longest:.0f} s waiting for Azure to {action}"
                raise NotReady(msg)
            time.sleep(POLL)

    def done(self, operation: Operation, action: str) -> bool:
        """Say if an operation is done. Raises what became of it if it failed."""
        state, content = self.state(operation, action)
        if state == "Failed":
            raise arm.typed(*arm.details(content), action)
        return state == "Succeeded"

    @staticmethod
    def state(operation: Operation, action: str) -> tuple[str, Any]:
        """Say how far an operation is: InProgress, Succeeded or Failed; and what it says."""
        watched: Any = operation.polling_method()
        with translated(action):
            content = watched.look()
        if not watched.finished():
            return "InProgress", content
        return ("Succeeded" if watched.status().lower() == "succeeded" else "Failed"), content

    def pages(
        self, service: str, group: str, method: str, *arguments: Any, **named: Any
    ) -> list[dict[str, Any]]:
        """Collect a list which comes in pages. Raises the same."""
        with translated(_action(group, method)):
            ask = self._method(service, group, method)
            return [_plain(one) for one in ask(*arguments, **_options(), **named)]

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
        with translated("log in"):
            with self._lock:
                login = self._login
            found = login.get_token(STORAGE)
        return {
            "token": found.token,
            "expires_at": datetime.fromtimestamp(found.expires_on, timezone.utc),
        }

    def _method(self, service: str, group: str, method: str) -> Any:
        with self._lock:
            if service not in self._clients:
                self._clients[service] = self._new(service)
            client = self._clients[service]
        return getattr(getattr(client, group), method)

    def _new(self, service: str) -> Any:
        module, name = CLIENTS[service]
        try:
            kind = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise MissingDependency(installer.lacking("azure")) from error
        own = () if service == "subscriptions" else (self._subscription,)
        return kind(self._login, *own, base_url=manager(), **self._pipeline)

    @cached_property
    def _pipeline(self) -> dict[str, Any]:
        """What all clients share; their own would register resource providers, behind our back."""
        from azure.core.pipeline import policies, transport

        return {
            "transport": transport.RequestsTransport(connection_timeout=CONNECT, read_timeout=READ),
            "policies": [
                policies.RequestIdPolicy(),
                policies.CustomHookPolicy(raw_response_hook=self._hear),
                policies.UserAgentPolicy(base_user_agent="cml-runner"),
                policies.ContentDecodePolicy(),
                policies.RetryPolicy(retry_total=6, retry_backoff_factor=0.5),
                policies.BearerTokenCredentialPolicy(self._login, f"{MANAGER}/.default"),
            ],
        }

    def _hear(self, answer: Any) -> None:
        self.clock.hear(answer.http_response.headers.get("Date"))

    @cached_property
    def _login(self) -> Login:
        try:
            return Login(_credential())
        except ImportError as error:
            raise MissingDependency(installer.lacking("azure")) from error

    @cached_property
    def _subscription(self) -> str:
        if found := os.environ.get("AZURE_SUBSCRIPTION_ID") or _of_cli():
            return found
        listed = self.pages("subscriptions", "subscriptions", "list")
        names = [str(one["subscriptionId"]) for one in listed]
        if len(names) != 1:
            msg = f"which subscription? set AZURE_SUBSCRIPTION_ID: {', '.join(names) or 'none'}"
            raise CredentialsError(msg)
        return names[0]


class Login:
    """A credential whose own troubles aren't taken for Resource Manager's."""

    def __init__(self, credential: TokenCredential) -> None:
        self._credential = credential

    def get_token(self, *scopes: str, **more: Any) -> AccessToken:
        """Get one. Raises CredentialsError."""
        from azure.core.exceptions import ClientAuthenticationError

        try:
            return self._credential.get_token(*scopes, **more)
        except ClientAuthenticationError as error:
            msg = f"no access to Azure: {_first_line(error)}. To get it, {HELP}"
            raise CredentialsError(msg) from error


@contextmanager
def translated(action: str) -> Iterator[None]:
    """Raise our errors in place of the SDK's."""
    try:
        from azure.core import exceptions
    except ImportError as error:
        raise MissingDependency(installer.lacking("azure")) from error
    try:
        yield
    except (exceptions.ServiceRequestError, exceptions.ServiceResponseError) as error:
        msg = f"can't reach Azure; is there a network? {_first_line(error)}"
        raise RunnerError(msg) from error
    except exceptions.HttpResponseError as error:
        response: Any = error.response
        content = {} if response is None else arm.parsed(response.body())
        if response is not None and response.status_code >= HTTPStatus.BAD_REQUEST:
            raise arm.failure(response.status_code, content, action) from error
        code, text = arm.details(content)  # of an operation, or the SDK doesn't understand it
        raise arm.typed(code, text or _first_line(error), action) from error
    except exceptions.AzureError as error:
        raise RunnerError(_first_line(error)) from error


def _action(group: str, method: str) -> str:
    return f"call {group}.{method}"


def _options() -> dict[str, Any]:
    """Say how requests are to be sent; where Resource Manager is elsewhere it may have no TLS."""
    plain = {"enforce_https": False} if manager().startswith("http:") else {}
    return {"retry_on_methods": REPEATED, **plain}


def _answer(response: Any, _model: Any, _headers: Any) -> Any:
    """Take an answer as it came."""
    return arm.parsed(response.http_response.body())


def _plain(model: Any) -> dict[str, Any]:
    """Turn a part of an answer into what it came as; the SDK has models of two kinds."""
    older = getattr(model, "serialize", None)
    found: dict[str, Any] = older(keep_readonly=True) if older else model.as_dict()
    return found


def _watched() -> Any:
    """Make what the SDK asks how far an operation is: it looks when we do, not in a thread."""
    from azure.core.exceptions import HttpResponseError
    from azure.core.polling.base_polling import BadResponse, BadStatus
    from azure.mgmt.core.polling.arm_polling import ARMPolling

    class Watched(ARMPolling):
        def run(self) -> None:
            """Leave it to us, who don't wait as long as Azure says."""

        def look(self) -> Any:
            """Look once, and say what there is to see."""
            try:
                if not self.finished():
                    self.update_status()
            except (BadResponse, BadStatus) as error:
                response = self._pipeline_response.http_response
                raise HttpResponseError(str(error), response) from error
            return arm.parsed(self._pipeline_response.http_response.body())

    return Watched(POLL, **_options())


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
    raise NoCredentials(msg)


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
