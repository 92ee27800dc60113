"""The claim on a task in a cloud that has one bucket for all of them: an object, put once.

What such clouds have alike: leases/ID.json is the claim on a name; tasks/ID/ holds the task's
settings, which only its machines may read, and beside them what machines write.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import msgspec

from cml_runner import store
from cml_runner.boot.objects import clear
from cml_runner.boot.objects import finish as _finish
from cml_runner.errors import ConfigurationError, NotFound
from cml_runner.model import Identifier, Lease

if TYPE_CHECKING:
    from cml_runner.model import Task
    from cml_runner.store import Store

LEASES, TASKS = "leases", "tasks"  # what is in a bucket
RENEWED = timedelta(days=30)  # the age at which a program is put again; buckets forget it at 60
LAUNCH = timedelta(hours=1)  # the longest that one can take
AT_ONCE = 16  # objects read


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a lease object holds."""

    created: datetime
    expires: datetime | None
    launched: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    keeps: bool = False  # it stays when the machines are gone

    @classmethod
    def new(cls, task: Task) -> Claim:
        """Make that of a task which is about to be created."""
        now = datetime.now(timezone.utc)
        return cls(created=now, expires=task.expires, tags=dict(task.tags), keeps=task.keeps)

    def encoded(self) -> bytes:
        """Write it."""
        return msgspec.json.encode(self)


def key(identifier: Identifier) -> str:
    """Name a task's lease."""
    return f"{identifier}.json"


def lease(identifier: Identifier, claim: Claim, written: datetime) -> Lease:
    """Say how long a task may be there; one whose launcher died before the end isn't long.

    When that began is told by the bucket's clock: the launcher's own may be wrong.
    """
    expires = claim.expires
    if not claim.launched:
        given_up = max(claim.created, written) + LAUNCH
        expires = min(expires, given_up) if expires else given_up
    return Lease(
        id=identifier,
        created=claim.created,
        expires=expires,
        tags=claim.tags,
        keeps=claim.keeps and claim.launched,
        launched=claim.launched,
    )


def listed(leases: Store) -> list[Lease]:
    """Read all that there are; other objects are nobody's."""

    def read(entry: tuple[str, datetime]) -> Lease | None:
        name, written = entry
        with suppress(ConfigurationError):
            identifier = Identifier.parse(name.removesuffix(".json"))
            claim = leases.load(name, Claim)
            return lease(identifier, claim, written) if claim else None
        return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [found for found in pool.map(read, leases.written("").items()) if found]


def found(leases: Store, identifier: Identifier) -> Lease | None:
    """Read one."""
    claim = leases.load(key(identifier), Claim)
    if claim is None:
        return None
    written = None if claim.launched else leases.when(key(identifier))
    return lease(identifier, claim, written or claim.created)


def mistakes(task: Task, days: int) -> list[str]:
    """Say if a bucket that forgets everything after so many days is none for a task's data."""
    longest = datetime.now(timezone.utc) + timedelta(days=days - 2)
    if not task.keeps or not task.expires or task.expires <= longest:
        return []
    return [f"--timeout: less than {days - 2} days, as our bucket forgets all then"]


def finish(leases: Store, identifier: Identifier) -> None:
    """Delete a task's lease, or leave it without an end to who will delete the data."""
    _finish(leases, str(identifier))


@dataclass(frozen=True, eq=False)
class Bucket:
    """A task's part of a bucket, for a cloud to say where it is and how it is claimed."""

    task: Task
    label: str = field(default="lease", init=False)
    needs: tuple[()] = field(default=(), init=False)
    ours: list[Claim] = field(default_factory=list, init=False)  # what we have put there

    @property
    def store(self) -> Store:
        """Where the task's objects are."""
        raise NotImplementedError

    @property
    def leases(self) -> Store:
        """Where its lease is."""
        raise NotImplementedError

    @property
    def programs(self) -> Store:
        """Where the programs are that machines run; machines only read there."""
        raise NotImplementedError

    def create(self) -> bool:
        """Put the lease there, unless there is one."""
        content = Claim.new(self.task)
        if not self.leases.claim(key(self.task.id), content.encoded()):
            return False
        self.ours.append(content)
        return True

    def delete(self) -> None:
        """Delete all of the task's objects, the lease at last."""
        self.store.remove(self.store.keys(""))
        self.leases.delete(key(self.task.id))

    def finish(self) -> None:
        """Delete the lease, or leave it to whoever will delete the data."""
        finish(self.leases, self.task.id)

    def claim(self) -> Claim | None:
        """Return what the lease holds, as far as we know."""
        return self.ours[0] if self.ours else self.leases.load(key(self.task.id), Claim)

    def renew(self, expires: datetime | None) -> None:
        """Write that the task is launched, and until when it may be there. Raises NotFound."""
        old = self.claim()
        if old is None:
            msg = f"{self.task.id} is gone: launch it again"
            raise NotFound(msg)
        self.leases.save(key(self.task.id), replace(old, expires=expires, launched=True))


@dataclass(frozen=True, eq=False)
class Settings:
    """What the machines read; the only thing that is secret."""

    bucket: Bucket
    label: str = "settings"

    @property
    def needs(self) -> tuple[Bucket, ...]:
        """Without the lease they might be somebody else's."""
        return (self.bucket,)

    def create(self) -> bool:
        """Write them, once the records of an older task of this name are gone."""
        objects, content = self.bucket.store, self.bucket.task.settings.encode()
        with ThreadPoolExecutor(1) as pool:
            older = pool.submit(objects.keys, "")
            new = objects.claim(store.SETTINGS, content)
            if self.bucket.ours:
                objects.remove([one for one in older.result() if one != store.SETTINGS])
                if not new:  # somebody's who didn't clear up
                    objects.write(store.SETTINGS, content)
        return new or bool(self.bucket.ours)

    def delete(self) -> None:
        """Delete them, and all else that nobody wants to read when the task is over."""
        clear(self.bucket.store)


@dataclass(frozen=True, eq=False)
class Program:
    """What the machines run: the launcher's own program, shared by all tasks that run the same."""

    bucket: Bucket
    label: str = "program"

    @property
    def needs(self) -> tuple[Bucket, ...]:
        """Before the lease is there, there may be no bucket."""
        return (self.bucket,)

    def create(self) -> bool:
        """Put it there, unless it will be there for long enough."""
        program, programs = self.bucket.task.program, self.bucket.programs
        name = f"{program.sha256}.whl"
        written = programs.when(name)
        if written is None or datetime.now(timezone.utc) - written > RENEWED:
            programs.write(name, program.wheel)
        return bool(self.bucket.ours)

    def delete(self) -> None:
        """Leave it to others, and to the bucket, which forgets it some day."""
