"""The GitLab forge against the stateful fake: what the contract suite doesn't ask of all."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from cml_runner.errors import (
    AgentFailed,
    AlreadyExists,
    ConfigurationError,
    CredentialsError,
    JobRunning,
    NotFound,
    RunnerError,
)
from cml_runner.forges.gitlab import Forge
from cml_runner.model import Credential, Job, Runner
from tests.lab.gitlab import GitLab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.gitlab import GitLabJob
    from tests.lab.gitlab import Runner as Registered

PROJECT = "some/group/project"
API = "/below/api/v4"
GRAPHQL = "/below/api/graphql"
DEVELOPER = 30


@pytest.fixture
def gl(monkeypatch: pytest.MonkeyPatch) -> Iterator[GitLab]:
    with GitLab(prefix="/below") as there:
        there.add(PROJECT)
        there.add("some/group", "group")
        monkeypatch.setenv("GITLAB_RUNNER_DOWNLOADS", there.downloads)
        yield there


@pytest.fixture
def forge(gl: GitLab) -> Forge:
    return _forge(gl, gl.add_token())


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it would have slept, in seconds."""
    slept: list[float] = []
    fake = SimpleNamespace(sleep=slept.append, time=time.time)
    monkeypatch.setattr("gitlab.utils.time", fake)
    return slept


def _forge(gl: GitLab, token: str, path: str = f"/{PROJECT}") -> Forge:
    return Forge(f"{gl.url}{path}", Credential(token=token))


def _made(gl: GitLab, forge: Forge, name: str, minutes: float | None = None) -> Registered:
    """Register a runner whose last word was so many minutes ago."""
    forge.register(name, ["cml"], single=False, arch="x64")
    found = [one for one in gl.runners.values() if one.description == name][-1]
    if minutes is not None:
        found.contacted = datetime.now(timezone.utc) - timedelta(minutes=minutes)
    return found


def _seen(gl: GitLab, job: GitLabJob) -> Job:
    url = f"{gl.url}/{job.project.path}/-/jobs/{job.id}"
    return Job(name=f"job {job.id}", id=str(job.id), runner="one", url=url)


# Where it is


def test_the_server_is_found_below_a_path(gl: GitLab, forge: Forge) -> None:
    forge.check()
    probed = [one.path for one in gl.requests][:2]
    assert probed == ["/api/v4/version", f"{API}/version"]
    assert "PRIVATE-TOKEN" not in {name.upper() for one in gl.requests[:2] for name in one.headers}
    forge.runners()
    assert len(gl.asked("GET", "/api/v4/version")) == 1


def test_a_job_knows_its_server(gl: GitLab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI_SERVER_URL", gl.url)
    _forge(gl, gl.add_token()).check()
    assert gl.asked("GET", "/api/v4/version") == []


def test_no_gitlab_there(gl: GitLab, naps: list[float]) -> None:
    forge = Forge(gl.url.replace("/below", "/elsewhere/x"), Credential(token="glpat-x"))
    with pytest.raises(NotFound, match="there is no GitLab at"):
        forge.check()
    gl.fault("GET", "/api/v4/version", 99, status=502)
    with pytest.raises(RunnerError, match="502"):
        _forge(gl, gl.add_token()).check()


@pytest.mark.parametrize("path", ["/some/nowhere", "/nobody"])
def test_nothing_there(gl: GitLab, path: str) -> None:
    with pytest.raises(NotFound, match="may this credential see it"):
        _forge(gl, gl.add_token(), path).check()


def test_a_group(gl: GitLab) -> None:
    forge = _forge(gl, gl.add_token(), "/some/group")
    forge.check()
    made = _made(gl, forge, "one", 0)
    assert (made.kind, made.locked) == ("group_type", False)
    assert [one.name for one in forge.runners()] == ["one"]
    assert _forge(gl, gl.add_token()).runners() == []
    job = gl.add_job(PROJECT, "train", "true")
    assert forge.job(_seen(gl, job)).name == "train"


def test_a_whole_server(gl: GitLab) -> None:
    with pytest.raises(CredentialsError, match="administrator"):
        _forge(gl, gl.add_token(), "").check()
    forge = _forge(gl, gl.add_token(admin=True), "")
    forge.check()
    assert _made(gl, forge, "one", 0).kind == "instance_type"
    assert [one.name for one in forge.runners()] == ["one"]


# Credentials


@pytest.mark.parametrize(
    ("token", "hint"),
    [
        ("", "set REPO_TOKEN or GITLAB_TOKEN"),
        ("glcbt-64_x", "CI_JOB_TOKEN"),
        ("glrt-x", "the token of a runner"),
        ("GR1348941x", "a registration token"),
        ("glpat-wrong", "wrong or expired"),
    ],
)
def test_credentials_that_are_of_no_use(gl: GitLab, token: str, hint: str) -> None:
    with pytest.raises(CredentialsError, match=hint):
        _forge(gl, token).check()
    assert [
        one for one in gl.requests if token and token in str(one.headers)
    ] == [] or "wrong" in token


def test_a_github_app(gl: GitLab) -> None:
    with pytest.raises(ConfigurationError, match="GitHub App"):
        Forge(f"{gl.url}/{PROJECT}", Credential(app_id="1", app_key="k")).check()


def test_scopes_that_do_not_suffice(gl: GitLab) -> None:
    with pytest.raises(CredentialsError, match=r"read_api; it takes .* scope api"):
        _forge(gl, gl.add_token("read_api")).check()
    assert gl.asked("POST", f"{API}/user/runners") == []


def test_scopes_that_do(gl: GitLab) -> None:
    forge = _forge(gl, gl.add_token("create_runner", "manage_runner", "read_api"))
    forge.check()
    _made(gl, forge, "one", 0)
    forge.unregister(forge.runners()[0])
    assert gl.runners == {}


def test_a_role_that_does_not_suffice(gl: GitLab) -> None:
    with pytest.raises(CredentialsError, match="Maintainer"):
        _forge(gl, gl.add_token(role=DEVELOPER)).check()
    with pytest.raises(CredentialsError, match="Owner of the group"):
        _forge(gl, gl.add_token(role=DEVELOPER), "/some/group").check()


def test_a_token_without_words_about_itself(gl: GitLab) -> None:
    gl.fault("GET", f"{API}/personal_access_tokens/self", status=404)
    _forge(gl, gl.add_token()).check()


# Runners


def test_a_label_that_is_too_long(gl: GitLab, forge: Forge) -> None:
    with pytest.raises(ConfigurationError, match="--labels"):
        forge.check(["x" * 256])
    assert gl.requests == []


def test_what_is_registered(gl: GitLab, forge: Forge) -> None:
    expires = datetime.now(timezone.utc) + timedelta(hours=2)
    found = forge.register("one", ["gpu", "big"], single=True, arch="x64", expires=expires)
    (asked,) = gl.asked("POST", f"{API}/user/runners")
    assert {name: asked.body[name] for name in ("tag_list", "description", "run_untagged")} == {
        "tag_list": ["gpu", "big"],
        "description": "one",
        "run_untagged": True,
    }
    assert (asked.body["locked"], asked.body["runner_type"]) == (True, "project_type")
    assert 7000 < asked.body["maximum_timeout"] <= 7200
    assert found.secret.startswith("glrt-")
    assert found.details == {"server": gl.url}


def test_a_short_life_is_no_mistake(gl: GitLab, forge: Forge) -> None:
    soon = datetime.now(timezone.utc) + timedelta(minutes=1)
    forge.register("one", ["cml"], single=True, arch="x64", expires=soon)
    assert next(iter(gl.runners.values())).maximum_timeout == 600


def test_names_that_are_taken(gl: GitLab, forge: Forge) -> None:
    first = _made(gl, forge, "one", 1)
    with pytest.raises(AlreadyExists, match="another --name"):
        forge.register("one", ["cml"], single=False, arch="x64")
    first.contacted = datetime.now(timezone.utc) - timedelta(minutes=5)
    second = _made(gl, forge, "one")
    assert list(gl.runners) == [second.id]


def test_too_many_runners(gl: GitLab, forge: Forge) -> None:
    gl.most_runners = 0
    with pytest.raises(RunnerError, match=r"exceeded.*cml-runner gc"):
        forge.register("one", ["cml"], single=False, arch="x64")


def test_many_runners(gl: GitLab, forge: Forge) -> None:
    first = _made(gl, forge, "r", 0)
    for number in range(1000, 1149):
        gl.runners[number] = first
    assert len(forge.runners()) == 150
    assert len(gl.asked("POST", GRAPHQL)) == 3  # one of them before it registered


def test_what_is_known_of_them(gl: GitLab, forge: Forge) -> None:
    _made(gl, forge, "new")
    _made(gl, forge, "gone", 4)
    busy = _made(gl, forge, "busy", 1)
    job = gl.add_job(PROJECT, "train", "true")
    job.status, job.runner = "running", busy
    found = {one.name: (one.online, one.busy) for one in forge.runners()}
    assert found == {"new": (False, False), "gone": (False, False), "busy": (True, True)}
    assert all(one.ours and one.seen for one in forge.runners())
    next(iter(gl.runners.values())).note = "somebody else's"
    assert [one.ours for one in forge.runners()] == [False, True, True]


def test_a_busy_runner_is_paused_only_for_a_moment(gl: GitLab, forge: Forge) -> None:
    made = _made(gl, forge, "busy", 0)
    job = gl.add_job(PROJECT, "train", "true")
    job.status, job.runner = "running", made
    with pytest.raises(JobRunning):
        forge.unregister(forge.runners()[0])
    asked = gl.asked("PUT", f"{API}/runners/{made.id}")
    assert [one.body for one in asked] == [{"paused": True}, {"paused": False}]
    job.status = "success"
    forge.unregister(forge.runners()[0])
    assert gl.runners == {}


def test_removed_by_hand_in_between(gl: GitLab, forge: Forge) -> None:
    made = _made(gl, forge, "one", 0)
    found = forge.runners()[0]
    gl.fault("DELETE", f"{API}/runners/{made.id}", status=404)
    forge.unregister(found)
    forge.unregister(Runner(id="9", name="x", labels=frozenset(), online=True, busy=False))


# Jobs


def test_a_job_is_looked_up(gl: GitLab, forge: Forge) -> None:
    job = gl.add_job(PROJECT, "train 1/2", "true")
    gl.jobs.append(type(job)(gl.last + 1, "lint", "", (), job.pipeline, job.project))
    found = forge.job(_seen(gl, job))
    assert (found.name, found.attempt, found.runner) == ("train 1/2", 1, "one")
    assert found.pipeline == f"{PROJECT}/-/pipelines/{job.pipeline}"
    assert found.url == f"{gl.url}/{PROJECT}/-/jobs/{job.id}"


@pytest.mark.parametrize("path", ["other/project", "some/group/project2"])
def test_jobs_of_others(gl: GitLab, forge: Forge, path: str) -> None:
    gl.add(path)
    job = gl.add_job(path, "train", "true")
    for ask in (forge.job, forge.retry):
        with pytest.raises(RunnerError, match="is no job of"):
            ask(_seen(gl, job))


@pytest.mark.parametrize(
    ("status", "again", "attempts"),
    [
        ("success", True, 1),
        ("pending", True, 1),
        ("failed", True, 2),
        ("canceled", True, 2),
    ],
)
def test_retry(gl: GitLab, forge: Forge, status: str, again: bool, attempts: int) -> None:
    job = gl.add_job(PROJECT, "train", "true")
    job.status = status
    for seen in (_seen(gl, job), forge.job(_seen(gl, job))):
        assert forge.retry(seen) == again
    assert len(gl.attempts(job)) == attempts


def test_a_running_job_is_left_alone(gl: GitLab, forge: Forge) -> None:
    job = gl.add_job(PROJECT, "train", "true")
    job.status, job.runner = "running", _made(gl, forge, "one", 1)
    assert not forge.retry(_seen(gl, job))
    assert job.status == "running"


@pytest.mark.parametrize("removed", [True, False])
def test_a_lost_job_is_cancelled_and_retried(gl: GitLab, forge: Forge, *, removed: bool) -> None:
    """GitLab waits for a program's agreement, unless it is forced."""
    job = gl.add_job(PROJECT, "train", "true")
    job.status, job.runner = "running", _made(gl, forge, "one", 5)
    if removed:
        gl.fault("GET", f"{API}/runners/.*", 9, status=404)
    assert not forge.retry(_seen(gl, job))
    assert job.status == "canceling"
    assert not forge.retry(_seen(gl, job))
    assert forge.retry(_seen(gl, job))
    assert [one.status for one in gl.attempts(job)] == ["canceled", "pending"]


@pytest.mark.parametrize(
    ("reason", "begun", "found"),
    [
        ("runner_system_failure", True, True),
        ("stuck_or_timeout_failure", True, True),  # its machine died without a word
        ("stuck_or_timeout_failure", False, False),  # no machine ever came
        ("script_failure", True, False),
        ("", True, False),
    ],
)
def test_which_failures_are_interruptions(
    gl: GitLab, forge: Forge, reason: str, *, begun: bool, found: bool
) -> None:
    job = gl.add_job(PROJECT, "train", "true")
    job.status, job.failure, job.runner = "failed", reason, _made(gl, forge, "one", 60)
    job.started = datetime.now(timezone.utc) - timedelta(hours=1) if begun else None
    pipeline = f"{gl.url}/{PROJECT}/-/pipelines/{job.pipeline}"
    seen = forge.interrupted(pipeline, lambda name: name == "one")
    assert [one.job.name for one in seen] == (["train"] if found else [])


def test_a_job_that_is_gone(gl: GitLab, forge: Forge) -> None:
    with pytest.raises(NotFound):
        forge.retry(Job(name="x", id="9", url=f"{gl.url}/{PROJECT}/-/jobs/9"))


# Faults


@pytest.mark.parametrize("fault", [{"status": 502}, {"status": 429}, {"drop": True}])
def test_passing_faults_are_waited_for(
    gl: GitLab, forge: Forge, naps: list[float], fault: dict[str, int]
) -> None:
    hits = gl.fault("POST", GRAPHQL, 2, headers={"Retry-After": "7"}, **fault)  # type: ignore[arg-type]
    assert forge.runners() == []
    assert hits.hits == 2
    assert len(naps) >= 2


def test_lasting_faults(gl: GitLab, forge: Forge, naps: list[float]) -> None:
    job = gl.add_job(PROJECT, "train", "true")
    forge.check()
    gl.fault("GET", ".*/jobs/.*", 99, status=503)
    assert not forge.retry(_seen(gl, job))
    gl.fault("POST", GRAPHQL, 99, status=503)
    with pytest.raises(RunnerError, match="503"):
        forge.runners()
    assert 5 < sum(naps) < 60


@pytest.mark.parametrize("body", ["<html>", '{"data": {"scope": 7}}', "[]"])
def test_other_answers(gl: GitLab, forge: Forge, body: str) -> None:
    gl.fault("POST", GRAPHQL, status=200, body=body)
    with pytest.raises(RunnerError, match="doesn't answer as GitLab would"):
        forge.runners()


def test_a_query_that_fails(gl: GitLab, forge: Forge) -> None:
    gl.fault("POST", GRAPHQL, status=200, body={"errors": [{"message": "Timeout"}]})
    with pytest.raises(RunnerError, match="GitLab said: Timeout"):
        forge.runners()


def test_a_token_that_expires_on_the_way(gl: GitLab, forge: Forge) -> None:
    forge.check()
    gl.tokens.clear()
    with pytest.raises(CredentialsError, match="wrong or expired"):
        forge.runners()


# The program


def test_the_server_s_own_version(gl: GitLab, forge: Forge) -> None:
    found = {one.arch: one for one in forge.packages()}
    assert set(found) == {"x64", "arm64"}
    assert found["x64"].version == "v18.5.0"
    assert found["x64"].url == f"{gl.downloads}/v18.5.0/binaries/gitlab-runner-linux-amd64"


def test_the_newest_of_all(gl: GitLab, forge: Forge) -> None:
    gl.version = "18.7.0-pre"
    found = forge.packages()[0]
    assert found.version == f"latest-{found.sha256[:12]}"
    assert "/latest/" in found.url
    gl.releases = ()
    assert forge.packages() == []


def test_no_version(gl: GitLab, forge: Forge) -> None:
    gl.version = "unknown"
    with pytest.raises(AgentFailed, match="unknown"):
        forge.packages()
    gl.version = "18.5.0"
    gl.fault("GET", "/_downloads/.*", 9, status=500)
    with pytest.raises(AgentFailed, match="status 500"):
        forge.packages()
