"""How something is waited for; no test waits."""

from __future__ import annotations

import pytest

from cml_runner.errors import NotFound, RunnerError
from cml_runner.wait import PAUSES, Pacer, insist


def test_it_insists_with_growing_pauses() -> None:
    troubles: list[Exception] = [RunnerError("no"), NotFound("no"), *([OSError("no")] * 6)]
    pauses: list[float] = []

    def action() -> str:
        if troubles:
            raise troubles.pop()
        return "done"

    assert insist(action, pauses.append) == "done"
    assert pauses == [*PAUSES, *[PAUSES[-1]] * 3]


def test_it_does_not_insist_on_a_mistake_of_ours() -> None:
    def action() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        insist(action)


def test_a_pacer_says_at_once_that_it_is_time_and_then_after_its_pauses() -> None:
    now = 0.0
    pacer = Pacer(1, 3, clock=lambda: now)
    due = []
    for tick in range(100):
        now = tick / 10
        due += [now] if pacer.due() else []
    assert due == [0, 1, 4, 7]
    pacer.restart()
    assert pacer.due()
    assert not pacer.due()
