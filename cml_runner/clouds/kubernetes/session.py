"""The only file that knows the SDK: whose cluster it is, and one call to its API server.

Requests and answers are the API's own JSON, https://kubernetes.io/docs/reference/kubernetes-api/;
the SDK finds the credentials, keeps them fresh, and speaks TLS.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from contextlib import suppress
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from cml_runner import installer, times, wait
from cml_runner.checkup import Clock
from cml_runner.errors import (
    AlreadyExists,
    ConfigurationError,
    CredentialsError,
    MissingDependency,
    NoCapacity,
    NoCredentials,
    NotFound,
    RunnerError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from kubernetes.client import ApiClient
    from websocket import WebSocket

log = logging.getLogger(__name__)

CONTENTS = ("KUBECONFIG_DATA", "KUBERNETES_CONFIGURATION")  # of a kubeconfig; TPI's was the second
NAMESPACE = "CML_RUNNER_CLOUD_KUBERNETES_NAMESPACE"
OURS = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # of a pod in the cluster
PATIENCE = 60  # seconds for an API server that doesn't answer …
PAUSES = (0.2, 0.5, 1, 2, 4)  # … between two attempts; the last one for ever
BRIEF = 15  # seconds for one of which nothing is wanted but news
STREAMS = "v5.channel.k8s.io"  # the first version in which an input can end
STALL = 300  # seconds in which nothing moves
CONNECT, READ = 5, 30  # seconds for a connection, and for an answer
PASSING = frozenset({429, 500, 502, 503, 504})
PATCH = "application/merge-patch+json"
QUOTA = re.compile(r"exceeded quota|must specify (limits|requests)", re.IGNORECASE)
HELP = (
    "set KUBECONFIG to the path of a kubeconfig or KUBECONFIG_DATA to its contents,"
    " or run in a pod of the cluster"
)


class Session:
    """One namespace of one cluster. Nothing is imported or sent before the first call."""

    def __init__(self, namespace: str = "") -> None:
        self._namespace = namespace or os.environ.get(NAMESPACE, "")
        self._lock = threading.Lock()
        self.clock = Clock()

    @property
    def host(self) -> str:
        """The address of the API server."""
        return str(self._login[0].configuration.host)

    @property
    def namespace(self) -> str:
        """The one that was asked for, or the one of the kubeconfig's context, or of our pod."""
        return self._login[1]

    def call(
        self,
        method: str,
        kind: str,
        name: str = "",
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str | int] | None = None,
    ) -> dict[str, Any]:
        """Make one call about things of a kind in the namespace; tried again where it makes sense.

        Raises NotFound, AlreadyExists, NoCapacity, CredentialsError, ConfigurationError, or
        RunnerError.
        """
        found: dict[str, Any] = json.loads(self._ask(method, kind, name, body, query or {}))
        return found

    def text(
        self, kind: str, name: str, *, query: Mapping[str, str | int], patience: float = PATIENCE
    ) -> str:
        """Read what isn't JSON, a log say."""
        return self._ask("GET", kind, name, None, query, patience).decode(errors="replace")

    def items(self, kind: str, *, patience: float = PATIENCE, **query: str) -> list[dict[str, Any]]:
        """List things of a kind; query names selectors as the API does."""
        found: list[dict[str, Any]] = []
        more = ""
        while True:
            asked: dict[str, str | int] = {**query, "limit": 500, "continue": more}
            page = json.loads(self._ask("GET", kind, "", None, asked, patience))
            found += page["items"]
            more = page["metadata"].get("continue", "")
            if not more:
                return found

    def now(self) -> datetime:
        """Ask the API server what time it is; every answer says so. Raises RunnerError."""
        from urllib3 import Timeout  # noqa: PLC0415
        from urllib3.exceptions import HTTPError  # noqa: PLC0415

        api = self._login[0]
        url, patience = f"{api.configuration.host}/version", Timeout(connect=CONNECT, read=READ)
        try:
            answer = api.rest_client.pool_manager.request(
                "GET", url, headers=self._token(), timeout=patience, retries=False
            )
            return times.of_header(answer.headers["Date"])
        except (HTTPError, KeyError, ValueError) as error:
            msg = f"the cluster doesn't say what time it is: {error}"
            raise RunnerError(msg) from error

    def may(self, group: str, resource: str, verb: str) -> bool:
        """Ask if we are allowed to do something in the namespace."""
        resource, _, part = resource.partition("/")
        wanted = {"group": group, "resource": resource, "subresource": part, "verb": verb}
        body = {"spec": {"resourceAttributes": {**wanted, "namespace": self.namespace}}}
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        found = json.loads(self._send_again("POST", path, body, "ask for permissions"))
        return bool(found["status"]["allowed"])

    def who(self) -> str:
        """Ask the cluster who it thinks that we are; everybody may."""
        kind = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        path = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
        found = json.loads(self._send_again("POST", path, kind, "ask who we are", BRIEF))
        return str(found["status"]["userInfo"].get("username", ""))

    def read(self, path: str) -> dict[str, Any]:
        """Read something that isn't in the namespace. Raises the same as `call`."""
        found: dict[str, Any] = json.loads(
            self._send_again("GET", path, None, f"get {path}", BRIEF)
        )
        return found

    def run(
        self, pod: str, container: str, command: Sequence[str], *, terminal: bool = False
    ) -> WebSocket:
        """Start a command in a pod; its streams are channels of one connection.

        With a terminal there is one stream for all that it says.

        Raises NotFound, CredentialsError, or RunnerError.
        """
        from kubernetes.stream import ws_client
        from websocket import WebSocketBadStatusException, WebSocketException  # noqa: PLC0415

        client: Any = ws_client  # whose functions bear no types
        configuration = self._login[0].configuration
        names = ("stdin", "stdout", "tty" if terminal else "stderr")
        streams = [(name, "true") for name in names]
        asked = [*(("command", one) for one in command), ("container", container), *streams]
        path = f"{_base('pods')}/namespaces/{self.namespace}/pods/{pod}/exec?{urlencode(asked)}"
        headers = {key.lower(): value for key, value in self._token().items()}
        headers["sec-websocket-protocol"] = STREAMS
        try:
            url = client.get_websocket_url(f"{configuration.host}{path}")
            found: WebSocket = client.create_websocket(configuration, url, headers)
        except WebSocketBadStatusException as error:
            raise _error(error.status_code, error.resp_body or b"", "create pods/exec") from error
        except (WebSocketException, OSError) as error:
            msg = f"can't speak to {pod}: {error}"
            raise RunnerError(msg) from error
        found.settimeout(STALL)
        return found

    def _ask(
        self,
        method: str,
        kind: str,
        name: str,
        body: Mapping[str, Any] | None,
        query: Mapping[str, str | int],
        patience: float = PATIENCE,
    ) -> bytes:
        path = f"{_base(kind)}/namespaces/{self.namespace}/{kind}{f'/{name}' if name else ''}"
        asked = urlencode({key: one for key, one in query.items() if one != ""})
        what = f"{method.lower()} {kind}"
        return self._send_again(method, f"{path}?{asked}".rstrip("?"), body, what, patience)

    def _send_again(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        what: str,
        patience: float = PATIENCE,
    ) -> bytes:
        end = time.monotonic() + patience
        for pause in wait.lasting(PAUSES):
            try:
                status, content = self._send(method, path, body)
            except OSError as error:
                trouble = str(error)
            else:
                if status < HTTPStatus.BAD_REQUEST:
                    return content
                if status not in PASSING:
                    raise _error(status, content, what)
                trouble = _message(content)
            if time.monotonic() + pause > end:
                msg = f"can't reach the cluster; is its address right? {trouble}"
                raise RunnerError(msg)
            log.debug("the API server doesn't answer (%s): trying again", trouble)
            time.sleep(pause)
        raise AssertionError

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, bytes]:
        """Send one request. Raises OSError if there is no answer."""
        from urllib3 import Timeout  # noqa: PLC0415
        from urllib3.exceptions import HTTPError  # noqa: PLC0415

        api = self._login[0]
        headers = {"Accept": "application/json", "User-Agent": "cml-runner", **self._token()}
        if body is not None:
            headers["Content-Type"] = PATCH if method == "PATCH" else "application/json"
        try:
            answer = api.rest_client.pool_manager.request(
                method,
                f"{api.configuration.host}{path}",
                headers=headers,
                body=None if body is None else json.dumps(body),
                timeout=Timeout(connect=CONNECT, read=READ),
                retries=False,
            )
        except HTTPError as error:
            raise OSError(str(error)) from error
        self.clock.hear(answer.headers.get("Date"))
        return answer.status, answer.data

    def _token(self) -> dict[str, str]:
        with self._lock:  # a plugin may be asked for a new one
            found = self._found[0].configuration.auth_settings().values()
            return {
                one["key"]: one["value"] for one in found if one["in"] == "header" and one["value"]
            }

    @property
    def _login(self) -> tuple[ApiClient, str]:
        with self._lock:
            return self._found

    @cached_property
    def _found(self) -> tuple[ApiClient, str]:
        """Find the cluster, our credentials, and the namespace."""
        try:
            from kubernetes import config
        except ImportError as error:
            raise MissingDependency(installer.lacking("kubernetes")) from error
        from kubernetes.config.config_exception import ConfigException

        text = next(filter(None, map(os.environ.get, CONTENTS)), "")
        connect: Any = config  # whose functions bear no types
        try:
            if text:
                content = _parsed(text)
                api = connect.new_client_from_config_dict(content, persist_config=False)
                own = _namespace(content)
            elif self._in_cluster():
                connect.load_incluster_config()
                api, own = _new(), (OURS / "namespace").read_text()
            else:
                file = os.environ.get("KUBECONFIG") or None
                api = connect.new_client_from_config(file, persist_config=False)
                own = connect.list_kube_config_contexts(file)[1]["context"].get("namespace", "")
        except (ConfigException, OSError, KeyError, TypeError, ValueError) as error:
            msg = f"no access to a Kubernetes cluster: {error}. To get it, {HELP}"
            raise (CredentialsError if self._named() else NoCredentials)(msg) from error
        return api, (self._namespace or own or "default").strip()

    def _named(self) -> bool:
        """Say if there is anything that should name a cluster."""
        variables = any(map(os.environ.get, ("KUBECONFIG", *CONTENTS)))
        return variables or Path("~/.kube/config").expanduser().exists() or self._in_cluster()

    def _in_cluster(self) -> bool:
        given = os.environ.get("KUBECONFIG") or Path("~/.kube/config").expanduser().exists()
        return not given and "KUBERNETES_SERVICE_HOST" in os.environ and OURS.exists()


def _new() -> ApiClient:
    from kubernetes.client import ApiClient

    return ApiClient()


def _parsed(text: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        content = str(error)
    if not isinstance(content, dict):
        msg = f"{' or '.join(CONTENTS)} holds no kubeconfig"
        raise TypeError(msg)
    return content


def _namespace(content: Mapping[str, Any]) -> str:
    current = content.get("current-context")
    for one in content.get("contexts", ()):
        if one["name"] == current:
            return str(one["context"].get("namespace", ""))
    return ""


def _base(kind: str) -> str:
    return "/apis/batch/v1" if kind == "jobs" else "/api/v1"


def _message(content: bytes) -> str:
    with suppress(ValueError, AttributeError):
        return str(json.loads(content).get("message", ""))
    return content.decode(errors="replace")[:200]


def _reason(content: bytes) -> str:
    with suppress(ValueError, AttributeError):
        return str(json.loads(content).get("reason", ""))
    return ""


def _error(status: int, content: bytes, action: str) -> RunnerError:
    text = _message(content)
    if status == HTTPStatus.UNAUTHORIZED:
        return CredentialsError(f"the cluster refuses our credentials: {text}. Renew them: {HELP}")
    if status == HTTPStatus.FORBIDDEN and QUOTA.search(text):
        return NoCapacity(text)
    if status == HTTPStatus.FORBIDDEN and "being terminated" in text:
        return NotFound(f"the namespace is being deleted: {text}")
    if status == HTTPStatus.FORBIDDEN:
        msg = f"not allowed to {action}: {text}. What is needed is printed by: "
        return CredentialsError(f"{msg}cml-runner permissions kubernetes")
    if status == HTTPStatus.NOT_FOUND:
        return NotFound(text)
    if status == HTTPStatus.CONFLICT and _reason(content) == "AlreadyExists":
        return AlreadyExists(text)
    if status in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY):
        return ConfigurationError(f"the cluster doesn't take this: {text}")
    return RunnerError(f"{action}: {text}")
