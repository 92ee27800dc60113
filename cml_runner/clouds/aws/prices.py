"""What machines cost: the price list, and what spot machines cost just now."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from cml_runner.errors import RunnerError
from cml_runner.model import Quote

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cml_runner.clouds.aws.session import Session

log = logging.getLogger(__name__)

LINUX = "Linux/UNIX"
# Of all that is listed for a type, what a launch gets:
# https://docs.aws.amazon.com/awsaccountbilling/latest/aboutv2/price-list-query-api.html
PRODUCT = {
    "operatingSystem": "Linux",
    "tenancy": "Shared",
    "preInstalledSw": "NA",
    "capacitystatus": "Used",
}


def quotes(session: Session, types: Sequence[str], *, spot: bool) -> list[Quote]:
    """Ask for each type; one whose price we may not ask for has none."""
    listed = {name: _listed(session, name) for name in types}
    now = _spot(session, types) if spot else listed
    return [Quote(type=name, price=now.get(name), on_demand=listed[name]) for name in types]


def _spot(session: Session, types: Sequence[str]) -> dict[str, float | None]:
    """Return the price in the dearest zone, since it isn't known yet which one it will be."""
    found: dict[str, float | None] = {}
    try:
        told = session.pages(
            "ec2",
            "describe_spot_price_history",
            "SpotPriceHistory",
            InstanceTypes=list(types),
            ProductDescriptions=[LINUX],
            StartTime=datetime.now(timezone.utc),
        )
    except RunnerError as error:
        log.debug("the price of spot machines isn't known: %s", error)
        return found
    latest: dict[tuple[str, str], tuple[Any, float]] = {}
    for one in told:
        place, new = (one["InstanceType"], one["AvailabilityZone"]), one["Timestamp"]
        if place not in latest or new > latest[place][0]:
            latest[place] = (new, float(one["SpotPrice"]))
    for (name, _), (_, price) in latest.items():
        found[name] = max(price, found.get(name) or 0)
    return found


def _listed(session: Session, name: str) -> float | None:
    """Return the price on demand."""
    wanted = {**PRODUCT, "instanceType": name, "regionCode": session.region}
    filters = [
        {"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()
    ]
    try:
        found = session.call("pricing", "get_products", ServiceCode="AmazonEC2", Filters=filters)
    except RunnerError as error:
        log.debug("the price of %s isn't known: %s", name, error)
        return None
    return max((price for text in found["PriceList"] for price in _hourly(text)), default=None)


def _hourly(text: str) -> Iterable[float]:
    """Read a product; what costs nothing is some offer, or is paid beforehand."""
    for term in json.loads(text)["terms"].get("OnDemand", {}).values():
        for one in term["priceDimensions"].values():
            if one["unit"] == "Hrs" and float(one["pricePerUnit"].get("USD", 0)) > 0:
                yield float(one["pricePerUnit"]["USD"])
