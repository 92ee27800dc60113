"""The commands for what has been launched: list, show, logs, interrupt, destroy, gc."""

from __future__ import annotations

import os
import sys
from datetime import datetime, timezone
from functools import cache
from typing import TYPE_CHECKING, Any

import click

from cml_runner import times
from cml_runner.cli import options
from cml_runner.errors import CleanupFailed, ConfigurationError, RunnerError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cml_runner.access import Access
    from cml_runner.sweep import Report

REPORT = ("id", "kind", "place", "reason", "outcome")
COLUMNS = ("id", "name", "cloud", "region", "states", "jobs", "age", "left", "cost")


@click.command("list", context_settings=options.SETTINGS)
@options.place
@options.common
def list_(cloud: str, cloud_region: str, output: str) -> None:
    """List what is there, of all clouds or of one."""
    from cml_runner import inventory

    rows = inventory.rows(inventory.tasks(cloud, cloud_region))
    if output == "json":
        options.echo_json(rows)
    elif rows:
        table(COLUMNS, [_with_times(row) for row in rows])
    else:
        click.echo("nothing is there", err=True)


@click.command("show", context_settings=options.SETTINGS)
@click.argument("identifier", metavar="ID|NAME")
@options.place
@options.common
def show_(identifier: str, cloud: str, cloud_region: str, output: str) -> None:
    """Show all that is known of one: machines, jobs, events."""
    from cml_runner import inventory

    details = inventory.details(inventory.find(identifier, cloud, cloud_region))
    if output == "json":
        options.echo_json(details)
    else:
        page(details)


@click.command("logs", context_settings=options.SETTINGS)
@click.argument("identifier", metavar="ID|NAME")
@options.option("-f", "--follow", is_flag=True, help="Go on until the runner is over.")
@options.place
@options.common
def logs_(identifier: str, cloud: str, cloud_region: str, output: str, *, follow: bool) -> None:
    """Print what its machines have logged, also after they are gone."""
    from cml_runner import inventory

    found = inventory.find(identifier, cloud, cloud_region)
    several = len(found.bucket.ranks()) > 1
    for rank, text in inventory.logs(found, follow=follow):
        for line in text.splitlines():
            if output == "json":
                options.echo_json({"rank": rank, "line": line})
            else:
                click.echo(f"{rank}| {line}" if several else line)


@click.command("interrupt", context_settings=options.SETTINGS)
@click.argument("identifier", metavar="ID|NAME")
@options.option("--instance", help="Which machine.  [default: the first that runs]")
@options.option(
    "--after", default="120", metavar="DURATION", help="Time between the notice and the end."
)
@options.option(
    "--real",
    is_flag=True,
    help="Have the cloud's own simulation do it, in earnest, when it likes.",
)
@options.place
@options.common
def interrupt_(
    identifier: str,
    instance: str,
    after: str,
    cloud: str,
    cloud_region: str,
    output: str,
    *,
    real: bool,
) -> None:
    """Take a spot machine away as its cloud would, to see what happens then."""
    from cml_runner import inventory

    found = inventory.find(identifier, cloud, cloud_region)
    if real:
        inventory.evict(found, instance)
    else:
        inventory.interrupt(found, instance, times.seconds(after))
    if output == "json":
        left = None if real else times.seconds(after)
        options.echo_json({"id": str(found.id), "after": left})
    elif real:
        click.echo(f"{found.id}: the cloud will take a machine away", err=True)
    else:
        click.echo(f"{found.id}: a machine has {times.text(times.seconds(after))} left", err=True)


@click.command("destroy", context_settings=options.SETTINGS)
@click.argument("identifiers", metavar="ID|NAME…", nargs=-1, required=True)
@options.place
@options.forge
@options.common
def destroy_(
    identifiers: Sequence[str], cloud: str, cloud_region: str, output: str, **values: Any
) -> None:
    """End runners at once, with all that belongs to them, their logs included.

    Given the repository and a token, what is still registered is taken off the forge too.
    """
    from cml_runner import inventory, sweep

    several = [inventory.find(text, cloud, cloud_region) for text in identifiers]
    for found in several:
        if found.lease and found.lease.keeps:
            msg = f"{found.id} is a task: cml-runner task destroy fetches its results first"
            raise ConfigurationError(msg)
    report = sweep.destroy(several, _access(values))
    if output == "json":
        gone = [one.id for one in report.items if one.outcome == "removed"]
        failed = {one.id: one.error for one in report.items if one.outcome == "failed"}
        options.echo_json({"destroyed": gone, **({"failed": failed} if failed else {})})
    else:
        for one in report.items:
            if one.outcome == "removed":
                click.echo(f"{one.id}: destroyed", err=True)
    _complain(report)


@click.command("gc", context_settings=options.SETTINGS)
@options.option(
    "--older-than",
    default="never",
    metavar="DURATION",
    help="Also remove what has been there for so long, whatever its deadline.",
)
@options.option("--dry-run", is_flag=True, help="Say what would be removed; change nothing.")
@options.place
@options.forge
@options.common
def gc_(
    older_than: str, cloud: str, cloud_region: str, output: str, *, dry_run: bool, **values: Any
) -> None:
    """Remove what is past its deadline, and what launches that died have left behind.

    Given the repository and a token, on the forge too: runners that cml-runner registered, and
    that have been silent for a day. Safe in cron: what is being launched, or within its time, is
    never touched, nor what others have registered. What can't be looked at is told, and in the
    exit code.
    """
    from cml_runner import sweep

    age = times.seconds(older_than)
    report = sweep.Sweep(cloud, cloud_region, age, dry_run, _access(values)).run()
    if output == "json":
        options.echo_json(report.document())
    elif report.items:
        _listed(report)
    elif not report.unseen:
        click.echo("nothing to remove", err=True)
    _complain(report)


def _listed(report: Report) -> None:
    """Print what was found: a table on a terminal, on stdout."""
    from dataclasses import asdict

    words = {"found": "would be removed"}
    rows = [asdict(one) for one in report.items]
    for row in rows:
        row["outcome"] = words.get(row["outcome"], row["outcome"])
    table(REPORT, rows)


def _complain(report: Report) -> None:
    """Say what could not be removed or looked at, and end with the code for it."""
    places: dict[str, list[str]] = {}
    for unseen in report.unseen:
        places.setdefault(unseen.error, []).append(unseen.place)
    for error, where in places.items():
        click.echo(f"not looked at: {', '.join(where)}: {error}", err=True)
    failed = [one for one in report.items if one.outcome == "failed"]
    for one in failed:
        if one.kind == "registration":
            click.echo(f"{one.id} can't be taken off {one.place}: {one.error}", err=True)
    if costly := [one for one in failed if one.kind != "registration"]:
        raise CleanupFailed([(one.id, RunnerError(one.error)) for one in costly])
    if report.code:
        sys.exit(report.code)


def _access(values: Mapping[str, Any]) -> Callable[[], Access | None]:
    """Speak to the forge only if there is something to do there and we were told how."""

    @cache
    def find() -> Access | None:
        from cml_runner import access

        if not values["repo"]:
            return None
        return access.find(options.asked(values), os.environ)

    return find


def _with_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """Add how long it has been there, and how long it may be."""
    now = datetime.now(timezone.utc)
    age = now - datetime.fromisoformat(row["created"])
    left = datetime.fromisoformat(row["expires"]) - now if row["expires"] else None
    return {
        **row,
        "age": times.text(age.total_seconds()),
        "left": times.text(max(0, left.total_seconds())) if left else "for ever",
        "cost": "" if row["cost"] is None else f"~{row['cost']:.2f} USD",
    }


def page(details: Mapping[str, Any]) -> None:
    """Print what is simple line by line, and below it the tables."""
    tables = {}
    for key, value in details.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            tables[key] = value
        elif value not in ([], None):
            click.echo(f"{key:11} {_plain(value)}")
    for key, rows in tables.items():
        click.echo(f"\n{key}")
        table(tuple(rows[0]), rows)


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table on a terminal, and lines of tab-separated values elsewhere."""
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(_plain(row[column]) for column in columns))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(_plain(row[column]) for column in columns))
    Console().print(table)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(
            f"{count} {state}" if isinstance(count, int) else f"{state}={count}"
            for state, count in value.items()
        )
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
