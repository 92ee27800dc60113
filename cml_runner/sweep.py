"""Clear up safely: what is past its deadline, and what launches that died have left behind.

It may run at any time, several times at once, and beside launches: whatever is decided is decided
by the clock of the cloud that holds a task, and looked up again before anything is deleted.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Literal

from cml_runner import inventory, times
from cml_runner.errors import (
    CleanupFailed,
    MissingDependency,
    NoCredentials,
    NotFound,
    RunnerError,
)
from cml_runner.model import made_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cml_runner.access import Access
    from cml_runner.forges import Forge
    from cml_runner.inventory import Found, Place
    from cml_runner.model import Lease, Runner

log = logging.getLogger(__name__)

PAUSES = (1, 3)  # seconds before a removal that failed is tried again
SILENCE = timedelta(days=1)  # after which nobody waits for a runner any more


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something that has to go, why, and what became of it."""

    kind: Literal["runner", "task", "registration"]
    id: str
    name: str
    place: str  # cloud and region, or the forge's address
    reason: str
    outcome: Literal["found", "removed", "failed"] = "found"
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Unseen:
    """What could not be looked at, so nobody knows what is there."""

    place: str
    error: str
    code: int  # exit code of that error


@dataclass
class Report:
    """What came of a sweep."""

    items: list[Item] = field(default_factory=list)
    unseen: list[Unseen] = field(default_factory=list)

    @property
    def code(self) -> int:
        """The exit code: 0 if everything was looked at, and all that had to go is gone."""
        failed = {one.kind for one in self.items if one.outcome == "failed"}
        if failed:
            return RunnerError.exit_code if failed == {"registration"} else CleanupFailed.exit_code
        return self.unseen[0].code if self.unseen else 0

    def document(self) -> dict[str, Any]:
        """Describe it in JSON's terms: names for scripts, and all that is known below them."""
        return {
            "found": [one.id for one in self.items],
            "removed": [one.id for one in self.items if one.outcome == "removed"],
            "failed": [one.id for one in self.items if one.outcome == "failed"],
            "items": [asdict(one) for one in self.items],
            "unseen": [{"place": one.place, "error": one.error} for one in self.unseen],
        }


@dataclass(frozen=True)
class Sweep:
    """Where to look, and what to do about it."""

    cloud: str = ""
    region: str = ""
    older_than: float = 0  # seconds; 0: only the deadline counts
    dry: bool = False
    access: Callable[[], Access | None] = lambda: None

    def run(self) -> Report:
        """Clear up everywhere; what fails hinders nothing else."""
        self.access()  # what is wrong with that is told before anything is deleted
        report = Report()
        there, report.unseen = look(self.cloud, self.region)
        living = list(there)
        for found, reason in self._overdue(there, report):
            item = _item(found, reason)
            report.items.append(item if self.dry else _removed(found, item, self.access))
            if report.items[-1].outcome == "removed":
                living.remove(found)
        self._registrations(living, report)
        return report

    def _overdue(self, there: Sequence[Found], report: Report) -> list[tuple[Found, str]]:
        """Pick what has to go. A cloud that doesn't tell the time isn't guessed at."""
        found = []
        for place in dict.fromkeys(one.place for one in there):
            try:
                now = place.cloud.now()
            except RunnerError as error:
                report.unseen.append(_unseen(place, error))
                continue
            own = [one for one in there if one.place is place]
            judged = [(one, overdue(one.lease, now, self.older_than)) for one in own if one.lease]
            found += [(one, reason) for one, reason in judged if reason]
        return found

    def _registrations(self, living: Sequence[Found], report: Report) -> None:
        """Sweep the forge that we were told of, if we know all runners that may be on it."""
        access = self.access()
        if not access:
            return
        if self.cloud or self.region:  # others live elsewhere
            living, hidden = look("", "")
            for one in hidden:
                log.warning("can't look for runners on %s: %s", one.place, one.error)
        try:
            forge = access.forge()
            for runner in stale(forge.runners(), living):
                item = _registration(runner, forge.url)
                report.items.append(item if self.dry else _unregistered(runner, item, forge))
        except RunnerError as error:
            unseen = Unseen(place=access.url, error=str(error), code=error.exit_code)
            report.unseen.append(unseen)


def look(cloud: str, region: str) -> tuple[list[Found], list[Unseen]]:
    """List the tasks which are there, oldest first, and the places that can't be looked at.

    Of all clouds, those of which there are no credentials at all are passed over.
    """
    found, failures = inventory.scan(cloud, region, lambda one: one.tasks())
    unseen: list[Unseen] = []
    for place, error in failures:
        if not isinstance(error, MissingDependency | NoCredentials):
            unseen.append(_unseen(place, error))
        elif cloud:
            raise error
    return found, sorted(unseen, key=lambda one: one.place)


def overdue(lease: Lease, now: datetime, older_than: float) -> str:
    """Say why a task has to go; nothing if it may stay. `now` is its cloud's time."""
    if lease.expires and lease.expires < now:
        late = times.text((now - lease.expires).total_seconds())
        if not lease.launched:
            return f"its launch, of {_minute(lease.created)}, was never completed"
        return f"past its deadline, {_minute(lease.expires)}, by {late}"
    age = (now - lease.created).total_seconds()
    if older_than and age > older_than and not _only_data(lease):
        return f"older than {times.text(older_than)}: it has been there for {times.text(age)}"
    return ""


def destroy(several: Sequence[Found], access: Callable[[], Access | None]) -> Report:
    """End tasks at once, whatever their deadline; what fails hinders no other."""
    items = [_removed(found, _item(found, "asked for"), access) for found in several]
    return Report(items)


def stale(runners: Sequence[Runner], living: Sequence[Found]) -> list[Runner]:
    """Pick the registrations of ours whose runner is gone for good.

    Ours are those which say so, or whose name no other program makes up. Of living tasks none is
    taken, nor one that a launch elsewhere may have just made: it must have been silent for a day.
    """
    kept = {name for found in living for name in found.runners()}
    oldest = _now() - SILENCE
    return [
        one
        for one in runners
        if not one.online
        and one.name not in kept
        and (one.ours or made_up(one.name))
        and one.seen
        and one.seen < oldest
    ]


def _removed(found: Found, item: Item, access: Callable[[], Access | None]) -> Item:
    """Remove a task, unless it is another one's turn by now; say what became of it."""

    def work() -> None:
        try:
            inventory.remove(found, access, lambda: _still_there(found))  # design 61
        except RunnerError as error:
            if _still_there(found):
                raise
            if not isinstance(error, CleanupFailed):  # of a forge, when all else was done
                log.warning("%s is gone, but perhaps still registered: %s", found.id, error)

    outcome = _attempted(item, work)
    for pause in PAUSES:
        if outcome.outcome == "failed":  # or somebody else is at it, and is done a moment later
            time.sleep(pause)
            outcome = _attempted(item, work)
    return outcome


def _still_there(found: Found) -> bool:
    """Look again: somebody else may have removed it, and even launched anew under its name."""
    if not found.lease:
        return True  # but a record
    now, before = found.place.cloud.lease(found.id), found.lease
    return bool(now and (now.created, now.expires) == (before.created, before.expires))


def _attempted(item: Item, work: Callable[[], None]) -> Item:
    try:
        work()
    except RunnerError as error:
        return replace(item, outcome="failed", error=str(error))
    return replace(item, outcome="removed")


def _item(found: Found, reason: str) -> Item:
    tags = found.lease.tags if found.lease else {}
    return Item(
        kind="task" if tags.get("kind") == "task" else "runner",
        id=str(found.id),
        name=tags.get("name", str(found.id)),
        place=f"{found.place.name} {found.place.region}",
        reason=reason,
    )


def _unregistered(runner: Runner, item: Item, forge: Forge) -> Item:
    def work() -> None:
        with suppress(NotFound):  # somebody was faster
            forge.unregister(runner)

    return _attempted(item, work)


def _registration(runner: Runner, url: str) -> Item:
    seen = _minute(runner.seen) if runner.seen else "never"
    reason = f"its runner is gone; last seen {seen}"
    return Item(kind="registration", id=runner.name, name=runner.name, place=url, reason=reason)


def _unseen(place: Place, error: RunnerError) -> Unseen:
    where = f"{place.name} {place.region}"
    return Unseen(place=where, error=str(error), code=error.exit_code)


def _only_data(lease: Lease) -> bool:
    """Say if the machines of a task are gone already."""
    return lease.keeps and lease.expires is None


def _minute(at: datetime) -> str:
    return at.astimezone(timezone.utc).isoformat(sep=" ", timespec="minutes")


def _now() -> datetime:
    return datetime.now(timezone.utc)
