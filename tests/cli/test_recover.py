"""Running interrupted jobs again, for machines that hold no credential."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cml_runner import recover
from cml_runner.errors import JobRunning
from cml_runner.model import Interruption, Job
from tests.worlds import Local, OnGitHub, wait

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.conftest import Cli

WAIT = "while [ ! -e {flag} ]; do sleep 0.1; done; echo done"


@pytest.fixture(params=["local", "github"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Local | OnGitHub]:
    found = Local(tmp_path) if request.param == "local" else OnGitHub()
    yield found
    found.leave_alone()


def address(world: Local | OnGitHub, name: str) -> str:
    """The address of a job's pipeline, as people have it."""
    if isinstance(world, OnGitHub):
        (run,) = world.github.runs.values()
        return f"{world.repo}/actions/runs/{run.id}"
    (job,) = (one.job for one in world.forge.jobs() if one.job.name == name)
    return f"{world.repo}/done/{job.id}"


def own_token(world: OnGitHub, **more: str) -> Mapping[str, str]:
    """Have the token of a workflow's own job."""
    token = world.github.add_workflow_token("acme/model", actions="write", **more)
    return {**world.environment, "REPO_TOKEN": token}


def test_a_machine_without_a_credential(cli: Cli, world: Local | OnGitHub, tmp_path: Path) -> None:
    flag, env = tmp_path / "flag", world.environment
    world.submit("train", WAIT.format(flag=flag))
    single = ("launch", "--repo", world.repo, "--cloud", "local", "--single")
    identifier = cli.run(*single, environment=env).json["id"]
    wait(lambda: world.job("train").state == "running", "the job")
    cli.run("interrupt", identifier, "--after", "20s")
    wait(lambda: world.job("train").state == "failed", "its end")
    run = address(world, "train")
    told = cli.run("recover", run, "--dry-run", "--output", "json", environment=env).json
    assert [(one["name"], one["state"]) for one in told["jobs"]] == [("train", "interrupted")]
    assert world.job("train").attempt == 1
    if isinstance(world, OnGitHub):
        env = own_token(world, checks="read")
        blind = cli.run("recover", run, environment=own_token(world), code=3)
        assert "checks: read" in blind.err, "who can't see what was interrupted is told so"
    told = cli.run("recover", run, "--output", "json", environment=env).json
    assert (told["count"], told["jobs"][0]["state"]) == (1, "queued")
    flag.touch()
    cli.run(*single, environment=world.environment)
    wait(lambda: world.job("train").state == "succeeded", "its good end")
    assert world.job("train").attempt == 2
    again = cli.run("recover", run, environment=env)
    assert "nothing was interrupted" in again.err
    assert world.job("train").attempt == 2


def test_what_is_no_run(cli: Cli, tmp_path: Path) -> None:
    world = Local(tmp_path)
    cli.run("recover", f"{world.repo}/done/nothing", code=4)
    cli.run("recover", "nonsense", code=2)


class Stubborn:
    """A forge that takes a re-run only when it is asked for the third time."""

    def __init__(self) -> None:
        self.asked = 0

    def retry(self, job: Job) -> bool:
        assert job
        self.asked += 1
        return self.asked > 2

    def retry_together(self, jobs: object) -> bool:
        assert jobs
        return False

    def interrupted(self, pipeline: str, ours: object) -> list[Interruption]:
        assert ours
        self.asked += 1
        if self.asked < 3:
            raise JobRunning(pipeline)
        return [Interruption(job=Job(name="train", id="1"))]


def patience(seconds: float) -> recover.Patience:
    """Let no time go by but by sleeping."""
    now = [0.0]
    return recover.Patience(seconds, lambda pause: now.append(now[-1] + pause), lambda: now[-1])


def test_it_waits_until_the_run_is_over() -> None:
    assert recover.find(Stubborn(), "run", [], patience(60))  # type: ignore[arg-type]
    with pytest.raises(JobRunning):
        recover.find(Stubborn(), "run", [], patience(0))  # type: ignore[arg-type]


def test_it_asks_again_until_a_job_is_queued() -> None:
    judged = recover.judge([Interruption(job=Job(name="train", id="1"))])
    (one,) = recover.again(Stubborn(), judged, patience(60))  # type: ignore[arg-type]
    assert one.state == "queued"
    (one,) = recover.again(Stubborn(), judged, patience(0))  # type: ignore[arg-type]
    assert one.state == "waiting"


def test_often_enough() -> None:
    (one,) = recover.judge([Interruption(job=Job(name="train"), times=4)])
    assert one.state == "spent"
    assert recover.again(Stubborn(), [one], patience(60)) == [one]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "known"),
    [("gpu", True), ("gpu-1", True), ("gpu-1-0a1b", True), ("gpus", False), ("other", False)],
)
def test_whose_a_runner_is(name: str, known: bool) -> None:
    assert recover.ours(["gpu"])(name) is known
