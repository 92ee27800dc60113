"""What a launch costs: asked before, where that matters, or else beside it."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cml_runner import store
from cml_runner.errors import NoCapacity, RunnerError
from cml_runner.model import Bill

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from cml_runner.model import Quote

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Price:
    """USD per hour, for all machines of a launch; None: nobody knows."""

    now: float | None = None
    on_demand: float | None = None

    @property
    def saved(self) -> int:
        """How much less than on demand, in per cent."""
        if self.now is None or not self.on_demand:
            return 0
        return round(100 * (1 - self.now / self.on_demand))

    @property
    def text(self) -> str:
        """What people are told."""
        if self.now is None:
            return "the price isn't known"
        less = f", {self.saved} % less than on demand" if self.saved > 0 else ""
        return f"{self.now:.4g} USD an hour{less}"


def of(quotes: Sequence[Quote], count: int) -> Price:
    """Take the dearest of what a cloud may choose: what has no price isn't sold there."""
    return Price(
        _sum([one.price for one in quotes], count), _sum([one.on_demand for one in quotes], count)
    )


def check(price: Price, limit: float, region: str) -> None:
    """Raise NoCapacity if it's too much, or isn't known: another region or type may do."""
    if price.now is None:
        msg = f"{region}: the price isn't known, so --max-price {limit:g} can't be kept"
        raise NoCapacity(msg)
    if price.now > limit:
        msg = (
            f"{region}: {price.text}, more than --max-price {limit:g}: allow more, take fewer or"
            " other machines (--cloud-type), --cloud-spot, or another --cloud-region"
        )
        raise NoCapacity(msg)


class Beside(threading.Thread):
    """Asks while something else is done; nobody waits for it, and nothing fails because of it."""

    def __init__(self, ask: Callable[[], Price]) -> None:
        super().__init__(name="price", daemon=True)
        self._ask = ask
        self.price = Price()

    def run(self) -> None:
        """Ask."""
        try:
            self.price = self._ask()
        except RunnerError as error:
            log.debug("the price isn't known: %s", error)


def record(price: Price, since: datetime, bucket: store.Store) -> None:
    """Write down what it costs, for those who list it; no launch fails for want of that."""
    if not price.now:
        return
    try:
        bucket.save(store.PRICE, Bill(price=price.now, since=since))
    except RunnerError as error:
        log.warning("nobody will be told what it costs: %s", error)


def _sum(prices: Sequence[float | None], count: int) -> float | None:
    known = [one for one in prices if one is not None]
    return round(max(known) * count, 6) if known else None
