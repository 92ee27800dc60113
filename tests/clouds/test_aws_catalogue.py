from __future__ import annotations

from typing import Any

import boto3
import pytest

from cml_runner.clouds import SIZES
from cml_runner.clouds.aws import catalogue
from cml_runner.errors import ConfigurationError

# Families of Graviton: https://docs.aws.amazon.com/ec2/latest/instancetypes/ec2-nitro-instances.html
ARM = [
    "a1",
    "t4g",
    "m6g",
    "m6gd",
    "m7g",
    "m7gd",
    "m8g",
    "m8gd",
    "m8gb",
    "m8gn",
    "c6g",
    "c6gd",
    "c6gn",
    "c7g",
    "c7gd",
    "c7gn",
    "c8g",
    "c8gd",
    "c8gn",
    "c8gb",
    "r6g",
    "r6gd",
    "r7g",
    "r7gd",
    "r8g",
    "r8gd",
    "r8gb",
    "r8gn",
    "x2gd",
    "x8g",
    "im4gn",
    "is4gen",
    "i4g",
    "i8g",
    "i8ge",
    "hpc7g",
    "g5g",
]
NOT_ARM = "t3 m5 m7i m8i m7a g4dn g4ad g5 g6 g6e gr6 p3dn p4d p5 p5en p6-b200 i4i u7i-12tb trn1 f2"


@pytest.fixture(scope="module")
def there() -> set[str]:
    """Every type that EC2 has, according to the description of its API."""
    client = boto3.client(
        "ec2", region_name="us-west-2", aws_access_key_id="-", aws_secret_access_key="-"
    )
    return set(client.meta.service_model.shape_for("InstanceType").enum)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return catalogue.data()


def lists(data: dict[str, Any]) -> list[list[str]]:
    return [
        *data["sizes"].values(),
        *(one for gpu in data["gpus"].values() for one in gpu.values()),
    ]


def test_every_type_exists(there: set[str], data: dict[str, Any]) -> None:
    assert {name for one in lists(data) for name in one} <= there


def test_alternates_have_the_same_size(data: dict[str, Any]) -> None:
    for one in lists(data):
        assert len({name.partition(".")[2] for name in one}) == 1


def test_the_sizes_of_all_clouds_are_there(data: dict[str, Any]) -> None:
    assert set(SIZES) <= set(data["sizes"])
    for name in SIZES:
        assert catalogue.types([name])


def test_graviton_is_recognised(there: set[str]) -> None:
    families = {name.partition(".")[0] for name in there}
    for family in families & set(ARM):
        assert catalogue.arch([f"{family}.large"]) == "arm64", family
    for family in NOT_ARM.split():
        assert catalogue.arch([f"{family}.large"]) == "x64", family
    assert len(families & set(ARM)) > 30


def test_types_in_order_of_preference() -> None:
    assert catalogue.types(["m"])[:2] == ("m7i.2xlarge", "m7a.2xlarge")
    assert catalogue.types(["m5.large", "s", "m5.large"]) == ("m5.large", "t3.small", "t3a.small")
    assert catalogue.types(["m"], "t4") == catalogue.types(["m+t4"]) == ("g4dn.xlarge",)
    assert catalogue.types(["g4dn.xlarge"], "t4") == ("g4dn.xlarge",)


@pytest.mark.parametrize(
    ("names", "gpu", "told"),
    [
        (["huge"], "", "use one of s, m"),
        (["m"], "k80", r"use m\+t4"),
        (["m"], "v100", r"use m\+l4 or m\+a10g"),
        (["m+v100"], "", r"use m\+l4 or m\+a10g"),
        (["m"], "b200", r"use xl\+b200"),
        (["m"], "abacus", "AWS has t4, l4"),
        (["m5.large"], "t4", "m5.large has none"),
        (["m5.large;x"], "", "no name of an EC2 type"),
        (["m7i.large", "m7g.large"], "", "use one kind"),
    ],
)
def test_what_there_is_not(names: list[str], gpu: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        catalogue.types(names, gpu)


def test_all_mistakes_are_told() -> None:
    with pytest.raises(ConfigurationError) as caught:
        catalogue.types(["huge", "m+k80", "m"], "")
    assert len(caught.value.mistakes) == 2


@pytest.mark.parametrize(
    ("name", "native"),
    [("us-west", "us-west-2"), ("us-east", "us-east-1"), ("eu-central-1", "eu-central-1")],
)
def test_regions(name: str, native: str) -> None:
    assert catalogue.region(name) == native


def test_every_region_of_aws_is_accepted() -> None:
    session = boto3.Session()
    for partition in session.get_available_partitions():
        for name in session.get_available_regions("ec2", partition):
            assert catalogue.region(name) == name


@pytest.mark.parametrize(
    ("text", "types", "path"),
    [
        ("ubuntu", ["m7i.large"], "24.04/stable/current/amd64/"),
        ("", ["m7g.large"], "24.04/stable/current/arm64/"),
        ("ubuntu", ["g4dn.xlarge"], "deeplearning/ami/x86_64/"),
        ("nvidia", ["m7i.large"], "deeplearning/ami/x86_64/"),
        ("ubuntu", ["g4ad.xlarge"], "24.04/stable/current/amd64/"),
        ("ubuntu", ["p6-b200.48xlarge"], "deeplearning/ami/x86_64/"),
    ],
)
def test_default_images(text: str, types: list[str], path: str) -> None:
    assert path in catalogue.image(text, types).parameter


def test_native_images() -> None:
    found = catalogue.image("ubuntu@099720109477:x86_64:*noble*", ["m7i.large"])
    assert found == catalogue.Image(owner="099720109477", name="*noble*", architecture="x86_64")
    assert catalogue.image("ami-0123456789abcdef0", ["m7i.large"]).id == "ami-0123456789abcdef0"


@pytest.mark.parametrize(
    "text",
    [
        "debian",
        "ami-xyz",
        "ubuntu@:x86_64:name",
        "ubuntu@123:x86_64:",
        "ubuntu@123:name",
        "ubuntu@123:i386:name",
        "ubuntu@123:arm64:name",
    ],
)
def test_odd_images_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        catalogue.image(text, ["m7i.large"])
