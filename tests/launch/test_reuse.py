"""Which runner makes a launch needless, and which is in its way."""

from __future__ import annotations

import pytest

from cml_runner import launch
from cml_runner.errors import AlreadyExists
from cml_runner.model import Runner
from tests.launch.test_options import order


def runner(name: str, *labels: str, online: bool = True, busy: bool = False) -> Runner:
    return Runner(id=name, name=name, labels=frozenset(labels), online=online, busy=busy)


def found(*runners: Runner, **options: object) -> str | None:
    one = launch.find(runners, order(labels="a,b", **options))
    return one.name if one else None


def test_it_has_all_labels_that_are_asked_for() -> None:
    some = (runner("one", "a"), runner("other", "c", "b"))
    assert found(*some, runner("all", "a", "b", "c"), reuse=True) == "all"
    assert found(*some, reuse=True) is None
    assert found(runner("none"), reuse=True) is None


def test_it_is_online_and_if_so_asked_idle() -> None:
    assert found(runner("gone", "a", "b", online=False), reuse=True) is None
    busy = runner("busy", "a", "b", busy=True)
    assert found(busy, reuse=True) == "busy"
    assert found(busy, reuse_idle=True) is None
    assert found(busy, runner("idle", "a", "b"), reuse_idle=True) == "idle"
    assert found(busy) is None


def test_one_of_this_name_will_do_whatever_its_labels_or_is_in_the_way() -> None:
    named = runner("mine", "other")
    assert found(named, name="mine", reuse=True) == "mine"
    with pytest.raises(AlreadyExists, match="a runner named mine is online"):
        found(named, name="mine")
    assert found(runner("mine", online=False), name="mine") is None
