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
    with tempfile.TemporaryDirectory() as directory, Region(prepared, Path(directory)) as region:
        region.cli("setup", "aws")
        start = time.monotonic()
        done = region.cli("launch", "--cloud", "aws", "--idle-timeout", "never")
        spent = time.monotonic() - start
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        show("launch to online: 1 on AWS, in the lab", f"{spent:.2f} s")
        show("boot to listening, in the lab", f"{_listening(region):.2f} s", aim="15 s")
        fields = json.loads(done.stdout)
        region.cli("destroy", fields["id"], "--cloud", "aws", "--cloud-region", "us-west-2")


def _listening(region: Region) -> float:
    """Seconds from a machine's start until its agent listened, as its log says."""
    (began,) = region.booted.values()
    logs = [text for key, text in region.aws.objects().items() if "/log-" in key]
    (line,) = (one for one in b"".join(logs).decode().splitlines() if "Listening for Jobs" in one)
    at = datetime.strptime(line.split("| ")[1][:19], "%Y-%m-%d %H:%M:%S")
    return (at.replace(tzinfo=timezone.utc) - began).total_seconds()
