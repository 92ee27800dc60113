"""The stand-in runner program against the fake GitHub: both are what facts say of the real ones."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import tarfile
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import requests

from tests.lab import actions_runner
from tests.lab.github import GitHub, WorkflowJob

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STAMP = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ: "


class Program:
    """An unpacked runner program, and what it printed."""

    def __init__(self, gh: GitHub, directory: Path) -> None:
        self.gh = gh
        self.directory = directory
        self.output = directory.parent / f"{directory.name}.output"
        content, _ = actions_runner.build()
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            if hasattr(tarfile, "data_filter"):  # early 3.10 and 3.11 have none, and ask for none
                tar.extraction_filter = tarfile.data_filter
            tar.extractall(directory)

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {"PATH": os.environ["PATH"], "RUNNER_ALLOW_RUNASROOT": "1"}
        return {**kept, "STAND_IN_CONFLICT_LIMIT": "0.3", **variables}

    def call(self, *words: str, **variables: str) -> tuple[int, str]:
        """Run it to its end; return its exit code and its output."""
        command, *rest = words
        done = subprocess.run(
            [self.directory / command, *rest],
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def configure(self, *more: str, name: str = "one", labels: str = "gpu") -> tuple[int, str]:
        token = post(self.gh, "registration-token")["token"]
        url = f"{self.gh.url}/mona/train"
        own = ("--unattended", "--url", url, "--token", token, "--name", name, "--labels", labels)
        return self.call("config.sh", *own, *more)

    @contextmanager
    def running(self, *words: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
        """Start the listener; end it and all that it started at the end."""
        with self.output.open("wb") as output:
            command = [str(self.directory / "bin/Runner.Listener"), "run", *words]
            environment = self.environment(**variables)
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            yield process
        finally:
            kill_tree(process)

    def said(self, pattern: str) -> bool:
        return re.search(pattern, self.output.read_text(), re.MULTILINE) is not None


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
    process.wait()


def post(gh: GitHub, what: str, body: Any = None) -> dict[str, Any]:
    token = gh.add_token("repo")
    url = f"{gh.api_url}/repos/mona/train/actions/runners/{what}"
    headers = {"Authorization": f"token {token}"}
    answer = requests.post(url, json=body, headers=headers, timeout=10)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def jit(gh: GitHub, name: str = "once") -> str:
    body = {"name": name, "runner_group_id": 1, "labels": ["gpu"]}
    return str(post(gh, "generate-jitconfig", body)["encoded_jit_config"])


@pytest.fixture
def gh() -> Iterator[GitHub]:
    with GitHub() as github:
        github.add_repository("mona/train")
        yield github


@pytest.fixture
def program(gh: GitHub, tmp_path: Path) -> Program:
    return Program(gh, tmp_path / "runner")


def test_job_runs_for_real(gh: GitHub, program: Program, tmp_path: Path) -> None:
    assert program.configure()[0] == 0
    with program.running():
        gh.wait_for(lambda: program.said(f"{STAMP}Listening for Jobs$"))
        run = gh.add_run("mona/train", [WorkflowJob("T (a)", ["gpu"], f"echo hi > {tmp_path}/x")])
        gh.wait_for(lambda: program.said(rf"{STAMP}Job T \(a\) completed with result: Succeeded$"))
        runner = gh.runner("one")
    assert program.said(r"^√ Connected to GitHub$")
    assert program.said(r"^Current runner version: '2\.337\.0'$")
    assert program.said(rf"{STAMP}Running job: T \(a\)$")
    assert (tmp_path / "x").read_text() == "hi\n"
    assert (run.status, run.conclusion) == ("completed", "success")
    assert runner
    assert runner.labels == ("self-hosted", "Linux", "X64", "gpu")
    assert runner.online
    assert not runner.busy


def test_job_that_fails_and_its_variables(gh: GitHub, program: Program) -> None:
    program.configure("--no-default-labels")
    script = "env; echo to stderr >&2; exit 3"
    run = gh.add_run("mona/train", [WorkflowJob("My job", ["GPU"], script, key="train")])
    secret = {"ACTIONS_RUNNER_INPUT_TOKEN": "s3cret", "OTHER": "stays"}
    with program.running(**secret):
        job = gh.job("My job", run)
        gh.wait_for(lambda: job.status == "completed")
    assert job.conclusion == "failure"
    expected = f"CI=true GITHUB_JOB=train GITHUB_RUN_ID={run.id} GITHUB_RUN_ATTEMPT=1 "
    expected += f"GITHUB_REPOSITORY=mona/train GITHUB_SERVER_URL={gh.url} RUNNER_NAME=one"
    lines = job.log.splitlines()
    assert {*expected.split(), "OTHER=stays", "to stderr"} <= set(lines)
    assert "s3cret" not in job.log
    assert "ACTIONS_RUNNER_INPUT" not in job.log


def test_labels_decide(gh: GitHub, program: Program) -> None:
    program.configure()
    jobs = [WorkflowJob("other", ["gpu", "big"]), WorkflowJob("mine", ["Linux", "gpu"])]
    run = gh.add_run("mona/train", jobs)
    with program.running():
        gh.wait_for(lambda: gh.job("mine", run).status == "completed")
        assert gh.job("other", run).status == "queued"


def test_jit_takes_one_job_and_is_gone(gh: GitHub, program: Program) -> None:
    run = gh.add_run("mona/train", [WorkflowJob("a", ["gpu"]), WorkflowJob("b", ["gpu"])])
    blob = jit(gh)
    with program.running(ACTIONS_RUNNER_INPUT_JITCONFIG=blob) as process:
        assert process.wait(20) == 0
    assert [job.status for job in run.jobs] == ["completed", "queued"]
    assert gh.runners() == []
    assert not (program.directory / ".runner").exists()


def test_jit_blob_that_is_none(program: Program) -> None:
    assert program.call("bin/Runner.Listener", "run", "--jitconfig", "x!")[0] == 1


def test_killed_worker_fails_the_job_at_once(gh: GitHub, program: Program) -> None:
    program.configure()
    run = gh.add_run("mona/train", [WorkflowJob("long", ["gpu"], "sleep 60")])
    job = gh.job("long", run)
    with program.running() as process:
        gh.wait_for(lambda: job.status == "in_progress")
        (worker,) = psutil.Process(process.pid).children()
        assert worker.name() == "Runner.Worker"
        rest = gh.wait_for(lambda: [one for one in worker.children() if one.children()])
        rest += rest[0].children()
        began = time.monotonic()
        for one in [worker, *rest]:
            one.kill()
        gh.wait_for(lambda: job.status == "completed")
        assert time.monotonic() - began < 5
        assert job.conclusion == "failure"
        again = gh.add_run("mona/train", [WorkflowJob("next", ["gpu"])])
        gh.wait_for(lambda: again.conclusion == "success")
    assert program.said(f"{STAMP}Job long completed with result: Failed$")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_signal_cancels_the_job(gh: GitHub, program: Program, number: int, code: int) -> None:
    program.configure()
    run = gh.add_run("mona/train", [WorkflowJob("long", ["gpu"], "sleep 60")])
    job = gh.job("long", run)
    with program.running() as process:
        gh.wait_for(lambda: job.status == "in_progress")
        process.send_signal(number)
        assert process.wait(20) == code
    assert job.conclusion == "cancelled"
    assert "received a shutdown signal" in job.log
    assert program.said("^Exiting...$")
    runner = gh.runner("one")
    assert runner
    assert not runner.online


def test_interrupt_while_idle(gh: GitHub, program: Program) -> None:
    program.configure()
    with program.running() as process:
        gh.wait_for(lambda: program.said("Listening for Jobs"))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_cancelled_run_stops_the_job(gh: GitHub, program: Program) -> None:
    program.configure()
    run = gh.add_run("mona/train", [WorkflowJob("long", ["gpu"], "sleep 60")])
    with program.running():
        gh.wait_for(lambda: run.status == "in_progress")
        gh.cancel(run)
        gh.wait_for(lambda: run.conclusion == "cancelled")
        gh.wait_for(lambda: program.said("Job long completed with result: Canceled"))


def test_lost_listener_fails_its_job_later(gh: GitHub, program: Program) -> None:
    gh.poll, gh.offline_after, gh.lost_after = 0.2, 1, 2
    program.configure()
    run = gh.add_run("mona/train", [WorkflowJob("long", ["gpu"], "sleep 60")])
    with program.running() as process:
        gh.wait_for(lambda: run.status == "in_progress")
        kill_tree(process)
        gh.wait_for(lambda: run.conclusion == "failure")
    assert "lost communication" in run.jobs[0].message


@pytest.mark.parametrize(
    ("mode", "words", "variables", "code", "line"),
    [
        ("update", (), {}, 3, "Runner update in progress"),
        ("update", ("--once",), {}, 4, "Runner update in progress"),
        ("refresh", (), {}, 6, "Listening for Jobs"),
        ("conflict", (), {}, 5, "A session for this runner already exists"),
        ("retryable", (), {}, 2, "An error occurred: "),
        ("deprecated", (), {}, 1, "is deprecated and cannot receive messages"),
        (
            "deprecated",
            (),
            {"ACTIONS_RUNNER_RETURN_VERSION_DEPRECATED_EXIT_CODE": "1"},
            7,
            "^An error occurred: Runner version v2.337.0 is deprecated and cannot receive messages",
        ),
    ],
)
def test_exit_codes(
    gh: GitHub,
    program: Program,
    mode: str,
    words: tuple[str, ...],
    variables: dict[str, str],
    code: int,
    line: str,
) -> None:
    program.configure()
    gh.mode("one", mode)
    with program.running(*words, **variables) as process:
        assert process.wait(20) == code
    assert program.said(line)


def test_second_session_is_a_conflict(gh: GitHub, program: Program) -> None:
    program.configure()
    with program.running():
        gh.wait_for(lambda: program.said("Listening for Jobs"))
        code, output = program.call("bin/Runner.Listener", "run")
    assert code == 5
    assert "A session for this runner already exists." in output


def test_registration_that_was_removed(gh: GitHub, program: Program) -> None:
    program.configure()
    with program.running() as process:
        gh.wait_for(lambda: program.said("Listening for Jobs"))
        gh.remove(gh.runners()[0])
        assert process.wait(20) == 1
    assert program.said("^The runner no longer exists on the server")
    code, output = program.call("bin/Runner.Listener", "run")
    assert code == 1
    assert "The runner registration has been deleted" in output


def test_hooks(gh: GitHub, program: Program, tmp_path: Path) -> None:
    program.configure()
    for name, line in (("before", "test ! -e no"), ("after", "")):
        text = f"echo {name} $GITHUB_RUN_ID $GITHUB_JOB >> {tmp_path}/seen\n{line}\n"
        (tmp_path / f"{name}.sh").write_text(text)
    variables = {
        "ACTIONS_RUNNER_HOOK_JOB_STARTED": f"{tmp_path}/before.sh",
        "ACTIONS_RUNNER_HOOK_JOB_COMPLETED": f"{tmp_path}/after.sh",
    }
    script = "touch no; echo done"
    run = gh.add_run("mona/train", [WorkflowJob("a", ["gpu"], script)])
    with program.running(**variables):
        gh.wait_for(lambda: run.conclusion == "success")
        again = gh.add_run("mona/train", [WorkflowJob("b", ["gpu"], "echo never")])
        gh.wait_for(lambda: again.conclusion == "failure")
    assert "never" not in again.jobs[0].log
    seen = (tmp_path / "seen").read_text().splitlines()
    assert seen == [
        *(f"{name} {run.id} a" for name in ("before", "after")),
        *(f"{name} {again.id} b" for name in ("before", "after")),
    ]


def test_broken_connection_is_survived(gh: GitHub, program: Program) -> None:
    gh.poll = 0.3
    program.configure()
    with program.running():
        gh.wait_for(lambda: program.said("Listening for Jobs"))
        gh.fault("GET", "/_runner/message", 3, drop=True)
        gh.wait_for(lambda: program.said(f"{STAMP}Runner reconnected.$"))
        run = gh.add_run("mona/train", [WorkflowJob("a", ["gpu"])])
        gh.wait_for(lambda: run.conclusion == "success")
    assert program.said(f"{STAMP}Runner connect error: .* Retrying until reconnected.$")


def test_configuration_mistakes(gh: GitHub, program: Program, tmp_path: Path) -> None:
    assert program.configure(name="taken")[0] == 0
    assert "already configured" in program.configure()[1]
    other = Program(gh, tmp_path / "other")
    code, output = other.configure(name="taken")
    assert (code, "exists with the same name taken" in output) == (1, True)
    assert other.configure("--replace", name="taken")[0] == 0
    assert len(gh.runners()) == 1
    wrong = ("--url", f"{gh.url}/mona/train", "--token", "wrong")
    code, output = Program(gh, tmp_path / "third").call("config.sh", *wrong)
    assert (code, "NotFound" in output) == (1, True)


def test_registration_token_expires(gh: GitHub, program: Program) -> None:
    token = post(gh, "registration-token")["token"]
    now = time.time() + 3601
    gh.clock = lambda: now
    words = ("--url", f"{gh.url}/mona/train", "--token", token)
    assert program.call("config.sh", *words)[0] == 1


def test_remove(gh: GitHub, program: Program) -> None:
    program.configure()
    token = post(gh, "remove-token")["token"]
    assert program.call("config.sh", "remove", "--token", token)[0] == 0
    assert gh.runners() == []
    assert not list(program.directory.glob(".*"))


def test_run_sh_hides_exit_codes(gh: GitHub, program: Program) -> None:
    program.configure()
    gh.mode("one", "update", "retryable")
    assert program.call("run.sh")[0] == 0
    assert program.call("run.sh")[0] == 2


def test_version(program: Program) -> None:
    assert program.call("bin/Runner.Listener", "--version") == (0, "2.337.0\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is refused")
def test_root_must_be_allowed(program: Program) -> None:
    code, output = program.call("bin/Runner.Listener", "run", RUNNER_ALLOW_RUNASROOT="")
    assert (code, output) == (1, "Must not run with sudo\n")
