from __future__ import annotations

import re

import pytest

from cml_runner.errors import ConfigurationError
from cml_runner.model import Identifier, Job


@pytest.mark.parametrize(
    ("name", "text"),
    [  # vectors of terraform-provider-iterative's algorithm
        ("test", "tpi-test-3z4xlzwq-3u0vweb4"),
        ("Hello, World!", "tpi-hello-world-4dl8w653-5lubxln8"),
    ],
)
def test_fixed_identifiers_are_those_of_the_predecessor(name: str, text: str) -> None:
    assert str(Identifier.fixed(name, "tpi")) == text
    assert str(Identifier.parse(text)) == text
    assert Identifier.parse(text) == Identifier.fixed(name, "tpi")


def test_new_identifiers_differ_and_fit_everywhere() -> None:
    long = [Identifier.new("A very long name, indeed much too long for a cloud") for _ in range(20)]
    assert len({str(one) for one in long}) == 20
    for one in long:
        assert re.fullmatch("cml-[a-z0-9-]+", str(one))
        assert len(str(one)) <= 50
        assert len(one.short) == 16
        assert Identifier.parse(str(one)) == one


def test_a_seed_separates_equal_names() -> None:
    assert Identifier.fixed("a", seed="x/a") != Identifier.fixed("a", seed="y/a")
    assert Identifier.fixed("a", seed="x/a") == Identifier.fixed("a", seed="x/a")


def test_a_name_without_letters_still_makes_an_identifier() -> None:
    assert Identifier.parse(str(Identifier.fixed("日本"))).name == "runner"


@pytest.mark.parametrize(
    "text",
    ["", "cml", "tpi-test-3z4xlzwq-3u0vweb5", "cml-test-3z4xlzwq", "cml-a/b-3z4xlzwq-3u0vweb4"],
)
def test_names_of_others_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="not an identifier"):
        Identifier.parse(text)


def test_a_jobs_key_is_the_same_for_every_attempt() -> None:
    first = Job(name="train", pipeline="7", attempt=1, runner="a")
    assert first.key == Job(name="train", pipeline="7", attempt=2, runner="b").key
    assert first.key != Job(name="train", pipeline="8", attempt=1).key
