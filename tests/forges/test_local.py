from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from cml_runner.errors import (
    AlreadyExists,
    ConfigurationError,
    CredentialsError,
    NotFound,
    RunnerError,
)
from cml_runner.forges import local
from cml_runner.forges.local import agent
from cml_runner.model import (
    Credential,
    Exited,
    Job,
    JobEnded,
    JobStarted,
    Ready,
    Troubled,
)
from cml_runner.wait import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cml_runner.model import Registration
    from tests.forges.conftest import Started

STAMP = "2026-01-02T03:04:05+00:00 agent: "


@pytest.fixture
def forge(tmp_path: Path) -> local.Forge:
    (tmp_path / "forge").mkdir()
    return local.Forge(str(tmp_path / "forge"))


@pytest.fixture
def run(tmp_path: Path, start: Callable[..., Started]) -> Callable[..., Started]:
    """Start the agent of a registration."""

    def one(registration: Registration, prefix: tuple[str, ...] = ()) -> Started:
        its = local.Agent()
        return start(its, its.command(tmp_path / registration.name, registration), prefix)

    return one


def register(forge: local.Forge, name: str = "one", *, single: bool = False) -> Registration:
    return forge.register(name, ["cml"], single=single, arch="x64")


def put(forge: local.Forge, name: str, **files: str) -> None:
    """Put a job in by hand."""
    folder = forge.root / "queued" / name
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_text(content)


def text(forge: local.Forge, name: str) -> str:
    """Read the log of a job that has ended, whatever is happening to it."""
    with suppress(FileNotFoundError):
        return ended(forge, name).log.read_text()
    return ""


def job(forge: local.Forge, number: int = 0) -> local.JobState:
    return forge.jobs()[number]


def said(forge: local.Forge, number: int = 0) -> str:
    """Return a job's log so far."""
    try:
        return job(forge, number).log.read_text()
    except FileNotFoundError:
        return ""


def wait(condition: Callable[[], object]) -> None:
    until(condition, "the forge", 30, 0.02)


def ended(forge: local.Forge, name: str) -> local.JobState:
    """Wait for a job's end."""

    def finished() -> list[local.JobState]:
        return [
            each for each in forge.jobs() if each.job.name == name and each.state in agent.RESULTS
        ]

    return until(finished, name, 30, 0.02)[0]


# Addresses


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("/some/where", "/some/where"),
        ("file:///some/where", "/some/where"),
        ("file://localhost/some/where", "/some/where"),
        ("file:///some%20where", "/some where"),
        ("/odd?name#here", "/odd?name#here"),
    ],
)
def test_addresses(url: str, root: str) -> None:
    forge = local.Forge(url, Credential(token="ignored"))
    assert forge.root == Path(root)
    assert local.Forge(forge.url).root == Path(root)


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local.Forge("here").url == (tmp_path / "here").as_uri()


@pytest.mark.parametrize("url", ["", "file://host/path", "file:path", "https://example.com/a/b"])
def test_wrong_addresses(url: str) -> None:
    with pytest.raises(ConfigurationError, match="absolute"):
        local.Forge(url)


def test_there_are_no_groups(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="group"):
        local.Forge(str(tmp_path), group="fast")


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("file:///some/where", "file:///some/where"),
        ("", ""),
        ("/some/where", ""),
        ("https://github.com/owner/repo", ""),
        ("owner/repo", ""),
    ],
)
def test_detection(url: str, found: str) -> None:
    assert local.Forge.detect(url, {"GITHUB_ACTIONS": "true"}) == found


def test_check(forge: local.Forge, tmp_path: Path) -> None:
    forge.check()
    assert list(forge.root.iterdir()) == []
    (tmp_path / "file").touch()
    for name in ("absent", "file"):
        with pytest.raises(NotFound, match=name):
            local.Forge(str(tmp_path / name)).check()
        with pytest.raises(NotFound, match=name):
            local.Forge(str(tmp_path / name)).jobs()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_directory_of_others(forge: local.Forge) -> None:
    forge.root.chmod(0o500)
    with pytest.raises(CredentialsError, match="may not write"):
        forge.check()
    with pytest.raises(CredentialsError, match="may not"):
        forge.submit("job", "true")


# Registrations


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "new\nline", "x" * 65])
def test_wrong_runner_names(forge: local.Forge, name: str) -> None:
    with pytest.raises(ConfigurationError, match="called"):
        register(forge, name)


def test_the_secret_is_not_kept(forge: local.Forge) -> None:
    secret = register(forge).secret
    files = [file.read_text() for file in forge.root.rglob("*") if file.is_file()]
    assert len(files) == 2
    assert not [content for content in files if secret in content]


def test_one_name_registered_at_once_has_one_owner(forge: local.Forge) -> None:
    registrations: list[Registration] = []
    threads = [
        threading.Thread(target=lambda: registrations.append(register(forge))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    owners = 0
    for registration in registrations:
        try:
            connected = forge.connect("one", registration.secret)
        except CredentialsError:
            continue
        assert connected
        connected[1].close()
        owners += 1
    assert (len(registrations), owners, len(forge.runners())) == (8, 1, 1)


def test_a_damaged_registration(forge: local.Forge) -> None:
    register(forge)
    (forge.root / "runners" / "one.json").write_text("{")
    with pytest.raises(RunnerError, match="damaged"):
        forge.runners()


# Jobs


def test_submitted_jobs_keep_their_order(forge: local.Forge) -> None:
    first = [forge.submit("same", "true") for _ in range(3)]
    put(forge, "9999-high", script="true")
    last = forge.submit("last", "true", ["a", "b"])
    assert [each.job.id for each in forge.jobs()] == [
        "0001-same",
        "0002-same",
        "0003-same",
        "9999-high",
        "10000-last",
    ]
    assert len({each.key for each in first}) == 3
    assert (last.name, last.attempt, last.runner) == ("last", 0, "")
    assert (forge.root / "queued" / "10000-last" / "labels").read_text() == "a,b"
    assert job(forge).state == "queued"
    assert not list(forge.root.glob(".new-*"))


@pytest.mark.parametrize("name", ["", "a/b", "nul\0", "x" * 201, "\udcff"])
def test_wrong_job_names(forge: local.Forge, name: str) -> None:
    with pytest.raises(ConfigurationError, match="called"):
        forge.submit(name, "true")


def test_jobs_made_by_hand(forge: local.Forge, run: Callable[..., Started]) -> None:
    put(forge, "bare", script="echo $0 is here")
    put(forge, "labelled", script="#!/bin/sh -e\nfalse\ntrue", labels=" cml ,\n")
    put(forge, "python", script="#!/usr/bin/env python3\nprint(6 * 7)")
    put(forge, "other", script="true", labels="cml,gpu")
    put(forge, "no-program", script="#!/no/such/program")
    put(forge, "binary", script="#!\0\n")
    put(forge, "unfinished")
    run(register(forge))
    assert ended(forge, "bare").log.read_text().endswith("/running/bare/script is here\n")
    assert (ended(forge, "labelled").state, ended(forge, "labelled").exit_code) == ("failed", 1)
    assert ended(forge, "python").log.read_text() == "42\n"
    assert (ended(forge, "binary").state, ended(forge, "binary").exit_code) == ("failed", 127)
    assert ended(forge, "no-program").exit_code == 127
    assert "can't be started" in ended(forge, "no-program").log.read_text()
    rest = {each.job.name: each.state for each in forge.jobs() if each.state == "queued"}
    assert rest == {"other": "queued"}
    put(forge, "bare", script="echo another")
    # While one record takes the place of the other, there is none for a moment.
    wait(lambda: "another" in text(forge, "bare"))
    assert len([each for each in forge.jobs() if each.job.name == "bare"]) == 1


NAMES = [
    "two words  and  spaces",
    f"x\n{STAMP}listening for jobs",
    'a" ended: succeeded',
    f"x\r{STAMP}trouble: none",
    "\u00e9\u2028\u0085\u2603",
    "-rf",
    "$(false)",
    "{}",
]


def test_odd_names_survive(forge: local.Forge, run: Callable[..., Started]) -> None:
    for name in NAMES:
        forge.submit(name, 'printf %s "$JOB_NAME"; exit 1')
    started = run(register(forge))
    for name in NAMES:
        assert ended(forge, name).log.read_bytes().endswith(name.encode())
    started.wait(JobEnded, len(NAMES))
    assert [event.job.name for event in started.events if isinstance(event, JobStarted)] == NAMES
    kinds = [type(event) for event in started.events]
    assert kinds == [Ready, *[JobStarted, JobEnded] * len(NAMES)]
    assert JobEnded(succeeded=True) not in started.events


def test_where_a_job_runs(forge: local.Forge, run: Callable[..., Started]) -> None:
    script = "echo $CI $JOB_NAME $JOB_ATTEMPT $RUNNER_NAME $PWD; ls -A; touch x; cat; exit 7"
    forge.submit("job", script)
    started = run(register(forge))
    done = ended(forge, "job")
    told, directory = done.log.read_text().rstrip("\n").rsplit(" ", 1)
    assert told == "true job 1 one"
    assert Path(directory).parent.name == "one"
    assert not Path(directory).exists()
    assert (done.state, done.exit_code, done.runner, done.attempt) == ("failed", 7, "one", 1)
    assert (done.log.parent / "exit").read_text() == "7\n"
    assert (done.log.parent / "result").read_text() == "failed\n"
    assert started.wait(JobEnded) == JobEnded(succeeded=False)


def test_the_log_grows_live(
    forge: local.Forge, run: Callable[..., Started], tmp_path: Path
) -> None:
    forge.submit(
        "job", f"echo begun; until test -e {tmp_path}/flag; do sleep 0.05; done; echo over"
    )
    run(register(forge)).wait(JobStarted)
    wait(lambda: said(forge) == "begun\n")
    assert job(forge).state == "running"
    (tmp_path / "flag").touch()
    assert ended(forge, "job").log.read_text() == "begun\nover\n"


def test_a_job_may_close_its_output(forge: local.Forge, run: Callable[..., Started]) -> None:
    forge.submit("quiet", "echo some; exec >&- 2>&-; sleep 0.3; exit 5")
    run(register(forge))
    done = ended(forge, "quiet")
    assert (done.exit_code, done.log.read_text()) == (5, "some\n")


def test_much_output(forge: local.Forge, run: Callable[..., Started]) -> None:
    forge.submit("loud", "head -c 5000000 /dev/zero")
    run(register(forge))
    assert ended(forge, "loud").log.stat().st_size == 5_000_000


def test_many_agents_run_each_job_once(
    forge: local.Forge, run: Callable[..., Started], tmp_path: Path
) -> None:
    for number in range(30):
        forge.submit(f"job-{number}", f'echo "$JOB_NAME" >> {tmp_path}/trace')
    for number in range(5):
        run(register(forge, f"runner-{number}"))
    wait(lambda: all(each.state == "succeeded" for each in forge.jobs()))
    jobs = forge.jobs()
    assert sorted((tmp_path / "trace").read_text().split()) == sorted(
        each.job.name for each in jobs
    )
    assert {each.attempt for each in jobs} == {1}
    assert len(jobs) == 30


# Interruptions


def test_lost_agents(forge: local.Forge, run: Callable[..., Started]) -> None:
    for number, single in enumerate((False, True)):
        forge.submit("long", "echo begun; exec sleep 600")
        started = run(register(forge, f"runner-{number}", single=single))
        started.wait(JobStarted)
        wait(lambda: said(forge, -1))
        assert job(forge, -1).state == "running"
        started.process.kill()
        started.process.wait()
        lost = job(forge, -1)
        assert (lost.state, lost.exit_code) == ("failed", None)
        assert lost.log.read_text() == "begun\nlost communication with the runner\n"
    (left,) = forge.runners()
    assert (left.name, left.online, left.busy) == ("runner-0", False, False)


def test_another_agent_finds_what_is_lost(forge: local.Forge, run: Callable[..., Started]) -> None:
    registration = register(forge)
    forge.submit("long", "sleep 600")
    started = run(registration)
    started.wait(JobStarted)
    started.process.kill()
    started.process.wait()
    run(registration)
    wait((forge.root / "done" / "0001-long" / "result").exists)


def test_attempts_are_kept(forge: local.Forge, run: Callable[..., Started]) -> None:
    first = forge.submit("job", "echo attempt $JOB_ATTEMPT; exit $((10 - JOB_ATTEMPT))")
    run(register(forge))
    for number in (1, 2):
        assert ended(forge, "job").attempt == number
        assert forge.retry(ended(forge, "job").job)
    done = ended(forge, "job")
    assert (done.exit_code, done.attempt, done.job.key) == (7, 3, first.key)
    kept = {file.name: file.read_text().strip() for file in done.log.parent.iterdir()}
    for name in ("script", "labels"):
        del kept[name]
    assert kept == {
        "attempt": "3",
        "runner": "one",
        "runner.1": "one",
        "runner.2": "one",
        "log.1": "attempt 1",
        "log.2": "attempt 2",
        "log": "attempt 3",
        "exit.1": "9",
        "exit.2": "8",
        "exit": "7",
        "result.1": "failed",
        "result.2": "failed",
        "result": "failed",
    }


def test_what_is_not_run_again(forge: local.Forge, run: Callable[..., Started]) -> None:
    with pytest.raises(NotFound, match="0007-never"):
        forge.retry(Job(name="never", id="0007-never"))
    queued = forge.submit("job", "true")
    assert forge.retry(queued)
    run(register(forge))
    done = ended(forge, "job")
    assert forge.retry(done.job)
    assert forge.retry(Job(name="job", pipeline=done.job.pipeline))
    assert job(forge).state == "succeeded"
    assert job(forge).attempt == 1


HIDES = """
import os, subprocess, sys, time
command = [sys.executable, "-c", "import time; time.sleep(600)"]
for options in ({}, {"start_new_session": True}):
    child = subprocess.Popen(command, **options)
    with open(sys.argv[1], "a") as file:
        print(child.pid, file=file)
"""


@pytest.mark.parametrize("how", ["abort", "stop", "by itself"])
def test_no_process_of_a_job_survives(
    forge: local.Forge, run: Callable[..., Started], tmp_path: Path, how: str
) -> None:
    (tmp_path / "hides.py").write_text(HIDES)
    trace = tmp_path / "trace"
    end = "" if how == "by itself" else "; sleep 600"
    forge.submit("job", f"(python3 {tmp_path}/hides.py {trace}); touch {trace}.done{end}")
    started = run(register(forge))
    wait((tmp_path / "trace.done").exists)
    if how == "abort":
        local.Agent().abort(started.pid)
    if how == "stop":
        local.Agent().stop(started.pid)
    expected = {"abort": "failed", "stop": "cancelled", "by itself": "succeeded"}
    done = ended(forge, "job")
    assert done.state == expected[how]
    pids = [int(pid) for pid in trace.read_text().split()]
    assert len(pids) == 2
    wait(lambda: not [pid for pid in pids if _alive(pid)])
    if how != "by itself":
        assert "told to end" in done.log.read_text()


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("how", ["abort", "stop"])
def test_signals_without_a_job(forge: local.Forge, run: Callable[..., Started], how: str) -> None:
    started = run(register(forge))
    started.wait(Ready)
    for _ in range(3):
        getattr(local.Agent(), how)(started.pid)
    assert started.ended() == 0
    assert [runner.online for runner in forge.runners()] == [False]


def test_an_aborted_agent_takes_no_other_job(
    forge: local.Forge, run: Callable[..., Started]
) -> None:
    forge.submit("long", "sleep 600")
    forge.submit("next", "true")
    started = run(register(forge))
    started.wait(JobStarted)
    local.Agent().abort(started.pid)
    local.Agent().stop(started.pid)
    assert started.ended() == 0
    assert [each.state for each in forge.jobs()] == ["failed", "queued"]


def test_interrupts_may_be_repeated(forge: local.Forge, run: Callable[..., Started]) -> None:
    forge.submit("job", "trap '' INT TERM; sleep 600")
    started = run(register(forge))
    started.wait(JobStarted)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        if started.process.poll() is None:
            os.kill(started.pid, number)
    assert started.ended() == 0
    assert ended(forge, "job").state == "cancelled"
    assert started.wait(JobEnded) == JobEnded(succeeded=False)


# Bad starts and sudden ends of the agent


def test_a_wrong_secret(forge: local.Forge, run: Callable[..., Started]) -> None:
    old = register(forge)
    register(forge)
    started = run(old)
    assert started.ended() == agent.REFUSED
    assert "LOCAL_FORGE_SECRET" in started.wait(Troubled).message


def test_a_second_agent(forge: local.Forge, run: Callable[..., Started], tmp_path: Path) -> None:
    registration = register(forge)
    run(registration).wait(Ready)
    assert run(registration).ended() == agent.TRY_AGAIN
    with pytest.raises(AlreadyExists):
        forge.connect("one", registration.secret)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_deleted_registration(forge: local.Forge, run: Callable[..., Started], when: str) -> None:
    registration = register(forge)
    if when == "before":
        forge.unregister(forge.runners()[0])
        started = run(registration)
    else:
        started = run(registration)
        started.wait(Ready)
        forge.unregister(forge.runners()[0])
    assert started.ended() == agent.DELETED
    assert "registration has been deleted" in started.wait(Troubled).message
    assert forge.runners() == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_directory_goes(forge: local.Forge, run: Callable[..., Started], when: str) -> None:
    registration = register(forge)
    if when == "before":
        shutil.rmtree(forge.root)
        started = run(registration)
    else:
        started = run(registration)
        started.wait(Ready)
        forge.root.rename(forge.root.with_name("gone"))
    assert started.ended() == agent.REFUSED
    assert "no directory" in started.wait(Troubled).message
    assert not forge.root.exists()


def test_how_to_start_it() -> None:
    command = local.Agent().command(Path.cwd(), _registration()).arguments[:-1]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == agent.REFUSED
    assert "usage" in found.stdout


def _registration() -> Registration:
    from cml_runner.model import Registration

    return Registration(url="file:///forge", name="one", labels=(), single=False, secret="secret")


# A full disk


def test_a_log_that_cannot_grow(forge: local.Forge, run: Callable[..., Started]) -> None:
    forge.submit("loud", "head -c 100000 /dev/zero; sleep 600")
    started = run(register(forge), ("/bin/sh", "-c", 'ulimit -f 16; exec "$@"', "sh"))
    assert started.wait(JobEnded) == JobEnded(succeeded=False)
    assert "can't go on" in started.wait(Troubled).message
    assert ended(forge, "loud").state == "failed"
    forge.submit("small", "echo fine")
    assert ended(forge, "small").log.read_text() == "fine\n"
    assert started.wait(JobEnded, 2) == JobEnded(succeeded=True)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system that is soon full."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.lab
def test_a_full_disk(small: Path, run: Callable[..., Started]) -> None:
    forge = local.Forge(str(small))
    registration = register(forge)
    forge.submit("loud", "head -c 200000 /dev/zero; sleep 600")
    started = run(registration)
    assert started.wait(JobEnded) == JobEnded(succeeded=False)
    full = ended(forge, "loud")
    assert full.state == "failed"
    with pytest.raises(RunnerError, match="No space left"):
        forge.submit("next", "true" * 1000)
    assert not list(small.glob(".new-*"))
    full.log.unlink()
    forge.submit("next", "echo fine")
    assert ended(forge, "next").state == "succeeded"
    assert started.process.poll() is None


# What the supervisor understands


@pytest.mark.parametrize(
    ("line", "event"),
    [
        (f"{STAMP}listening for jobs", Ready()),
        (f"{STAMP}listening for jobs\n", Ready()),
        (
            f'{STAMP}running job {{"name": "a\\n", "id": "0001-a", "attempt": 2}}',
            JobStarted(job=Job(name="a\n", id="0001-a", attempt=2)),
        ),
        (f'{STAMP}job "a" ended: succeeded', JobEnded(succeeded=True)),
        (f'{STAMP}job "a" ended: cancelled', JobEnded(succeeded=False)),
        (f'{STAMP}job "a\\" ended: succeeded" ended: failed', JobEnded(succeeded=False)),
        (f"{STAMP}trouble: no space", Troubled(message="no space")),
        (f'{STAMP}running job {{"name": 3}}', None),
        (f"{STAMP}running job {{}}", None),
        (f"{STAMP}something else", None),
        (f" {STAMP}listening for jobs", None),
        (f"x\n{STAMP}listening for jobs", None),
        ('job "a" ended: succeeded', None),
    ],
)
def test_parse(line: str, event: object) -> None:
    assert local.Agent().parse(line) == event


@pytest.mark.parametrize(
    ("code", "again", "reason"),
    [
        (0, False, ""),
        (1, False, "could not start"),
        (2, True, "could not be used"),
        (7, False, "registration has been deleted"),
        (99, False, ""),
        (-9, True, "signal 9"),
    ],
)
def test_exit_codes(code: int, again: bool, reason: str) -> None:
    exited = local.Agent().exited(code)
    assert exited == Exited(code=code, reason=exited.reason, again=again, outdated=False)
    assert reason in exited.reason
    assert bool(exited.reason) == bool(reason)
