from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from cml_runner.access import Access, Asked, find
from cml_runner.errors import ConfigurationError
from cml_runner.model import Credential

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CI = {
    "GITHUB_ACTIONS": "true",
    "GITHUB_REPOSITORY": "acme/model",
    "GITHUB_SERVER_URL": "https://github.com",
}


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "environment", "found"),
    [
        (Asked(repo="https://github.com/acme/model"), {}, ("github", "acme/model")),
        (Asked(repo="git@github.com:acme/model.git"), {}, ("github", "acme/model")),
        (Asked(repo="acme/model", driver="github"), {}, ("github", "acme/model")),
        (
            Asked(repo="https://git.acme.com/a/b", driver="github"),
            {},
            ("github", "git.acme.com/a/b"),
        ),
        (Asked(), CI, ("github", "acme/model")),
        (Asked(repo="file:///srv/forge"), CI, ("local", "file:///srv/forge")),
        (Asked(repo="/srv/forge", driver="local"), {}, ("local", "/srv/forge")),
    ],
)
def test_find(asked: Asked, environment: Mapping[str, str], found: tuple[str, str]) -> None:
    access = find(asked, environment)
    assert access.driver == found[0]
    assert access.forge().url.endswith(found[1])


def test_the_remote_of_a_checkout_without_its_password(checkout: Path) -> None:
    subprocess.run(["git", "init", "-q"], check=True)
    url = "https://user:s3cret@github.com/acme/model.git"
    subprocess.run(["git", "remote", "add", "origin", url], check=True)
    access = find(Asked(), {})
    assert (access.driver, access.forge().url) == ("github", "https://github.com/acme/model")
    assert "s3cret" not in access.url


@pytest.mark.parametrize(
    ("environment", "driver", "url"),
    [
        (
            {"CI_SERVER_URL": "https://x.y/z", "CI_PROJECT_URL": "https://x.y/z/a/b"},
            "gitlab",
            "https://x.y/z/a/b",
        ),
        ({"BITBUCKET_REPO_FULL_NAME": "a/b"}, "bitbucket", "https://bitbucket.org/a/b"),
        (
            {"GITHUB_ACTIONS": "true", "GITHUB_REPOSITORY": "a/b"},
            "github",
            "https://github.com/a/b",
        ),
    ],
)
def test_in_a_ci_job(environment: dict[str, str], driver: str, url: str) -> None:
    access = find(Asked(), environment)
    assert (access.driver, access.url) == (driver, url)


@pytest.mark.parametrize(
    ("repo", "environment", "token"),
    [
        ("https://gitlab.com/a/b", {"GITHUB_TOKEN": "gh", "GITLAB_TOKEN": "gl"}, "gl"),
        ("https://bitbucket.org/a/b", {"GITHUB_TOKEN": "gh", "BITBUCKET_TOKEN": "bb"}, "bb"),
        ("https://github.com/a/b", {"GITLAB_TOKEN": "gl"}, "gl"),
        ("https://github.com/a/b", {}, ""),
    ],
)
def test_the_forge_s_own_variable(repo: str, environment: dict[str, str], token: str) -> None:
    assert find(Asked(repo=repo), environment).credential.token == token
    assert find(Asked(repo=repo, token="mine"), environment).credential.token == "mine"


def test_a_key_from_a_file(checkout: Path) -> None:
    (checkout / "key.pem").write_text("-----BEGIN RSA PRIVATE KEY-----")
    asked = Asked(repo="https://github.com/a/b", github_app_id="1", github_app_key="key.pem")
    assert find(asked, {}).credential.app_key.startswith("-----BEGIN")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(), "no repository"),
        (Asked(repo="https://git.acme.com/a/b"), "which forge"),
        (Asked(repo="x", driver="svn"), "choose one of"),
        (Asked(repo="https://github.com/a/b", github_app_id="1"), "go together"),
        (
            Asked(repo="https://github.com/a/b", github_app_id="1", github_app_key="none.pem"),
            "neither a PEM nor a file",
        ),
    ],
)
def test_mistakes(asked: Asked, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        find(asked, {})


def test_other_repositories_of_the_same_server() -> None:
    ours = Access(
        driver="github", url="https://github.com/acme/model", credential=Credential(token="t")
    )
    other = ours.beside("https://github.com/acme/data")
    assert other
    assert (other.url, other.credential) == ("https://github.com/acme/data", ours.credential)
    for url in ("https://github.example.com/acme/model", "http://github.com/acme/model", "acme"):
        assert ours.beside(url) is None, "a token is never sent to another server"
