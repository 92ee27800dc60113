"""What people's words mean on Google Cloud: sizes, GPUs, images, regions. Nothing here is sent."""

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

REGION = re.compile(r"(?P<region>[a-z]+(?:-[a-z]+)+\d+)(?P<zone>-[a-z])?")
TYPE = re.compile(
    r"(?P<name>[a-z][a-z0-9]*(?:-[a-z0-9]+)+)(?:\+(?P<gpu>[a-z][a-z0-9-]*?)(?:\*(?P<count>\d+))?)?"
)
ARM = re.compile(r"(t2a|c4a|n4a|a4x)-")
BUILT_IN = re.compile(r"(a2|a3|a4|a4x|g2|g4)-")  # machines that come with their GPUs
# These boot from Hyperdisk only: https://cloud.google.com/compute/docs/disks/hyperdisks
HYPERDISK = re.compile(r"(c4|c4a|c4d|n4|n4a|n4d|h4d|m4|x4|g4|a4|a4x)-|a3-ultragpu-")
NATIVE_IMAGE = re.compile(
    r"(?P<user>[^@/]*)@(?P<project>[a-z][a-z0-9.:-]*)/(?P<name>[a-z][a-z0-9-]*)"
)
ACCOUNT = re.compile(r"[a-z0-9][a-z0-9._-]*(@[a-z0-9.:-]+)?")
SCOPE = "https://www.googleapis.com/auth/"


@dataclass(frozen=True)
class Type:
    """A kind of machine, and what is attached to it."""

    name: str
    gpu: str = ""  # accelerator type
    count: int = 0  # of them

    @property
    def arm(self) -> bool:
        """Whether software must be for ARM."""
        return bool(ARM.match(self.name))

    @property
    def has_gpu(self) -> bool:
        """Whether there are GPUs in it."""
        return bool(self.gpu or BUILT_IN.match(self.name))

    @property
    def disk(self) -> str:
        """The type of disk that it boots from."""
        return "hyperdisk-balanced" if HYPERDISK.match(self.name) else "pd-balanced"

    def __str__(self) -> str:
        return f"{self.name}+{self.gpu}*{self.count}" if self.gpu else self.name


@dataclass(frozen=True, kw_only=True)
class Image:
    """Where an image is, by the name of its family or by its own."""

    project: str
    name: str
    family: bool = False  # it can be nothing else
    user: str = "ubuntu"  # who logs in


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A service account, and how far its machines may use it."""

    account: str  # an address, or a name in our own project; empty: ours
    scopes: tuple[str, ...]


def region(name: str) -> tuple[str, str]:
    """Translate a generic region; a native one stays. A zone is returned too if it is one.

    Raises ConfigurationError.
    """
    generic: Mapping[str, str] = data()["regions"]
    match = REGION.fullmatch(generic.get(name, name))
    if not match:
        listed = ", ".join(generic)
        msg = f"region {name!r}: Google Cloud has {listed}, or native ones such as europe-west4"
        raise ConfigurationError(f"{msg} and zones such as europe-west4-a")
    return match["region"], match[0] if match["zone"] else ""


def types(names: Sequence[str], gpu: str = "") -> tuple[Type, ...]:
    """List the machine types that fit, in order of preference.

    A name is a size, a size with a GPU (m+t4), or a machine type, perhaps with what is attached to
    it: n1-standard-4+nvidia-tesla-t4*1. Raises ConfigurationError with everything that can't be
    had.
    """
    found: list[Type] = []
    mistakes: list[str] = []
    for name in names:
        size, _, own = name.partition("+")
        try:
            if "-" in size and size not in data()["sizes"]:
                found.append(_native(name, gpu))
            else:
                found += map(_read, _sized(size, own or gpu))
        except ConfigurationError as error:
            mistakes += error.mistakes
    if mistakes:
        raise ConfigurationError(*mistakes)
    found = list(dict.fromkeys(found))
    _must_go_together(found)
    return tuple(found)


def image(text: str, machines: Sequence[Type]) -> Image:
    """Understand which image is meant for such machines. Raises ConfigurationError."""
    if text in ("", "ubuntu", "nvidia"):
        kind = "nvidia" if text == "nvidia" or any(one.has_gpu for one in machines) else "ubuntu"
        path = data()["images"][kind].format(arch=arch_of(machines, "amd64"))
        project, _, name = path.partition("/")
        return Image(project=project, name=name, family=True)
    if match := NATIVE_IMAGE.fullmatch(text):
        user = match["user"] or "ubuntu"
        return Image(project=match["project"], name=match["name"], user=user)
    msg = (
        f"--cloud-image {text}: write ubuntu, nvidia or USER@PROJECT/FAMILY-OR-IMAGE,"
        " such as ubuntu@ubuntu-os-cloud/ubuntu-2204-lts"
    )
    raise ConfigurationError(msg)


def arch(machines: Sequence[Type]) -> Literal["x64", "arm64"]:
    """Say for which processors software must be."""
    return "arm64" if machines[0].arm else "x64"


def arch_of(machines: Sequence[Type], otherwise: str) -> str:
    """Say the same in others' words."""
    return "arm64" if arch(machines) == "arm64" else otherwise


def identity(text: str) -> Identity:
    """Understand ACCOUNT[,scopes=A,B]. Raises ConfigurationError."""
    account, _, listed = text.partition(",scopes=")
    scopes = [one.strip() for one in listed.split(",") if one.strip()] or ["cloud-platform"]
    if account and not ACCOUNT.fullmatch(account):
        msg = (
            f"--cloud-permission-set {text}: write ACCOUNT@PROJECT.iam.gserviceaccount.com,"
            " with ,scopes=… behind it if need be"
        )
        raise ConfigurationError(msg)
    names: Mapping[str, str] = data()["scopes"]
    full = (one if "://" in one else SCOPE + names.get(one, one) for one in scopes)
    return Identity(account=account, scopes=tuple(full))


def _sized(size: str, gpu: str) -> list[str]:
    sizes: Mapping[str, list[str]] = data()["sizes"]
    gpus: Mapping[str, Mapping[str, list[str]]] = data()["gpus"]
    gpu = gpu.removeprefix("nvidia-").removeprefix("tesla-")
    if size not in sizes:
        listed = ", ".join(sizes)
        msg = f"--cloud-type {size}: use one of {listed}, or a type such as n2-standard-4"
        raise ConfigurationError(msg)
    if not gpu:
        return sizes[size]
    if instead := data()["instead"].get(f"{size}+{gpu}"):
        msg = f"Google Cloud has no {size}+{gpu} (any more): use {instead}"
        raise ConfigurationError(msg)
    if gpu not in gpus:
        msg = f"--cloud-gpu {gpu}: Google Cloud has {', '.join(gpus)}"
        raise ConfigurationError(msg)
    if size not in gpus[gpu]:
        there = ", ".join(f"{one}+{gpu}" for one in gpus[gpu])
        msg = f"Google Cloud has no {size}+{gpu}: use {there}"
        raise ConfigurationError(msg)
    return gpus[gpu][size]


def _native(name: str, gpu: str) -> Type:
    """Take a machine type as it is, with the GPU that is asked for if it has none of its own."""
    found = _read(name)
    if not gpu or found.has_gpu:
        return found
    return _read(f"{name}+{gpu}")


def _read(text: str) -> Type:
    match = TYPE.fullmatch(text)
    if not match or (match["count"] and not int(match["count"])):
        msg = f"--cloud-type {text}: that's no machine type, as n1-standard-4+nvidia-tesla-t4*1 is"
        raise ConfigurationError(msg)
    if not match["gpu"]:
        return Type(match["name"])
    gpu = match["gpu"]
    if gpu in ("t4", "p4", "p100", "v100"):
        gpu = f"nvidia-tesla-{gpu}"
    return Type(match["name"], gpu, int(match["count"] or 1))


def _must_go_together(found: Sequence[Type]) -> None:
    """Raise ConfigurationError if one group can't hold them all."""
    kinds: dict[str, set[Any]] = {
        "for one kind of processor": {one.arm for one in found},
        "which boot from one kind of disk": {one.disk for one in found},
    }
    mistakes = [
        f"--cloud-type: {', '.join(map(str, found))} can't be mixed: name types {what}"
        for what, values in kinds.items()
        if len(values) > 1
    ]
    if len(found) > 1 and any(one.gpu for one in found):
        mistakes.append("--cloud-type: machines to which GPUs are attached can't be a choice")
    if mistakes:
        raise ConfigurationError(*mistakes)


@cache
def data() -> dict[str, Any]:
    """Read the tables."""
    text = files(__package__).joinpath("catalogue.toml").read_text(encoding="utf-8")
    found: dict[str, Any] = tomllib.loads(text)
    return found
