"""What `doctor` sees of forges for which a token isn't good enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cml_runner.errors import CredentialsError, NotFound
from cml_runner.forges import github, gitlab
from cml_runner.model import Credential
from tests.lab.gitlab import GitLab

if TYPE_CHECKING:
    from cml_runner.forges import Forge
    from cml_runner.model import Check
    from tests.lab.github import GitHub


def look(forge: Forge) -> dict[str, Check]:
    return {one.what: one for one in forge.checks(["cml"])}


def on_github(gh: GitHub, token: str, path: str = "owner/repo") -> dict[str, Check]:
    return look(github.Forge(f"{gh.url}/{path}", Credential(token=token)))


def test_a_classic_token_that_suffices(gh: GitHub) -> None:
    found = on_github(gh, gh.add_token("repo"))
    assert "a classic token with the scopes repo" in found["login"].message
    assert {one.state for one in found.values()} == {"ok"}


@pytest.mark.parametrize("scopes", [(), ("public_repo",), ("admin:org",)])
def test_a_classic_token_that_may_not_register_runners(gh: GitHub, scopes: tuple[str, ...]) -> None:
    found = on_github(gh, gh.add_token(*scopes))["permission to register runners"]
    # Of what somebody may not see GitHub says that it isn't there, and so would a launch.
    assert (found.state, found.code) == ("failed", NotFound.exit_code)
    assert "REPO_TOKEN" in found.hint


def test_a_fine_grained_token_that_may_only_read(gh: GitHub) -> None:
    token = gh.add_fine_grained_token("owner/repo", administration="read", actions="read")
    found = on_github(gh, token)
    assert found["permission to register runners"].state == "failed"
    assert found["permission to run jobs again"].state == "warning"


def test_a_fine_grained_token_that_can_not_run_jobs_again(gh: GitHub) -> None:
    token = gh.add_fine_grained_token("owner/repo", administration="write")
    found = on_github(gh, token)
    assert found["permission to register runners"].state == "ok"
    assert found["permission to run jobs again"].state == "warning"
    assert "--no-retry" in found["permission to run jobs again"].hint


def test_a_token_that_nobody_has(gh: GitHub) -> None:
    found = on_github(gh, "ghp_nonsense")
    assert found["login"].state == "failed"
    assert set(found) == {"login", "clock"}, "what depends on it is left out"


def test_looking_changes_nothing(gh: GitHub) -> None:
    on_github(gh, gh.add_token("repo"))
    assert not gh.registrations
    assert list(gh.runners()) == []


def test_a_clock_that_is_wrong(gh: GitHub) -> None:
    gh.ahead = -600
    found = on_github(gh, gh.add_token("repo"))["clock"]
    assert found.state == "warning"
    assert "fast" in found.message


def test_a_token_of_gitlab_with_too_few_scopes() -> None:
    with GitLab() as there:
        there.add("some/project")
        token = there.add_token("read_api")
        found = look(gitlab.Forge(f"{there.url}/some/project", Credential(token=token)))
    assert (found["scopes"].state, found["scopes"].code) == ("failed", CredentialsError.exit_code)
    assert found["role"].state == "ok"
