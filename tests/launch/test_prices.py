"""What a launch costs, and what is too much."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

import pytest

from cml_runner.errors import NoCapacity, RunnerError
from cml_runner.launch import prices
from cml_runner.launch.prices import Beside, Price
from cml_runner.model import Bill, Quote
from cml_runner.store import PRICE, Store

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Cli

QUOTES = [
    Quote(type="a", price=0.1, on_demand=0.4),
    Quote(type="b", price=0.2, on_demand=0.3),
    Quote(type="c", price=None),
]


def test_the_dearest_counts_and_all_machines() -> None:
    found = prices.of(QUOTES, 3)
    assert found == Price(0.6, 1.2)
    assert found.saved == 50
    assert found.text == "0.6 USD an hour, 50 % less than on demand"


def test_nobody_knows() -> None:
    assert prices.of(QUOTES[2:], 1) == prices.of([], 1) == Price()
    assert Price().text == "the price isn't known"


def test_too_much() -> None:
    prices.check(Price(0.5), 0.5, "us-west")
    with pytest.raises(NoCapacity, match=r"us-west: 0.6 USD an hour, more than --max-price 0.5"):
        prices.check(Price(0.6), 0.5, "us-west")
    with pytest.raises(NoCapacity, match="the price isn't known"):
        prices.check(Price(), 0.5, "us-west")


def test_nothing_fails_for_want_of_a_price() -> None:
    def refuse() -> Price:
        msg = "no"
        raise RunnerError(msg)

    asking = Beside(refuse)
    asking.start()
    asking.join()
    assert asking.price == Price()


def test_a_launch_goes_on_though_its_price_cannot_be_written_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    since = datetime.now(timezone.utc)
    good, bad = Store(tmp_path.as_uri()), Store((tmp_path / "gone").as_uri())
    prices.record(Price(), since, bad)
    assert not caplog.text
    prices.record(Price(0.5), since, bad)
    assert "nobody will be told what it costs" in caplog.text
    prices.record(Price(0.5), since, good)
    assert good.load(PRICE, Bill) == Bill(price=0.5, since=since)


def test_what_makes_no_sense(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "forge").mkdir()
    repo = ("launch", "--repo", (tmp_path / "forge").as_uri(), "--dry-run")
    assert "--max-price" in cli.run(*repo, "--max-price", "1", code=2).err
    cloud = ("--cloud", "local")
    assert "--max-price" in cli.run(*repo, *cloud, "--max-price", "-1", code=2).err
    assert "--max-price" in cli.run(*repo, *cloud, "--max-price", "cheap", code=2).err
    assert cli.run(*repo, *cloud, "--max-price", "1").json["pricePerHour"] == 0
