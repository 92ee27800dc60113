"""A machine's preparation and end, where its system is a directory and its cloud a stub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import cml_runner
from cml_runner import boot
from cml_runner.boot import environment, failing, places, prepare, trust, units, web
from cml_runner.boot.prepare import INTERRUPTED, TOLD
from cml_runner.errors import RunnerError
from cml_runner.model import Status
from cml_runner.store import Store, encoded
from tests.boot.test_failing import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

URL = "s3://x/tasks/cml-x#aws/us-west-2/cml-x"
SHA256 = "ab" * 32


@pytest.fixture
def bucket(tmp_path: Path) -> Store:
    place = tmp_path / "bucket"
    place.mkdir()
    return Store(place.as_uri())


class System:
    """What a machine has around it."""

    def __init__(self, machine: Machine, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.machine, self.directory = machine, directory
        self.calls: list[tuple[str, ...]] = []
        self.installed: list[str] = []
        self.trusted: list[str] = []
        program = directory / "programs" / SHA256
        program.mkdir(parents=True)
        self.program, self.python = program, directory / "env" / "bin" / "python"
        patch.setattr(cml_runner, "__file__", str(program / "cml_runner" / "__init__.py"))
        patch.setattr(boot, "machine", lambda url: machine)
        patch.setattr(boot, "WORD", directory / "word")
        patch.setattr(failing, "CONSOLES", ())
        patch.setattr(failing.fail, "__kwdefaults__", {"sleep": _no_pause, "consoles": ()})
        patch.setattr(prepare, "LOG", directory / "log")
        patch.setattr(prepare, "MACHINE_ID", directory / "machine-id")
        patch.setattr(units, "SYSTEM", directory)
        patch.setattr(units.start, "__defaults__", (directory,))
        patch.setattr(units, "systemctl", lambda *arguments: self.calls.append(arguments))
        patch.setattr(environment, "install", self._install)
        patch.setattr(trust, "install", self._trust)
        (directory / "log").write_text("one\ntwo\n")
        (directory / "machine-id").write_text("new")

    def _trust(self, pem: str) -> dict[str, str]:
        self.trusted.append(pem)
        return {}

    def _install(self, index: str) -> Path:
        self.installed.append(index)
        return self.python

    def run(self, what: str = "machine", *more: str) -> int:
        return prepare.main([what, URL, "--index", "https://index.example", *more])


def _no_pause(_: float) -> None:
    """Go on at once."""


@pytest.fixture
def system(bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    return System(Machine(bucket), tmp_path, monkeypatch)


def test_a_machine_is_prepared(system: System, bucket: Store) -> None:
    bucket.write("settings.json", json.dumps({"authorities": "PEM"}).encode())
    assert system.run("machine", "--count", "3") == 0
    assert system.installed == ["https://index.example"]
    assert system.trusted == ["PEM"]
    unit = (system.directory / "cml-runner.service").read_text()
    assert f'ExecStart="{system.python}" "-m" "cml_runner.supervise" "{URL}"\n' in unit
    end = f'ExecStopPost=-"{sys.executable}" "-m" "cml_runner.boot" "end" "{URL}" "--count" "3"\n'
    assert end in unit
    assert f'Environment="PYTHONPATH={system.program}"\n' in unit
    lines = set(unit.splitlines())
    assert {"OOMScoreAdjust=-900", "OOMPolicy=continue", "TasksMax=infinity"} <= lines
    assert {"SuccessAction=poweroff-force", "FailureAction=poweroff-force"} <= lines
    assert "TimeoutStopSec=1h" in lines, "its end goes on for as long as that"
    assert not [line for line in lines if line.startswith("UMask=")], "jobs would inherit it"
    assert ("start", "--no-block", "cml-runner.service") in system.calls
    assert ("mask", "--quiet", "--now", *prepare.UPGRADES) in system.calls
    assert system.machine.ended == []


def test_odd_words_stay_words_in_a_unit() -> None:
    assert units.quoted('s3://x/%u $HOME "y" \\') == r'"s3://x/%%u $$HOME \"y\" \\"'


def test_proxies_are_used_before_the_index_is_asked(
    system: System, bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    proxies = {"HTTPS_PROXY": "http://me:pass@proxy.example:3128"}
    bucket.write("settings.json", json.dumps({"proxies": proxies}).encode())
    assert system.run() == 0
    assert os.environ["https_proxy"] == os.environ["HTTPS_PROXY"] == proxies["HTTPS_PROXY"]
    unit = (system.directory / "cml-runner.service").read_text()
    assert "proxy.example" not in unit, "everybody can read it"


def _full(_: str) -> Path:
    raise OSError(28, "No space left on device")


def _unsure(_: str) -> Path:
    msg = "GET https://index.example/uv/: connection refused"
    raise RunnerError(msg)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(_full, "OSError: [Errno 28] No space left on device"), (_unsure, "connection refused")],
)
def test_what_fails_is_told_and_ends_the_machine(
    system: System,
    bucket: Store,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[str], Path],
    reason: str,
) -> None:
    bucket.write("settings.json", b"{}")
    monkeypatch.setattr(environment, "install", fault)
    assert system.run() == TOLD
    status = bucket.load("status-000.json", Status)
    assert status
    assert reason in status.reason
    assert status.program == SHA256[:12]
    assert bucket.log(0).endswith("\none\ntwo\n")
    assert system.machine.ended == ["replaced"]


def test_damaged_settings_are_a_failure(system: System, bucket: Store) -> None:
    for content in (b"{", b"[]", b"\xff"):
        bucket.write("settings.json", content)
        assert system.run() == TOLD
    status = bucket.load("status-000.json", Status)
    assert status
    assert status.reason == "the settings can't be read: they were damaged"


def test_without_settings_the_task_is_over(system: System) -> None:
    assert system.run() == TOLD
    assert system.machine.ended == ["finished"]
    assert system.installed == []


class Slow(Store):
    """A bucket whose rights take a while."""

    def __init__(self, url: str, times: int) -> None:
        super().__init__(url)
        self.times = times

    def read(self, key: str) -> bytes | None:
        if self.times > 0:
            self.times -= 1
            raise web.Refused(f"GET {key}", 403, "AccessDenied")
        return super().read(key)


def test_new_rights_are_waited_for(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.write("settings.json", b'{"a": 1}')
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    minutes = 9
    slow = Slow(bucket.url, minutes * 60 // prepare.PAUSE)
    assert prepare.read_settings(slow, sleep) == {"a": 1}
    assert now[0] == minutes * 60
    never = Slow(bucket.url, 10_000)
    with pytest.raises(RunnerError, match=r"settings can't be read: .*403 AccessDenied"):
        prepare.read_settings(never, sleep)
    assert now[0] == pytest.approx(minutes * 60 + prepare.RIGHTS, abs=5)


def test_it_ends_when_it_takes_too_long(
    system: System, bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.write("settings.json", b"{}")
    monkeypatch.setattr(prepare, "LIMIT", 1)

    def hang(_: str) -> Path:
        time.sleep(20)
        raise AssertionError

    monkeypatch.setattr(environment, "install", hang)
    assert system.run() == TOLD
    status = bucket.load("status-000.json", Status)
    assert status
    assert status.reason.startswith("not done within")


def test_a_clone_gets_an_identity(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command))
    prepare.new_identity()
    assert ran == [], "this one was made at the boot"
    uptime = system.directory / "uptime"
    uptime.write_text("5.0 1.0\n")
    monkeypatch.setattr(prepare, "UPTIME", uptime)
    long_ago = time.time() - 3600
    os.utime(prepare.MACHINE_ID, (long_ago, long_ago))
    prepare.new_identity()
    assert ran == [("systemd-machine-id-setup",)]
    assert not prepare.MACHINE_ID.exists()


# The end


class Ending:
    """How init calls us."""

    def __init__(self, system: System, patch: pytest.MonkeyPatch) -> None:
        self.system, self.patch = system, patch
        uptime = system.directory / "uptime"
        uptime.write_text("100.0 1.0\n")
        patch.setattr(prepare, "UPTIME", uptime)

    def __call__(self, result: str, code: int | str, count: int = 1) -> list[str]:
        self.patch.setenv("SERVICE_RESULT", result)
        self.patch.setenv("EXIT_STATUS", str(code))
        self.system.machine.ended.clear()
        assert self.system.run("end", "--count", str(count)) == 0
        return list(self.system.machine.ended)


@pytest.fixture
def end(system: System, monkeypatch: pytest.MonkeyPatch) -> Ending:
    return Ending(system, monkeypatch)


def said(bucket: Store, state: Any, ago: float = 0, rank: int = 0) -> None:
    at = datetime.now(timezone.utc) - timedelta(seconds=ago)
    status = Status(state=state, at=at, since=at, runner="x", reason="said before")
    bucket.write(f"status-{rank:03}.json", encoded(status))


def test_one_that_has_left_only_loses_its_power(end: Ending, system: System) -> None:
    assert end("success", 0) == []
    system.machine.ends_with_power = False
    assert end("success", 0) == ["replaced"], "it would be paid for"


def test_an_interrupted_one_is_replaced(end: Ending) -> None:
    assert end("exit-code", INTERRUPTED) == ["replaced"]


def test_one_that_failed_and_has_left_is_not_replaced(end: Ending, bucket: Store) -> None:
    said(bucket, "failed")
    assert end("exit-code", 8) == []
    assert bucket.keys("failed-") == []


@pytest.mark.parametrize(("result", "code"), [("exit-code", 1), ("signal", "KILL"), ("", "")])
def test_a_supervisor_that_dies_is_a_failure(
    end: Ending, bucket: Store, result: str, code: int | str
) -> None:
    said(bucket, "busy")
    assert end(result, code) == ["replaced"]
    status = bucket.load("status-000.json", Status)
    assert status
    assert (status.state, "the supervisor died" in status.reason) == ("failed", True)


def test_what_the_machine_before_has_said_does_not_count(end: Ending, bucket: Store) -> None:
    said(bucket, "failed", ago=200)
    assert end("exit-code", 1) == ["replaced"]
    assert len(bucket.keys("failed-")) == 1


def test_the_supervisors_own_words(end: Ending, bucket: Store, system: System) -> None:
    boot.leave_word(URL, "settings.json was damaged")
    boot.leave_word("file:///x", "nobody reads this")
    end("exit-code", 1)
    status = bucket.load("status-000.json", Status)
    assert status
    assert status.reason == "settings.json was damaged"
    assert system.machine.ended == ["replaced"]


def test_of_several_machines_one_ends_its_own_place(end: Ending, bucket: Store) -> None:
    for rank in range(3):
        places.take(bucket, 3, f"i-{rank}")
    said(bucket, "failed", rank=1)
    assert end("exit-code", 8, 3) == []
    said(bucket, "busy", rank=1)
    assert end("signal", "KILL", 3) == ["replaced"]
    assert bucket.keys("failed-") == ["failed-001-00"]


def test_ending_goes_on_until_it_is_done(end: Ending, system: System) -> None:
    system.machine.hindrances = []
    assert end("exit-code", INTERRUPTED) == ["replaced"]


def test_nothing_that_init_runs_needs_more_than_the_standard_library() -> None:
    code = "import sys; sys.modules['msgspec'] = sys.modules['obstore'] = None; "
    code += "import cml_runner.boot.prepare, cml_runner.boot.aws"
    root = Path(prepare.__file__).parents[2]
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=root)
