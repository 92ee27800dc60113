"""GitHub's REST API: log in, ask with patience, and say what a refusal means."""

from __future__ import annotations

import json
import logging
import time
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from cml_runner.checkup import Clock
from cml_runner.errors import (
    AlreadyExists,
    ConfigurationError,
    CredentialsError,
    JobRunning,
    NoCredentials,
    NotFound,
    RunnerError,
)
from cml_runner.web import Passing, trouble

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from github import Github, GithubException
    from github.Auth import Auth
    from urllib3 import Retry

    from cml_runner.forges.github.address import Address
    from cml_runner.model import Credential

log = logging.getLogger(__name__)
T = TypeVar("T")

HEADERS = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28"}
TIMEOUT = 10  # seconds; GitHub itself gives up on a request after as many
SECONDARY = 60  # seconds to wait for a rate limit which doesn't say how long

VARIABLES = "REPO_TOKEN (or --token), or --github-app-id and --github-app-key"
NEEDS = {
    "repository": (
        "a classic token with the scope repo, or a fine-grained token or a GitHub App"
        " with the repository permission Administration: write"
    ),
    "organization": (
        "a classic token with the scope admin:org, or a fine-grained token or a GitHub App"
        " with the organization permission Self-hosted runners: write"
    ),
    "enterprise": "a classic token with the scope manage_runners:enterprise",
    "checks": (
        "a classic token with the scope repo, a workflow's own token with checks: read, or a"
        " GitHub App with the repository permission Checks: read"
    ),
    "job": (
        "a classic token with the scope repo, or a fine-grained token or a GitHub App"
        " with the repository permission Actions: write"
    ),
}


# The first line that fits tells which error it is: status, words of the message, error.
ERRORS: tuple[tuple[int, str, type[RunnerError]], ...] = (
    (401, "", CredentialsError),
    (403, "already running", JobRunning),
    (403, "rate limit", Passing),
    (403, "unable to re", RunnerError),  # -run or -try: the run is too old, say
    (403, "", CredentialsError),
    (404, "", NotFound),
    (409, "", AlreadyExists),
    (422, "still running a job", JobRunning),
    (429, "", Passing),
    (500, "", Passing),
    (502, "", Passing),
    (503, "", Passing),
    (504, "", Passing),
)


class Api:
    """The API as one credential sees it, or as anybody does without one."""

    def __init__(self, address: Address, credential: Credential | None = None) -> None:
        self._address = address
        self._credential = credential
        self.clock = Clock()
        self.told: Mapping[str, str] = {}  # headers of the last answer, in small letters

    def ask(self, method: str, path: str, kind: type[T], body: object = None, needs: str = "") -> T:
        """Send one request, and return its answer as that kind of object.

        `needs` is a key of NEEDS, for the hint which permission is missing.
        """
        return self._send(method, path, kind, body=body, needs=needs)[0]

    def pages(self, path: str, kind: type[T], needs: str = "", **filters: str) -> Iterator[T]:
        """Read a list, page by page."""
        page, more = 1, True
        while more:
            parameters = {**filters, "per_page": "100", "page": str(page)}
            answer, more = self._send("GET", path, kind, parameters, needs=needs)
            yield answer
            page += 1

    def _send(
        self,
        method: str,
        path: str,
        kind: type[T],
        parameters: dict[str, str] | None = None,
        *,
        body: object = None,
        needs: str = "",
    ) -> tuple[T, bool]:
        """Send one request; return its answer, and whether there is one more page of it."""
        with self._translated(needs or self._address.kind):
            headers, data = self._client.requester.requestJsonAndCheck(
                method, path, parameters, headers={**HEADERS}, input=body
            )
            self._hear(headers)
            if isinstance(data, dict) and data.get("message") == "Moved Permanently":
                msg = f"{self._address.url} has a new name: use that"
                raise NotFound(msg)
            return msgspec.convert(data, kind), 'rel="next"' in headers.get("link", "")

    @property
    def app(self) -> str:
        """The number of the GitHub App that we are, if any."""
        return self._credential.app_id if self._credential else ""

    def _hear(self, headers: Mapping[str, str]) -> None:
        self.told = {name.lower(): value for name, value in headers.items()}
        self.clock.hear(self.told.get("date"))

    @cached_property
    def _client(self) -> Github:
        from github import Github

        # More detailed, it would write down the tokens that GitHub sends.
        logging.getLogger("github.Requester").setLevel(logging.INFO)
        return Github(auth=self._auth(), base_url=self._address.api, **_options())

    def _auth(self) -> Auth | None:
        from github.Auth import Token

        if not self._credential:
            return None
        if self._credential.app_id or self._credential.app_key:
            return self._app(self._credential)
        if not self._credential.token:
            takes = NEEDS[self._address.kind]
            msg = f"no credential for {self._address.url}: set {VARIABLES}; it takes {takes}"
            raise NoCredentials(msg)
        return Token(self._credential.token)

    def _app(self, credential: Credential) -> Auth:
        """Log in as an installation of a GitHub App; PyGithub renews its token in time."""
        from github import GithubIntegration
        from github.Auth import AppAuth
        from jwt import PyJWTError  # noqa: PLC0415 - comes with PyGithub

        kind, path = self._address.kind, self._address.path
        if kind == "enterprise":
            msg = f"a GitHub App can't manage an enterprise's runners: it takes {NEEDS[kind]}"
            raise CredentialsError(msg)
        try:
            auth = AppAuth(credential.app_id, credential.app_key)
            auth.create_jwt()
        except (AssertionError, ValueError, TypeError, PyJWTError):
            msg = "a GitHub App takes both its id and its private key (PEM): one of them is wrong"
            raise CredentialsError(msg) from None
        app = GithubIntegration(auth=auth, base_url=self._address.api, **_options())
        if kind == "organization":
            installation = app.get_org_installation(path)
        else:
            installation = app.get_repo_installation(*path.split("/"))
        return auth.get_installation_auth(installation.id)

    @contextmanager
    def _translated(self, needs: str) -> Iterator[None]:
        """Turn the errors of PyGithub, and of what it stands on, into ours."""
        import requests
        from github import GithubException

        host = self._address.host
        try:
            yield
        except GithubException as error:
            self._hear(error.headers or {})
            raise self._refusal(error, needs) from error
        except (msgspec.ValidationError, json.JSONDecodeError) as error:
            msg = f"{host} doesn't answer as GitHub would ({error}): is the address right?"
            raise RunnerError(msg) from error
        except requests.RequestException as error:
            msg = f"{host} {trouble(error)}"
            raise Passing(msg) from error
        except RuntimeError as error:  # PyGithub doesn't follow every redirection
            msg = f"{self._address.url} leads elsewhere: {error}"
            raise ConfigurationError(msg) from error

    def _refusal(self, error: GithubException, needs: str) -> RunnerError:
        """Say what GitHub refused, and what to do about it."""
        data = error.data if isinstance(error.data, dict) else {}
        said = str(data.get("message") or f"status {error.status}")
        kind = _kind(error.status, said)
        url, quote = self._address.url, f"{self._address.host} said: {said}"
        if kind is NotFound:
            hint = "is the address right, and may this credential see it?"
            return NotFound(f"{url} wasn't found ({quote}); {hint} It takes {NEEDS[needs]}")
        if kind is CredentialsError and error.status == 401:
            return CredentialsError(f"the credential for {url} is wrong or expired ({quote})")
        if kind is CredentialsError:
            action = "run jobs again at" if needs == "job" else "manage the runners of"
            msg = f"this credential may not {action} {url} ({quote}); it takes {NEEDS[needs]}"
            return CredentialsError(msg + self._workflow_hint(said))
        return kind(f"{url}: {quote}")

    def _workflow_hint(self, said: str) -> str:
        app = self._credential and self._credential.app_id
        if "not accessible by integration" in said and not app:
            return ". The GITHUB_TOKEN of a workflow never will do"
        return ""


def _kind(status: int, said: str) -> type[RunnerError]:
    for code, words, kind in ERRORS:
        if status == code and words in said.lower():
            return kind
    return RunnerError


def _options() -> dict[str, Any]:
    return {
        "timeout": TIMEOUT,
        "retry": _patience(),
        "user_agent": "cml-runner",
        "seconds_between_requests": None,
        "seconds_between_writes": None,
    }


def _patience() -> Retry:
    """Make the rules by which a request is sent again.

    Rate limits, server errors and broken connections are waited for; a silent server is asked
    twice (a kept connection may have died), a silent address once (TCP itself has tried again).
    A POST is repeated too: what one may have left behind is found where it matters.
    """
    from github.GithubRetry import GithubRetry
    from urllib3 import exceptions as lib  # noqa: PLC0415 - comes with requests

    class Patience(GithubRetry):
        def increment(
            self,
            method: str | None = None,
            url: str | None = None,
            response: Any = None,
            error: Exception | None = None,
            _pool: Any = None,
            _stacktrace: Any = None,
        ) -> Any:
            again = any(isinstance(past.error, lib.ReadTimeoutError) for past in self.history)
            silent = isinstance(error, lib.ReadTimeoutError) and again
            if silent or type(error) is lib.ConnectTimeoutError:
                raise lib.MaxRetryError(_pool, url or "", error)
            return super().increment(method, url, response, error, _pool, _stacktrace)

        def sleep(self, response: Any = None) -> None:
            seconds = (response and self.get_retry_after(response)) or self.get_backoff_time()
            limited = bool(response) and response.status in {403, 429}
            if limited and response.status == 429 and "Retry-After" not in response.headers:
                seconds = max(seconds, _until_reset(response.headers))
            if limited:
                log.warning("waiting %.0f s for GitHub's rate limit", seconds)
            elif seconds:
                log.info("GitHub has trouble: asking again in %.0f s", seconds)
            time.sleep(seconds)

    return Patience(
        total=8,
        connect=3,
        read=3,
        status=6,
        backoff_factor=0.5,
        secondary_rate_wait=SECONDARY,
        status_forcelist=[429, *range(500, 600)],
        allowed_methods=None,
    )


def _until_reset(headers: Mapping[str, str]) -> float:
    if headers.get("X-RateLimit-Remaining") != "0":
        return SECONDARY
    return max(1, float(headers.get("X-RateLimit-Reset", "0")) + 1 - time.time())
