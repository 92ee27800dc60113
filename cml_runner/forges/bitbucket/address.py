"""Where on Bitbucket Cloud: a repository or a workspace."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from cml_runner import remote
from cml_runner.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT = "https://bitbucket.org"
API = "https://api.bitbucket.org/2.0"
SLUG = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_.-]+)?")
BY_SSH = "ssh.bitbucket.org"
IN_A_BROWSER = re.compile(r"([\w-]+)/(?:workspace/|([\w.-]+)/(?:src|pipelines|admin)\b)")


@dataclass(frozen=True)
class Address:
    """A repository or, without one, a whole workspace."""

    server: str  # https://bitbucket.org, or a proxy of one's own before it
    workspace: str
    repository: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read a slug or a URL. Raises ConfigurationError."""
        server, path = split(text)
        if not SLUG.fullmatch(path):
            msg = (
                f"{text!r} is no address on Bitbucket: give workspace/repository, a workspace,"
                " or the URL of one of them"
            )
            raise ConfigurationError(msg)
        workspace, _, repository = path.partition("/")
        return cls(server or DEFAULT, workspace, repository)

    @property
    def path(self) -> str:
        """The slug."""
        return f"{self.workspace}/{self.repository}".removesuffix("/")

    @property
    def url(self) -> str:
        """The full address."""
        return f"{self.server}/{self.path}"

    @property
    def api(self) -> str:
        """The root of the REST API."""
        return API if self.server == DEFAULT else f"{self.server}/2.0"

    @property
    def scope(self) -> str:
        """The beginning of the API's paths about what it is the address of."""
        if self.repository:
            return f"/repositories/{quote(self.workspace)}/{quote(self.repository)}"
        return f"/workspaces/{quote(self.workspace)}"


def detect(text: str, environment: Mapping[str, str]) -> str:
    """Return the full form of an address on Bitbucket, "" of any other.

    An empty one stands for the repository whose pipeline the environment describes; a slug is
    Bitbucket's only in a pipeline, since other forges have slugs too.
    """
    ours = environment.get("BITBUCKET_REPO_FULL_NAME", "")
    try:
        server, path = split(text or ours)
    except ConfigurationError:
        return ""
    if not server:
        return f"{DEFAULT}/{path}" if ours and SLUG.fullmatch(path) else ""
    return f"{server}/{path}" if server == DEFAULT else ""


def split(text: str) -> tuple[str, str]:
    """Take an address apart: its server (empty for a slug) and its path."""
    server, path = remote.split(text, "Bitbucket")
    if urlsplit(server).hostname in {BY_SSH, "www.bitbucket.org", "bitbucket.org"}:
        server = DEFAULT
    if match := IN_A_BROWSER.match(path):
        path = "/".join(filter(None, match.groups()))
    return server, path
