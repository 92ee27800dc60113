"""The list of retail prices, which is everybody's.

https://learn.microsoft.com/rest/api/cost-management/retail-prices/azure-retail-prices
"""

from __future__ import annotations

import re
from typing import Any

PATH = "/api/retail/prices"
PRICES = {"Standard_D8as_v5": 0.344, "Standard_D8s_v5": 0.384, "Standard_D8ads_v5": 0.412}
SPOT = 0.2  # of that
WINDOWS = 2  # times that
PAGE = 3  # items, of a thousand


def answer(query: dict[str, str], base: str) -> dict[str, Any]:
    """List what a filter asks for, a page at a time."""
    where = query.get("$filter", "")
    region = re.search(r"armRegionName eq '(\w+)'", where)
    names = re.findall(r"armSkuName eq '(\w+)'", where)
    found = [one for name in names if name in PRICES for one in _items(name, region)]
    start = int(query.get("$skip", "0"))
    page = found[start : start + PAGE]
    more = ""
    if start + PAGE < len(found):
        more = f"{base}{PATH}?$filter={where}&$skip={start + PAGE}"
    return {
        "BillingCurrency": query.get("currencyCode", "USD"),
        "CustomerEntityId": "Default",
        "CustomerEntityType": "Retail",
        "Items": page,
        "NextPageLink": more or None,
        "Count": len(page),
    }


def _items(name: str, region: re.Match[str] | None) -> list[dict[str, Any]]:
    assert region
    sku = name.removeprefix("Standard_").replace("_", " ")
    common = {
        "currencyCode": "USD",
        "armRegionName": region[1],
        "armSkuName": name,
        "serviceName": "Virtual Machines",
        "unitOfMeasure": "1 Hour",
        "type": "Consumption",
    }
    price = PRICES[name]
    kinds = {
        (f"Virtual Machines {sku}", sku): price,
        (f"Virtual Machines {sku}", f"{sku} Spot"): price * SPOT,
        (f"Virtual Machines {sku}", f"{sku} Low Priority"): price * SPOT * 2,
        (f"Virtual Machines {sku} Windows", sku): price * WINDOWS,
        (f"Virtual Machines {sku} Windows", f"{sku} Spot"): price * WINDOWS,
    }
    return [
        {**common, "productName": product, "skuName": kind, "meterName": kind, "retailPrice": cost}
        for (product, kind), cost in kinds.items()
    ]
