"""How something is waited for; no test waits."""

from __future__ import annotations

import pytest

from cml_runner.errors import NotFound, RunnerError
from cml_runner.wait import PAUSES, insist


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
