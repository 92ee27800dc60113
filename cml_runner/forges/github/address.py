"""Where on GitHub: an address in any of the forms that people and git have for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from cml_runner import remote
from cml_runner.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT = "https://github.com"
ALIASES = {"www.github.com": "github.com", "ssh.github.com": "github.com"}
OWNER = r"[A-Za-z0-9][A-Za-z0-9_-]*"
REPOSITORY = rf"{OWNER}/(?!\.{{1,2}}$)[A-Za-z0-9._-]+"
ENTERPRISE = rf"enterprises/{OWNER}"
SLUG = re.compile(rf"{ENTERPRISE}|{REPOSITORY}|{OWNER}")


@dataclass(frozen=True)
class Address:
    """A repository, an organisation or an enterprise on some server."""

    server: str  # https://github.com
    path: str  # owner/repository, organisation, enterprises/slug

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read a slug or a URL. Raises ConfigurationError."""
        server, path = split(text)
        if not SLUG.fullmatch(path):
            msg = (
                f"{text!r} is no address on GitHub: give owner/repository, an organisation,"
                " enterprises/NAME, or the URL of one of them"
            )
            raise ConfigurationError(msg)
        return cls(server or DEFAULT, path)

    @property
    def kind(self) -> Literal["repository", "organization", "enterprise"]:
        """What it is the address of."""
        if "/" not in self.path:
            return "organization"
        return "enterprise" if re.fullmatch(ENTERPRISE, self.path) else "repository"

    @property
    def url(self) -> str:
        """The full address."""
        return f"{self.server}/{self.path}"

    @property
    def host(self) -> str:
        """The name of the server, with its port if it has an unusual one."""
        return urlsplit(self.server).netloc

    @property
    def api(self) -> str:
        """The root of the REST API, which has its own host but on Enterprise Server."""
        if _hosted(self.host):
            return f"https://api.{self.host}"
        return f"{self.server}/api/v3"

    @property
    def prefix(self) -> str:
        """The beginning of the API's paths about runners here."""
        roots = {"repository": "/repos/", "organization": "/orgs/", "enterprise": "/"}
        return f"{roots[self.kind]}{self.path}"


def detect(text: str, environment: Mapping[str, str]) -> str:
    """Return the full form of an address on GitHub, "" of any other.

    An empty one stands for the repository of the workflow that the environment describes; a
    slug is GitHub's only in a workflow, since other forges have slugs too.
    """
    home = environment.get("GITHUB_SERVER_URL") or DEFAULT
    workflow = "GITHUB_SERVER_URL" in environment or "GITHUB_ACTIONS" in environment
    try:
        server, path = split(text or environment.get("GITHUB_REPOSITORY", ""))
        home = split(home)[0] or DEFAULT
    except ConfigurationError:
        return ""
    if not server:
        return f"{home}/{path}" if SLUG.fullmatch(path) and (workflow or not text) else ""
    host = urlsplit(server).netloc
    return f"{server}/{path}" if _hosted(host) or host == urlsplit(home).netloc else ""


def split(text: str) -> tuple[str, str]:
    """Take an address apart: its server (empty for a slug) and its path."""
    server, path = remote.split(text, "GitHub")
    host = urlsplit(server).hostname or ""
    host = ALIASES.get(host, host)
    if server and _hosted(host):
        server = f"https://{host}"
    path = re.sub(r"^([\w-]+/[\w.-]+)/actions/runs/.*", r"\1", path)  # as people see a run
    if path.startswith("orgs/") and path.count("/") == 1:  # as in a browser
        path = path.removeprefix("orgs/")
    return server, path


def _hosted(host: str) -> bool:
    return host == "github.com" or host.endswith(".ghe.com")
