"""Tasks of terraform-provider-iterative, as far as clouds know them: to be listed and deleted."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cml_runner import inventory, steps
from cml_runner.errors import ConfigurationError, CredentialsError, MissingDependency
from cml_runner.model import OLDER

if TYPE_CHECKING:
    from cml_runner.inventory import Found
    from cml_runner.model import Identifier

log = logging.getLogger(__name__)


def is_old(identifier: Identifier) -> bool:
    """Say if it is one of them."""
    return identifier.prefix == OLDER


def tasks(cloud: str = "", region: str = "") -> list[Found]:
    """List them, oldest first; what hinders that is told by whoever lists our own."""
    found, failures = inventory.scan(cloud, region, lambda one: one.older())
    for place, error in failures:
        told = isinstance(error, CredentialsError | MissingDependency)
        level = logging.DEBUG if told else logging.WARNING
        log.log(level, "%s %s: %s", place.name, place.region, error)
    return found


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
