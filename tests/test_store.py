from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

import pytest

from cml_runner import store
from cml_runner.errors import RunnerError
from cml_runner.model import Interruption, Job, Status
from cml_runner.store import Store

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def bucket(tmp_path: Path) -> Store:
    return Store(tmp_path.as_uri())


def test_write_read_list_delete(bucket: Store) -> None:
    assert bucket.read("a") is None
    bucket.write("a-1", b"one")
    bucket.write("a-1", b"two")
    bucket.write("b", b"")
    assert bucket.read("a-1") == b"two"
    assert bucket.keys("") == ["a-1", "b"]
    assert bucket.keys("a") == ["a-1"]
    for _ in range(2):
        bucket.delete("a-1")
    assert bucket.keys("") == ["b"]


def test_dataclasses_come_back(bucket: Store) -> None:
    job = Job(name='odd "name"\n', pipeline="1")
    key = store.interruption(job)
    assert bucket.load(key, Interruption) is None
    bucket.save(key, Interruption(job=job, times=2))
    assert bucket.load(key, Interruption) == Interruption(job=job, times=2)


def test_a_log_grows_over_many_objects_and_machines(bucket: Store) -> None:
    text = "".join(f"line {number} ✓\n" for number in range(20_000))
    log = store.Log(bucket, 0)
    for start in range(0, len(text), 70_001):
        log.append(text[start : start + 70_001])
        log.flush()
    log.flush()
    after = store.Log(bucket, 0)  # of the machine that came in its place
    after.append("later\n")
    after.flush()
    store.Log(bucket, 1).flush()
    assert bucket.log(0) == text + "later\n"
    assert len(bucket.keys("log-000-")) > 3
    assert all(len(bucket.read(key) or b"") <= store.SEGMENT for key in bucket.keys(""))
    assert bucket.log(1) == ""
    assert bucket.ranks() == [0]


def test_what_can_not_be_written_is_kept_for_the_next_time(bucket: Store, tmp_path: Path) -> None:
    log = store.Log(bucket, 0)
    log.append("one\n")
    log.flush()
    (blocked := tmp_path / "log-000-000000.txt").unlink()
    blocked.mkdir()
    (blocked / "file").touch()
    log.append("two\n")
    with pytest.raises(RunnerError, match="Is a directory"):
        log.flush()
    (blocked / "file").unlink()
    blocked.rmdir()
    log.flush()
    assert bucket.log(0) == "one\ntwo\n"


def test_what_is_said_aloud_outlives_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("own", "volume"):
        (tmp_path / name).mkdir()
    bucket = store.opened(f"said://{tmp_path}/own?data={tmp_path}/volume")
    now = datetime(2026, 11, 25, tzinfo=timezone.utc)
    bucket.write(store.SETTINGS, b"secret")
    bucket.save(store.status(0), Status(state="busy", at=now, since=now, runner="x"))
    assert bucket.claim(store.result(0), b"{}")
    assert not bucket.claim(store.result(0), b"other")
    assert bucket.claim("data/000/h/1", b"head")
    log = store.Log(bucket, 0, epoch=1)
    log.append("a line\n")
    log.flush()
    said = capsys.readouterr().out
    assert said.count(store.SAID) == said.count(store.TOLD) == 1
    after = store.opened(f"said://{tmp_path}/another?data={tmp_path}/volume")
    assert after.read(store.result(0)) == b"{}"
    assert after.log(0) == "a line\n"
    assert after.keys("data/000/h/") == ["data/000/h/1"]
    assert bytes(after.view("data/000/h/1", 1, 3) or b"") == b"ea"
    assert not list((tmp_path / "volume").rglob(store.SETTINGS))
    assert [path.name for path in (tmp_path / "own").iterdir()] == [store.SETTINGS]
    after.remove(["data/000/h/1"])
    after.delete(store.result(0))
    assert bucket.read("data/000/h/1") is bucket.read(store.result(0)) is None


def test_what_is_said_aloud_may_be_kept_in_a_bucket_of_the_users(tmp_path: Path) -> None:
    for name in ("own", "theirs"):
        (tmp_path / name).mkdir()
    bucket, theirs = store.opened(f"said://{tmp_path}/own"), Store((tmp_path / "theirs").as_uri())
    bucket.outlive(bucket)  # which has no end
    assert bucket.claim(store.result(1), b"{}")
    bucket.outlive(theirs)
    assert bucket.claim(store.result(0), b"{}")
    assert theirs.keys(store.WORDS) == [store.WORDS + store.result(0)]
    assert bucket.keys("result-") == [store.result(0)]
