"""The supervisor of a script, as a process of its own, beside its bucket."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cml_runner import store
from cml_runner.boot import prepare
from cml_runner.model import Identifier, Result, Script, Settings, Status
from cml_runner.transfer import History, Rules, Writer, restore
from cml_runner.wait import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Start = Callable[[str], subprocess.Popen[str]]

COUNT = """\
i=$(cat counter 2>/dev/null || echo 0)
while [ ! -e {enough} ]; do
  i=$((i + 1)); echo $i >new; mv new counter; sleep 0.1
done
"""


@pytest.fixture
def bucket(tmp_path: Path) -> store.Store:
    """The bucket of a task which has been sent."""
    for name in ("bucket", "source"):
        (tmp_path / name).mkdir()
    (tmp_path / "source" / "input").write_text("x")
    found = store.Store((tmp_path / "bucket").as_uri())
    history = History(found, store.DATA, store.PUSHED)
    history.take()
    Writer(history, tmp_path / "source").snapshot()
    settings = Settings(
        id=Identifier.new("task"),
        driver="",
        repo="",
        names=("task",),
        labels=(),
        cloud="local",
        region=str(tmp_path),
        script=Script(content=COUNT.format(enough=tmp_path / "enough"), exclude=Rules().lines),
    )
    found.save(store.SETTINGS, settings)
    return found


@pytest.fixture
def start(bucket: store.Store, tmp_path: Path) -> Iterator[Start]:
    """Be a machine."""
    running = []

    def run(name: str) -> subprocess.Popen[str]:
        (tmp_path / name).mkdir()
        command = (sys.executable, "-m", "cml_runner.supervise", bucket.url)
        process = subprocess.Popen(command, cwd=tmp_path / name, stderr=subprocess.PIPE, text=True)
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


def counted(tmp_path: Path, name: str) -> int:
    path = tmp_path / name / "work" / "task" / "data" / "counter"
    return int(path.read_text() or 0) if path.exists() else 0


def snapshots(bucket: store.Store) -> int:
    return len([one for one in History(bucket, store.DATA, "000").heads() if one.number])


def test_who_returns_from_the_dead_goes_again(
    bucket: store.Store, start: Start, tmp_path: Path
) -> None:
    old = start("old")
    until(lambda: snapshots(bucket) > 0, "a snapshot", 30, 0.1)
    old.send_signal(signal.SIGSTOP)
    reached = counted(tmp_path, "old")
    new = start("new")
    until(lambda: counted(tmp_path, "new") > 3, "another machine to go on", 30, 0.1)
    assert 0 < counted(tmp_path, "new") <= reached + 10
    old.send_signal(signal.SIGCONT)
    _, err = old.communicate(timeout=40)
    assert old.returncode == prepare.INTERRUPTED, err
    assert "another machine has taken over" in err
    assert not (tmp_path / "old" / "work" / "task").exists()
    status = bucket.load(store.status(0), Status)
    assert status
    assert status.state == "busy"
    (tmp_path / "enough").touch()
    _, err = new.communicate(timeout=40)
    assert new.returncode == 0, err
    result = bucket.load(store.result(0), Result)
    assert result
    assert (result.code, result.epoch) == (0, 2)
    history = History(bucket, store.DATA, "000")
    manifest = history.latest()
    assert manifest
    restore(history, manifest, tmp_path / "target")
    assert (tmp_path / "target" / "input").read_text() == "x"
    # A third one has nothing to do.
    third = start("third")
    _, err = third.communicate(timeout=40)
    assert third.returncode == 0, err
    assert bucket.load(store.result(0), Result) == result


def test_a_signal_saves_the_data(bucket: store.Store, start: Start, tmp_path: Path) -> None:
    process = start("machine")
    until(lambda: counted(tmp_path, "machine") > 3, "the script to count", 30, 0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=40)
    assert process.returncode == prepare.INTERRUPTED, err
    assert snapshots(bucket) == 1
    assert bucket.load(store.result(0), Result) is None
    status = bucket.load(store.status(0), Status)
    assert status
    assert status.state == "interrupted"


def test_data_that_can_not_be_reached(bucket: store.Store, start: Start) -> None:
    """It doesn't go on for ever with one machine after the other."""
    settings = bucket.load(store.SETTINGS, Settings)
    assert settings
    assert settings.script
    nowhere = replace(settings.script, data="file:///nowhere/at/all")
    bucket.save(store.SETTINGS, replace(settings, script=nowhere))
    codes = []
    for name in ("one", "two"):
        process = start(name)
        process.communicate(timeout=40)
        codes.append(process.returncode)
    assert codes == [prepare.INTERRUPTED, 0]
    result = bucket.load(store.result(0), Result)
    assert result
    assert result.code
    assert "nowhere" in bucket.log(0)


def test_data_that_are_gone(bucket: store.Store, start: Start) -> None:
    """Another machine may do better, once; then it is said."""
    bucket.remove(bucket.keys("data/"))
    codes = []
    for name in ("one", "two"):
        process = start(name)
        process.communicate(timeout=40)
        codes.append(process.returncode)
        status = bucket.load(store.status(0), Status)
        assert status
        assert status.state == "failed"
    assert codes == [prepare.INTERRUPTED, 0]
    result = bucket.load(store.result(0), Result)
    assert result
    assert (result.code, result.reason) == (4, "the data of this task are gone")
