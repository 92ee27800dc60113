"""The commands for what a cloud's tasks share: setup, permissions."""

from __future__ import annotations

import click

from cml_runner import clouds
from cml_runner.cli import completion, options

NAME = click.argument("cloud", type=clouds.named, metavar="CLOUD", shell_complete=completion.values)
REGION = options.option(
    "--cloud-region", default="us-west", help="Region, generic or native; a list for several."
)


@click.command("setup", context_settings=options.SETTINGS)
@NAME
@REGION
@options.common
def setup_(cloud: str, cloud_region: str, output: str) -> None:
    """Make what all launches in an account and region share, once.

    Repeating it changes nothing. A launch does it too, if it may; it needs more rights than
    launching.
    """
    new = {region: _load(cloud, region).setup() for region in _regions(cloud_region)}
    if output == "json":
        options.echo_json(new)
        return
    for region, labels in new.items():
        click.echo(f"{cloud} {region}: {', '.join(labels) or 'nothing to do'}")


@click.command("permissions", context_settings=options.SETTINGS)
@NAME
@REGION
@options.option("--doctor", is_flag=True, help="Also allow what only doctor reads.")
@options.common
def permissions_(cloud: str, cloud_region: str, output: str, *, doctor: bool) -> None:
    """Print the least policy for whoever launches, as the cloud wants it; nothing is sent."""
    import json

    regions = _regions(cloud_region)
    documents = [_load(cloud, region).permissions(doctor=doctor) for region in regions]
    for document in documents:
        if output == "json":
            options.echo_json(document)
        else:
            click.echo(json.dumps(document, indent=2))


def _regions(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _load(cloud: str, region: str) -> clouds.Cloud:
    from cml_runner.errors import ConfigurationError

    if cloud not in clouds.NAMES:
        msg = f"{cloud}: choose one of {', '.join(clouds.NAMES)}"
        raise ConfigurationError(msg)
    return clouds.load(cloud, region)
