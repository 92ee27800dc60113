"""The command that looks at everything before money is spent."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from cml_runner import clouds
from cml_runner.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS = ("place", "what", "state", "message", "hint")
COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red", "unknown": "cyan"}


@click.command("doctor", context_settings=options.SETTINGS)
@options.forge
@options.option("--labels", default="cml", help="Labels of the runner, delimited with commas.")
@options.option(
    "--cloud",
    type=clouds.named,
    metavar=options.choice(clouds.NAMES),
    help="Look at this cloud only.  [default: all that have credentials]",
)
@options.option(
    "--cloud-region", default="us-west", help="Region, generic or native; a list for several."
)
@options.option("--cloud-type", default="m", help="As for launch: s, m, l, xl or native.")
@options.option("--cloud-gpu", help="As for launch.")
@options.option("--cloud-hdd-size", metavar="GB", help="As for launch.")
@options.option("--cloud-image", default="ubuntu", help="As for launch: ubuntu, nvidia or native.")
@options.option("--cloud-spot", is_flag=True, help="As for launch.")
@options.option("--cloud-permission-set", help="As for launch.")
@options.option("--cloud-aws-security-group", help="As for launch.")
@options.option("--cloud-aws-subnet", "--cloud-aws-subnet-id", help="As for launch.")
@options.option("--cloud-kubernetes-namespace", help="As for launch.")
@options.option(
    "--cloud-kubernetes-node-selector", multiple=True, metavar="K=V", help="As for launch."
)
@options.option(
    "--cloud-kubernetes-toleration", multiple=True, metavar="K=V:EFFECT", help="As for launch."
)
@options.option("--count", default="1", metavar="N", help="How many machines are wanted.")
@options.common
def doctor_(output: str, **values: Any) -> int:
    """Look at all that a launch needs, before money is spent; nothing is changed.

    Of the forge and of each cloud with credentials: login and clock, permissions, what setup
    makes, quota, machine type, image, network. What can't be looked at is "unknown", and what to
    do about a failure stands beside it. Ends with the exit code that a launch would, or 0.
    """
    from cml_runner import doctor, logs
    from cml_runner.cli import progress
    from cml_runner.launch.options import Options

    logs.hide(values["token"], values["github_app_key"])
    with progress.shown("doctor"):
        found = doctor.examine(Options(**values), os.environ)
    rows = [{"place": one.place, **asdict(one.check)} for one in found]
    if output == "json":
        options.echo_json(rows)
    elif sys.stdout.isatty():
        _show(rows)
    else:
        for row in rows:
            click.echo("\t".join(str(row[column]) for column in COLUMNS))
    return doctor.code(found)


def _show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table for each place."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for place in dict.fromkeys(row["place"] for row in rows):
        table = Table(title=place, title_justify="left", box=None, show_header=False)
        for row in rows:
            if row["place"] == place:
                colour = COLOURS[row["state"]]
                told = Text(row["message"])
                if row["hint"]:
                    told.append(f"\n→ {row['hint']}", style="bold")
                table.add_row(Text(row["state"], style=colour), Text(row["what"]), told)
        console.print(table)
