"""The billing catalogue, as far as it is about machines.

https://cloud.google.com/billing/docs/reference/rest/v1/services.skus/list
"""

from __future__ import annotations

import json
from typing import Any

HOST = "cloudbilling.googleapis.com"
KEY = "AIza-lab"
PAGE = 4
PRICES = {  # description without the place: on demand
    "N2 Instance Core": 0.031611,
    "N2 Instance Ram": 0.004237,
    "N2 Custom Instance Core": 0.033191,
    "N2D AMD Instance Core": 0.027502,
    "N2D AMD Instance Ram": 0.003686,
    "E2 Instance Core": 0.02181159,
    "E2 Instance Ram": 0.00292353,
    "N1 Predefined Instance Core": 0.031611,
    "N1 Predefined Instance Ram": 0.004237,
    "Nvidia Tesla T4 GPU": 0.35,
}
SPOT = 0.25  # of that


def answer(query: dict[str, str], key: str) -> tuple[int, bytes]:
    """List a page of it."""
    if key != KEY:
        text = "API key not valid. Please pass a valid API key."
        return 400, json.dumps({"error": {"code": 400, "message": text}}).encode()
    every = [sku for name, price in PRICES.items() for sku in _skus(name, price)]
    start = int(query.get("pageToken") or 0)
    more = str(start + PAGE) if start + PAGE < len(every) else ""
    return 200, json.dumps({"skus": every[start : start + PAGE], "nextPageToken": more}).encode()


def _skus(name: str, price: float) -> list[dict[str, Any]]:
    gpu = name.endswith("GPU")
    spot = f"{name} attached to Spot Preemptible VMs" if gpu else f"Spot Preemptible {name}"
    return [
        _sku(f"{name} running in Americas", "OnDemand", price, ["us-west1", "us-east1"]),
        _sku(f"{spot} running in Americas", "Preemptible", price * SPOT, ["us-west1", "us-east1"]),
        _sku(f"{name} running in Finland", "OnDemand", price * 1.1, ["europe-north1"]),
    ]


def _sku(text: str, usage: str, price: float, regions: list[str]) -> dict[str, Any]:
    money = {"currencyCode": "USD", "units": "0", "nanos": round(price * 1e9)}
    rates = [{"startUsageAmount": 0, "unitPrice": money}]
    return {
        "description": text,
        "category": {
            "serviceDisplayName": "Compute Engine",
            "resourceFamily": "Compute",
            "usageType": usage,
        },
        "serviceRegions": regions,
        "pricingInfo": [{"pricingExpression": {"usageUnit": "h", "tieredRates": rates}}],
    }
