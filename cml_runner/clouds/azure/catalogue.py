"""What people's words mean on Azure: sizes, GPUs, images, regions. Nothing here is sent."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
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

TYPE = re.compile(r"Standard_[A-Z]{1,2}\d+[A-Za-z0-9_-]*")
ARM = re.compile(r"Standard_[A-Z]+\d+(-\d+)?[a-z]*p[a-z]*_")  # a "p" among its features: Dps, Epds
NVIDIA = re.compile(r"Standard_N[CDV]\d")
NOT_NVIDIA = re.compile(r"MI\d+X|Standard_NV\d+as_v4")  # AMD
MIXED = re.compile(r"Standard_[ABDEF]\d.*?(_v(?P<version>\d+))?$")  # families that can be mixed
NO_SPOT = re.compile(r"Standard_B\d")
MOST_MIXED = 5
NVME = 6  # the version from which on disks are no SCSI disks any more
URN = re.compile(
    r"((?P<user>[^@:]+)@)?(?P<publisher>[\w.-]+):(?P<offer>[\w.-]+):(?P<sku>[\w.-]+)"
    r":(?P<version>[\w.-]+?):?(?P<plan>#plan)?"
)
RESOURCE = re.compile(
    r"/subscriptions/[\w-]+/resourceGroups/[^/]+/providers/Microsoft\.Compute/"
    r"(images/[^/]+|galleries/[^/]+/images/[^/]+(/versions/[\w.]+)?)",
    re.IGNORECASE,
)
COMMUNITY = re.compile(r"/CommunityGalleries/[^/]+/images/[^/]+(/versions/[\w.]+)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Image:
    """What machines boot from, as Azure wants it."""

    reference: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, str] = field(default_factory=dict)  # of the marketplace; empty: free
    disk: int = 0  # GB, at least


def region(name: str) -> str:
    """Translate a generic region; a native one stays. Raises ConfigurationError."""
    generic: Mapping[str, str] = data()["regions"]
    found = generic.get(name, name)
    if found not in data()["native"]["regions"]:
        listed = ", ".join(generic)
        msg = f"region {name!r}: Azure has {listed}, or native ones such as germanywestcentral"
        raise ConfigurationError(msg)
    return found


def types(names: Sequence[str], gpu: str = "", *, spot: bool = False) -> tuple[str, ...]:
    """List Azure's sizes that fit, in order of preference.

    A name is a size, a size with a GPU (m+t4), or a size of Azure's. Raises ConfigurationError
    with everything that can't be had.
    """
    found: list[str] = []
    mistakes: list[str] = []
    for name in names:
        size, _, own = name.partition("+")
        try:
            native = name.lower().startswith("standard_")
            found += _native(name, gpu, spot) if native else _sized(size, own or gpu, spot)
        except ConfigurationError as error:
            mistakes += error.mistakes
    if mistakes:
        raise ConfigurationError(*mistakes)
    arch(found)
    return tuple(dict.fromkeys(found))


def rungs(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Put together what can be had as one mixture; the others come by themselves, in order."""
    found: list[list[str]] = []
    kinds: list[object] = []
    for name in names:
        kind = _mixture(name)
        if found and kind is not None and kind == kinds[-1] and len(found[-1]) < MOST_MIXED:
            found[-1].append(name)
        else:
            found.append([name])
            kinds.append(kind)
    return [tuple(one) for one in found]


def arch(names: Sequence[str]) -> Literal["x64", "arm64"]:
    """Say for which processors software must be. Raises ConfigurationError for a mixture."""
    arm = [name for name in names if ARM.match(name)]
    if arm and len(arm) < len(names):
        others = ", ".join(name for name in names if name not in arm)
        msg = f"--cloud-type: {', '.join(arm)} are ARM machines, {others} are not: use one kind"
        raise ConfigurationError(msg)
    return "arm64" if arm else "x64"


def has_gpu(name: str) -> bool:
    """Say if a size has GPUs of NVIDIA."""
    return bool(NVIDIA.match(name)) and not NOT_NVIDIA.search(name)


def image(text: str, machines: Sequence[str]) -> Image:
    """Understand which image is meant for such machines. Raises ConfigurationError."""
    if text in ("", "ubuntu", "nvidia"):
        nvidia = text == "nvidia" or any(has_gpu(name) for name in machines)
        name = "nvidia" if nvidia else "ubuntu"
        if nvidia and arch(machines) == "arm64":
            msg = "--cloud-image nvidia: Azure has none for ARM machines: name another one"
            raise ConfigurationError(msg)
        own = "-arm" if arch(machines) == "arm64" else ""
        disk = data()["disks"][name]
        return _urn(data()["images"][f"{name}{own}"], disk)
    if RESOURCE.fullmatch(text):
        return Image(reference={"id": text})
    if COMMUNITY.fullmatch(text):
        return Image(reference={"communityGalleryImageId": text})
    return _urn(text)


def _urn(text: str, disk: int = 0) -> Image:
    match = URN.fullmatch(text)
    if not match:
        msg = (
            f"--cloud-image {text}: write ubuntu, nvidia, PUBLISHER:OFFER:SKU:VERSION (with #plan"
            " if it must be bought), or the resource ID of an image or of a gallery's"
        )
        raise ConfigurationError(msg)
    reference = {name: match[name] for name in ("publisher", "offer", "sku", "version")}
    plan = {}
    if match["plan"]:
        plan = {
            "publisher": match["publisher"],
            "product": match["offer"],
            "name": match["sku"],
        }
    return Image(reference=reference, plan=plan, disk=disk)


def _mixture(name: str) -> object:
    """Say with which others a size can be mixed: with those for which this is the same."""
    match = MIXED.match(name)
    if not match:
        return None
    return int(match["version"] or 1) >= NVME


def _sized(size: str, gpu: str, spot: bool) -> list[str]:
    sizes: Mapping[str, list[str]] = data()["sizes"]
    gpus: Mapping[str, Mapping[str, list[str]]] = data()["gpus"]
    if size not in sizes:
        listed = ", ".join(sizes)
        msg = f"--cloud-type {size}: use one of {listed}, or a size such as Standard_D4s_v5"
        raise ConfigurationError(msg)
    if not gpu:
        return [name for name in sizes[size] if not (spot and NO_SPOT.match(name))]
    if instead := data()["instead"].get(f"{size}+{gpu}"):
        msg = f"Azure has no {size}+{gpu} (any more): use {instead}"
        raise ConfigurationError(msg)
    if gpu not in gpus:
        msg = f"--cloud-gpu {gpu}: Azure has {', '.join(gpus)}"
        raise ConfigurationError(msg)
    if size not in gpus[gpu]:
        there = ", ".join(f"{one}+{gpu}" for one in gpus[gpu])
        msg = f"Azure has no {size}+{gpu}: use {there}"
        raise ConfigurationError(msg)
    return gpus[gpu][size]


def _native(name: str, gpu: str, spot: bool) -> list[str]:
    """Take a size of Azure's as it is; it has the GPUs that it has."""
    if not TYPE.fullmatch(name):
        msg = f"--cloud-type {name}: that's no name of an Azure size, such as Standard_D4s_v5"
        raise ConfigurationError(msg)
    if gpu and not has_gpu(name):
        msg = f"--cloud-gpu {gpu}: {name} has none; leave --cloud-type out, or name one that has"
        raise ConfigurationError(msg)
    if spot and NO_SPOT.match(name):
        msg = f"--cloud-type {name}: there are no spot machines of Azure's B sizes"
        raise ConfigurationError(msg)
    return [name]


@cache
def data() -> dict[str, Any]:
    """Read the tables."""
    text = files(__package__).joinpath("catalogue.toml").read_text(encoding="utf-8")
    found: dict[str, Any] = tomllib.loads(text)
    return found
