from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from cml_runner import logs, program, store
from cml_runner.model import Status
from cml_runner.store import Store
from cml_runner.supervise.report import Report
from cml_runner.wait import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger("cml_runner.test")


@pytest.fixture
def bucket(tmp_path: Path) -> Store:
    (tmp_path / "bucket").mkdir()
    return Store((tmp_path / "bucket").as_uri())


@pytest.fixture
def report(bucket: Store) -> Iterator[Report]:
    logging.getLogger("cml_runner").setLevel(logging.INFO)
    with Report(bucket, 0, "one") as found:
        yield found
    logging.getLogger("cml_runner").setLevel(logging.NOTSET)


def status(bucket: Store) -> Status | None:
    return bucket.load(store.status(0), Status)


def state(bucket: Store) -> str:
    found = status(bucket)
    return found.state if found else ""


def test_it_says_which_program_it_is_from(report: Report) -> None:
    assert report.status.program == program.digest()[:12]


def test_news_are_told_soon(bucket: Store, report: Report) -> None:
    until(lambda: state(bucket) == "starting", "the status", 10, 0.02)
    log.info("hello")
    report.tell(state="ready", version="1")
    until(lambda: state(bucket) == "ready" and "hello" in bucket.log(0), "the news", 10, 0.02)


def test_since_when_it_has_been_so(bucket: Store, report: Report) -> None:
    report.tell(state="ready")
    since = report.status.since
    report.tell(state="ready", reason="no connection")
    assert (report.status.since, report.status.reason) == (since, "no connection")
    report.tell(state="busy")
    assert report.status.since > since


def test_no_secret_gets_into_the_log(bucket: Store, report: Report) -> None:
    logs.hide("s3cret-token")
    log.info("the token is %s", "s3cret-token")
    until(lambda: "the token is ***" in bucket.log(0), "the message", 10, 0.02)


def test_a_bucket_in_trouble_gets_everything_later(
    bucket: Store, report: Report, tmp_path: Path
) -> None:
    until(lambda: state(bucket) == "starting", "the status", 10, 0.02)
    (tmp_path / "bucket").rename(tmp_path / "away")
    (tmp_path / "bucket").touch()
    log.info("while it was away")
    until(lambda: not report._news.is_set(), "a vain attempt", 10, 0.02)
    (tmp_path / "bucket").unlink()
    (tmp_path / "away").rename(tmp_path / "bucket")
    log.info("afterwards")
    until(lambda: "afterwards" in bucket.log(0), "the log", 10, 0.02)
    assert "while it was away" in bucket.log(0)
