"""Which sizes there are; a small part of what the resource SKUs of a region tell."""

from __future__ import annotations

import re
from typing import Any

ZONES = ["1", "2", "3"]
PUBLISHERS = ("Canonical", "microsoft-dsvm", "Debian", "nvidia")
SMALL = ("B2als_v2", "B2as_v2", "B2pls_v2")  # never spot
SCSI = (
    *("D2as_v5", "D2s_v5", "D4s_v5", "E8s_v5", "D8as_v5", "D8s_v5", "D8s_v4", "D32as_v5"),
    *("D32s_v5", "D32s_v4", "D64as_v5", "D64s_v5", "D64s_v4"),
)
ARM = ("D2pls_v5", "D2ps_v5", "D8ps_v5", "D32ps_v5", "D64ps_v5")
NVME = ("D8ps_v6", "D32ps_v6", "D64ps_v6", "D8s_v6")
GPU = (
    *("NC4as_T4_v3", "NC64as_T4_v3", "NV36ads_A10_v5", "NV72ads_A10_v5", "ND40rs_v2"),
    *("NC24ads_A100_v4", "NC96ads_A100_v4", "ND96amsr_A100_v4", "ND96asr_v4"),
    *("NC40ads_H100_v5", "NC80adis_H100_v5", "ND96isr_H100_v5", "ND96isr_H200_v5"),
    "NC36ds_xl_RTXPRO6000BSE_v6",
)
ONE_ZONE = ("NC4as_T4_v3",)
NAMES = {f"Standard_{name}" for name in (*SMALL, *SCSI, *ARM, *NVME, *GPU)}
NO_SPOT = {f"Standard_{name}" for name in SMALL}
QUOTAS = {  # names for people
    "cores": "Total Regional vCPUs",
    "lowPriorityCores": "Total Regional Spot vCPUs",
    "standardDASv5Family": "Standard DASv5 Family vCPUs",
    "standardDSv5Family": "Standard DSv5 Family vCPUs",
    "Standard NCASv3_T4 Family": "Standard NCASv3_T4 Family vCPUs",
}
USAGES = {
    "cores": (2, 64),
    "lowPriorityCores": (0, 32),
    "standardDASv5Family": (0, 64),
    "standardDSv5Family": (2, 64),
    "Standard NCASv3_T4 Family": (0, 0),
}
FAMILIES = {  # those of which there is a quota here
    r"D\d+as_v5": "standardDASv5Family",
    r"D\d+s_v5": "standardDSv5Family",
    r"NC\d+as_T4_v3": "Standard NCASv3_T4 Family",
}
IMAGES = {  # versions, and for which processors they are
    ("Canonical", "ubuntu-24_04-lts", "server"): {"24.04.202610010": "x64"},
    ("Canonical", "ubuntu-24_04-lts", "server-arm64"): {"24.04.202610010": "Arm64"},
    ("microsoft-dsvm", "ubuntu-hpc", "2404"): {"24.04.2026090101": "x64"},
}


def listed(region: str, missing: set[str]) -> list[dict[str, Any]]:
    """Describe them for a region; those that are missing are restricted."""
    return [_described(name, region, name in missing) for name in sorted(NAMES)]


def mixable(names: list[str]) -> bool:
    """Say if a scale set takes them as a mixture."""
    plain = [name.removeprefix("Standard_") for name in names]
    kinds = {_kind(name) for name in plain}
    return 1 <= len(names) <= 5 and len(kinds) == 1 and "gpu" not in kinds


def _kind(name: str) -> str:
    if name in GPU:
        return "gpu"
    arch = "arm" if "ps_" in name or "pls_" in name else "x64"
    return f"{arch} {'nvme' if name in NVME else 'scsi'}"


def _described(name: str, region: str, restricted: bool) -> dict[str, Any]:
    plain = name.removeprefix("Standard_")
    cores = re.match(r"[A-Z]+(\d+)", plain)
    capabilities = {
        "vCPUs": cores[1] if cores else "1",
        "LowPriorityCapable": str(name not in NO_SPOT),
        "CpuArchitectureType": "Arm64" if _kind(plain).startswith("arm") else "x64",
    }
    restriction = {
        "type": "Location",
        "values": [region],
        "reasonCode": "NotAvailableForSubscription",
    }
    return {
        "resourceType": "virtualMachines",
        "name": name,
        "family": next((one for pat, one in FAMILIES.items() if re.fullmatch(pat, plain)), ""),
        "locations": [region],
        "locationInfo": [{"location": region, "zones": ["2"] if plain in ONE_ZONE else ZONES}],
        "capabilities": [{"name": key, "value": value} for key, value in capabilities.items()],
        "restrictions": [restriction] if restricted else [],
    }
