"""Bitbucket's REST API: log in, ask with patience, and say what a refusal means."""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from cml_runner.checkup import Clock
from cml_runner.errors import (
    ConfigurationError,
    CredentialsError,
    NoCredentials,
    NotFound,
    RunnerError,
)
from cml_runner.forges.bitbucket import answers
from cml_runner.web import Passing, trouble

if TYPE_CHECKING:
    from collections.abc import Iterator

    import requests

    from cml_runner.forges.bitbucket.address import Address
    from cml_runner.model import Credential

T = TypeVar("T")

TIMEOUT = 20  # seconds
RETRIES = 5
EARLY = 60  # seconds before its end that a token is renewed

VARIABLES = "REPO_TOKEN or BITBUCKET_TOKEN (or --token)"
NEEDS = (
    "an API token, written EMAIL:TOKEN, with the scopes read:runner:bitbucket,"
    " write:runner:bitbucket, read:pipeline:bitbucket, write:pipeline:bitbucket and"
    " read:repository:bitbucket; or an OAuth consumer, written KEY:SECRET; or an access token of"
    " the repository or workspace; with the right to administer what has the runners"
)
APP_PASSWORD = "ATBB"  # noqa: S105 - how they all begin
RUN = ("write:pipeline:bitbucket", "pipeline:write")  # likewise
WRITE = ("write:runner:bitbucket", "runner:write")  # in tokens, and in older kinds of credentials


class Api:
    """The API as one credential sees it."""

    def __init__(self, where: Address, credential: Credential) -> None:
        self._where, self._credential = where, credential
        self._token, self._until = "", 0.0  # of an OAuth consumer
        self.clock = Clock()
        self.scopes: frozenset[str] = frozenset()  # of the credential, when they were last told

    @property
    def who(self) -> str:
        """Whose credential it is, as far as it tells."""
        name = self._credential.token.rpartition(":")[0]
        return name if "@" in name else f"the OAuth consumer {name}" if name else "an access token"

    def ask(self, method: str, path: str, kind: type[T], body: object = None) -> T:
        """Send one request, and return its answer as that kind of object."""
        answer = self._send(method, path, body)
        if kind is object or not answer.content:
            return None  # type: ignore[return-value]
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except msgspec.MsgspecError as error:
            msg = f"{self._where.url} doesn't answer as Bitbucket would ({error})"
            raise RunnerError(msg) from error

    def runners(self, path: str) -> Iterator[answers.Runner]:
        """Read the list of runners, page by page."""
        address = f"{path}?pagelen=100"
        while address:
            page = self.ask("GET", address, answers.Runners)
            yield from page.values
            address = page.next

    def _send(self, method: str, path: str, body: object) -> requests.Response:
        url = path if "://" in path else self._where.api + path
        if not url.startswith(self._where.api):
            msg = f"{self._where.url} leads elsewhere: {url}"
            raise RunnerError(msg)
        with self._translated():
            auth = self._auth()
            answer = self._session.request(method, url, json=body, auth=auth, timeout=TIMEOUT)
        self.clock.hear(answer.headers.get("Date"))
        self.scopes = frozenset(answer.headers.get("X-OAuth-Scopes", "").replace(",", " ").split())
        if not answer.ok:
            raise self._refusal(answer)
        return answer

    def _auth(self) -> Any:
        from requests.auth import HTTPBasicAuth

        token = self._credential.token
        if self._credential.app_id:
            msg = "a GitHub App is of no use on Bitbucket: leave --github-app-id out"
            raise ConfigurationError(msg)
        if not token:
            msg = f"no credential for {self._where.url}: set {VARIABLES}; it takes {NEEDS}"
            raise NoCredentials(msg)
        name, _, secret = token.rpartition(":")
        if secret.startswith(APP_PASSWORD):
            msg = f"Bitbucket's app passwords are gone: set {VARIABLES} to {NEEDS}"
            raise CredentialsError(msg)
        if "@" in name:
            return HTTPBasicAuth(name, secret)
        if secret.startswith("ATATT"):
            msg = f"an API token goes with its owner's e-mail address: EMAIL:TOKEN, in {VARIABLES}"
            raise CredentialsError(msg)
        return _Bearer(self._consumer(name, secret) if name else secret)

    def _consumer(self, key: str, secret: str) -> str:
        """Log in as an OAuth consumer; its token is renewed in time."""
        if time.monotonic() < self._until:
            return self._token
        url = f"{self._where.server}/site/oauth2/access_token"
        body = {"grant_type": "client_credentials"}
        answer = self._session.post(url, data=body, auth=(key, secret), timeout=TIMEOUT)
        if 400 <= answer.status_code < 500:
            msg = f"the OAuth consumer for {self._where.url} is wrong, or isn't a private one"
            raise CredentialsError(msg)
        if not answer.ok:
            raise self._refusal(answer)
        found = msgspec.json.decode(answer.content, type=answers.Token)
        self._token, self._until = found.access_token, time.monotonic() + found.expires_in - EARLY
        return self._token

    @cached_property
    def _session(self) -> requests.Session:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3 import Retry  # noqa: PLC0415 - comes with requests

        patience = Retry(
            total=RETRIES,
            backoff_factor=0.5,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=None,
            raise_on_status=False,
        )
        session = requests.Session()
        session.headers["User-Agent"] = "cml-runner"
        session.mount("https://", HTTPAdapter(max_retries=patience))
        session.mount("http://", HTTPAdapter(max_retries=patience))
        return session

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the errors of requests into ours."""
        import requests

        try:
            yield
        except requests.RequestException as error:
            msg = f"{self._where.server} {trouble(error)}"
            raise Passing(msg) from error
        except OSError as error:  # a bundle of certificates that isn't there
            msg = f"{self._where.url} can't be asked: {error}"
            raise ConfigurationError(msg) from error

    def _refusal(self, answer: requests.Response) -> RunnerError:
        """Say what Bitbucket refused, and what to do about it."""
        status, url = answer.status_code, self._where.url
        said, lacking = _said(answer)
        told = f"Bitbucket said: {said}"
        if status == 401:
            return CredentialsError(f"the credential for {url} is wrong or expired ({told})")
        if status == 403:
            lacks = f"it lacks {', '.join(lacking)}; " if lacking else ""
            return CredentialsError(
                f"this credential may not do that at {url} ({told}); {lacks}it takes {NEEDS}"
            )
        if status == 404:
            hint = "is the address right, and may this credential see it?"
            return NotFound(f"{url} wasn't found ({told}); {hint}")
        if status == 429 or status >= 500:
            return Passing(f"{url}: {told}")
        return RunnerError(f"{url}: {told}")


class _Bearer:
    """A token in a header."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _said(answer: requests.Response) -> tuple[str, list[str]]:
    """Read an error: https://developer.atlassian.com/cloud/bitbucket/rest/intro/#error-responses."""
    try:
        error = answer.json()["error"]
        detail = error.get("detail")
        required = detail.get("required", []) if isinstance(detail, dict) else []
        granted = detail.get("granted", []) if isinstance(detail, dict) else []
        return str(error["message"]), [one for one in required if one not in granted]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"status {answer.status_code}", []
