"""The part of bench.py that measures Google Cloud, against the fake one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench_aws import LATENCY, in_a_row

if TYPE_CHECKING:
    from collections.abc import Callable


def launches(
    run: Callable[..., tuple[float, str]], show: Callable[..., None], program: str, repo: str
) -> None:
    """Launch without waiting, one machine and fifty, in a project that is set up."""
    from tests.lab.gcp import GCP

    with tempfile.TemporaryDirectory() as directory, GCP(Path(directory)) as gcp:
        environment = gcp.environment()
        run(program, "setup", "gcp", environment=environment)
        gcp.app.latency = LATENCY
        for count in (1, 50):
            gcp.app.calls.clear()
            more = ("--cloud", "gcp", "--repo", repo, "--no-wait", "--count", str(count))
            spent, _ = run(program, "launch", *more, environment=environment)
            calls = list(gcp.app.calls)
            row = f"{in_a_row(calls)} in a row"
            aim = "3.5 s, 7 in a row" if count == 1 else "as many calls as for one"
            what = f"launch --no-wait: {count} on Google, {LATENCY * 1000:.0f} ms a call"
            show(what, f"{spent:.2f} s", f"{len(calls)} calls", row, aim=aim)
