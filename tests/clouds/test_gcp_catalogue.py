"""What people's words mean on Google Cloud."""

from __future__ import annotations

import pytest

from cml_runner.clouds.gcp import catalogue
from cml_runner.clouds.gcp.catalogue import Type
from cml_runner.errors import ConfigurationError


@pytest.mark.parametrize(
    ("name", "region", "zone"),
    [
        ("us-west", "us-west1", ""),
        ("us-east", "us-east1", ""),
        ("eu-north", "europe-north1", ""),
        ("eu-west", "europe-west1", ""),
        ("europe-west12", "europe-west12", ""),
        ("me-central2", "me-central2", ""),
        ("us-west1-b", "us-west1", "us-west1-b"),
        ("northamerica-northeast1-a", "northamerica-northeast1", "northamerica-northeast1-a"),
    ],
)
def test_regions_and_zones(name: str, region: str, zone: str) -> None:
    assert catalogue.region(name) == (region, zone)


@pytest.mark.parametrize("name", ["", "us", "us-west-2", "us-west1-bb", "us-west1/x", "US-WEST1"])
def test_what_is_no_region(name: str) -> None:
    with pytest.raises(ConfigurationError, match="us-east"):
        catalogue.region(name)


@pytest.mark.parametrize(
    ("name", "gpu", "types"),
    [
        ("s", "", [Type("e2-small")]),
        ("l", "", [Type(f"{one}-standard-32") for one in ("n2", "n2d", "e2")]),
        ("m-arm", "", [Type("c4a-standard-8")]),
        ("m+t4", "", [Type("n1-standard-4", "nvidia-tesla-t4", 1)]),
        ("m", "nvidia-tesla-t4", [Type("n1-standard-4", "nvidia-tesla-t4", 1)]),
        ("l", "t4", [Type("n1-standard-32", "nvidia-tesla-t4", 4)]),
        ("xl", "nvidia-l4", [Type("g2-standard-96")]),
        ("m+a100", "", [Type("a2-highgpu-1g"), Type("a2-ultragpu-1g")]),
        ("e2-custom-8-32768", "", [Type("e2-custom-8-32768")]),
        ("custom-8-65536-ext", "", [Type("custom-8-65536-ext")]),
        (
            "n1-standard-8+nvidia-tesla-v100*2",
            "",
            [Type("n1-standard-8", "nvidia-tesla-v100", 2)],
        ),
        ("n1-standard-8+t4", "", [Type("n1-standard-8", "nvidia-tesla-t4", 1)]),
        ("n1-standard-8", "t4", [Type("n1-standard-8", "nvidia-tesla-t4", 1)]),
        ("g2-standard-8", "l4", [Type("g2-standard-8")]),  # has its own
    ],
)
def test_types(name: str, gpu: str, types: list[Type]) -> None:
    assert list(catalogue.types((name,), gpu)) == types


def test_several_types_in_their_order_each_once() -> None:
    found = catalogue.types(("e2-standard-8", "m"))
    assert [one.name for one in found] == ["e2-standard-8", "n2-standard-8", "n2d-standard-8"]


@pytest.mark.parametrize(
    ("names", "gpu", "told"),
    [
        (("huge",), "", "s, m, l, xl"),
        (("m+h900",), "", "t4, l4"),
        (("s",), "t4", r"m\+t4, l\+t4"),
        (("m+v100",), "", r"m\+l4, or n1-standard-8\+nvidia-tesla-v100\*1"),
        (("m+k80",), "", r"use m\+t4"),
        (("n1-standard-4+nvidia-tesla-t4*0",), "", "no machine type"),
        (("n1-Standard-4",), "", "no machine type"),
        (("m", "m-arm"), "", "one kind of processor"),
        (("n2-standard-8", "n4-standard-8"), "", "one kind of disk"),
        (("m+t4", "m"), "", "GPUs are attached"),
    ],
)
def test_what_can_not_be_had(names: tuple[str, ...], gpu: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        catalogue.types(names, gpu)


def test_every_mistake_is_told() -> None:
    with pytest.raises(ConfigurationError) as caught:
        catalogue.types(("huge", "m", "tiny"))
    assert len(caught.value.mistakes) == 2


def test_all_tables_can_be_read_and_mixed() -> None:
    sizes, gpus = catalogue.data()["sizes"], catalogue.data()["gpus"]
    for size in sizes:
        assert catalogue.types((size,))
    for gpu, several in gpus.items():
        for size in several:
            assert all(one.has_gpu for one in catalogue.types((size,), gpu))
            assert catalogue.types((f"{size}+{gpu}",)) == catalogue.types((size,), gpu)


@pytest.mark.parametrize(
    ("text", "size", "project", "name", "family"),
    [
        ("", "m", "ubuntu-os-cloud", "ubuntu-2404-lts-amd64", True),
        ("ubuntu", "m-arm", "ubuntu-os-cloud", "ubuntu-2404-lts-arm64", True),
        (
            "ubuntu",
            "m+t4",
            "ubuntu-os-accelerator-images",
            "ubuntu-accelerator-2404-amd64-with-nvidia-580",
            True,
        ),
        (
            "ubuntu@ubuntu-os-cloud/ubuntu-2204-lts",
            "m",
            "ubuntu-os-cloud",
            "ubuntu-2204-lts",
            False,
        ),
        ("@example.com:mine/golden", "m", "example.com:mine", "golden", False),
    ],
)
def test_images(text: str, size: str, project: str, name: str, family: bool) -> None:
    found = catalogue.image(text, catalogue.types((size,)))
    assert found == catalogue.Image(project=project, name=name, family=family)


def test_who_logs_in_to_an_image() -> None:
    machines = catalogue.types(("m",))
    assert catalogue.image("", machines).user == "ubuntu"
    assert catalogue.image("debian@debian-cloud/debian-12", machines).user == "debian"


@pytest.mark.parametrize("text", ["debian", "ami-12345678", "user@project", "x@y/Z"])
def test_what_is_no_image(text: str) -> None:
    with pytest.raises(ConfigurationError, match="FAMILY-OR-IMAGE"):
        catalogue.image(text, catalogue.types(("m",)))


@pytest.mark.parametrize(
    ("text", "account", "scopes"),
    [
        ("", "", ["cloud-platform"]),
        ("me@p.iam.gserviceaccount.com", "me@p.iam.gserviceaccount.com", ["cloud-platform"]),
        ("me,scopes=storage-rw,compute-rw", "me", ["devstorage.read_write", "compute"]),
        (
            "me,scopes=https://www.googleapis.com/auth/bigquery",
            "me",
            ["bigquery"],
        ),
    ],
)
def test_identities(text: str, account: str, scopes: list[str]) -> None:
    found = catalogue.identity(text)
    full = [f"https://www.googleapis.com/auth/{one}" for one in scopes]
    assert (found.account, list(found.scopes)) == (account, full)


def test_what_is_no_identity() -> None:
    with pytest.raises(ConfigurationError, match="--cloud-permission-set"):
        catalogue.identity("two words")
