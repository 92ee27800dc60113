"""The part of bench.py that measures AWS: against the fake one, and on machines that boot."""

from __future__ import annotations

import json
import os
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from tests.lab.region import Region

    class Entry(Protocol):
        """A call, in seconds."""

        @property
        def began(self) -> float: ...
        @property
        def ended(self) -> float: ...


BOOTSTRAP = "/var/log/cml-runner-bootstrap.log"
LATENCY = 0.1  # seconds that each call takes, at least


def launches(
    run: Callable[..., tuple[float, str]], show: Callable[..., None], program: str, repo: str
) -> None:
    """Launch without waiting, one machine and fifty, in an account that is set up."""
    from tests.lab.aws import AWS

    with AWS() as aws:
        environment = {**aws.environment(), "AWS_EC2_METADATA_DISABLED": "true"}
        run(program, "setup", "aws", environment=environment)
        aws.app.latency = LATENCY
        for count in (1, 50):
            aws.app.calls.clear()
            more = ("--cloud", "aws", "--repo", repo, "--no-wait", "--count", str(count))
            spent, _ = run(program, "launch", *more, environment=environment)
            calls = list(aws.app.calls)
            row = f"{in_a_row(calls)} in a row"
            aim = "2.5 s, 7 in a row" if count == 1 else "as many calls as for one"
            what = f"launch --no-wait: {count} on AWS, {LATENCY * 1000:.0f} ms a call"
            show(what, f"{spent:.2f} s", f"{len(calls)} calls", row, aim=aim)


def in_a_row(calls: Sequence[Any]) -> int:
    """Count the calls of the longest chain in which each began after the one before had ended."""
    number, end = 0, 0.0
    for call in sorted(calls, key=lambda one: one.ended):
        if call.began >= end:
            number, end = number + 1, call.ended
    return number


def boots(show: Callable[..., None]) -> None:
    """Boot a machine in the lab, if it is prepared, and see when its runner listens."""
    from tests.lab.region import Region, missing

    prepared = Path(os.environ.get("LAB_DIRECTORY", "/nonexistent"))
    if reason := missing(prepared):
        show("user data to listening", f"not measured: {reason}")
        return
    for stock in (True, False):
        with (
            tempfile.TemporaryDirectory() as directory,
            Region(prepared, Path(directory)) as region,
        ):
            region.stock = stock
            _boot(region, show)


def _boot(region: Region, show: Callable[..., None]) -> None:
    region.cli("setup", "aws")
    start = time.monotonic()
    done = region.cli("launch", "--cloud", "aws", "--idle-timeout", "never")
    spent = time.monotonic() - start
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    what = "stock image" if region.stock else "environment in the image"
    show(f"launch to online: {what}", f"{spent:.2f} s")
    (machine,) = region.machines.values()
    began = float(machine.run(f"stat -c %.W {BOOTSTRAP}").stdout)
    aim = "12 s" if region.stock else "4 s, with the agent in it, too"
    show(f"user data to listening: {what}", f"{_listening(region) - began:.2f} s", aim=aim)
    programs = sum(map(len, region.aws.programs().values()))
    hosts = 2 if region.index.sent else 1  # the bucket's, and the index's
    row = (f"{region.index.sent / 1e6:.1f} MB", f"{programs / 1e6:.2f} MB", f"{hosts} hosts")
    show("index, program, hosts without the forge's", *row)
    fields = json.loads(done.stdout)
    region.cli("destroy", fields["id"], "--cloud", "aws", "--cloud-region", "us-west-2")


def _listening(region: Region) -> float:
    """When a machine's agent listened, as its log says, in seconds since 1970."""
    logs = [text for key, text in region.aws.objects().items() if "/log-" in key]
    (line,) = (one for one in b"".join(logs).decode().splitlines() if "Listening for Jobs" in one)
    at = datetime.strptime(line.split("| ")[1][:19], "%Y-%m-%d %H:%M:%S")
    return at.replace(tzinfo=timezone.utc).timestamp()


def wheels(show: Callable[..., None]) -> None:
    """Build the program's wheel, and take it from the cache."""
    from cml_runner import program

    with tempfile.TemporaryDirectory() as directory:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = directory
        try:
            for what, aim in (("built", "300 ms, with putting it"), ("from the cache", "")):
                start = time.monotonic()
                size = len(program.wheel())
                spent = f"{(time.monotonic() - start) * 1000:.0f} ms"
                show(f"the program's wheel, {what}", spent, f"{size / 1e3:.0f} kB", aim=aim)
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before
