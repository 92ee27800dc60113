"""How a task is watched: what is looked at, how often, and what ends it; no test waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from cml_runner import store
from cml_runner.errors import NoCapacity, NotReady
from cml_runner.model import Result
from cml_runner.store import Store
from cml_runner.task.follow import Follow
from tests.launch.test_readiness import FAILED, NOW, Everything, FarSide

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def far(tmp_path: Path) -> FarSide:
    found = FarSide(Store(tmp_path.as_uri()))
    found.bucket.write(store.SETTINGS, b"{}")
    return found


def follow(far: FarSide, count: int = 1) -> list[str]:
    plan = cast("Any", Everything(far, far))
    watched = Follow(plan, count, sleep=far.sleep, clock=far.clock)
    return [line.text for line in watched.lines()]


def end(far: FarSide) -> None:
    far.bucket.save(store.result(0), Result(code=0, epoch=1, at=NOW))
    far.say(0, "ended")


def test_the_cloud_is_asked_all_five_seconds(far: FarSide) -> None:
    far.later = {160: lambda: end(far)}
    assert follow(far) == []
    pauses = [b - a for a, b in zip(far.looks, far.looks[1:], strict=False)]
    assert far.looks[0] == 100
    assert all(5 <= pause <= 8 for pause in pauses)
    assert 8 <= len(pauses) <= 12


def test_one_that_was_stopped_says_so_at_once(far: FarSide) -> None:
    far.bucket.write(store.RECALL, b"")
    with pytest.raises(NotReady, match="was stopped"):
        follow(far)
    assert far.now == 100


def test_machines_that_do_not_come(far: FarSide) -> None:
    far.happen("capacity", "nothing is left")
    with pytest.raises(NoCapacity, match="nothing is left"):
        follow(far)


def test_machines_that_die_as_they_start(far: FarSide) -> None:
    far.happen("error", "the first died")
    far.screen = "panic\n"
    far.later = {110: lambda: far.happen("error", "the second died")}
    with pytest.raises(NotReady, match=r"die as they start: the second died\n  panic$"):
        follow(far)
    assert far.now > 110


def test_a_machine_that_can_not_be_prepared(far: FarSide) -> None:
    far.happen("error", "it died")
    far.screen = FAILED
    with pytest.raises(NotReady, match=r"bootstrap failed: no index\n  the last words$"):
        follow(far)


def test_what_is_said_is_passed_on(far: FarSide) -> None:
    log = store.Log(far.bucket, 0)

    def say(text: str) -> None:
        log.append(text)
        log.flush()

    say("12:00:00 | one\n12:00:01 about it\n12:00:02 | tw")
    far.later = {
        102: lambda: say("o\n"),
        104: lambda: say("no end"),
        104.1: lambda: end(far),
    }
    assert follow(far) == ["one", "12:00:01 about it", "two", "no end"]
