"""Addresses on GitHub, in all their forms."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cml_runner.errors import ConfigurationError
from cml_runner.forges.github import Forge
from cml_runner.forges.github.address import Address
from cml_runner.model import Credential

GITHUB = "https://api.github.com"


@pytest.mark.parametrize(
    ("text", "url", "api", "prefix"),
    [
        ("owner/repo", "https://github.com/owner/repo", GITHUB, "/repos/owner/repo"),
        ("my-org", "https://github.com/my-org", GITHUB, "/orgs/my-org"),
        (
            "enterprises/big",
            "https://github.com/enterprises/big",
            GITHUB,
            "/enterprises/big",
        ),
        ("https://github.com/o/r", "https://github.com/o/r", GITHUB, "/repos/o/r"),
        ("https://github.com/o/r.git", "https://github.com/o/r", GITHUB, "/repos/o/r"),
        ("https://github.com/o/r/", "https://github.com/o/r", GITHUB, "/repos/o/r"),
        ("http://www.github.com/o/r", "https://github.com/o/r", GITHUB, "/repos/o/r"),
        ("github.com/o/r.js", "https://github.com/o/r.js", GITHUB, "/repos/o/r.js"),
        ("https://GitHub.com/orgs/o", "https://github.com/o", GITHUB, "/orgs/o"),
        ("git@github.com:o/r.git", "https://github.com/o/r", GITHUB, "/repos/o/r"),
        ("ssh://git@github.com/o/r.git", "https://github.com/o/r", GITHUB, "/repos/o/r"),
        ("ssh://git@ssh.github.com:443/o/r", "https://github.com/o/r", GITHUB, "/repos/o/r"),
        ("https://me:secret@github.com/o/r", "https://github.com/o/r", GITHUB, "/repos/o/r"),
        (
            "https://octo.ghe.com/o/r",
            "https://octo.ghe.com/o/r",
            "https://api.octo.ghe.com",
            "/repos/o/r",
        ),
        (
            "git@octo.ghe.com:o/r.git",
            "https://octo.ghe.com/o/r",
            "https://api.octo.ghe.com",
            "/repos/o/r",
        ),
        (
            "https://git.corp.example/o/r",
            "https://git.corp.example/o/r",
            "https://git.corp.example/api/v3",
            "/repos/o/r",
        ),
        (
            "http://127.0.0.1:8080/o",
            "http://127.0.0.1:8080/o",
            "http://127.0.0.1:8080/api/v3",
            "/orgs/o",
        ),
        (
            "https://git.corp.example:443/enterprises/e",
            "https://git.corp.example/enterprises/e",
            "https://git.corp.example/api/v3",
            "/enterprises/e",
        ),
        (
            "ssh://git@git.corp.example:2222/o/r.git",
            "https://git.corp.example/o/r",
            "https://git.corp.example/api/v3",
            "/repos/o/r",
        ),
    ],
)
def test_parse(text: str, url: str, api: str, prefix: str) -> None:
    address = Address.parse(text)
    assert (address.url, address.api, address.prefix) == (url, api, prefix)
    assert Forge(text, Credential()).url == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "https://github.com",
        "https://github.com/o/r/actions",
        "https://github.com/o/..",
        "o/r?x=1/y",
        "ftp://github.com/o/r",
        "https://me:secret@github.com:port/o/r",
        "own er/repo",
        "../../etc",
    ],
)
def test_nonsense(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Forge(text, Credential())
    assert "secret" not in str(caught.value)


WORKFLOW = {"GITHUB_ACTIONS": "true", "GITHUB_REPOSITORY": "o/r"}
OWN = {**WORKFLOW, "GITHUB_SERVER_URL": "https://git.corp.example"}


@pytest.mark.parametrize(
    ("url", "environment", "found"),
    [
        ("https://github.com/o/r", {}, "https://github.com/o/r"),
        ("git@github.com:o/r.git", {}, "https://github.com/o/r"),
        ("git@octo.ghe.com:o/r.git", {}, "https://octo.ghe.com/o/r"),
        ("https://me:secret@github.com/o/r.git", {}, "https://github.com/o/r"),
        ("https://github.com/", {}, "https://github.com/"),  # its mistake is Forge's to tell
        ("", {}, ""),
        ("", WORKFLOW, "https://github.com/o/r"),
        ("", OWN, "https://git.corp.example/o/r"),
        ("", {"GITHUB_REPOSITORY": "o/r"}, "https://github.com/o/r"),
        ("a/b", {}, ""),
        ("a/b", {"GITLAB_CI": "true"}, ""),
        ("a/b", WORKFLOW, "https://github.com/a/b"),
        ("a/b", OWN, "https://git.corp.example/a/b"),
        ("https://git.corp.example/a/b", OWN, "https://git.corp.example/a/b"),
        ("git@git.corp.example:a/b.git", OWN, "https://git.corp.example/a/b"),
        ("https://git.corp.example/a/b", {}, ""),
        ("https://gitlab.com/a/b", WORKFLOW, ""),
        ("https://notgithub.com/a/b", {}, ""),
        ("https://github.com.evil.example/a/b", {}, ""),
        ("/srv/forge", WORKFLOW, ""),
        ("file:///srv/forge", WORKFLOW, ""),
        ("https://[bad/a/b", WORKFLOW, ""),
        ("", {**WORKFLOW, "GITHUB_SERVER_URL": "https://[bad"}, ""),
    ],
)
def test_detect(url: str, environment: dict[str, str], found: str) -> None:
    assert Forge.detect(url, environment) == found


def test_detection_loads_no_sdk() -> None:
    code = (
        "import sys; from cml_runner.forges.github import Forge;"
        "assert Forge.detect('https://github.com/o/r', {});"
        "print(sorted({'github', 'requests', 'jwt'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
