"""cml-runner recover."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from cml_runner.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cml_runner.recover import Outcome

BRIEF = 10  # seconds for what takes a forge some seconds, when nobody wants to wait


@click.command("recover", context_settings=options.SETTINGS)
@click.argument("url", metavar="RUN_URL")
@options.option(
    "--name",
    help="Names given to the runners, delimited with commas.  [default: those that we make up]",
)
@options.option("--dry-run", is_flag=True, help="Say what would be run again; change nothing.")
@options.option("--wait/--no-wait", default=True, help="Wait until the forge can do it.")
@options.option(
    "--wait-timeout", default="20 minutes", metavar="DURATION", help="Then give up waiting."
)
@options.forge
@options.common
def recover_(
    url: str,
    name: str,
    wait_timeout: str,
    output: str,
    *,
    dry_run: bool,
    wait: bool,
    **values: Any,
) -> None:
    """Run the interrupted jobs of a run, or pipeline, again.

    For machines that hold no credential, so that they can't do it themselves: jobs whose machine
    was taken away, or was lost, each once for every interruption, three times at most. Jobs that
    failed by themselves, were cancelled, or ran elsewhere are left alone. RUN_URL is the run's
    address as people have it.

    Where a job can't be run again before others have ended, it is waited for; with --no-wait this
    is to be called again then. Asking twice never runs a job twice.
    """
    from cml_runner import access, recover, times
    from cml_runner.cli import ci

    timeout = times.seconds(wait_timeout) or float("inf")
    asked = options.asked({**values, "repo": values["repo"] or url})
    forge = access.find(asked, os.environ).forge()
    names = [one.strip() for one in name.split(",") if one.strip()]
    found = recover.find(forge, url, names, recover.Patience(timeout if wait else 0))
    outcomes = recover.judge(found)
    if not dry_run:
        patience = recover.Patience(timeout if wait else BRIEF)
        outcomes = recover.again(forge, outcomes, patience)
    fields = _fields(url, outcomes)
    ci.report_recovery(fields, os.environ)
    if output == "json":
        options.echo_json(fields)
    else:
        _show(outcomes)
    _complain(outcomes, wait=wait)


def _fields(url: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    counts = Counter(one.state for one in outcomes)
    return {
        "run": url,
        "count": counts["interrupted"] + counts["queued"],
        "waiting": counts["waiting"],
        "jobs": [
            {
                "name": one.job.name,
                "runner": one.job.runner,
                "attempt": one.job.attempt,
                "url": one.job.url,
                "state": one.state,
                "reason": one.reason,
            }
            for one in outcomes
        ],
    }


def _show(outcomes: Sequence[Outcome]) -> None:
    for one in outcomes:
        reason = f": {one.reason}" if one.reason else ""
        click.echo(f"{one.job.name}\t{one.state}{reason}\t{one.job.url}")
    if not outcomes:
        click.echo("nothing was interrupted", err=True)


def _complain(outcomes: Sequence[Outcome], *, wait: bool) -> None:
    """Raise what is worse than nothing to do."""
    from cml_runner.errors import JobRunning, RunnerError

    refused = [one for one in outcomes if one.state == "refused"]
    if refused:
        raise RunnerError("; ".join(f"{one.job.name}: {one.reason}" for one in refused))
    waiting = ", ".join(one.job.name for one in outcomes if one.state == "waiting")
    if not waiting:
        return
    msg = f"{waiting} can't be run again before others have ended: ask again then"
    if wait:
        raise JobRunning(msg)
    click.echo(msg, err=True)
