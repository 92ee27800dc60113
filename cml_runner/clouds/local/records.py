"""What lease.json and group.json say, and where the machines are."""

from __future__ import annotations

import sys
from collections.abc import Mapping  # noqa: TC003 - msgspec reads the annotations at run time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Literal

import msgspec

from cml_runner.clouds.local import files
from cml_runner.clouds.local.processes import Process

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COMMAND = (sys.executable, "-m", "cml_runner.supervise")
GRACE = 10.0  # seconds from SIGTERM to SIGKILL; half of that at the deadline
SETTINGS = "settings.json"  # store.SETTINGS, which is a layer above


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What lease.json says: the task exists, until when, and who is launching it."""

    created: datetime
    expires: datetime | None
    tags: Mapping[str, str]
    launcher: Process
    launched: bool = False
    keeps: bool = False  # it stays when the machines are gone


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What group.json says: the machines that there should be, and until when."""

    ranks: tuple[int, ...] = ()  # the group's size is how many there are
    expires: datetime | None = None
    command: tuple[str, ...] = COMMAND
    grace: float = GRACE
    over: Literal["", "finished", "deleted"] = ""


def claim(directory: Path) -> Claim | None:
    """Read the lease of a task, None if it is over; one that is damaged has expired."""
    path = directory / "lease.json"
    try:
        return files.read(path, Claim)
    except msgspec.MsgspecError:
        at = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
        return Claim(created=at, expires=at, tags={}, launcher=Process(0, 0), launched=True)


def wish(directory: Path) -> Wish | None:
    """Read what a group should be, None if there is no group; a damaged one had better end."""
    try:
        return files.read(directory / "group.json", Wish)
    except msgspec.MsgspecError:
        return Wish(over="deleted")


def machines(directory: Path) -> list[Path]:
    """List the directories of machines which have not ended, by rank."""
    found = [path for path in directory.glob("machines/*.*") if not (path / "ended").exists()]
    return sorted(found, key=lambda path: (rank(path), incarnation(path)))


def rank(machine: Path) -> int:
    """Which of its group's machines this is; those in whose place it came had the same."""
    return int(machine.name.split(".")[0])


def incarnation(machine: Path) -> int:
    """How many machines of its rank there have been, with this one."""
    return int(machine.name.split(".")[1])


def change(directory: Path, edit: Callable[[Wish], Wish]) -> Wish | None:
    """Replace a group's wish; None if there is no group, or none for long."""
    if wish(directory) is None:
        return None
    with files.locked(directory.parent):
        old = wish(directory)
        if old is None or old.over:
            return None
        new = edit(old)
        files.save(directory / "group.json", new)
        return new
