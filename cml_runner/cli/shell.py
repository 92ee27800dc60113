"""cml-runner ssh: into a machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from cml_runner.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.command("ssh", context_settings=options.SETTINGS)
@click.argument("identifier", metavar="ID|NAME")
@click.argument("command", nargs=-1)
@options.option("--instance", help="Which machine.  [default: the first that runs]")
@options.place
@options.log
def ssh_(
    identifier: str, command: Sequence[str], instance: str, cloud: str, cloud_region: str
) -> None:
    """Get a shell on a machine of a runner or task, or run a command, given after --, on it.

    Nothing is open before, and nothing is left open. Its exit code is that of the shell or of the
    command, where the cloud tells it.
    """
    from cml_runner import inventory

    found = inventory.find(identifier, cloud, cloud_region)
    with inventory.shell(found, instance, command) as shell:
        code = shell.run()
    sys.exit(code)
