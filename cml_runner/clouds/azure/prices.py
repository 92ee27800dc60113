"""What machines cost: Azure's public list of retail prices, which takes no login.

https://learn.microsoft.com/rest/api/cost-management/retail-prices/azure-retail-prices
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cml_runner.errors import RunnerError
from cml_runner.model import Quote

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PLACE = "https://prices.azure.com"
VARIABLE = "AZURE_RETAIL_PRICES_ENDPOINT"  # puts it elsewhere
TIMEOUT = 10  # seconds
HOUR = "1 Hour"


def quotes(region: str, types: Sequence[str], *, spot: bool) -> list[Quote]:
    """Ask for all sizes at once. Raises RunnerError."""
    listed: dict[str, float] = {}
    evictable: dict[str, float] = {}
    for one in _items(region, types):
        if one["unitOfMeasure"] != HOUR or "Windows" in one["productName"]:
            continue
        if one["skuName"].endswith(" Spot"):
            evictable[one["armSkuName"]] = float(one["retailPrice"])
        elif not one["skuName"].endswith(" Low Priority"):
            listed[one["armSkuName"]] = float(one["retailPrice"])
    now = evictable if spot else listed
    return [Quote(type=name, price=now.get(name), on_demand=listed.get(name)) for name in types]


def _items(region: str, types: Sequence[str]) -> Iterator[dict[str, Any]]:
    sizes = " or ".join(f"armSkuName eq '{name}'" for name in types)
    where = (
        "serviceName eq 'Virtual Machines' and priceType eq 'Consumption'"
        f" and armRegionName eq '{region}' and ({sizes})"
    )
    url = f"{os.environ.get(VARIABLE) or PLACE}/api/retail/prices"
    page = _ask(url, {"currencyCode": "USD", "$filter": where})
    while True:
        yield from page["Items"]
        if not (more := page.get("NextPageLink")):
            return
        page = _ask(more, {})


def _ask(url: str, query: dict[str, str]) -> dict[str, Any]:
    import requests

    try:
        answer = requests.get(url, query, timeout=TIMEOUT)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
    except requests.RequestException as error:
        msg = f"Azure's prices aren't known: {error}"
        raise RunnerError(msg) from error
    return found
