"""What people's words mean on Kubernetes: sizes, GPUs, images, nodes. Nothing here is sent."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product
from typing import TYPE_CHECKING, Any

from cml_runner.clouds import REGIONS
from cml_runner.errors import ConfigurationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NATIVE = re.compile(
    r"(?P<cpu>\d+(\.\d+)?)-(?P<memory>\d+)(\+(?P<gpu>[\w.-]+)(\*(?P<number>\d+))?)?"
)
PREFIX, NAME = r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?", r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
KEY, VALUE = re.compile(PREFIX + NAME), re.compile(f"({NAME})?")
TOLERATION = re.compile(r"(?P<key>[^=:]+)(=(?P<value>[^:]*))?(:(?P<effect>\w+))?")
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
IMAGE = re.compile(r"[a-z0-9][\w.:/-]*(@sha256:[0-9a-f]{64})?")
LONGEST = 63  # characters of a label's name, and of its value
GPU = "nvidia.com/gpu"  # the resource, and the taint of nodes which have any


@dataclass(frozen=True)
class Size:
    """What a pod asks for."""

    cpu: float
    memory: int  # MB
    gpu: str = ""  # its kind; nvidia: any
    number: int = 0  # of GPUs

    @property
    def resources(self) -> dict[str, str]:
        """Name the amounts as the API does."""
        found = {"cpu": f"{self.cpu:g}", "memory": f"{self.memory}M"}
        return {**found, GPU: str(self.number)} if self.number else found


def region(name: str) -> tuple[str, dict[str, str]]:
    """Return what marks a region's tasks, and the labels of its nodes.

    A generic name stands for the whole cluster; K=V for the nodes with this label. Raises
    ConfigurationError.
    """
    if name in REGIONS:
        return name, {}
    key, equals, value = name.partition("=")
    if not (equals and value and KEY.fullmatch(key) and VALUE.fullmatch(value)):
        listed = ", ".join(REGIONS)
        msg = f"region {name!r}: Kubernetes has {listed}, or a label of nodes: KEY=VALUE"
        raise ConfigurationError(msg)
    return re.sub(r"[^\w.-]", "_", name)[-LONGEST:].strip("_.-"), {key: value}


def size(names: Sequence[str], gpu: str = "") -> Size:
    """Understand a size; a pod has no second choice. Raises ConfigurationError."""
    found: list[Size] = []
    mistakes: list[str] = []
    for name in names:
        try:
            found.append(_size(name, gpu))
        except ConfigurationError as error:
            mistakes += error.mistakes
    if len(names) > 1:
        mistakes.append("--cloud-type: a pod has one size, so only one makes sense on Kubernetes")
    if mistakes:
        raise ConfigurationError(*mistakes)
    return found[0]


def _size(name: str, gpu: str) -> Size:
    word, _, own = name.partition("+")
    table: Mapping[str, Mapping[str, str]] = data()["gpus"]
    sizes: Mapping[str, str] = data()["sizes"]
    kind = own or gpu
    if word not in sizes:
        found = _native(name)
        return Size(found.cpu, found.memory, gpu, 1) if gpu and not found.gpu else found
    if not kind:
        return _native(sizes[word])
    if kind not in table:
        return _native(f"{table['nvidia'].get(word, sizes[word])}".replace("nvidia", kind))
    if word not in table[kind]:
        msg = f"type {word} with {kind}: Kubernetes has it as {', '.join(table[kind])}"
        raise ConfigurationError(msg)
    return _native(table[kind][word])


def image(text: str, size: Size) -> str:
    """Understand which image is meant. Raises ConfigurationError."""
    del size
    if not text:
        text = "ubuntu"
    found: str = data()["images"].get(text, text)
    if not IMAGE.fullmatch(found):
        msg = f"image {text!r}: use ubuntu, nvidia, or the name of a container image"
        raise ConfigurationError(msg)
    return found


def labels(texts: Sequence[str]) -> dict[str, str]:
    """Read KEY=VALUE. Raises ConfigurationError."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals and KEY.fullmatch(key) and VALUE.fullmatch(value)):
            msg = f"--cloud-kubernetes-node-selector {text}: write KEY=VALUE"
            raise ConfigurationError(msg)
        found[key] = value
    return found


def fitting(tags: Mapping[str, str]) -> dict[str, str]:
    """Choose the tags which can be labels: those are short, and of few characters."""
    return {
        key: value
        for key, value in tags.items()
        if KEY.fullmatch(key) and VALUE.fullmatch(value)
        if len(key.rpartition("/")[2]) <= LONGEST and len(value) <= LONGEST
    }


def tolerations(texts: Sequence[str]) -> list[dict[str, str]]:
    """Read KEY[=VALUE][:EFFECT], as kubectl writes taints. Raises ConfigurationError."""
    found = []
    for text in texts:
        match = TOLERATION.fullmatch(text)
        if not match or match["effect"] not in (*EFFECTS, None) or not KEY.fullmatch(match["key"]):
            msg = f"--cloud-kubernetes-toleration {text}: write KEY[=VALUE][:EFFECT]"
            raise ConfigurationError(f"{msg}; effects are {', '.join(EFFECTS)}")
        found.append(_toleration(match["key"], match["value"], match["effect"]))
    return found


def accepted(size: Size, *, spot: bool) -> list[dict[str, str]]:
    """List the taints that keep all other pods away from such nodes."""
    found = [_toleration(key, value, None) for key, value in data()["spot"].items() if spot]
    return found + ([_toleration(GPU, None, None)] if size.number else [])


def nodes(size: Size, chosen: Mapping[str, str], *, spot: str) -> dict[str, Any]:
    """Say on which nodes a pod may run, as node affinity; empty if on any.

    spot is "required", "preferred" or "". Labels that were chosen replace the usual ones of GPUs.
    """
    kinds = [] if chosen else _kinds(size)
    markets = [{key: [value]} for key, value in data()["spot"].items()] if spot else []
    found: dict[str, Any] = {}
    required = product(kinds or [{}], markets if spot == "required" else [{}])
    terms = [_term({**kind, **market}) for kind, market in required]
    if kinds or spot == "required":
        found["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": terms}
    if spot == "preferred":
        found["preferredDuringSchedulingIgnoredDuringExecution"] = [
            {"weight": 100, "preference": _term(market)} for market in markets
        ]
    return found


@cache
def data() -> dict[str, Any]:
    """Read the tables."""
    found: dict[str, Any] = tomllib.loads(files(__package__).joinpath("catalogue.toml").read_text())
    return found


def _native(name: str) -> Size:
    match = NATIVE.fullmatch(name)
    if not match or not float(match["cpu"]) or not int(match["memory"]):
        listed = ", ".join(data()["sizes"])
        msg = f"type {name!r}: Kubernetes has {listed}, or CPUS-MEGABYTES[+GPU[*NUMBER]]"
        raise ConfigurationError(msg)
    number = int(match["number"] or 1) if match["gpu"] else 0
    return Size(float(match["cpu"]), int(match["memory"]), match["gpu"] or "", number)


def _kinds(size: Size) -> list[dict[str, list[str]]]:
    """List the labels by which nodes with such GPUs may be known."""
    if not size.number or size.gpu == "nvidia":
        return []
    known: Mapping[str, Mapping[str, Sequence[str]]] = data()["kinds"]
    return [{key: list(values.get(size.gpu, (size.gpu,)))} for key, values in known.items()]


def _term(labels: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {
        "matchExpressions": [
            {"key": key, "operator": "In", "values": values} for key, values in labels.items()
        ]
    }


def _toleration(key: str, value: str | None, effect: str | None) -> dict[str, str]:
    how = {"operator": "Exists"} if value is None else {"operator": "Equal", "value": value}
    return {"key": key, **how, **({"effect": effect} if effect else {})}
