"""What machines cost: the billing catalogue has prices of cores, memory and GPUs, by the hour.

It takes an API key, any of a project in which the Cloud Billing API is enabled, and no login.
https://cloud.google.com/billing/docs/reference/rest/v1/services.skus/list
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cml_runner.clouds.gcp.session import last
from cml_runner.errors import RunnerError
from cml_runner.model import Quote

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cml_runner.clouds.gcp.catalogue import Type
    from cml_runner.clouds.gcp.session import Session

VARIABLE = "GCP_BILLING_API_KEY"
COMPUTE = "https://cloudbilling.googleapis.com/v1/services/6F81-5844-456A/skus"
TIMEOUT = 30  # seconds
SPOT, LISTED = "Preemptible", "OnDemand"
PART = re.compile(
    r"(?:Spot Preemptible )?(?P<family>[A-Z]\w*)(?: Predefined| AMD| Arm)? Instance"
    r" (?P<part>Core|Ram) running in"
)
GPU = re.compile(r"(?P<gpu>Nvidia .+?) GPU (?:attached to Spot Preemptible VMs )?running in")
# Of types that share cores, how much of one is paid for:
# https://cloud.google.com/compute/docs/general-purpose-machines#sharedcore
SHARED = {"e2-micro": 0.25, "e2-small": 0.5, "e2-medium": 1.0}


@dataclass(frozen=True)
class Shape:
    """What a type consists of."""

    cores: float
    memory: float  # GiB
    gpus: Mapping[str, int]


def quotes(session: Session, types: Sequence[Type], *, spot: bool) -> list[Quote]:
    """Add the parts up; without a key nobody knows. Raises RunnerError."""
    key = os.environ.get(VARIABLE)
    if not key:
        return []
    shapes = _shapes(session, types)
    parts = _parts(session.region, key)
    now = SPOT if spot else LISTED
    return [
        Quote(
            type=str(one),
            price=_sum(parts, one, shapes.get(one.name), now),
            on_demand=_sum(parts, one, shapes.get(one.name), LISTED),
        )
        for one in types
    ]


def _shapes(session: Session, types: Sequence[Type]) -> dict[str, Shape]:
    names = sorted({one.name for one in types})
    where = " OR ".join(f"(name = {name})" for name in names)
    found = {}
    for scope, listed in session.pages("MachineTypes", "aggregated_list", filter=where):
        if last(scope).startswith(f"{session.region}-"):
            for one in listed.machine_types:
                built = {
                    gpu.guest_accelerator_type: gpu.guest_accelerator_count
                    for gpu in one.accelerators
                }
                cores = SHARED.get(one.name, float(one.guest_cpus))
                found[one.name] = Shape(cores, one.memory_mb / 1024, built)
    return found


def _parts(region: str, key: str) -> dict[tuple[str, str], float]:
    """Return the price of each part, by what it is and how it is used."""
    found: dict[tuple[str, str], float] = {}
    for one in _skus(key):
        if region not in one["serviceRegions"]:
            continue
        name = ""
        if match := PART.match(one["description"]):
            name = f"{match['family']} {match['part']}".lower()
        elif match := GPU.match(one["description"]):
            name = match["gpu"].lower().replace(" ", "-")
        if name:
            found[name, one["category"]["usageType"]] = _hourly(one)
    return found


def _skus(key: str) -> Iterator[dict[str, Any]]:
    import requests

    query = {"currencyCode": "USD", "pageSize": "5000"}
    while True:
        try:
            # In a header, or it would stand in logs of whoever is between.
            answer = requests.get(COMPUTE, query, headers={"X-Goog-Api-Key": key}, timeout=TIMEOUT)
            answer.raise_for_status()
            page = answer.json()
        except requests.RequestException as error:
            msg = f"Google's prices aren't known: {error}; is {VARIABLE} right?"
            raise RunnerError(msg) from error
        yield from page.get("skus", ())
        if not (token := page.get("nextPageToken")):
            return
        query["pageToken"] = token


def _hourly(sku: Mapping[str, Any]) -> float:
    price = sku["pricingInfo"][-1]["pricingExpression"]["tieredRates"][-1]["unitPrice"]
    return int(price.get("units") or 0) + int(price.get("nanos") or 0) / 1e9


def _sum(
    parts: Mapping[tuple[str, str], float], wanted: Type, shape: Shape | None, usage: str
) -> float | None:
    """Add up; None if there is no such type, or a part of it has no price."""
    if not shape:
        return None
    family = wanted.name.partition("-")[0]
    amounts = {f"{family} core": shape.cores, f"{family} ram": shape.memory, **shape.gpus}
    if wanted.gpu:
        amounts[wanted.gpu] = wanted.count
    prices = [parts.get((name, usage)) for name in amounts]
    known = [one for one in prices if one is not None]
    if len(known) < len(prices):
        return None
    return sum(one * amount for one, amount in zip(known, amounts.values(), strict=True))
