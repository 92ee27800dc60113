"""cml-runner supervise: what runs on the machine."""

from __future__ import annotations

import sys

import click


@click.command("supervise", hidden=True)
@click.argument("url")
def supervise_(url: str) -> None:
    """Be the supervisor of this machine; the settings are in the bucket at URL."""
    from cml_runner import logs, supervise

    logs.set_up(stamped=True)
    sys.exit(supervise.run(url))
