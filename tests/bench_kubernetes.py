"""The part of bench.py that measures Kubernetes: on the lab's cluster, if it is prepared."""

from __future__ import annotations

import json
import os
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cml_runner.model import Status
from cml_runner.store import SAID
from tests.bench_aws import in_a_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.town import Country, Town

WHERE = ("--cloud", "kubernetes", "--idle-timeout", "never")
SMALL, USUAL = ("--cloud-type", "0.1-500"), ("--cloud-type", "1-1000")
IMAGE = ("--cloud-image", "lab.example/system:1")
READY = ("--cloud-image", "lab.example/ready:1")  # with all that our program depends on


def launches(show: Callable[..., None]) -> None:
    """Launch one runner and fifty; count what the launcher asks until the pods may start."""
    from tests.lab import cluster
    from tests.lab.town import Country

    prepared = Path(os.environ.get("LAB_DIRECTORY", "/nonexistent"))
    if reason := cluster.missing(prepared):
        show("launch on Kubernetes", f"not measured: {reason}")
        return
    with tempfile.TemporaryDirectory() as directory, Country(prepared, Path(directory)) as country:
        with country.town(Path(directory)) as town:
            _online(town, show, IMAGE, "stock image")
            _online(town, show, READY, "with our environment")
        for count in (1, 50):
            with country.town(Path(directory)) as town:
                _launch(country, town, count, show)


def _launch(country: Country, town: Town, count: int, show: Callable[..., None]) -> None:
    start = time.monotonic()
    done = town.cli("launch", *WHERE, *SMALL, *IMAGE, "--no-wait", "--count", str(count))
    spent = time.monotonic() - start
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    calls = country.cluster.calls(f"{town.name}:launcher")
    let_go = next(n for n, one in enumerate(calls, 1) if one.verb == "patch")
    row = f"{in_a_row(calls[:let_go])} in a row until its pods start"
    what = f"launch --no-wait: {count} on Kubernetes, in the lab"
    show(what, f"{spent:.2f} s", f"{len(calls)} calls", row, aim="4 in a row")
    town.cli("destroy", json.loads(done.stdout)["id"], "--cloud", "kubernetes")


def _online(town: Town, show: Callable[..., None], image: tuple[str, ...], what: str) -> None:
    start, before = time.monotonic(), town.country.index.sent
    done = town.cli("launch", *WHERE, *USUAL, *image)
    spent = time.monotonic() - start
    sent = (town.country.index.sent - before) / 1e6
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    own, installed = f"  {_to_readiness(town):.1f} s in the pod", f"  {sent:.1f} MB installed"
    show(f"launch on Kubernetes, {what}", f"{spent:.1f} s", own, installed)
    town.cli("destroy", json.loads(done.stdout)["id"], "--cloud", "kubernetes")


def _to_readiness(town: Town) -> float:
    """Return the seconds from the start of the pod's script until its runner was ready."""
    (pod,) = town.pods()
    (container,) = pod["status"]["containerStatuses"]
    said = [line for line in town.log(pod["metadata"]["name"]).splitlines() if SAID in line]
    ready = next(one for one in map(_status, said) if one.state == "ready").since
    began = container["state"]["running"]["startedAt"].replace("Z", "+00:00")
    return (ready - datetime.fromisoformat(began)).total_seconds()


def _status(line: str) -> Status:
    return msgspec.json.decode(line.removeprefix(SAID), type=Status)
