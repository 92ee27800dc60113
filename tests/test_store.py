from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cml_runner import store
from cml_runner.errors import RunnerError
from cml_runner.model import Interruption, Job
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
