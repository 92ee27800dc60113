from __future__ import annotations

import logging
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import pytest

from cml_runner import reports, store
from cml_runner.errors import RunnerError
from cml_runner.model import Status
from cml_runner.reports import Tail

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2026, 11, 30, tzinfo=timezone.utc)
LOG = "log-000-000000.txt"


class Counting(store.Store):
    """A bucket that notes what was read, and fails on request."""

    failing = ""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reads: list[int] = []  # bytes of each

    def read(self, key: str) -> bytes | None:
        if key == self.failing:
            self.failing = ""
            msg = "away for a moment"
            raise RunnerError(msg)
        content = super().read(key)
        self.reads.append(len(content or b""))
        return content


@pytest.fixture
def bucket(tmp_path: Path) -> Counting:
    return Counting(tmp_path.as_uri())


def test_of_a_log_only_its_end_is_read_again(bucket: Counting) -> None:
    log = store.Log(bucket, 0)
    log.append("a line of the log\n" * 20_000)
    log.flush()
    tail = Tail(bucket, 0)
    whole = tail.text()
    assert len(whole) == sum(bucket.reads)
    bucket.reads.clear()
    assert tail.text() == ""
    log.append("more\n")
    log.flush()
    assert tail.text() == "more\n"
    assert len(bucket.reads) == 2
    assert max(bucket.reads) <= store.SEGMENT


def test_lines_are_whole_until_the_last(bucket: Counting) -> None:
    tail = Tail(bucket, 0)
    assert tail.text() == ""
    bucket.write(LOG, "one\n✓ tw".encode()[:6])
    assert tail.text() == "one\n"
    bucket.write(LOG, "one\n✓ tw".encode())
    assert tail.text() == ""
    bucket.write("log-000-000001.txt", b"o\nthr")
    assert tail.text() == "✓ two\n"
    assert tail.text(last=True) == "thr"
    assert tail.text(last=True) == ""


def test_nothing_is_lost_when_the_bucket_is_away_for_a_moment(bucket: Counting) -> None:
    bucket.write(LOG, b"one\n")
    bucket.write("log-000-000001.txt", b"two\n")
    tail = Tail(bucket, 0)
    bucket.failing = "log-000-000001.txt"
    with pytest.raises(RunnerError):
        tail.text()
    assert tail.text() == "one\ntwo\n"


def test_statuses_of_so_many_or_of_all(bucket: Counting, caplog: pytest.LogCaptureFixture) -> None:
    said = [Status(state="ready", at=NOW, since=NOW, runner=f"r-{rank}") for rank in range(3)]
    assert reports.statuses(bucket, 1) == reports.statuses(bucket) == {}
    for rank in (2, 0):
        bucket.save(store.status(rank), said[rank])
    assert reports.statuses(bucket) == reports.statuses(bucket, 3) == {0: said[0], 2: said[2]}
    assert reports.statuses(bucket, 2) == reports.statuses(bucket, 1) == {0: said[0]}
    bucket.write(store.status(1), b"from another version")
    with pytest.raises(RunnerError, match="another version"):
        reports.statuses(bucket, 3)
    with caplog.at_level(logging.WARNING):
        assert list(reports.statuses(bucket, tolerant=True)) == [0, 2]
    assert "another version" in caplog.text
