"""The Bitbucket forge against the stateful fake: what the contract suite doesn't ask of all."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from cml_runner.errors import (
    AlreadyExists,
    ConfigurationError,
    CredentialsError,
    JobRunning,
    NotFound,
    RunnerError,
)
from cml_runner.forges.bitbucket import Forge
from cml_runner.forges.bitbucket.address import Address, detect
from cml_runner.model import Credential, Job
from tests.lab.bitbucket import READ, Bitbucket, Runner, Step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.bitbucket import Pipeline

HERE = "/2.0/repositories/team/repo"
RUNNERS = f"{HERE}/pipelines-config/runners"


@pytest.fixture
def bb() -> Iterator[Bitbucket]:
    with Bitbucket(page=2) as there:
        there.add("team/repo")
        yield there


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it would have slept, in seconds."""
    slept: list[float] = []
    fake = SimpleNamespace(sleep=slept.append, time=time.time)
    monkeypatch.setattr("urllib3.util.retry.time", fake)
    return slept


@pytest.fixture
def forge(bb: Bitbucket) -> Forge:
    return _forge(bb, bb.add_token())


def _forge(bb: Bitbucket, token: str, path: str = "team/repo") -> Forge:
    return Forge(f"{bb.url}/{path}", Credential(token=token))


def _runner(bb: Bitbucket, name: str, *, online: bool = True) -> Runner:
    runner = Runner(name, ["self.hosted", "linux"], bb.repositories["team/repo"], "team")
    bb.runners[runner.uuid] = runner
    if online:
        runner.status, runner.seen = "ONLINE", time.time() + 60
    return runner


def _busy(bb: Bitbucket, runner: Runner) -> Pipeline:
    pipeline = bb.add_pipeline("team/repo", "train", "true")
    pipeline.step.state, pipeline.step.runner = "IN_PROGRESS", runner.name
    runner.step = pipeline.step
    return pipeline


def _job(bb: Bitbucket, pipeline: Pipeline, runner: str = "one") -> Job:
    parts = (pipeline.repository.uuid, pipeline.uuid, pipeline.step.uuid)
    return Job(name="a step", id="/".join(parts), runner=runner)


# Addresses


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("team/repo", "https://bitbucket.org/team/repo"),
        ("team", "https://bitbucket.org/team"),
        ("https://bitbucket.org/team/repo.git", "https://bitbucket.org/team/repo"),
        ("https://me@bitbucket.org/team/repo", "https://bitbucket.org/team/repo"),
        ("https://bitbucket.org/team/repo/src/main/", "https://bitbucket.org/team/repo"),
        ("https://bitbucket.org/team/workspace/projects", "https://bitbucket.org/team"),
        ("git@bitbucket.org:team/repo.git", "https://bitbucket.org/team/repo"),
        ("ssh://git@ssh.bitbucket.org:443/team/repo", "https://bitbucket.org/team/repo"),
    ],
)
def test_addresses(text: str, url: str) -> None:
    address = Address.parse(text)
    assert (address.url, address.api) == (url, "https://api.bitbucket.org/2.0")
    assert detect(text, {}) == (url if "bitbucket" in text else "")


@pytest.mark.parametrize("text", ["", "a/b/c", "https://bitbucket.org/", "/repo", "a b"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is no address on Bitbucket"):
        Forge(text, Credential())


def test_the_pipeline_says_where_it_is() -> None:
    environment = {"BITBUCKET_REPO_FULL_NAME": "team/repo"}
    assert detect("", environment) == "https://bitbucket.org/team/repo"
    assert detect("other", environment) == "https://bitbucket.org/other"
    assert detect("https://github.com/o/r", environment) == ""
    assert detect("", {}) == ""


def test_there_are_no_groups() -> None:
    with pytest.raises(ConfigurationError, match="--runner-group"):
        Forge("team/repo", Credential(), "gpus")


# Credentials


def test_every_kind_of_credential(bb: Bitbucket) -> None:
    for token in (bb.add_token(), bb.add_access_token(), bb.add_consumer()):
        _forge(bb, token).check(["cml"])
    kinds = {one.headers["Authorization"].split()[0] for one in bb.asked("GET", RUNNERS)}
    assert kinds == {"Basic", "Bearer"}


def test_a_consumer_logs_in_once(bb: Bitbucket) -> None:
    forge = _forge(bb, bb.add_consumer())
    forge.check()
    forge.runners()
    assert len(bb.asked("POST", "/site/oauth2/access_token")) == 1


@pytest.mark.parametrize(
    ("token", "hint"),
    [
        ("", "set REPO_TOKEN or BITBUCKET_TOKEN"),
        ("me:ATBBx8Yz", "app passwords are gone"),
        ("ATBBx8Yz", "app passwords are gone"),
        ("ATATTx8Yz", "EMAIL:TOKEN"),
    ],
)
def test_credentials_that_are_of_no_use(bb: Bitbucket, token: str, hint: str) -> None:
    with pytest.raises(CredentialsError, match=hint):
        _forge(bb, token).check()
    assert bb.requests == []


@pytest.mark.parametrize("token", ["me@example.com:ATATTwrong", "ATCTTwrong"])
def test_wrong_credentials(bb: Bitbucket, token: str) -> None:
    with pytest.raises(CredentialsError, match="wrong or expired"):
        _forge(bb, token).check()


def test_a_wrong_consumer(bb: Bitbucket) -> None:
    with pytest.raises(CredentialsError, match="OAuth consumer"):
        _forge(bb, "key:secret").check()


def test_a_github_app(bb: Bitbucket) -> None:
    forge = Forge(f"{bb.url}/team/repo", Credential(app_id="1", app_key="k"))
    with pytest.raises(ConfigurationError, match="GitHub App"):
        forge.check()


def test_missing_scopes_are_named(bb: Bitbucket) -> None:
    with pytest.raises(CredentialsError, match=f"it lacks {READ}"):
        _forge(bb, bb.add_token("read:repository:bitbucket")).check()
    with pytest.raises(CredentialsError, match="may only list"):
        _forge(bb, bb.add_token(READ)).check()
    bb.tells_scopes = False
    forge = _forge(bb, bb.add_token(READ, "read:repository:bitbucket"))
    forge.check()
    with pytest.raises(CredentialsError, match="it lacks write:runner:bitbucket"):
        forge.register("one", ["cml"], single=False, arch="x64")


# Runners


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["GPU"], "--labels GPU"),
        (["a-b", "ok", "c_d"], "--labels a-b,c_d"),
        (["x" * 51], "up to 50"),
        ([f"l{number}" for number in range(9)], "takes 10"),
    ],
)
def test_labels_are_checked_before_anything_is_asked(
    bb: Bitbucket, forge: Forge, labels: list[str], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        forge.check(labels)
    assert bb.requests == []


def test_registration(bb: Bitbucket, forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITBUCKET_RUNNER_RUNTIME", "shell")
    found = forge.register("one", ["gpu", "linux.shell"], single=False, arch="x64")
    assert found.labels == ("self.hosted", "linux.shell", "gpu")
    (made,) = bb.runners.values()
    assert found.secret == made.secret
    repository = bb.repositories["team/repo"]
    assert found.details == {
        "runner": made.uuid,
        "client": made.client,
        "workspace": bb.workspaces["team"],
        "repository": repository.uuid,
    }


def test_a_runner_of_a_workspace(bb: Bitbucket) -> None:
    forge = _forge(bb, bb.add_token(), "team")
    found = forge.register("one", ["cml"], single=False, arch="x64")
    assert found.url == f"{bb.url}/team"
    assert "repository" not in found.details
    assert [one.name for one in forge.runners()] == ["one"]
    pipeline = bb.add_pipeline("team/repo", "train", "true")
    job = forge.job(_job(bb, pipeline))
    assert (job.name, job.attempt) == ("train", 1)
    forge.unregister(forge.runners()[0])
    assert forge.runners() == []


def test_many_runners(bb: Bitbucket, forge: Forge) -> None:
    for number in range(5):
        _runner(bb, f"r{number}", online=False)
    assert sorted(one.name for one in forge.runners()) == [f"r{number}" for number in range(5)]
    assert len(bb.asked("GET", RUNNERS)) == 3


def test_names_that_are_taken(bb: Bitbucket, forge: Forge) -> None:
    _runner(bb, "one")
    with pytest.raises(AlreadyExists, match="another --name"):
        forge.register("one", ["cml"], single=False, arch="x64")


def test_too_many_runners(bb: Bitbucket, forge: Forge) -> None:
    bb.page = 100
    for number in range(100):
        _runner(bb, f"r{number}", online=False)
    with pytest.raises(RunnerError, match=r"maximum number of runners.*cml-runner gc"):
        forge.register("one", ["cml"], single=False, arch="x64")


def test_busy_is_who_has_a_step(bb: Bitbucket, forge: Forge) -> None:
    one = _runner(bb, "one")
    _runner(bb, "two")
    _busy(bb, one)
    assert {runner.name: runner.busy for runner in forge.runners()} == {"one": True, "two": False}
    with pytest.raises(JobRunning):
        forge.unregister(next(runner for runner in forge.runners() if runner.name == "one"))
    assert not one.cordoned
    assert one.uuid in bb.runners


def test_drain(bb: Bitbucket, forge: Forge) -> None:
    one, two = _runner(bb, "one"), _runner(bb, "two")
    forge.drain("one")
    assert (one.cordoned, two.cordoned) == (True, False)


# Steps


def test_a_step_is_looked_up(bb: Bitbucket, forge: Forge) -> None:
    pipeline = bb.add_pipeline("team/repo", "train", "true")
    job = forge.job(_job(bb, pipeline))
    assert (job.name, job.attempt, job.runner) == ("train", 1, "one")
    assert job.url == f"{bb.url}/team/repo/pipelines/results/1"
    again = bb._start(pipeline.repository, pipeline.target, pipeline.step)
    later = forge.job(_job(bb, again))
    assert (later.key, later.attempt) == (job.key, 2)


def test_a_step_of_which_nobody_knows(forge: Forge) -> None:
    with pytest.raises(RunnerError, match="by hand"):
        forge.retry(Job(name="train"))


def _over(pipeline: Pipeline, result: str) -> None:
    pipeline.step.state, pipeline.step.result = "COMPLETED", result


@pytest.mark.parametrize(("result", "runs"), [("SUCCESSFUL", 1), ("FAILED", 2), ("STOPPED", 2)])
def test_retry(bb: Bitbucket, forge: Forge, result: str, runs: int) -> None:
    pipeline = bb.add_pipeline("team/repo", "train", "true")
    _over(pipeline, result)
    for _ in range(2):
        assert forge.retry(_job(bb, pipeline))
    assert len(bb.runs(pipeline)) == runs
    for asked in bb.asked("POST", f"{HERE}/pipelines/"):
        target = asked.body["target"]
        assert target["commit"] == {"type": "commit", "hash": pipeline.target["commit"]["hash"]}
        assert target["selector"] == pipeline.target["selector"]


def test_a_pull_request_is_run_again_as_such(bb: Bitbucket, forge: Forge) -> None:
    pipeline = bb.add_pipeline("team/repo", "train", "true")
    pipeline.target |= {
        "type": "pipeline_pullrequest_target",
        "source": "topic",
        "destination": "main",
        "destination_commit": {"hash": "abc", "links": {}},
        "pullrequest": {"id": 7, "title": "no", "links": {}},
    }
    _over(pipeline, "FAILED")
    assert forge.retry(_job(bb, pipeline))
    (asked,) = bb.asked("POST", f"{HERE}/pipelines/")
    assert asked.body["target"]["pullrequest"] == {"id": 7}
    assert asked.body["target"]["destination_commit"] == {"hash": "abc"}


def test_a_running_pipeline_is_waited_for(bb: Bitbucket, forge: Forge) -> None:
    pipeline = _busy(bb, _runner(bb, "one"))
    assert not forge.retry(_job(bb, pipeline))
    assert bb.asked("POST", ".*") == []


def test_a_lost_step_is_stopped_and_run_again(bb: Bitbucket, forge: Forge) -> None:
    pipeline = bb.add_pipeline("team/repo", "train", "true")
    pipeline.step.state = "IN_PROGRESS"
    assert not forge.retry(_job(bb, pipeline))
    assert pipeline.step.result == "STOPPED"
    assert forge.retry(_job(bb, pipeline))
    assert len(bb.runs(pipeline)) == 2


def test_a_step_that_is_better_lost_than_failed(bb: Bitbucket, forge: Forge) -> None:
    runner = _runner(bb, "one")
    pipeline = _busy(bb, runner)
    job = _job(bb, pipeline)
    assert not forge.better_lost(job)
    pipeline.others.append(Step("other", "true", ("cml",), state="IN_PROGRESS"))
    assert forge.better_lost(job)
    assert not _forge(bb, bb.add_token(), "team").better_lost(job)  # which nobody would find
    pipeline.others[0].state = "COMPLETED"
    assert not forge.better_lost(job)


def test_steps_that_are_lost(bb: Bitbucket, forge: Forge) -> None:
    bb.lost_after = 100
    here, gone = _runner(bb, "here"), _runner(bb, "gone")
    gone.seen = time.time() - 10
    _busy(bb, here)
    pipeline = _busy(bb, gone)
    (job,) = forge.lost("gone")
    assert (job.name, job.runner, job.attempt) == (pipeline.step.name, "gone", pipeline.number)
    assert forge.lost("here") == []
    assert forge.lost("other") == []
    assert _forge(bb, bb.add_token(), "team").lost("gone") == []


# Faults


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_passing_faults_are_waited_for(
    bb: Bitbucket, forge: Forge, naps: list[float], status: int
) -> None:
    headers = {"Retry-After": "7"} if status == 429 else {}
    fault = bb.fault("GET", RUNNERS, 2, status=status, headers=headers)
    assert forge.runners() == []
    assert fault.hits == 2
    assert (7 in naps) == (status == 429)


def test_lasting_faults(bb: Bitbucket, forge: Forge, naps: list[float]) -> None:
    pipeline = bb.add_pipeline("team/repo", "train", "true")
    _over(pipeline, "FAILED")
    bb.fault("GET", f"{HERE}/pipelines/.*", 99, status=502)
    assert not forge.retry(_job(bb, pipeline))
    bb.fault("GET", RUNNERS, 99, drop=True)
    with pytest.raises(RunnerError, match=r"can't be reached|fails"):
        forge.runners()
    assert naps


def test_html(bb: Bitbucket, forge: Forge) -> None:
    bb.fault("GET", RUNNERS, status=200, body="<html>")
    with pytest.raises(RunnerError, match="doesn't answer as Bitbucket would"):
        forge.runners()


def test_a_next_page_elsewhere(bb: Bitbucket, forge: Forge) -> None:
    """It would get our credential."""
    body = {"values": [], "next": "https://elsewhere.example/2.0/x"}
    bb.fault("GET", RUNNERS, status=200, body=body)
    with pytest.raises(RunnerError, match="leads elsewhere"):
        forge.runners()


def test_nobody_there(bb: Bitbucket) -> None:
    for path in ("team/nowhere", "nobody", "nobody/repo"):
        with pytest.raises(NotFound, match="is the address right"):
            _forge(bb, bb.add_token(), path).check()
