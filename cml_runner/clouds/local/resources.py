"""The resources of a task: its bucket, which is the claim, and its group of machines."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from itertools import count as numbers
from itertools import islice
from typing import TYPE_CHECKING, Literal

import msgspec
import psutil

from cml_runner import clouds
from cml_runner.clouds.local import files, processes, records
from cml_runner.clouds.local.keeper import Keeper, wake
from cml_runner.clouds.local.machine import environment
from cml_runner.clouds.local.records import Wish
from cml_runner.errors import ConfigurationError, NotFound
from cml_runner.model import Happening, Identifier, Instance, Notice
from cml_runner.store import Store
from cml_runner.terminal import Program

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime
    from pathlib import Path

    from cml_runner.clouds import Resource
    from cml_runner.model import Task

NOTICE = 30.0  # seconds, as short as any cloud's
RECORD_KEPT = timedelta(days=7)


@dataclass(frozen=True)
class Bucket:
    """A directory. Who has its lease has the task."""

    directory: Path
    task: Task
    label: str = "bucket"
    needs: tuple[Resource, ...] = ()

    @cached_property
    def store(self) -> Store:
        """A directory, of use on this computer."""
        return Store((self.directory / "bucket").as_uri())

    @files.translated()
    def create(self) -> bool:
        """Take the lease, unless somebody has it.

        An older task's record has to go, and so has what a launcher left that died at its work.
        """
        region = self.directory.parent
        files.make(region)
        with files.locked(region):
            _prune(region)
            old = records.claim(self.directory)
            if old is None:
                files.remove(self.directory)
            elif old.launched or processes.alive(processes.find(old.launcher)):
                return False
            self._begin()
        if old:
            Group(self).delete()
        return True

    @files.translated()
    def delete(self) -> None:
        """Delete the whole directory, once nothing runs in it."""
        Group(self).delete()
        if self.directory.exists():
            with files.locked(self.directory.parent):
                for path in (self.directory / "bucket", self.directory / "machines"):
                    files.remove(path)
                files.remove(self.directory)

    def _begin(self) -> None:
        """Write the lease, and only then what is secret, or nothing."""
        launcher = processes.identify(psutil.Process())
        task = self.task
        claim = records.Claim(
            created=files.now(),
            expires=task.expires,
            tags=task.tags,
            launcher=launcher,
            keeps=task.keeps,
        )
        try:
            files.make(self.directory / "bucket")
            files.save(self.directory / "lease.json", claim)
            files.write(self.directory / "bucket" / records.SETTINGS, task.settings.encode())
        except BaseException:
            files.remove(self.directory)
            raise


def _prune(region: Path) -> None:
    """Delete the records of tasks that were over long ago."""
    oldest = (files.now() - RECORD_KEPT).timestamp()
    for directory in region.glob("*-*-*"):
        with suppress(ConfigurationError, OSError):
            Identifier.parse(directory.name)
            if not (directory / "lease.json").exists() and directory.stat().st_mtime < oldest:
                files.remove(directory)


@dataclass(frozen=True)
class Group:
    """A wish, and the keeper who fulfils it."""

    bucket: Bucket
    command: tuple[str, ...] = records.COMMAND
    grace: float = records.GRACE
    label: str = "group of machines"

    @property
    def needs(self) -> tuple[Resource, ...]:
        """The keeper reports into the bucket."""
        return (self.bucket,)

    @property
    def directory(self) -> Path:
        """Where the task lives."""
        return self.bucket.directory

    @files.translated()
    def create(self) -> bool:
        """Start a keeper, which has no machine to keep yet."""
        if (old := records.wish(self.directory)) and old.over:
            self.delete()
        if records.claim(self.directory) is None:
            msg = f"{self.directory.name} has no bucket: create that first"
            raise NotFound(msg)
        path = self.directory / "group.json"
        with files.locked(self.directory.parent):
            new = not path.exists()
            if new:
                expires = self.bucket.task.expires
                files.save(path, Wish(expires=expires, command=self.command, grace=self.grace))
        try:
            wake(self.directory)
        except BaseException:
            if new:
                path.unlink(missing_ok=True)
            raise
        return new

    @files.translated()
    def delete(self) -> None:
        """Have the keeper end all machines and itself; should it not obey, do it here."""
        wish = records.wish(self.directory)
        if wish is None and not (self.directory / "machines").exists():
            return
        process = processes.find(files.read(self.directory / "keeper.json", processes.Process))
        records.change(self.directory, lambda wish: replace(wish, over="deleted"))
        wake(self.directory, start=False)
        with suppress(FileNotFoundError):  # somebody has deleted the whole task
            lock = self._dismiss(process, 2 * (wish.grace if wish else records.GRACE))
            with os.fdopen(lock):
                keeper = Keeper(self.directory)
                while (pause := keeper.turn()) is not None:
                    time.sleep(min(pause, 0.05))
        while processes.alive(process):
            time.sleep(0.01)

    @files.translated()
    def resize(self, count: int) -> None:
        """Ask the keeper for that many; of too many machines, those of the highest ranks go."""

        def resized(wish: Wish) -> Wish:
            kept = wish.ranks[:count]
            more = islice((rank for rank in numbers() if rank not in kept), count - len(kept))
            return replace(wish, ranks=tuple(sorted((*kept, *more))))

        if records.change(self.directory, resized) is None:
            raise self._missing
        wake(self.directory)

    @files.translated()
    def instances(self) -> list[Instance]:
        """List those machines which run, or are about to."""
        wish = records.wish(self.directory)
        if wish is None:
            return []
        wake(self.directory)
        found = [_instance(path, wish) for path in records.machines(self.directory)]
        return [instance for instance in found if instance]

    @files.translated()
    def events(self) -> list[Happening]:
        """Read what the keeper has written down, even after it has gone."""
        found = []
        with suppress(FileNotFoundError):
            for line in (self.directory / "bucket" / "events.jsonl").read_bytes().splitlines():
                with suppress(msgspec.DecodeError):  # the last may not be complete yet
                    found.append(msgspec.json.decode(line, type=Happening))
        return found

    @files.translated()
    def expire(self, at: datetime | None) -> None:
        """Tell the keeper; with that, the task is launched."""
        if records.change(self.directory, lambda wish: replace(wish, expires=at)) is None:
            raise self._missing
        with files.locked(self.directory.parent):
            if claim := records.claim(self.directory):
                launched = replace(claim, expires=at, launched=True)
                files.save(self.directory / "lease.json", launched)
        wake(self.directory)

    @files.translated()
    def interrupt(self, instance: str, after: float) -> None:
        """Write the notice; the keeper will see to it. No name stands for the first machine."""
        name = self._running(instance)
        notice = Notice(reason="spot interruption", deadline=files.now() + timedelta(seconds=after))
        files.save(self.directory / "machines" / name / "notice.json", notice)
        wake(self.directory)

    def evict(self, instance: str) -> None:
        """Write the notice that machines have here in earnest, too."""
        self.interrupt(instance, NOTICE)

    def shell(self, instance: str, command: Sequence[str]) -> AbstractContextManager[Program]:
        """Run it as a part of the machine: in its directory, and it ends with the machine."""
        directory = self.directory / "machines" / self._running(instance)
        variables = {**environment(), processes.VARIABLE: str(directory)}
        variables["TERM"] = os.environ.get("TERM", "dumb")
        arguments = tuple(command) or (os.environ.get("SHELL") or "/bin/sh",)
        return nullcontext(Program(arguments, variables, directory, alone=True))

    @files.translated()
    def console(self) -> str:
        """Read the console of the one which ended last, or of the youngest."""
        machines = list(records.machines(self.directory))
        written = [path for path in machines if (path / "console.log").exists()]

        def order(path: Path) -> tuple[bool, float]:
            return (path / "ended").exists(), (path / "console.log").stat().st_mtime

        newest = max(written, key=order, default=None)
        return (newest / "console.log").read_text(errors="replace") if newest else ""

    def _running(self, instance: str) -> str:
        return clouds.running(self.instances(), instance, self.directory.name)

    @property
    def _missing(self) -> NotFound:
        return NotFound(f"{self.directory.name} has no machines any more: launch it again")

    def _dismiss(self, keeper: psutil.Process | None, patience: float) -> int:
        """Wait until the keeper has ended, or end it, and take its place."""
        end = time.monotonic() + patience
        while (lock := files.lock(self.directory / "keeper.lock")) is None:
            if keeper and time.monotonic() > end:
                with suppress(psutil.NoSuchProcess):
                    keeper.kill()
            time.sleep(0.02)
        return lock


def _instance(machine: Path, wish: Wish) -> Instance | None:
    status: Literal["starting", "running", "stopping"] = "starting"
    if process := files.read(machine / "machine.json", processes.Process):
        if not processes.alive(processes.find(process)):
            return None
        left = (machine / "left").exists()
        wanted = records.rank(machine) in wish.ranks and not wish.over and not left
        status = "running" if wanted else "stopping"
    return Instance(id=machine.name, status=status, address="127.0.0.1")
