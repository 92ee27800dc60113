"""Addresses on GitLab, in all their forms."""

from __future__ import annotations

import pytest

from cml_runner.errors import ConfigurationError
from cml_runner.forges.gitlab import Forge
from cml_runner.forges.gitlab.address import Address, detect
from cml_runner.model import Credential


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("group/project", "https://gitlab.com/group/project"),
        ("group", "https://gitlab.com/group"),
        ("a/b/c/d", "https://gitlab.com/a/b/c/d"),
        ("https://gitlab.com/a/b.git", "https://gitlab.com/a/b"),
        ("https://oauth2:glpat@gitlab.com/a/b", "https://gitlab.com/a/b"),
        ("https://gitlab.com/groups/a/b", "https://gitlab.com/a/b"),
        ("git@gitlab.com:a/b.git", "https://gitlab.com/a/b"),
        ("ssh://git@gitlab.example.com:2222/a/b.git", "https://gitlab.example.com/a/b"),
        ("https://git.example.com/below/a/b", "https://git.example.com/below/a/b"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("https://gitlab.example.com/", "https://gitlab.example.com"),
    ],
)
def test_addresses(text: str, url: str) -> None:
    assert Address.parse(text).url == url
    assert Forge(text, Credential()).url == url


@pytest.mark.parametrize(
    "text", ["", "/", "a b/c", "a//b", "https://gitlab.com/a/-/jobs", "ftp://x/y"]
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is no address on GitLab"):
        Forge(text, Credential())


def test_where_the_server_may_end() -> None:
    root = "https://git.example.com"
    assert Address.parse(f"{root}/x/y").bases == [root, f"{root}/x", f"{root}/x/y"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("https://gitlab.com/a/b", "https://gitlab.com/a/b"),
        ("git@gitlab.corp.example:a/b.git", "https://gitlab.corp.example/a/b"),
        ("https://git.corp.example/a/b", ""),
        ("https://github.com/a/b", ""),
        ("git@bitbucket.org:a/b.git", ""),
        ("a/b", ""),
        ("", ""),
        ("https://[", ""),
    ],
)
def test_detection(text: str, found: str) -> None:
    assert detect(text, {}) == found


def test_the_job_says_where_it_is() -> None:
    server = "https://git.corp.example/below"
    job = {"CI_SERVER_URL": server, "CI_PROJECT_URL": f"{server}/a/b"}
    assert detect("", job) == f"{server}/a/b"
    assert detect("other/project", job) == f"{server}/other/project"
    assert detect(f"{server}/a", job) == f"{server}/a"
    assert detect("https://github.com/a/b", job) == ""


def test_there_are_no_groups_of_runners() -> None:
    with pytest.raises(ConfigurationError, match="--runner-group"):
        Forge("a/b", Credential(), "gpus")
