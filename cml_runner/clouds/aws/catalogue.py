"""What people's words mean on AWS: sizes, GPUs, images, regions. Nothing here is sent."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from cml_runner.errors import ConfigurationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REGION = re.compile(r"[a-z]{2,4}(-[a-z]+)+-\d{1,2}")
TYPE = re.compile(r"[a-z][a-z0-9-]*\.[a-z0-9-]+")
# Graviton: a1, or a "g" among the letters after the generation: m7g, c8gd, im4gn, x2gd, hpc7g.
GRAVITON = re.compile(r"(a1|[a-z]+\d+[a-fh-z]*g[a-z]*(-[a-z0-9]+)?|p6e-gb\d+)\.")
NVIDIA = re.compile(r"(g\d+[a-z]*|gr\d+[a-z]*|p\d+[a-z]*)(-[a-z0-9]+)?\.")
NOT_NVIDIA = re.compile(r"g4ad\.")  # AMD
NATIVE_IMAGE = re.compile(r"(?P<user>[^@:]*)@(?P<owner>[\w-]+):(?P<arch>x86_64|arm64):(?P<name>.+)")
AMI = re.compile(r"ami-[0-9a-f]{8,17}")


@dataclass(frozen=True, kw_only=True)
class Image:
    """How to find an image: by a public parameter, by its number, or by its owner and name."""

    parameter: str = ""
    id: str = ""
    owner: str = ""  # account, or amazon, self, aws-marketplace
    name: str = ""  # with wildcards
    architecture: str = ""  # as EC2 calls it
    large: bool = False  # it needs a larger disk than people would guess


def region(name: str) -> str:
    """Translate a generic region; a native one stays. Raises ConfigurationError."""
    generic: Mapping[str, str] = data()["regions"]
    found = generic.get(name, name)
    if not REGION.fullmatch(found):
        listed = ", ".join(generic)
        msg = f"region {name!r}: AWS has {listed}, or native ones such as eu-central-1"
        raise ConfigurationError(msg)
    return found


def types(names: Sequence[str], gpu: str = "") -> tuple[str, ...]:
    """List the EC2 types that fit, in order of preference.

    A name is a size, a size with a GPU (m+t4), or an EC2 type. Raises ConfigurationError with
    everything that can't be had.
    """
    found: list[str] = []
    mistakes: list[str] = []
    for name in names:
        size, _, own = name.partition("+")
        try:
            found += _native(name, gpu) if "." in name else _sized(size, own or gpu)
        except ConfigurationError as error:
            mistakes += error.mistakes
    if mistakes:
        raise ConfigurationError(*mistakes)
    arch(found)
    return tuple(dict.fromkeys(found))


def arch(names: Sequence[str]) -> Literal["x64", "arm64"]:
    """Say for which processors software must be. Raises ConfigurationError for a mixture."""
    arm = [name for name in names if GRAVITON.match(name)]
    if arm and len(arm) < len(names):
        others = ", ".join(name for name in names if name not in arm)
        msg = f"--cloud-type: {', '.join(arm)} are ARM machines, {others} are not: use one kind"
        raise ConfigurationError(msg)
    return "arm64" if arm else "x64"


def has_gpu(name: str) -> bool:
    """Say if a type has GPUs of NVIDIA."""
    return bool(NVIDIA.match(name)) and not NOT_NVIDIA.match(name)


def image(text: str, machines: Sequence[str]) -> Image:
    """Understand which image is meant for such machines. Raises ConfigurationError."""
    arm = arch(machines) == "arm64"
    if text in ("", "ubuntu", "nvidia"):
        if text == "nvidia" or any(has_gpu(name) for name in machines):
            path = data()["images"]["nvidia"].format(arch="arm64" if arm else "x86_64")
            return Image(parameter=path, large=True)
        path = data()["images"]["ubuntu"].format(arch="arm64" if arm else "amd64")
        return Image(parameter=path)
    if AMI.fullmatch(text):
        return Image(id=text)
    if not (match := NATIVE_IMAGE.fullmatch(text)):
        msg = (
            f"--cloud-image {text}: write ubuntu, nvidia, ami-NUMBER or USER@OWNER:ARCH:NAME,"
            " such as ubuntu@099720109477:x86_64:*ubuntu-noble-24.04*"
        )
        raise ConfigurationError(msg)
    if (match["arch"] == "arm64") != arm:
        msg = f"--cloud-image {text}: {machines[0]} isn't a machine for {match['arch']}"
        raise ConfigurationError(msg)
    return Image(owner=match["owner"], name=match["name"], architecture=match["arch"])


def _sized(size: str, gpu: str) -> list[str]:
    sizes: Mapping[str, list[str]] = data()["sizes"]
    gpus: Mapping[str, Mapping[str, list[str]]] = data()["gpus"]
    if size not in sizes:
        msg = f"--cloud-type {size}: use one of {', '.join(sizes)}, or a type such as m7i.large"
        raise ConfigurationError(msg)
    if not gpu:
        return sizes[size]
    if instead := data()["instead"].get(f"{size}+{gpu}"):
        msg = f"AWS has no {size}+{gpu} (any more): use {instead}"
        raise ConfigurationError(msg)
    if gpu not in gpus:
        msg = f"--cloud-gpu {gpu}: AWS has {', '.join(gpus)}"
        raise ConfigurationError(msg)
    if size not in gpus[gpu]:
        there = ", ".join(f"{one}+{gpu}" for one in gpus[gpu])
        msg = f"AWS has no {size}+{gpu}: use {there}"
        raise ConfigurationError(msg)
    return gpus[gpu][size]


def _native(name: str, gpu: str) -> list[str]:
    """Take an EC2 type as it is; it has the GPUs that it has."""
    if not TYPE.fullmatch(name):
        msg = f"--cloud-type {name}: that's no name of an EC2 type"
        raise ConfigurationError(msg)
    if gpu and not has_gpu(name):
        msg = f"--cloud-gpu {gpu}: {name} has none; leave --cloud-type out, or name one that has"
        raise ConfigurationError(msg)
    return [name]


@cache
def data() -> dict[str, Any]:
    """Read the tables."""
    text = files(__package__).joinpath("catalogue.toml").read_text(encoding="utf-8")
    found: dict[str, Any] = tomllib.loads(text)
    return found
