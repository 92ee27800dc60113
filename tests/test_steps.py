from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, field

import pytest

from cml_runner import signals, steps
from cml_runner.errors import AlreadyExists, CleanupFailed


@dataclass
class Fake:
    label: str
    log: list[str] = field(default_factory=list)
    needs: tuple[Fake, ...] = ()
    fails: str = ""
    new: bool = True
    meets: threading.Barrier | None = None

    def create(self) -> bool:
        if self.meets:
            self.meets.wait(10)
        self.log.append(f"+{self.label}")
        if self.fails == "create":
            raise ValueError(self.label)
        return self.new

    def delete(self) -> None:
        self.log.append(f"-{self.label}")
        if self.fails == "delete":
            raise ValueError(self.label)


def chain(log: list[str], **last: object) -> list[Fake]:
    first = Fake("a", log)
    second = Fake("b", log, (first,), **last)  # type: ignore[arg-type]
    return [first, second, Fake("c", log, (second,))]


def test_create_in_order() -> None:
    log: list[str] = []
    resources = chain(log)
    assert steps.create(resources) == resources
    assert log == ["+a", "+b", "+c"]


def test_independent_resources_are_created_at_the_same_time() -> None:
    barrier = threading.Barrier(3)  # breaks, and fails the test, unless all three are under way
    steps.create([Fake(name, meets=barrier) for name in "abc"])


def test_a_failure_deletes_what_was_created_backwards() -> None:
    log: list[str] = []
    with pytest.raises(ValueError, match="b"):
        steps.create(chain(log, fails="create"))
    assert log == ["+a", "+b", "-a"]


def test_who_holds_the_claim_also_deletes_what_failed() -> None:
    log: list[str] = []
    resources = chain(log, fails="create")
    with pytest.raises(ValueError, match="b"):
        steps.create(resources, claim=resources[0])
    assert log == ["+a", "+b", "-b", "-a"]


def test_what_was_adopted_is_never_deleted() -> None:
    log: list[str] = []
    first = Fake("a", log, new=False)
    with pytest.raises(ValueError, match="b"):
        steps.create([first, Fake("b", log, (first,), fails="create")])
    assert log == ["+a", "+b"]


def test_a_claim_of_somebody_else_ends_the_launch() -> None:
    log: list[str] = []
    resources = chain(log)
    resources[0].new = False
    with pytest.raises(AlreadyExists, match="a of this name"):
        steps.create(resources, claim=resources[0])
    assert log == ["+a"]


def test_equal_resources_are_not_mixed_up() -> None:
    log: list[str] = []
    steps.create([Fake("a", log), Fake("a", log)])
    assert log == ["+a", "+a"]


def test_delete_goes_on_after_a_failure() -> None:
    log: list[str] = []
    with pytest.raises(CleanupFailed, match="cost money:\n  b: b"):
        steps.delete([*chain(log, fails="delete"), Fake("d", log)])
    assert sorted(log) == ["-b", "-c", "-d"]  # but not what the one that failed needs


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_deletes_what_was_created(number: signal.Signals) -> None:
    class Slow(Fake):
        def create(self) -> bool:
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # the creation goes on while the signal is dealt with
            return super().create()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    log: list[str] = []
    first = Fake("a", log)
    before = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            steps.create([first, Slow("b", log, (first,))])
    finally:
        signal.signal(number, before)
    assert log == ["+a", "+b", "-b", "-a"]


def test_clearing_up_is_not_interrupted(caplog: pytest.LogCaptureFixture) -> None:
    with steps.uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert "please wait" in caplog.text


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled(signals.ENDING, lambda *_: pytest.fail("it was ignored")):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
