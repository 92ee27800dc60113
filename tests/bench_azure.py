"""The part of bench.py that measures Azure, against the fake one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.bench_aws import LATENCY, in_a_row

if TYPE_CHECKING:
    from collections.abc import Callable

LOOKS = "/operations/"  # at what Azure is doing; neither they nor the login are counted


def launches(
    run: Callable[..., tuple[float, str]], show: Callable[..., None], program: str, repo: str
) -> None:
    """Launch without waiting, one machine and fifty, in a subscription that is set up."""
    from tests.lab.azure import Azure

    with Azure() as azure:
        environment = azure.environment()
        run(program, "setup", "azure", environment=environment)
        azure.app.latency = LATENCY
        for count in (1, 50):
            azure.app.calls.clear()
            more = ("--cloud", "azure", "--repo", repo, "--no-wait", "--count", str(count))
            spent, _ = run(program, "launch", *more, environment=environment)
            calls = [one for one in azure.app.calls if not one.path.startswith(LOOKS)]
            row = f"{in_a_row(calls)} in a row"
            aim = "8 in a row" if count == 1 else "as many calls as for one"
            what = f"launch --no-wait: {count} on Azure, {LATENCY * 1000:.0f} ms a call"
            show(what, f"{spent:.2f} s", f"{len(calls)} calls", row, aim=aim)
