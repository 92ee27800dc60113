from __future__ import annotations

from typing import Any

import pytest

from cml_runner.clouds import REGIONS, SIZES
from cml_runner.clouds.azure import catalogue
from cml_runner.errors import ConfigurationError
from tests.lab.azure import skus


def test_every_generic_name_is_translated() -> None:
    assert set(catalogue.data()["regions"]) == set(REGIONS)
    assert {catalogue.region(name) for name in REGIONS} == {
        *("eastus", "westus2", "northeurope", "westeurope"),
    }
    for size in SIZES:
        assert catalogue.types([size])
        assert catalogue.arch(catalogue.types([f"{size}-arm"])) == "arm64"


def test_every_type_in_the_tables_is_one() -> None:
    data = catalogue.data()
    listed = [name for names in data["sizes"].values() for name in names]
    listed += [name for gpu in data["gpus"].values() for names in gpu.values() for name in names]
    assert {name for name in listed if not catalogue.TYPE.fullmatch(name)} == set()
    assert set(listed) <= skus.NAMES


@pytest.mark.parametrize("size", [*SIZES, *(f"{size}-arm" for size in SIZES)])
@pytest.mark.parametrize("spot", [True, False])
def test_what_is_mixed_can_be_mixed(size: str, spot: bool) -> None:
    names = catalogue.types([size], spot=spot)
    assert names
    assert all(skus.mixable(list(one)) for one in catalogue.rungs(names))


@pytest.mark.parametrize(
    ("names", "rungs"),
    [
        (["Standard_D8s_v5"], [("Standard_D8s_v5",)]),
        (
            ["Standard_D8s_v5", "Standard_E8s_v5", "Standard_D8s_v6", "Standard_F8s_v2"],
            [
                ("Standard_D8s_v5", "Standard_E8s_v5"),
                ("Standard_D8s_v6",),
                ("Standard_F8s_v2",),
            ],
        ),
        (
            ["Standard_NC4as_T4_v3", "Standard_NC64as_T4_v3", "Standard_D8s_v5"],
            [("Standard_NC4as_T4_v3",), ("Standard_NC64as_T4_v3",), ("Standard_D8s_v5",)],
        ),
        (
            [f"Standard_D{number}s_v5" for number in range(1, 8)],
            [
                tuple(f"Standard_D{number}s_v5" for number in range(1, 6)),
                ("Standard_D6s_v5", "Standard_D7s_v5"),
            ],
        ),
    ],
)
def test_mixtures(names: list[str], rungs: list[tuple[str, ...]]) -> None:
    assert catalogue.rungs(names) == rungs


@pytest.mark.parametrize("name", ["D8ps_v5", "D8pls_v5", "D8pds_v6", "E8ps_v5", "B2pls_v2"])
def test_arm(name: str) -> None:
    assert catalogue.arch([f"Standard_{name}"]) == "arm64"


@pytest.mark.parametrize(
    "name", ["D8s_v5", "D8as_v5", "E4-2s_v5", "NP10s", "NC40ads_H100_v5", "ND96asr_v4", "B2s"]
)
def test_not_arm(name: str) -> None:
    assert catalogue.arch([f"Standard_{name}"]) == "x64"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NC4as_T4_v3", True),
        ("NV36ads_A10_v5", True),
        ("ND96isr_H100_v5", True),
        ("ND96isr_MI300X_v5", False),
        ("NV8as_v4", False),
        ("NP10s", False),
        ("D8s_v5", False),
    ],
)
def test_gpus(name: str, found: bool) -> None:
    assert catalogue.has_gpu(f"Standard_{name}") is found


@pytest.mark.parametrize(
    ("names", "gpu", "spot", "message"),
    [
        (["xxl"], "", False, "use one of s, m, l, xl"),
        (["m"], "k80", False, r"use m\+t4"),
        (["m"], "l4", False, r"use m\+a10"),
        (["m"], "h900", False, "Azure has t4"),
        (["s"], "t4", False, r"m\+t4, l\+t4"),
        (["Standard_D8s_v5"], "t4", False, "has none"),
        (["Standard_oops!"], "", False, "no name of an Azure size"),
        (["Standard_B2s"], "", True, "B sizes"),
        (["m", "m-arm"], "", False, "use one kind"),
        (["xxl", "m+k80"], "", False, "xxl"),
    ],
)
def test_what_cant_be_had(names: list[str], gpu: str, spot: bool, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        catalogue.types(names, gpu, spot=spot)


IMAGES: list[tuple[str, dict[str, Any]]] = [
    (
        "ubuntu",
        {"publisher": "Canonical", "offer": "ubuntu-24_04-lts", "sku": "server"},
    ),
    ("azureuser@Debian:debian-13:13:latest", {"publisher": "Debian", "version": "latest"}),
    (
        "/subscriptions/a-b/resourceGroups/g/providers/Microsoft.Compute/images/own",
        {"id": "/subscriptions/a-b/resourceGroups/g/providers/Microsoft.Compute/images/own"},
    ),
    (
        "/CommunityGalleries/theirs/images/one",
        {"communityGalleryImageId": "/CommunityGalleries/theirs/images/one"},
    ),
]


@pytest.mark.parametrize(("text", "reference"), IMAGES)
def test_images(text: str, reference: dict[str, Any]) -> None:
    found = catalogue.image(text, ["Standard_D8s_v5"])
    assert found.reference.items() >= reference.items()
    assert found.plan == {}


def test_images_for_others() -> None:
    assert catalogue.image("ubuntu", ["Standard_D8ps_v5"]).reference["sku"] == "server-arm64"
    assert catalogue.image("ubuntu", ["Standard_NC4as_T4_v3"]).disk == 128
    bought = catalogue.image("me@a:b:c:latest#plan", ["Standard_D8s_v5"])
    assert bought.plan == {"publisher": "a", "product": "b", "name": "c"}
    assert bought.reference["version"] == "latest"
    for wrong in ("windows", "a:b:c", "ami-1"):
        with pytest.raises(ConfigurationError, match="PUBLISHER:OFFER"):
            catalogue.image(wrong, ["Standard_D8s_v5"])
    with pytest.raises(ConfigurationError, match="none for ARM"):
        catalogue.image("nvidia", ["Standard_D8ps_v5"])
