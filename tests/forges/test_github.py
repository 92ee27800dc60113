"""The GitHub forge against the stateful fake: what the contract suite doesn't ask of all."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner.errors import (
    AlreadyExists,
    ConfigurationError,
    CredentialsError,
    JobRunning,
    NotFound,
    RunnerError,
)
from cml_runner.forges.github import Forge
from cml_runner.model import Credential, Job
from tests.lab.github import GitHub, WorkflowJob
from tests.lab.github_shapes import moment
from tests.lab.github_state import LOST, Token

if TYPE_CHECKING:
    from cml_runner import forges
    from tests.lab.github_state import Run, Runner

RUNNERS = r"/repos/owner/repo/actions/runners"
DAY = 86_400


@pytest.fixture
def forge(gh: GitHub) -> forges.Forge:
    return Forge(f"{gh.url}/owner/repo", Credential(token=gh.add_token("repo")))


def _forge(gh: GitHub, token: str, path: str = "owner/repo", group: str = "") -> Forge:
    return Forge(f"{gh.url}/{path}", Credential(token=token), group)


def _online(gh: GitHub, name: str, job: str = "") -> Runner:
    """Let a runner's program appear, and take a job."""
    runner = gh.register(gh.places["repos/owner/repo"], name, ["cml"])
    runner.session, runner.seen = "x", time.monotonic()
    if job:
        runner.job = gh.job(job)
        runner.job.runner_id, runner.job.runner_name = runner.id, name
        gh.start(runner.job)
    return runner


# Credentials


@pytest.mark.parametrize(
    ("path", "scopes"),
    [("owner/repo", "repo"), ("owner", "admin:org"), ("enterprises/big", None)],
)
def test_enough_permission(gh: GitHub, path: str, scopes: str | None) -> None:
    _forge(gh, gh.add_token(scopes or "manage_runners:enterprise"), path).check()


def test_fine_grained_token(gh: GitHub) -> None:
    _forge(gh, gh.add_fine_grained_token("owner/repo", administration="write")).check()


def test_read_permission_is_not_enough(gh: GitHub) -> None:
    token = gh.add_fine_grained_token("owner/repo", administration="read")
    with pytest.raises(CredentialsError, match="Administration: write"):
        _forge(gh, token).check()


@pytest.mark.parametrize(
    ("path", "scope", "words"),
    [
        ("owner", "repo", "admin:org"),
        ("owner", "repo", "Self-hosted runners: write"),
    ],
)
def test_missing_scope(gh: GitHub, path: str, scope: str, words: str) -> None:
    with pytest.raises(CredentialsError, match=words):
        _forge(gh, gh.add_token(scope), path).check()


@pytest.mark.parametrize(
    ("path", "scope", "words"),
    [
        ("owner/repo", "public_repo", "scope repo"),
        ("enterprises/big", "admin:org", "manage_runners:enterprise"),
        ("owner/nothing", "repo", "is the address right"),
    ],
)
def test_what_a_token_cannot_see(gh: GitHub, path: str, scope: str, words: str) -> None:
    with pytest.raises(NotFound, match=words):
        _forge(gh, gh.add_token(scope), path).check()


def test_workflow_token(gh: GitHub) -> None:
    with pytest.raises(CredentialsError, match=r"GITHUB_TOKEN of a workflow never will do"):
        _forge(gh, gh.add_workflow_token("owner/repo", actions="write")).check()


def test_wrong_token(gh: GitHub) -> None:
    with pytest.raises(CredentialsError, match="wrong or expired") as caught:
        _forge(gh, "ghp_sesame").check()
    assert "sesame" not in str(caught.value)


def test_no_token(gh: GitHub) -> None:
    with pytest.raises(CredentialsError, match="REPO_TOKEN"):
        _forge(gh, "").check()
    assert gh.requests == []


def test_not_admin(gh: GitHub) -> None:
    with pytest.raises(CredentialsError, match="Must have admin rights"):
        _forge(gh, gh.add_token("repo", role="write")).check()


# GitHub Apps


@pytest.mark.parametrize(
    ("path", "permission"),
    [("owner/repo", "administration"), ("owner", "organization_self_hosted_runners")],
)
def test_app(gh: GitHub, path: str, permission: str) -> None:
    app = gh.add_app("owner", **{permission: "write"})
    forge = Forge(f"{gh.url}/{path}", Credential(app_id=str(app.id), app_key=app.key))
    forge.check()
    forge.runners()
    kinds = [request.authorization for request in gh.requests]
    assert kinds == ["app", "app", "installation", "installation"]


def test_app_token_is_renewed(gh: GitHub) -> None:
    app = gh.add_app("owner", administration="write")
    gh.issue(Token("ghs_short", "installation", permissions=app.permissions))
    answer = {"token": "ghs_short", "expires_at": moment(time.time() + 10)}
    gh.fault("POST", r"/app/installations/.*", status=201, body=answer)
    forge = Forge(f"{gh.url}/owner/repo", Credential(app_id=app.client_id, app_key=app.key))
    forge.runners()
    del gh.tokens["ghs_short"]
    forge.runners()
    forge.runners()
    assert len(gh.asked("POST", r"/app/installations/.*")) == 2
    assert len(gh.asked("GET", r".*/installation")) == 1


def test_app_elsewhere(gh: GitHub) -> None:
    app = gh.add_app("somebody")
    with pytest.raises(NotFound):
        Forge(f"{gh.url}/owner", Credential(app_id=str(app.id), app_key=app.key)).check()


@pytest.mark.parametrize(
    ("app_id", "key"), [("", "key"), ("7", ""), ("7", "no PEM"), ("7", "-----BEGIN X-----")]
)
def test_app_by_halves(gh: GitHub, app_id: str, key: str) -> None:
    with pytest.raises(CredentialsError, match="id and its private key"):
        Forge(f"{gh.url}/owner", Credential(app_id=app_id, app_key=key)).check()
    assert gh.requests == []


def test_app_of_an_enterprise(gh: GitHub) -> None:
    app = gh.add_app("owner")
    with pytest.raises(CredentialsError, match="manage_runners:enterprise"):
        Forge(f"{gh.url}/enterprises/big", Credential(app_id="7", app_key=app.key)).check()


# Runners


def test_many_runners(gh: GitHub, forge: forges.Forge) -> None:
    for number in range(230):
        gh.register(gh.places["repos/owner/repo"], f"r{number}", ["cml"])
    assert len({runner.id for runner in forge.runners()}) == 230
    assert len(gh.asked("GET", RUNNERS)) == 3
    _online(gh, "last")
    with pytest.raises(AlreadyExists):
        forge.register("last", [], single=True, arch="x64")


@pytest.mark.parametrize(("arch", "label"), [("x64", "X64"), ("arm64", "ARM64")])
def test_labels(gh: GitHub, forge: forges.Forge, arch: str, label: str) -> None:
    registration = forge.register("a", ["Gpu", "linux", "gpu"], single=True, arch=arch)
    found = gh.runner("a")
    assert found
    assert found.labels == registration.labels == ("self-hosted", "Linux", label, "Gpu")
    assert (found.group, found.ephemeral, found.work) == (1, True, "_work")


def test_groups(gh: GitHub) -> None:
    number = gh.add_group(gh.places["orgs/owner"], "Big Machines")
    token = gh.add_token("admin:org")
    forge = _forge(gh, token, "owner", "big machines")
    registration = forge.register("a", ["cml"], single=True, arch="x64")
    found = gh.runner("a")
    assert found
    assert (found.group, registration.group) == (number, "Big Machines")
    with pytest.raises(ConfigurationError, match="there are: Default, Big Machines"):
        _forge(gh, token, "owner", "small").register("b", ["cml"], single=False, arch="x64")


def test_a_repository_has_no_groups(gh: GitHub) -> None:
    assert _forge(gh, "x", group="Default").url
    with pytest.raises(ConfigurationError, match="big"):
        _forge(gh, "x", group="big")


@pytest.mark.parametrize("broken", [{"drop": True}, {"status": 502}])
def test_a_registration_whose_answer_was_lost(
    gh: GitHub, forge: forges.Forge, naps: list[float], broken: dict[str, Any]
) -> None:
    gh.fault("POST", f"{RUNNERS}/generate-jitconfig", after=True, **broken)
    assert forge.register("a", [], single=True, arch="x64").secret
    assert [runner.name for runner in forge.runners()] == ["a"]


def test_a_name_that_is_always_taken(gh: GitHub, forge: forges.Forge) -> None:
    clash = {"message": "Already exists - A runner with the name a already exists."}
    gh.fault("POST", f"{RUNNERS}/generate-jitconfig", 9, status=409, body=clash)
    with pytest.raises(AlreadyExists):
        forge.register("a", [], single=True, arch="x64")
    assert len(gh.asked("POST", f"{RUNNERS}/generate-jitconfig")) == 3


def test_a_runner_that_was_lost_with_its_job(gh: GitHub, forge: forges.Forge) -> None:
    gh.add_run("owner/repo", [WorkflowJob("long")])
    _online(gh, "a", "long").session = ""
    assert not forge.runners()[0].online
    with pytest.raises(JobRunning):
        forge.unregister(forge.runners()[0])
    with pytest.raises(AlreadyExists, match="lost"):
        forge.register("a", [], single=True, arch="x64")


# Jobs


def _lost(gh: GitHub, name: str, runner: str, message: str) -> None:
    gh.add_run("owner/repo", [WorkflowJob(name)])
    found = _online(gh, runner, name)
    assert found.job
    found.job.message = message
    gh.finish(found, "Failed")


def test_a_job_that_goes_on_without_its_runner(gh: GitHub, forge: forges.Forge) -> None:
    gh.add_run("owner/repo", [WorkflowJob("long"), WorkflowJob("other")])
    _online(gh, "a", "long")
    _online(gh, "b", "other")
    assert [(one.name, one.attempt) for one in forge.lost("a")] == [("long", 1)]
    assert forge.lost("c") == []


def test_what_github_itself_says_was_lost(gh: GitHub, forge: forges.Forge) -> None:
    _lost(gh, "lost", "a-0af3", LOST)
    _lost(gh, "wrong", "a-0af4", "Process completed with exit code 1.")
    _lost(gh, "other", "b", LOST)
    gh.add_run("owner/repo", [WorkflowJob("fine")])
    _do(gh, "fine", "Succeeded", "a")
    assert [one.name for one in forge.lost("a")] == ["lost"]


def test_what_was_lost_long_ago(gh: GitHub, forge: forges.Forge) -> None:
    gh.clock = lambda: time.time() - 7 * 3600
    _lost(gh, "lost", "a", LOST)
    gh.clock = time.time
    assert forge.lost("a") == []


def test_who_may_not_read_checks_learns_less(gh: GitHub) -> None:
    token = gh.add_fine_grained_token("owner/repo", actions="write")
    _lost(gh, "lost", "a", LOST)
    assert _forge(gh, token).lost("a") == []
    token = gh.add_fine_grained_token("owner/repo", actions="write", checks="read")
    assert len(_forge(gh, token).lost("a")) == 1


def test_an_organisation_is_not_asked_for_runs(gh: GitHub) -> None:
    token = gh.add_token("admin:org")
    assert _forge(gh, token, "owner").lost("a") == []


def test_a_job_that_is_better_lost_than_failed(gh: GitHub, forge: forges.Forge) -> None:
    run = gh.add_run("owner/repo", [WorkflowJob("long"), WorkflowJob("other")])
    _online(gh, "a", "long")
    job = Job(name="long", pipeline=f"owner/repo/actions/runs/{run.id}", attempt=1, runner="a")
    assert forge.better_lost(job)
    token = gh.add_token("repo", "admin:org")
    assert not _forge(gh, token, "owner").better_lost(job)  # which nobody would find
    _do(gh, "other", "Failed", "b")
    assert not forge.better_lost(job)


def _interrupted(gh: GitHub, *others: str) -> tuple[Run, Job]:
    """Let a job die with its runner, and return it as its supervisor knew it."""
    jobs = [WorkflowJob(name) for name in ("long", *others)]
    run = gh.add_run("owner/repo", jobs)
    gh.finish(_online(gh, "a", "long"), "Failed")
    pipeline = f"owner/repo/actions/runs/{run.id}"
    return run, Job(name="long", pipeline=pipeline, attempt=1, runner="a")


def _do(gh: GitHub, name: str, result: str, runner: str) -> None:
    gh.finish(_online(gh, runner, name), result)


def test_only_the_interrupted_job_runs_again(gh: GitHub, forge: forges.Forge) -> None:
    run, job = _interrupted(gh, "other")
    assert not forge.retry(job)
    _do(gh, "other", "Failed", "b")
    assert forge.retry(job)
    assert [(one.name, one.status) for one in run.jobs] == [
        ("long", "queued"),
        ("other", "completed"),
    ]
    assert forge.retry(job)
    _do(gh, "long", "Failed", "c")  # this time it was its own fault
    assert forge.retry(job)
    assert run.attempt == 2


def test_two_interrupted_jobs_of_one_run(gh: GitHub, forge: forges.Forge) -> None:
    run, first = _interrupted(gh, "other")
    second = Job(name="other", pipeline=first.pipeline, attempt=1, runner="b")
    _do(gh, "other", "Failed", "b")
    assert forge.retry(first)
    assert not forge.retry(second)  # the first one runs
    _do(gh, "long", "Succeeded", "c")
    assert forge.retry(second)
    assert run.attempt == 3
    assert [(one.name, one.status) for one in run.jobs] == [
        ("long", "completed"),
        ("other", "queued"),
    ]
    assert forge.retry(first)
    assert run.attempt == 3


def test_a_job_which_succeeded_after_all(gh: GitHub, forge: forges.Forge) -> None:
    run = gh.add_run("owner/repo", [WorkflowJob("long"), WorkflowJob("other")])
    _do(gh, "long", "Succeeded", "a")
    job = Job(name="long", pipeline=f"owner/repo/actions/runs/{run.id}", attempt=1, runner="a")
    assert forge.retry(job)
    assert run.attempt == 1


def test_a_job_under_another_name(gh: GitHub, forge: forges.Forge) -> None:
    run, job = _interrupted(gh)
    assert forge.retry(Job(name="?", pipeline=job.pipeline, attempt=1, runner="a"))
    assert run.attempt == 2
    with pytest.raises(RunnerError, match="no job"):
        forge.retry(Job(name="?", pipeline=job.pipeline, attempt=1, runner="nobody"))


def test_a_rerun_that_came_first(gh: GitHub, forge: forges.Forge) -> None:
    _, job = _interrupted(gh)
    body = {"message": "The workflow run containing this job is already running"}
    gh.fault("POST", r".*/rerun", status=403, body=body)
    assert not forge.retry(job)
    assert forge.retry(job)


def test_a_rerun_whose_answer_was_lost(gh: GitHub, forge: forges.Forge, naps: list[float]) -> None:
    run, job = _interrupted(gh)
    gh.fault("POST", r".*/rerun", after=True, status=502)
    assert not forge.retry(job)
    assert forge.retry(job)
    assert run.attempt == 2


def test_a_run_that_is_too_old(gh: GitHub, forge: forges.Forge) -> None:
    run, job = _interrupted(gh)
    run.too_old = True
    with pytest.raises(RunnerError, match="over a month") as caught:
        forge.retry(job)
    assert not isinstance(caught.value, CredentialsError)


def test_no_permission_to_run_again(gh: GitHub) -> None:
    _, job = _interrupted(gh)
    token = gh.add_fine_grained_token("owner/repo", administration="write", actions="read")
    with pytest.raises(CredentialsError, match="Actions: write"):
        _forge(gh, token).retry(job)


@pytest.mark.parametrize(
    "job",
    [
        Job(name="x"),
        Job(name="x", pipeline="owner/repo/actions/runs/1"),
        Job(name="x", pipeline="owner/repo/actions/runs/../../../x", attempt=1),
        Job(name="x", pipeline="owner/other/actions/runs/1", attempt=1),
    ],
)
def test_a_job_of_nowhere(gh: GitHub, forge: forges.Forge, job: Job) -> None:
    with pytest.raises(RunnerError, match="'x'"):
        forge.retry(job)
    assert gh.requests == []


def test_a_job_of_an_organisation(gh: GitHub) -> None:
    run, job = _interrupted(gh)
    forge = _forge(gh, gh.add_token("repo", "admin:org"), "Owner")
    assert forge.retry(job)
    assert run.attempt == 2
    with pytest.raises(RunnerError, match="isn't in"):
        forge.retry(Job(name="x", pipeline="else/repo/actions/runs/1", attempt=1))


def test_a_retry_while_github_is_down(gh: GitHub, forge: forges.Forge, naps: list[float]) -> None:
    _, job = _interrupted(gh)
    fault = gh.fault("GET", r".*/actions/runs/\d+", 99, status=503)
    assert not forge.retry(job)
    fault.left = 0
    assert forge.retry(job)
