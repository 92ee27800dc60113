"""GitLab's API: find the server, log in, ask with patience, and say what a refusal means."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import quote

import msgspec

from cml_runner.checkup import Clock
from cml_runner.errors import (
    ConfigurationError,
    CredentialsError,
    NoCredentials,
    NotFound,
    RunnerError,
)
from cml_runner.forges.gitlab import address, answers
from cml_runner.web import Passing, trouble

if TYPE_CHECKING:
    from collections.abc import Iterator

    import requests
    from gitlab import Gitlab

    from cml_runner.forges.gitlab.address import Address
    from cml_runner.model import Credential

log = logging.getLogger(__name__)
T = TypeVar("T")

Kind = Literal["project", "group", "instance"]

TIMEOUT = 20  # seconds
RETRIES = 7  # python-gitlab doubles its pauses from 0.1 s on: 13 s in all
MAINTAINER = 40  # https://docs.gitlab.com/api/members/#roles

VARIABLES = "REPO_TOKEN or GITLAB_TOKEN (or --token)"
NEEDS = {
    "project": "an access token with the scope api, of somebody who is Maintainer of the project",
    "group": "an access token with the scope api, of somebody who is Owner of the group",
    "instance": "an access token with the scope api, of an administrator",
}
# What a token that may register runners, list them and remove them has, if not all of api.
ENOUGH = frozenset({"create_runner", "manage_runner", "read_api"})

# Tokens of other kinds, by their prefix: https://docs.gitlab.com/security/tokens/#token-prefixes
OTHERS = {
    "glcbt-": "the CI_JOB_TOKEN of a job",
    "glrt-": "the token of a runner",
    "glrtr-": "a registration token",
    "GR1348941": "a registration token",
    "gldt-": "a deploy token",
}


@dataclass(frozen=True)
class Place:
    """What an address turned out to be."""

    kind: Kind
    path: str  # on the server; "" for the server itself
    id: int = 0
    role: int | None = None  # of the credential's owner in a project, where GitLab tells


class Api:
    """The API as one credential sees it."""

    def __init__(self, where: Address, credential: Credential) -> None:
        self._where, self._credential = where, credential
        self.clock = Clock()
        self.now = datetime.now(timezone.utc)  # by the server's clock, when it last answered

    @cached_property
    def base(self) -> str:
        """The address of the server, which may be a path on its host.

        A job's own variables tell, or else it is the shortest one at which a GitLab answers.
        """
        home = os.environ.get("CI_SERVER_URL", "").rstrip("/")
        if home and f"{self._where.url}/".startswith(f"{home}/"):
            return home
        if self._where.server == address.DEFAULT:
            return address.DEFAULT
        for base in self._where.bases:
            if self._answers(base):
                return base
        msg = f"there is no GitLab at {self._where.url}: is the address right?"
        raise NotFound(msg)

    @cached_property
    def place(self) -> Place:
        """The project, group or server that we are asked for. Raises NotFound."""
        path = self._where.url.removeprefix(self.base).strip("/")
        if not path:
            return Place("instance", "")
        kinds: tuple[Kind, ...] = ("project", "group") if "/" in path else ("group",)
        for kind in kinds:
            try:
                options = "?with_projects=false" if kind == "group" else ""
                found = self.ask("GET", f"/{kind}s/{quote(path, '')}{options}", answers.Place)
            except NotFound:
                continue
            return Place(kind, path, found.id, found.permissions.highest)
        hint = "is the address right, and may this credential see it?"
        msg = f"{self._where.url} wasn't found; {hint} It takes {NEEDS[kinds[0]]}"
        raise NotFound(msg)

    def ask(self, method: str, path: str, kind: type[T], body: object = None) -> T:
        """Send one request, and return its answer as that kind of object."""
        return self._read(self._send(method, path, body), kind)

    def pages(self, path: str, kind: type[T], **filters: str) -> Iterator[T]:
        """Read a list, page by page."""
        page = "1"
        while page:
            query = {**filters, "per_page": "100", "page": page}
            answer = self._send("GET", path, None, query)
            yield from self._read(answer, list[kind])  # type: ignore[valid-type]
            page = answer.headers.get("X-Next-Page", "")

    def query(self, text: str, **variables: str | None) -> answers.Data:
        """Ask GraphQL."""
        url = f"{self.base}/api/graphql"
        answer = self._send("POST", url, {"query": text, "variables": variables})
        found = self._read(answer, answers.Result)
        if found.errors or not found.data:
            said = "; ".join(one.message for one in found.errors) or "it says nothing"
            msg = f"{self._where.url}: GitLab said: {said}"
            raise RunnerError(msg)
        return found.data

    def _send(
        self, method: str, path: str, body: object = None, query: dict[str, str] | None = None
    ) -> requests.Response:
        with self._translated():
            answer = self._client.http_request(
                method,
                path,
                query_data=query,
                post_data=body,  # type: ignore[arg-type]
                max_retries=RETRIES,
            )
        if stamp := answer.headers.get("Date"):
            self.now = parsedate_to_datetime(stamp)
            self.clock.hear(stamp)
        return answer

    def _read(self, answer: requests.Response, kind: type[T]) -> T:
        if kind is object or not answer.content:
            return None  # type: ignore[return-value]
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except msgspec.MsgspecError as error:
            msg = f"{self._where.url} doesn't answer as GitLab would ({error})"
            raise RunnerError(msg) from error

    def _answers(self, base: str) -> bool:
        """Say whether a GitLab is at this address; it wants to know who asks."""
        from gitlab.exceptions import GitlabAuthenticationError, GitlabError

        with self._translated():
            try:
                answer = _client(base).http_request("GET", "/version", max_retries=RETRIES)
            except GitlabAuthenticationError:
                return True
            except GitlabError as error:
                if error.response_code and error.response_code >= 500:
                    raise
                return False
        return "application/json" in answer.headers.get("Content-Type", "")

    @cached_property
    def _client(self) -> Gitlab:
        token = self._credential.token
        if self._credential.app_id:
            msg = "a GitHub App is of no use on GitLab: leave --github-app-id out"
            raise ConfigurationError(msg)
        if not token:
            needs = "; ".join(NEEDS.values())
            msg = f"no credential for {self._where.url}: set {VARIABLES}; it takes {needs}"
            raise NoCredentials(msg)
        for prefix, what in OTHERS.items():
            if token.startswith(prefix):
                msg = f"{what} can't manage runners: set {VARIABLES} to {NEEDS['project']}"
                raise CredentialsError(msg)
        return _client(self.base, private_token=token)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the errors of python-gitlab, and of what it stands on, into ours."""
        import requests
        from gitlab.exceptions import GitlabError

        url = self._where.url
        try:
            yield
        except requests.RequestException as error:
            msg = f"{self._where.server} {trouble(error)}"
            raise Passing(msg) from error
        except GitlabError as error:
            raise self._refusal(error) from error
        except OSError as error:  # a bundle of certificates that isn't there
            msg = f"{url} can't be asked: {error}"
            raise ConfigurationError(msg) from error

    def _refusal(self, error: Any) -> RunnerError:
        """Say what GitLab refused, and what to do about it."""
        status, url = error.response_code or 0, self._where.url
        said = str(error.error_message or f"status {status}")
        told = f"GitLab said: {said}"
        if status == 401:
            return CredentialsError(f"the credential for {url} is wrong or expired ({told})")
        if status == 403:
            return CredentialsError(
                f"this credential may not do that at {url} ({told}); {_takes()}"
            )
        if status == 404:
            return NotFound(f"{url}: {told}")
        if status == 429 or status >= 500:
            return Passing(f"{url}: {told} (status {status})")
        return RunnerError(f"{url}: {told}")


def _takes() -> str:
    return f"it takes {NEEDS['project']}; of a group, its Owner; of a server, an administrator"


def _client(base: str, **login: str) -> Gitlab:
    from gitlab import Gitlab

    return Gitlab(
        base,
        timeout=TIMEOUT,
        retry_transient_errors=True,
        keep_base_url=True,
        user_agent="cml-runner",
        **login,  # type: ignore[arg-type]
    )
