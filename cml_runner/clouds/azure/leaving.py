"""How a machine ends its part of a task, or all of it, with no more than its identity."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from cml_runner import leases, wait
from cml_runner.clouds.azure import autoscale, machine, resources
from cml_runner.clouds.azure.account import Place
from cml_runner.errors import NotFound, RunnerError
from cml_runner.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.model import Identifier

log = logging.getLogger(__name__)


def leave(region: str, identifier: Identifier, *, last: bool) -> None:
    """Delete this machine and have none in its place or, as the last, delete everything.

    It goes on trying: a machine that just powered itself off would be paid for.
    """
    me = wait.patiently(machine.compute)  # jobs may keep the service busy
    if not me:
        log.warning("the metadata service doesn't say which machine this is")
    if not me or me.get("vmScaleSetName", "").lower() != str(identifier):
        return
    leaving = Leaving(machine.Manager(me), Place(me["subscriptionId"], region), identifier)
    steps = leaving.everything() if last else leaving.alone()
    for step in steps:
        wait.insist(partial(_take, step))


class Leaving:
    """One machine on its way out."""

    def __init__(self, manager: machine.Manager, place: Place, identifier: Identifier) -> None:
        self._manager, self._place, self._identifier = manager, place, identifier
        identity = machine.tags(manager.machine).get(machine.IDENTITY, "")
        self._objects = Store(resources.task_url(place, identifier, identity))
        self._leases = Store(resources.lease_url(place, identity))

    def alone(self) -> tuple[Callable[[], None], ...]:
        """Say what to do while others stay: nobody must come in our place, and nobody else go."""
        return (self._mark, self._lower, self._delete_self)

    def everything(self) -> tuple[Callable[[], None], ...]:
        """Say what to do as the last one; once the scale set is on its way out, so are we."""
        return (
            lambda: leases.clear(self._objects),
            lambda: self._delete("Compute/virtualMachineScaleSets", forceDeletion="true"),
            lambda: self._delete(autoscale.KIND),
            lambda: leases.finish(self._leases, self._identifier),
        )

    def _mark(self) -> None:
        """Put down that we leave; what to hold the group at is told by all such marks."""
        self._objects.claim(f"{autoscale.GONE}{self._manager.machine['name']}", b"")

    def _lower(self) -> None:
        """Lower the number below which Azure makes new machines, not that above which it ends some.

        Who left at the same time may have written at the same time, so look again afterwards.
        """
        path = self._place.id(autoscale.KIND, str(self._identifier))
        for _ in range(10):
            try:
                setting = self._manager.call("GET", path)
            except NotFound:
                return
            marks = len(self._objects.keys(autoscale.GONE))
            lower = autoscale.lowered(setting, marks)
            if lower is None:
                return
            self._manager.call("PUT", path, lower)
        msg = "others keep changing how many machines there should be"
        raise RunnerError(msg)

    def _delete_self(self) -> None:
        name = self._manager.machine["name"]
        with suppress(NotFound):
            self._manager.call("DELETE", self._place.id("Compute/virtualMachines", name))

    def _delete(self, kind: str, **query: str) -> None:
        with suppress(NotFound):
            self._manager.call("DELETE", self._place.id(kind, str(self._identifier)), **query)


def _take(step: Callable[[], None]) -> None:
    with suppress(NotFound):  # the container is gone, and all that was in it
        step()
