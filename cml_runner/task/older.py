"""Tasks of terraform-provider-iterative, as far as clouds know them: to be listed and deleted."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cml_runner import inventory, steps
from cml_runner.errors import ConfigurationError, CredentialsError, MissingDependency, RunnerError
from cml_runner.inventory import Found

if TYPE_CHECKING:
    from cml_runner.model import Identifier

log = logging.getLogger(__name__)

PREFIX = "tpi"


def is_old(identifier: Identifier) -> bool:
    """Say if it is one of them."""
    return identifier.prefix == PREFIX


def tasks(cloud: str = "", region: str = "") -> list[Found]:
    """List them, oldest first; what hinders that is told by whoever lists our own."""
    found = []
    for place in inventory.places(cloud, region):
        try:
            found += [Found(lease.id, place, lease) for lease in place.cloud.older()]
        except (CredentialsError, MissingDependency) as error:
            log.debug("%s: %s", place.name, error)
        except RunnerError as error:
            log.warning("%s %s: %s", place.name, place.region, error)
    return sorted(found, key=lambda one: one.lease.created if one.lease else 0)


def counts(found: Found) -> dict[str, int]:
    """Count its machines, if there are any."""
    running = len(found.plan.group.instances())
    return {"running": running} if running else {"stopped": 1}


def destroy(found: Found, *, fetch: bool) -> None:
    """Delete all that there is of it. Its results are not ours to fetch."""
    if fetch:
        place = found.bucket.url.partition("?")[0]
        msg = (
            f"{found.id} is a task of terraform-provider-iterative, whose results are in"
            f" {place}/data: fetch them, then delete it with --no-pull"
        )
        raise ConfigurationError(msg)
    steps.delete(found.plan.resources)
