from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cml_runner.boot import failing, web
from cml_runner.boot.failing import Failure, fail
from cml_runner.errors import RunnerError
from cml_runner.model import Status
from cml_runner.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cml_runner.boot import Objects

FAILURE = Failure("no index", "0" * 64)


class Unable(Store):
    """A bucket that can't be written, for the reasons that are given."""

    def __init__(self, url: str, *reasons: Exception) -> None:
        super().__init__(url)
        self.reasons = list(reasons)

    def write(self, key: str, content: bytes) -> None:
        if self.reasons:
            raise self.reasons.pop(0)
        super().write(key, content)


class Machine:
    """One that notes how it ends."""

    url = "s3://x/tasks/x#aws/r/x"
    ends_with_power = True

    def __init__(self, bucket: Store, name: str = "i-1") -> None:
        self.objects: Objects = bucket
        self.leases: Objects = bucket
        self.ended: list[str] = []
        self.hindrances: list[Exception] = []
        self._name = name

    def name(self) -> str:
        return self._name

    def check(self) -> None:
        """It is."""

    def replace(self) -> None:
        self._end("replaced")

    def dismiss(self) -> None:
        self._end("dismissed")

    def finish(self) -> None:
        self._end("finished")

    def _end(self, how: str) -> None:
        if self.hindrances:
            raise self.hindrances.pop(0)
        self.ended.append(how)


class Clock:
    """Notes pauses in place of waiting."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)


def refused(status: int) -> web.Refused:
    return web.Refused("PUT x", status, "no")


def failed(machine: Machine, count: int = 1, consoles: Sequence[Path] = ()) -> Clock:
    clock = Clock()
    places = tuple(map(str, consoles))
    fail(machine, count, FAILURE, sleep=clock, consoles=places)
    return clock


def test_the_console_has_the_reason_and_a_console_that_is_none_is_no_matter(tmp_path: Path) -> None:
    console = tmp_path / "console"
    machine = Machine(Store(tmp_path.as_uri()))
    failure = Failure("no index", "0" * 64, "one\ntwo")
    fail(machine, 1, failure, consoles=("/no/such/console", str(console)))
    assert console.read_text() == "cml-runner: bootstrap failed: no index\none\ntwo\n"
    assert machine.ended == ["replaced"]


def test_ending_goes_on_whatever_hinders_it(tmp_path: Path) -> None:
    machine = Machine(Store(tmp_path.as_uri()))
    machine.hindrances = [refused(429), refused(403), refused(500), OSError("no metadata")]
    assert failed(machine).slept == [1, 2, 5, 10]
    assert machine.ended == ["replaced"]


def test_a_bucket_that_is_away_for_a_moment_learns_it_all_the_same(tmp_path: Path) -> None:
    bucket = Unable(tmp_path.as_uri(), RunnerError("reset"), refused(503))
    machine = Machine(bucket)
    assert failed(machine).slept == [1, 2]
    status = bucket.load("status-000.json", Status)
    assert status
    assert status.reason == "no index"
    assert machine.ended == ["replaced"]


def test_a_failure_that_may_not_be_counted_is_the_last(tmp_path: Path) -> None:
    machine = Machine(Unable(tmp_path.as_uri(), refused(403)))
    failed(machine)
    assert machine.ended == ["finished"]


def test_without_a_network_it_is_replaced(tmp_path: Path) -> None:
    machine = Machine(Unable(tmp_path.as_uri(), *[RunnerError("no route")] * 99))
    assert len(failed(machine).slept) == failing.ATTEMPTS
    assert machine.ended == ["replaced"]


def test_a_failure_counts_once_however_often_it_is_tried(tmp_path: Path) -> None:
    bucket = Store(tmp_path.as_uri())
    once = Machine(bucket)
    failed(once)
    failed(once)  # its end was called again
    assert once.ended == ["replaced", "replaced"]
    other = Machine(bucket, "i-2")
    failed(other)
    assert other.ended == ["finished"]


def test_a_start_in_between_is_no_failure_in_a_row(tmp_path: Path) -> None:
    bucket = Store(tmp_path.as_uri())
    for name in ("i-1", "i-2"):
        machine = Machine(bucket, name)
        failed(machine)
        assert machine.ended == ["replaced"]
        failing.forget(bucket, 0)


def test_the_log_goes_on_after_it(tmp_path: Path) -> None:
    from cml_runner.reports import Tail
    from cml_runner.store import Log
    from cml_runner.task.follow import lines

    bucket = Store(tmp_path.as_uri())
    tail = Tail(bucket, 0)
    said: list[str] = []
    for epoch in (1, 2):
        log = Log(bucket, 0, epoch)
        log.append(f"machine {epoch}\n")
        log.flush()
        said += [line.text for line in lines(tail)]
        failed(Machine(bucket, f"i-{epoch}"))
        said += [line.text for line in lines(tail)]
    texts = [text.partition("Z ")[2] or text for text in said]
    reason = "cml-runner: bootstrap failed: no index"
    assert texts == ["machine 1", reason, "machine 2", reason]
    assert bucket.log(0).splitlines() == said


@pytest.mark.parametrize("count", [2, 5])
def test_where_others_hold_all_places_nothing_is_counted(tmp_path: Path, count: int) -> None:
    from cml_runner.boot import places

    bucket = Store(tmp_path.as_uri())
    for rank in range(count):
        places.take(bucket, count, f"i-{rank}")
    surplus = Machine(bucket, "surplus")
    failed(surplus, count)
    assert bucket.keys("failed-") == []
    assert surplus.ended == ["replaced"]
