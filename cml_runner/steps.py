"""Create the resources of a task; delete them backwards."""

from __future__ import annotations

import logging
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from graphlib import TopologicalSorter
from itertools import count
from typing import TYPE_CHECKING

from cml_runner import signals
from cml_runner.errors import AlreadyExists, CleanupFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from cml_runner.clouds import Resource

log = logging.getLogger(__name__)

AT_ONCE = 8  # calls under way; a plan is rarely wider


def create(resources: Sequence[Resource], claim: Resource | None = None) -> list[Resource]:
    """Create all resources, independent ones at the same time, or none; return the new ones.

    With a claim (one of the resources, which all others of this task need) the whole task must be
    new: AlreadyExists is raised if somebody else created the claim first. When a resource fails,
    or on Ctrl-C, all that this call created is deleted again, and nothing else is.
    """
    tried: list[Resource] = []
    new: list[Resource] = []
    number = count(1)

    def one(resource: Resource) -> None:
        log.info("[%d/%d] creating %s", next(number), len(resources), resource.label)
        tried.append(resource)
        if resource.create():
            new.append(resource)
        elif resource is claim:
            msg = f"the {resource.label} of this name exists already"
            raise AlreadyExists(msg)

    try:
        _walk(resources, _needs(resources), one)
    except BaseException:
        # A creation that failed may have been carried out all the same; who holds the claim
        # knows that it can only be its own.
        _undo(resources, tried if any(resource is claim for resource in new) else new)
        raise
    return new


def _always() -> bool:
    return True


def delete(resources: Sequence[Resource], permit: Callable[[], bool] = _always) -> None:
    """Delete every resource that can be deleted, users before what they use.

    What is used by one that could not be deleted stays too: by it the rest will be found again.
    Before each one is deleted `permit` is asked if it still has to be: what has its name may be
    somebody else's by now. Raises CleanupFailed, at the end, with all that could not be deleted.
    """
    failures: list[tuple[str, Exception]] = []
    staying: list[Resource] = []
    number = count(1)

    def one(resource: Resource) -> None:
        if any(need is resource for user in staying for need in user.needs):
            log.info("keeping %s", resource.label)  # design 16
            staying.append(resource)
            return
        try:
            if not permit():
                return
            log.info("[%d/%d] deleting %s", next(number), len(resources), resource.label)
            resource.delete()
        except Exception as error:
            log.debug("deleting %s", resource.label, exc_info=True)
            failures.append((resource.label, error))
            staying.append(resource)

    users: dict[int, list[int]] = {index: [] for index in range(len(resources))}
    for index, needs in _needs(resources).items():
        for need in needs:
            users[need].append(index)
    _walk(resources, users, one)
    if failures:
        raise CleanupFailed(failures)


def _undo(resources: Sequence[Resource], ours: Sequence[Resource]) -> None:
    left = [resource for resource in resources if any(resource is one for one in ours)]
    if not left:
        return
    log.warning("deleting what was created: %s", ", ".join(item.label for item in left))
    with uninterrupted():
        delete(left)


def _needs(resources: Sequence[Resource]) -> dict[int, list[int]]:
    """Draw the graph by identity: two resources of one plan may be equal."""
    place = {id(resource): index for index, resource in enumerate(resources)}
    return {
        index: [place[id(need)] for need in resource.needs if id(need) in place]
        for index, resource in enumerate(resources)
    }


def _walk(
    resources: Sequence[Resource],
    needs: Mapping[int, Sequence[int]],
    work: Callable[[Resource], None],
) -> None:
    """Do the work on each resource once it's done on those that it needs; stop at an error."""
    sorter = TopologicalSorter(needs)
    sorter.prepare()
    running: dict[Future[None], int] = {}
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="step") as pool:
        try:
            while sorter.is_active():
                for index in sorter.get_ready():
                    running[pool.submit(work, resources[index])] = index
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    sorter.done(running.pop(future))
                    future.result()
        except BaseException:
            with uninterrupted():  # whatever has begun must end before it can be undone
                pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back while something runs that must not be left half done."""

    def say(*_: object) -> None:
        log.warning("still clearing up: please wait")

    with signals.undisturbed(say):
        yield
