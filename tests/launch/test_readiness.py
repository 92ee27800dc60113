"""How a launch waits: which questions it asks, how often, and what ends it; no test waits."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, cast

import pytest

from cml_runner import store
from cml_runner.errors import CredentialsError, NoCapacity, NotReady
from cml_runner.launch.options import Options, read
from cml_runner.launch.readiness import Wait
from cml_runner.model import Happening, Runner, Status
from cml_runner.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOW = datetime(2026, 11, 30, tzinfo=timezone.utc)
PATIENCE = 1000.0
FAILED = "cml-runner: bootstrap failed: no index\nthe last words\n"


@dataclass
class FarSide:
    """A cloud and a forge on which time passes only when somebody sleeps."""

    bucket: Store
    now: float = 100.0
    looks: list[float] = field(default_factory=list)  # when the cloud was asked …
    questions: list[float] = field(default_factory=list)  # … and the forge
    consoles: int = 0  # how often one was read
    happened: list[Happening] = field(default_factory=list)
    screen: str = ""
    online: set[str] = field(default_factory=set)
    later: dict[float, Callable[[], object]] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        return self.bucket

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < PATIENCE, "it waits for ever"
        for at in [at for at in self.later if at <= self.now]:
            self.later.pop(at)()

    def clock(self) -> float:
        return self.now

    def events(self) -> list[Happening]:
        self.looks.append(self.now)
        return self.happened

    def console(self) -> str:
        self.consoles += 1
        return self.screen

    def runners(self) -> list[Runner]:
        self.questions.append(self.now)
        return [
            Runner(id=name, name=name, labels=frozenset(), online=True, busy=False)
            for name in self.online
        ]

    def say(self, rank: int, state: Any) -> None:
        said = Status(state=state, at=NOW, since=NOW, runner=f"runner-{rank}")
        self.bucket.save(store.status(rank), said)

    def happen(self, kind: Any, *messages: str) -> None:
        self.happened += [Happening(at=NOW, kind=kind, message=one) for one in messages]


@dataclass
class Everything:
    """A plan, as far as a launch that waits needs it."""

    bucket: FarSide
    group: FarSide


@pytest.fixture
def far(tmp_path: Path) -> FarSide:
    return FarSide(Store(tmp_path.as_uri()))


def wait(far: FarSide, count: int = 1, timeout: str = "1 minute") -> None:
    options = Options(
        repo="https://github.com/acme/model", token="x", driver="github", cloud="local",
        count=str(count), wait_timeout=timeout,
    )  # fmt: skip
    plan = cast("Any", Everything(far, far))
    order = read(options, {})
    Wait(order, plan, cast("Any", far), print, sleep=far.sleep, clock=far.clock).run()


def test_the_first_question_comes_at_once_and_the_others_in_a_rhythm(far: FarSide) -> None:
    far.say(0, "starting")
    far.later = {108: lambda: far.say(0, "ready"), 122.5: lambda: far.online.add("runner-0")}
    wait(far)
    pauses = [b - a for a, b in zip(far.questions, far.questions[1:], strict=False)]
    assert far.questions[0] == pytest.approx(108, abs=0.21)
    assert pauses == pytest.approx([0.2, 0.5, 1, 2, 3, 3, 3, 3], abs=0.21)


def test_who_comes_online_at_the_last_moment_is_seen(far: FarSide) -> None:
    far.say(0, "ready")
    far.later = {159.9: lambda: far.online.add("runner-0")}
    wait(far, timeout="1 minute")
    assert far.now == pytest.approx(160.2, abs=0.21)


def test_a_launch_that_is_ready_asks_once(far: FarSide) -> None:
    far.say(0, "ready")
    far.online.add("runner-0")
    wait(far)
    assert far.questions == far.looks == [100]


def test_who_is_ready_again_is_asked_for_at_once(far: FarSide) -> None:
    far.say(0, "ready")
    far.later = {
        107.2: lambda: far.say(0, "interrupted"),  # it was asked for just now
        107.9: lambda: far.online.add("runner-0"),
        108: lambda: far.say(0, "ready"),
    }
    wait(far)
    assert far.questions[-1] == pytest.approx(108.1, abs=0.21)


def test_the_cloud_is_asked_all_three_seconds(far: FarSide) -> None:
    with pytest.raises(NotReady, match=r"no runner was online within 60 s \(booting\)"):
        wait(far)
    pauses = [b - a for a, b in zip(far.looks, far.looks[1:], strict=False)]
    assert pauses == pytest.approx([3] * len(pauses), abs=0.21)
    assert 17 <= len(far.looks) <= 21
    assert far.questions == []


def test_of_several_all_are_waited_for(far: FarSide) -> None:
    far.say(0, "ready")
    far.say(2, "ended")  # it has had its job already
    far.online |= {"runner-0", "runner-1"}
    far.later = {110: lambda: far.say(1, "busy")}
    wait(far, 3)
    assert far.questions == pytest.approx([110], abs=0.21)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("capacity", NoCapacity),
        ("quota", NoCapacity),
        ("permission", CredentialsError),
        ("image", NotReady),
    ],
)
def test_what_the_cloud_can_not_do_ends_it_at_once(
    far: FarSide, kind: str, error: type[Exception]
) -> None:
    far.happen(kind, "no such luck")
    with pytest.raises(error, match="no such luck"):
        wait(far)
    assert far.now == 100


def test_one_machine_that_dies_is_replaced_and_two_are_enough(far: FarSide) -> None:
    far.happen("error", "the first died")
    far.screen = "it can't be\n"
    far.later = {110: lambda: far.happen("error", "the second died")}
    with pytest.raises(NotReady, match=r"die as they start: the second died\n  it can't be$"):
        wait(far)
    assert far.now == pytest.approx(111, abs=1.3)
    assert far.consoles == len(far.looks)


def test_a_machine_that_says_why_it_can_not_be_prepared(far: FarSide) -> None:
    far.happen("error", "it died")
    far.screen = f"booting\n{FAILED}"
    with pytest.raises(NotReady) as caught:
        wait(far)
    assert str(caught.value) == (
        "the machine can't be prepared\n  cml-runner: bootstrap failed: no index\n  the last words"
    )


def test_its_log_tells_more_than_its_console(far: FarSide) -> None:
    far.happen("error", "one", "two")
    far.screen = "nothing of interest"
    log = store.Log(far.bucket, 1)
    log.append("".join(f"line {number}\n" for number in range(20)))
    log.flush()
    with pytest.raises(NotReady) as caught:
        wait(far, 2)
    assert str(caught.value).splitlines()[1:] == [f"  line {number}" for number in range(10, 20)]
