"""Where on GitLab: a project, a group or a whole server, in any of the forms people have for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cml_runner import remote
from cml_runner.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT = "https://gitlab.com"
PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_-])?"
PATH = re.compile(rf"{PART}(/{PART})*")


@dataclass(frozen=True)
class Address:
    """A path on some server. Only the server knows whether its first parts belong to itself."""

    server: str  # https://gitlab.com
    path: str  # group/subgroup/project; "" is the server as a whole

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read a path or a URL. Raises ConfigurationError."""
        server, path = remote.split(text, "GitLab")
        path = _plain(path)
        if not (server and not path) and not PATH.fullmatch(path):
            msg = (
                f"{text!r} is no address on GitLab: give group/project, a group, or the URL"
                " of a project, a group or a server"
            )
            raise ConfigurationError(msg)
        return cls(server or DEFAULT, path)

    @property
    def url(self) -> str:
        """The full address."""
        return f"{self.server}/{self.path}".removesuffix("/")

    @property
    def bases(self) -> list[str]:
        """Where the server's own address may end, the likeliest first."""
        parts = self.path.split("/") if self.path else []
        return ["/".join([self.server, *parts[:count]]) for count in range(len(parts) + 1)]


def detect(text: str, environment: Mapping[str, str]) -> str:
    """Return the full form of an address on GitLab, "" of any other.

    An empty one stands for the project of the job that the environment describes; a path is
    GitLab's only in such a job, since other forges have the like.
    """
    text = text or environment.get("CI_PROJECT_URL", "")
    home = environment.get("CI_SERVER_URL", "").rstrip("/")
    if not text:
        return ""
    try:
        server, path = remote.split(text, "GitLab")
    except ConfigurationError:
        return ""
    path = _plain(path)
    if not server:
        return f"{home}/{path}" if home and PATH.fullmatch(path) else ""
    host = urlsplit(server).netloc
    ours = host in {"gitlab.com", urlsplit(home).netloc} or host.startswith("gitlab.")
    return f"{server}/{path}".removesuffix("/") if ours else ""


def _plain(path: str) -> str:
    """Leave out what a browser adds to the path of a group, and of a pipeline."""
    return re.sub(r"/-/pipelines/\d+$", "", path.removeprefix("groups/"))
