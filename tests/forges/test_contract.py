"""What every forge must do, with its real agent.

A new forge joins by adding one rig to RIGS, and nothing else: a context manager which takes an
empty directory and yields what Rig describes.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

import psutil
import pytest

from cml_runner import forges
from cml_runner.errors import (
    AlreadyExists,
    ConfigurationError,
    CredentialsError,
    JobRunning,
    NotFound,
)
from cml_runner.forges import bitbucket, github, gitlab, local
from cml_runner.model import Credential, JobEnded, JobStarted, Ready, Runner
from cml_runner.wait import until
from tests.lab.bitbucket import Bitbucket, Pipeline
from tests.lab.github import GitHub, WorkflowJob
from tests.lab.gitlab import GitLab, GitLabJob

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from cml_runner.forges import Agent, Forge
    from cml_runner.model import Interruption, Job, Registration
    from tests.forges.conftest import Started
    from tests.lab.github import Run


class Rig(Protocol):
    """One repository of a forge, and what its users do there."""

    @property
    def forge(self) -> Forge:
        """The repository, opened with a credential that may do everything."""

    @property
    def nowhere(self) -> Forge:
        """A repository which doesn't exist."""

    def submit(self, name: str, script: str, labels: Sequence[str] = ("cml",)) -> str:
        """Queue a job (a pipeline of its own) that runs a shell script; return its id here."""

    tells: bool  # a job that its agent aborted from one that failed by itself

    def address(self, job: str) -> str:
        """The address of its pipeline, as people see it."""

    def state(self, job: str) -> str:
        """Its last attempt: queued, running, succeeded, failed or cancelled."""

    def attempts(self, job: str) -> int:
        """How often it was started."""

    def log(self, job: str) -> str:
        """What the script printed in its last attempt."""


class LocalRig:
    tells = True

    def __init__(self, directory: Path) -> None:
        self.forge = local.Forge(str(directory))
        self.nowhere = local.Forge(str(directory / "nowhere"))

    def submit(self, name: str, script: str, labels: Sequence[str] = ("cml",)) -> str:
        return self.forge.submit(name, script, labels).id

    def address(self, job: str) -> str:
        return f"{self.forge.url}/done/{job}"

    def state(self, job: str) -> str:
        return self._job(job).state

    def attempts(self, job: str) -> int:
        return self._job(job).attempt

    def log(self, job: str) -> str:
        return self._job(job).log.read_text()

    def _job(self, job: str) -> local.JobState:
        return next(found for found in self.forge.jobs() if found.job.id == job)


@contextmanager
def local_rig(directory: Path) -> Iterator[Rig]:
    yield LocalRig(directory)


class GitHubRig:
    tells = True

    def __init__(self, there: GitHub) -> None:
        there.add_repository("owner/repo")
        credential = Credential(token=there.add_token("repo"))
        self.forge = github.Forge(f"{there.url}/owner/repo", credential)
        self.nowhere = github.Forge(f"{there.url}/owner/nowhere", credential)
        self._there = there

    def submit(self, name: str, script: str, labels: Sequence[str] = ("cml",)) -> str:
        run = self._there.add_run("owner/repo", [WorkflowJob(name, labels, script)])
        return str(run.id)

    def address(self, job: str) -> str:
        return f"{self._there.url}/owner/repo/actions/runs/{job}"

    def state(self, job: str) -> str:
        found = self._run(job).jobs[0]
        words = {"success": "succeeded", "failure": "failed", "in_progress": "running"}
        word = found.conclusion or found.status
        return words.get(word, word)

    def attempts(self, job: str) -> int:
        return self._run(job).attempt

    def log(self, job: str) -> str:
        return self._run(job).jobs[0].log

    def _run(self, job: str) -> Run:
        return self._there.runs[int(job)]


@contextmanager
def github_rig(_: Path) -> Iterator[Rig]:
    with GitHub() as there:
        yield GitHubRig(there)


class GitLabRig:
    tells = True

    def __init__(self, there: GitLab) -> None:
        there.add("some/group/project")
        credential = Credential(token=there.add_token("api"))
        self.forge = gitlab.Forge(f"{there.url}/some/group/project", credential)
        self.nowhere = gitlab.Forge(f"{there.url}/some/nowhere", credential)
        self._there = there

    def submit(self, name: str, script: str, labels: Sequence[str] = ("cml",)) -> str:
        return str(self._there.add_job("some/group/project", name, script, labels).id)

    def address(self, job: str) -> str:
        number = self._attempts(job)[0].pipeline
        return f"{self._there.url}/some/group/project/-/pipelines/{number}"

    def state(self, job: str) -> str:
        words = {"pending": "queued", "success": "succeeded", "canceled": "cancelled"}
        status = self._attempts(job)[-1].status
        return words.get(status, status)

    def attempts(self, job: str) -> int:
        return len([one for one in self._attempts(job) if one.status != "pending"])

    def log(self, job: str) -> str:
        return self._attempts(job)[-1].trace.decode()

    def _attempts(self, job: str) -> list[GitLabJob]:
        first = next(one for one in self._there.jobs if one.id == int(job))
        return self._there.attempts(first)


@contextmanager
def gitlab_rig(_: Path) -> Iterator[Rig]:
    with GitLab(prefix="/below", haste=60) as there, pytest.MonkeyPatch.context() as patch:
        patch.setenv("GITLAB_RUNNER_DOWNLOADS", there.downloads)
        patch.setenv("RUNNER_EXECUTOR", "shell")
        yield GitLabRig(there)


class BitbucketRig:
    tells = False  # one that was killed has failed, whoever killed it

    def __init__(self, there: Bitbucket) -> None:
        there.add("team/repo")
        credential = Credential(token=there.add_token())
        self.forge = bitbucket.Forge(f"{there.url}/team/repo", credential)
        self.nowhere = bitbucket.Forge(f"{there.url}/team/nowhere", credential)
        self._there = there

    def submit(self, name: str, script: str, labels: Sequence[str] = ("cml",)) -> str:
        return self._there.add_pipeline("team/repo", name, script, labels).uuid

    def address(self, job: str) -> str:
        number = self._runs(job)[-1].number
        return f"{self._there.url}/team/repo/pipelines/results/{number}"

    def state(self, job: str) -> str:
        words = {"SUCCESSFUL": "succeeded", "STOPPED": "cancelled", "IN_PROGRESS": "running"}
        step = self._runs(job)[-1].step
        return words.get(step.result or step.state, "failed" if step.result else "queued")

    def attempts(self, job: str) -> int:
        return len([one for one in self._runs(job) if one.step.state != "PENDING"])

    def log(self, job: str) -> str:
        return self._runs(job)[-1].step.log

    def _runs(self, job: str) -> list[Pipeline]:
        return self._there.runs(next(one for one in self._there.pipelines if one.uuid == job))


@contextmanager
def bitbucket_rig(directory: Path) -> Iterator[Rig]:
    with pytest.MonkeyPatch.context() as patch, Bitbucket(page=2, offline_after=1) as there:
        there.lost_after = 2
        for name, value in there.environment(directory).items():
            patch.setenv(name, value)
        yield BitbucketRig(there)


RIGS: dict[str, Callable[[Path], AbstractContextManager[Rig]]] = {
    "bitbucket": bitbucket_rig,
    "local": local_rig,
    "github": github_rig,
    "gitlab": gitlab_rig,
}


class Scene:
    """A forge, and runners that come and go."""

    def __init__(self, name: str, rig: Rig, start: Callable[..., Started], home: Path) -> None:
        self.rig, self.forge = rig, rig.forge
        self.agent: Agent = forges.agent(name)
        self.home = home
        self._start = start

    def register(self, name: str, single: bool = False, label: str = "cml") -> Registration:
        return self.forge.register(name, [label], single=single, arch="x64")

    def start(self, registration: Registration) -> Started:
        directory = self.home / registration.name
        directory.mkdir()
        self.agent.install(directory, self.forge.packages())
        return self._start(self.agent, self.agent.command(directory, registration))

    def ready(self, name: str, single: bool = False, label: str = "cml") -> Started:
        started = self.start(self.register(name, single, label))
        started.wait(Ready)
        self.until(lambda: self.runner(name).online)
        return started

    def runner(self, name: str) -> Runner:
        return next(runner for runner in self.forge.runners() if runner.name == name)

    def names(self) -> set[str]:
        return {runner.name for runner in self.forge.runners()}

    def running(self, started: Started, name: str, number: int = 1) -> Job:
        """Complete what the agent said about its first, second, … job, while it runs."""
        seen = started.wait(JobStarted, number).job

        def told() -> Job:
            return self.forge.job(self.agent.job(self.home / name, seen))

        self.until(lambda: told().pipeline)
        return told()

    def until(self, condition: Callable[[], object]) -> None:
        until(condition, "the forge", 30, 0.05)

    def interrupted(self, job: str, *ours: str) -> list[Interruption]:
        """What was interrupted in a pipeline, once its forge can say so."""
        found: list[list[Interruption]] = []

        def told() -> bool:
            with suppress(JobRunning):
                address = self.rig.address(job)
                found.append(self.forge.interrupted(address, lambda name: name in ours))
            return bool(found)

        self.until(told)
        return found[0]

    def becomes(self, job: str, *states: str) -> None:
        self.until(lambda: self.rig.state(job) in states)


@pytest.fixture(params=forges.NAMES)
def scene(
    request: pytest.FixtureRequest, tmp_path: Path, start: Callable[..., Started]
) -> Iterator[Scene]:
    if request.param not in RIGS:
        pytest.fail(f"the forge {request.param} needs a rig in {__name__}.RIGS")
    there, here = tmp_path / "forge", tmp_path / "agents"
    there.mkdir()
    here.mkdir()
    with RIGS[request.param](there) as rig:
        yield Scene(request.param, rig, start, here)


@pytest.fixture
def flag(tmp_path: Path) -> Path:
    """What the script below waits for."""
    return tmp_path / "flag"


def kill(pid: int) -> None:
    """End a process and all that it has begun, without a word."""
    agent = psutil.Process(pid)
    for process in (agent, *agent.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture
def waiting(flag: Path) -> str:
    return f"until test -e {flag}; do sleep 0.05; done"


def test_register_list_unregister(scene: Scene) -> None:
    scene.forge.check()
    assert scene.forge.runners() == []
    registration = scene.register("one")
    assert (registration.name, registration.single) == ("one", False)
    assert registration.url == scene.forge.url
    assert "cml" in registration.labels
    scene.start(registration).wait(Ready)
    scene.register("two", single=True, label="gpu")
    runners = {runner.name: runner for runner in scene.forge.runners()}
    assert set(runners) == {"one", "two"}
    assert "cml" in runners["one"].labels
    assert "gpu" in runners["two"].labels
    assert not runners["two"].online
    assert not runners["two"].busy
    scene.forge.unregister(runners["two"])
    assert scene.names() == {"one"}
    scene.forge.unregister(runners["one"])
    assert scene.names() == set()


def test_absent_is_unregistered_already(scene: Scene) -> None:
    scene.register("one", single=True)
    runner = scene.runner("one")
    scene.forge.unregister(runner)
    scene.forge.unregister(runner)
    never = Runner(id="999999", name="never", labels=frozenset(), online=False, busy=False)
    scene.forge.unregister(never)


def test_an_offline_runner_of_the_same_name_is_replaced(scene: Scene) -> None:
    scene.register("one", single=True)
    before = scene.runner("one").id
    scene.register("one", single=True)
    assert [runner.name for runner in scene.forge.runners()] == ["one"]
    assert scene.runner("one").id != before


def test_the_name_of_an_online_runner_is_taken(scene: Scene) -> None:
    scene.ready("one")
    with pytest.raises(AlreadyExists, match="one"):
        scene.register("one")
    assert scene.runner("one").online


def test_jobs_come_and_go(scene: Scene, waiting: str, flag: Path) -> None:
    fine = scene.rig.submit("fine", f"echo hello; {waiting}")
    started = scene.ready("one")
    job = scene.running(started, "one")
    flag.touch()
    assert (job.name, job.runner, job.attempt) == ("fine", "one", 1)
    assert started.wait(JobEnded) == JobEnded(succeeded=True)
    scene.becomes(fine, "succeeded")
    assert "hello" in scene.rig.log(fine)

    flag.unlink()
    wrong = scene.rig.submit("wrong", f"{waiting}; exit 3")
    other = scene.running(started, "one", 2)
    flag.touch()
    assert other.name == "wrong"
    assert other.key != job.key
    assert started.wait(JobEnded, 2) == JobEnded(succeeded=False)
    scene.becomes(wrong, "failed")
    kinds = [type(event) for event in started.events if not isinstance(event, Ready)]
    assert kinds == [JobStarted, JobEnded, JobStarted, JobEnded]
    assert isinstance(started.events[0], Ready)


def test_a_busy_runner_stays(scene: Scene, waiting: str, flag: Path) -> None:
    started = scene.ready("one")
    job = scene.rig.submit("long", waiting)
    started.wait(JobStarted)
    scene.until(lambda: scene.runner("one").busy)
    with pytest.raises(JobRunning):
        scene.forge.unregister(scene.runner("one"))
    with pytest.raises(AlreadyExists):
        scene.register("one")
    flag.touch()
    started.wait(JobEnded)
    scene.becomes(job, "succeeded")
    scene.until(lambda: not scene.runner("one").busy)
    scene.forge.unregister(scene.runner("one"))
    assert scene.names() == set()


def test_a_runner_takes_only_jobs_for_its_labels(scene: Scene) -> None:
    for_gpu = scene.rig.submit("for-gpu", "true", ["gpu"])
    for_both = scene.rig.submit("for-both", "true", ["cml", "gpu"])
    plain = scene.rig.submit("plain", "true")
    scene.ready("one").wait(JobEnded)
    assert [scene.rig.state(job) for job in (for_gpu, for_both)] == ["queued", "queued"]
    scene.becomes(plain, "succeeded")
    scene.ready("two", label="gpu").wait(JobEnded)
    scene.becomes(for_gpu, "succeeded")
    assert scene.rig.state(for_both) == "queued"


def test_a_single_runner_takes_one_job(scene: Scene, waiting: str, flag: Path) -> None:
    first = scene.rig.submit("first", waiting)
    second = scene.rig.submit("second", "true")
    registration = scene.register("one", single=True)
    started = scene.start(registration)
    started.wait(JobStarted)
    scene.forge.drain("one")
    flag.touch()
    assert started.wait(JobEnded) == JobEnded(succeeded=True)
    if scene.forge.one_time:
        exited = scene.agent.exited(started.ended())
        assert (exited.code, exited.again, exited.outdated) == (0, False, False)
        scene.agent.leave(registration)
        scene.agent.leave(registration)
    else:  # it has to be told to end, and can't leave by itself
        scene.until(lambda: not scene.runner("one").busy)
        scene.agent.stop(started.pid)
        started.ended()
        scene.forge.unregister(scene.runner("one"))
    scene.until(lambda: scene.names() == set())
    scene.becomes(first, "succeeded")
    assert scene.rig.state(second) == "queued"


def test_an_aborted_job_fails_and_runs_again_once(
    scene: Scene, waiting: str, flag: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    script = f"echo run >> {trace}; {waiting}"
    started = scene.ready("one")
    job = scene.rig.submit("long", script)
    seen = scene.running(started, "one")
    scene.until(trace.exists)
    scene.agent.abort(started.pid)
    assert started.wait(JobEnded) == JobEnded(succeeded=False)
    scene.agent.stop(started.pid)
    started.ended()
    scene.until(lambda: scene.forge.retry(seen))
    assert scene.forge.retry(seen)
    again = scene.running(scene.ready("two"), "two")
    assert (again.attempt, again.key) == (seen.attempt + 1, seen.key)
    flag.touch()
    scene.becomes(job, "succeeded")
    assert scene.forge.retry(seen)
    fence = scene.rig.submit("fence", "true")
    scene.becomes(fence, "succeeded")
    assert scene.rig.attempts(job) == 2
    assert trace.read_text() == "run\nrun\n"


def test_a_job_is_lost_with_its_runner(
    scene: Scene, waiting: str, flag: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    started = scene.ready("one-0af3")
    job = scene.rig.submit("long", f"echo $$ > {trace}.new; mv {trace}.new {trace}; {waiting}")
    seen = scene.running(started, "one-0af3")
    assert not scene.forge.better_lost(seen)
    assert scene.forge.lost("other") == []
    scene.until(trace.exists)
    kill(started.pid)
    started.ended()
    scene.until(lambda: scene.forge.lost("one"))
    (lost,) = scene.forge.lost("one")
    assert (lost.key, lost.attempt, lost.runner) == (seen.key, seen.attempt, "one-0af3")
    scene.until(lambda: scene.forge.retry(lost))
    flag.touch()
    scene.ready("two")
    scene.becomes(job, "succeeded")
    assert scene.rig.attempts(job) == 2
    assert scene.forge.lost("one") == []


def test_an_interrupted_job_is_found_and_runs_again_once(
    scene: Scene, waiting: str, flag: Path
) -> None:
    started = scene.ready("one")
    job = scene.rig.submit("long", waiting)
    seen = scene.running(started, "one")
    scene.agent.abort(started.pid, "its machine is taken away")
    started.wait(JobEnded)
    scene.agent.stop(started.pid)
    started.ended()
    scene.becomes(job, "failed")
    found = [one.job for one in scene.interrupted(job, "one")]
    if not scene.rig.tells:
        assert found == []
        return
    (again,) = found
    assert (again.key, again.attempt) == (seen.key, seen.attempt)
    scene.until(lambda: scene.forge.retry(again))
    assert scene.forge.retry(again)
    flag.touch()
    scene.ready("two")
    scene.becomes(job, "succeeded")
    assert scene.interrupted(job, "one", "two") == []
    assert scene.rig.attempts(job) == 2


def test_a_lost_job_is_found_and_runs_again_once(
    scene: Scene, waiting: str, flag: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    started = scene.ready("one")
    job = scene.rig.submit("long", f"touch {trace}; {waiting}")
    seen = scene.running(started, "one")
    scene.until(trace.exists)
    kill(started.pid)
    started.ended()
    scene.until(lambda: scene.interrupted(job, "one"))
    (lost,) = scene.interrupted(job, "one")
    assert (lost.job.key, lost.times) == (seen.key, 1)
    if not scene.forge.retry_together([lost.job]):
        scene.until(lambda: scene.forge.retry(lost.job))
    assert scene.forge.retry(lost.job)
    flag.touch()
    scene.ready("two")
    scene.becomes(job, "succeeded")
    assert scene.interrupted(job, "one", "two") == []
    assert scene.rig.attempts(job) == 2


def test_what_failed_by_itself_was_not_interrupted(scene: Scene, waiting: str, flag: Path) -> None:
    started = scene.ready("one")
    flag.touch()
    wrong = scene.rig.submit("wrong", "exit 3")
    scene.becomes(wrong, "failed")
    assert scene.interrupted(wrong, "one") == []
    fine = scene.rig.submit("fine", waiting)
    scene.becomes(fine, "succeeded")
    assert scene.interrupted(fine, "one") == []
    started.wait(JobEnded, 2)


def test_an_address_that_is_no_pipelines(scene: Scene) -> None:
    with pytest.raises(ConfigurationError):
        scene.forge.interrupted(scene.forge.url, lambda _: True)


def test_a_running_job_is_not_run_again_yet(scene: Scene, waiting: str, flag: Path) -> None:
    started = scene.ready("one")
    job = scene.rig.submit("long", waiting)
    seen = scene.running(started, "one")
    assert not scene.forge.retry(seen)
    flag.touch()
    scene.becomes(job, "succeeded")
    assert scene.rig.attempts(job) == 1


def test_a_stopped_agent_gives_its_job_up(scene: Scene, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    started = scene.ready("one")
    job = scene.rig.submit("long", f"echo $$ > {trace}.new; mv {trace}.new {trace}; sleep 600")
    started.wait(JobStarted)
    scene.until(trace.exists)
    scene.agent.stop(started.pid)
    exited = scene.agent.exited(started.ended())
    assert not exited.again
    scene.becomes(job, "cancelled", "failed")
    scene.until(lambda: not psutil.pid_exists(int(trace.read_text())))
    scene.until(lambda: not scene.runner("one").online)
    scene.forge.unregister(scene.runner("one"))


def test_signals_to_an_agent_which_is_gone(scene: Scene) -> None:
    started = scene.ready("one")
    scene.agent.stop(started.pid)
    started.ended()
    scene.agent.abort(started.pid)
    scene.agent.stop(started.pid)


@pytest.mark.parametrize("single", [False, True])
def test_the_secret_stays_secret(scene: Scene, waiting: str, flag: Path, *, single: bool) -> None:
    job = scene.rig.submit("nosy", f"env; {waiting}")
    registration = scene.register("one", single)
    assert len(registration.secret) > 15
    assert registration.secret not in repr(registration)
    started = scene.start(registration)
    started.wait(JobStarted)
    commands = {each.pid: each.info["cmdline"] for each in psutil.process_iter(["cmdline"])}
    flag.touch()
    started.wait(JobEnded)
    scene.becomes(job, "succeeded")
    assert started.pid in commands
    assert not [each for each in commands.values() if registration.secret in " ".join(each or ())]
    assert "CI=true" in scene.rig.log(job)
    assert registration.secret not in scene.rig.log(job)
    assert registration.secret not in "".join(started.lines)


def test_what_a_launch_needs_can_be_looked_at_and_is_there(scene: Scene) -> None:
    found = list(scene.forge.checks(["cml"]))
    assert found[0].what == "login"
    assert {one.state for one in found} <= {"ok", "warning", "unknown"}, found
    assert len(found) > 1
    assert scene.forge.runners() == []


def test_a_repository_that_is_not_there_is_told_by_looking(scene: Scene) -> None:
    wrong = [one for one in scene.rig.nowhere.checks(["cml"]) if one.state == "failed"]
    assert {one.code for one in wrong} <= {NotFound.exit_code, CredentialsError.exit_code}
    assert wrong
    assert all(one.hint for one in wrong)


def test_no_such_repository(scene: Scene) -> None:
    nowhere = scene.rig.nowhere
    with pytest.raises(NotFound):
        nowhere.check()
    with pytest.raises(NotFound):
        nowhere.runners()
    for single in (False, True):
        with pytest.raises(NotFound):
            nowhere.register("one", ["cml"], single=single, arch="x64")


def test_other_output_means_nothing(scene: Scene) -> None:
    for line in ("", "hello", "listening for jobs", "Listening for Jobs", "running job: x"):
        assert scene.agent.parse(line) is None
