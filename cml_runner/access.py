"""Which forge, which repository there, and what opens its door."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cml_runner import forges
from cml_runner.errors import ConfigurationError
from cml_runner.model import Credential

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cml_runner.forges import Forge


TOKENS = ("GITHUB_TOKEN", "GITLAB_TOKEN", "BITBUCKET_TOKEN")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What people say on the command line, word for word."""

    driver: str = ""
    repo: str = ""
    token: str = field(default="", repr=False)
    github_app_id: str = ""
    github_app_key: str = field(default="", repr=False)
    runner_group: str = ""

    @classmethod
    def among(cls, values: Mapping[str, Any]) -> Asked:
        """Pick them from all the options of a command."""
        return cls(**{one.name: values[one.name] for one in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Access:
    """One repository, organisation or group on one forge, and our credential there."""

    driver: str
    url: str
    credential: Credential
    group: str = ""

    def beside(self, url: str) -> Access | None:
        """Speak to another repository of the same server; None if it is on another one."""
        ours, other = urlsplit(self.url), urlsplit(url)
        same = (ours.scheme, ours.netloc) == (other.scheme, other.netloc)
        return replace(self, url=url) if same else None

    def forge(self) -> Forge:
        """Load the forge; nothing is sent yet."""
        return forges.load(self.driver, self.url, self.credential, self.group)


def find(asked: Asked, environment: Mapping[str, str]) -> Access:
    """Take what was asked for, else what the CI's variables say, else the git remote.

    Raises ConfigurationError with every mistake.
    """
    mistakes: list[str] = []
    driver, url = _address(asked, environment, mistakes)
    credential = _credential(asked, environment, driver, mistakes)
    if mistakes:
        raise ConfigurationError(*mistakes)
    access = Access(driver=driver, url=url, credential=credential, group=asked.runner_group)
    return replace(access, url=access.forge().url)  # or it makes no sense


def _address(asked: Asked, environment: Mapping[str, str], mistakes: list[str]) -> tuple[str, str]:
    if asked.driver and asked.driver not in forges.NAMES:
        mistakes.append(f"--driver {asked.driver}: choose one of {', '.join(forges.NAMES)}")
        return "", ""
    names = (asked.driver,) if asked.driver else forges.NAMES
    driver, url = forges.detect(asked.repo, environment, names)
    if not url and (remote := _remote()):
        driver, url = forges.detect(remote, environment, names)
    if not url:
        mistakes.append("no repository: use --repo, or run this inside a checkout or a CI job")
    elif not driver and not asked.driver:
        mistakes.append(f"can't tell which forge {url} is on: use --driver")
    return driver or asked.driver, url


def _credential(
    asked: Asked, environment: Mapping[str, str], driver: str, mistakes: list[str]
) -> Credential:
    if bool(asked.github_app_id) != bool(asked.github_app_key):
        mistakes.append("--github-app-id and --github-app-key go together")
    key = asked.github_app_key
    if key and "PRIVATE KEY" not in key:
        try:
            key = Path(key).expanduser().read_text()
        except OSError as error:
            mistakes.append(f"--github-app-key is neither a PEM nor a file: {error.strerror}")
    token = asked.token
    if not token and not key:  # the forge's own variable; as CML did, any other if it isn't set
        names = sorted(TOKENS, key=lambda name: name != f"{driver.upper()}_TOKEN")
        token = next((environment[name] for name in names if environment.get(name)), "")
    return Credential(token=token, app_id=asked.github_app_id, app_key=key)


def _remote() -> str:
    """Ask git where this checkout came from; credentials in the address are left out."""
    command = ["git", "remote", "get-url", "origin"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return re.sub("://[^/@]*@", "://", done.stdout.strip()) if done.returncode == 0 else ""
