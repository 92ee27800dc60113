"""The keeper of a group: makes what is what should be, one turn after another.

`python -m cml_runner.clouds.local DIRECTORY` is that of the task which lives there. SIGHUP has it
look at its task at once; SIGINT and SIGTERM end the task.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import msgspec
import psutil

from cml_runner.clouds.local import files, processes, records
from cml_runner.clouds.local.machine import Machine, environment, kill
from cml_runner.errors import RunnerError
from cml_runner.model import Happening

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path

    from cml_runner.clouds.local.records import Wish

# What stays in the bucket when a task is over.
RECORD = ("log", "status", "price", "events.jsonl", "result", "resume", "data")
YOUNG = 5  # seconds; a machine that dies earlier than that will do so again
LONGEST_PAUSE = 60  # seconds before it is tried again
GLANCE = 0.5  # seconds between two looks at machines whose end nobody tells us


def wake(directory: Path, *, start: bool = True) -> None:
    """Have the keeper look at its task now; start one where a group has none."""
    patience = time.monotonic() + 1
    while files.held(directory / "keeper.lock"):
        if keeper := processes.find(files.read(directory / "keeper.json", processes.Process)):
            with suppress(psutil.NoSuchProcess):
                keeper.send_signal(signal.SIGHUP)
            return
        if time.monotonic() > patience:  # somebody is ending the task in its stead
            return
        time.sleep(0.01)
    if start and records.wish(directory):
        _start(directory)


def _start(directory: Path) -> None:
    """Start a keeper; it is ready, or has failed, when it closes its standard error."""
    command = (sys.executable, "-m", "cml_runner.clouds.local", str(directory))
    try:
        done = subprocess.run(
            command,
            cwd="/",
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            timeout=30,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        msg = f"local cloud: the keeper of {directory.name} is not up after 30 s; try again"
        raise RunnerError(msg) from error
    if records.wish(directory) and not files.held(directory / "keeper.lock"):
        said = done.stderr.decode(errors="replace").strip().splitlines()
        reason = said[-1] if said else "it doesn't say why"
        msg = f"local cloud: the keeper of {directory.name} can't be started: {reason}"
        raise RunnerError(msg)


def main(directory: Path) -> None:
    """Be the keeper of this task, unless there is one."""
    if os.fork():
        os._exit(0)  # a keeper is nobody's child: neither its launcher's nor a machine's
    for _ in range(20):  # others hold the lock for a moment, to see if anybody does
        if (lock := files.lock(directory / "keeper.lock")) is not None:
            break
        time.sleep(0.01)
    else:
        return
    keeper = Keeper(directory)
    with os.fdopen(lock), _woken(keeper) as wait:
        files.save(directory / "keeper.json", processes.identify(psutil.Process()))
        log = os.open(directory / "keeper.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        keeper.run(wait)


@contextmanager
def _woken(keeper: Keeper) -> Iterator[Callable[[float], None]]:
    """Let signals end the keeper's sleep."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    for number in (signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, keeper.stop)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait(seconds: float) -> None:
        select.select([reader], [], [], seconds)
        with suppress(BlockingIOError):
            os.read(reader, 4096)

    yield wait


@dataclass
class Keeper:
    """All that a keeper knows beyond what is in files, which is enough to begin anew."""

    directory: Path
    stopped: bool = False
    machines: list[Machine] = field(default_factory=list)
    failures: dict[int, int] = field(default_factory=dict)  # per rank, in a row
    pauses: dict[int, float] = field(default_factory=dict)  # per rank, until when

    def __post_init__(self) -> None:
        self.machines += map(Machine.adopt, records.machines(self.directory))

    def run(self, wait: Callable[[float], None]) -> None:
        """Keep the group to its end; no error of ours ends it earlier."""
        while True:
            try:
                if (pause := self.turn()) is None:
                    return
            except Exception:
                traceback.print_exc()
                pause = 1
            wait(pause)

    def stop(self, *_: object) -> None:
        """End the task at the next turn."""
        self.stopped = True

    def turn(self) -> float | None:
        """Do what is due; return for how many seconds nothing will be, or None at the end."""
        if not self.directory.exists():  # somebody has deleted it by hand
            kill(self.machines)
            return None
        now = time.time()
        wish = self._wish(now)
        for machine in self.machines:
            self._press(machine, wish, now)
        self._bury([one for one in self.machines if one.end <= now or not one.alive])
        wish = self._wish(now)
        for rank in self._missing(wish):
            if self.pauses.get(rank, 0) <= now:
                self._grow(rank, wish.command)
        if wish.over and not self.machines and self._close(wish):
            return None
        return self._pause(wish)

    def _wish(self, now: float) -> Wish:
        """Read what should be, and see if it's over."""
        none = records.Wish(over="deleted")
        wish = records.wish(self.directory) or none
        late = wish.expires is not None and wish.expires.timestamp() <= now
        if wish.over or not (late or self.stopped):
            return wish
        self._note("info", "the deadline has come" if late else "the keeper was told to end")
        grace = wish.grace / 2 if late else wish.grace
        over = partial(replace, over="finished", grace=grace)
        return records.change(self.directory, over) or none

    def _press(self, machine: Machine, wish: Wish, now: float) -> None:
        """Set the time by which a machine must be gone, if there is a reason."""
        machine.heed()
        unwanted = wish.over or machine.rank not in wish.ranks
        if unwanted:
            machine.ask()
        if unwanted or machine.has("left"):
            machine.end = min(machine.end, now + wish.grace)

    def _bury(self, machines: Sequence[Machine]) -> None:
        """Kill what is left of these machines, and write down how they ended."""
        if not machines:
            return
        kill(machines)
        for machine in machines:
            self.machines.remove(machine)
            self._report(machine)
            if machine.has("left") and not machine.asked:
                records.change(self.directory, partial(_without, machine.rank))
            with suppress(OSError):
                (machine.directory / "ended").touch()

    def _report(self, machine: Machine) -> None:
        name = f"machine {machine.directory.name}"
        if machine.has("left"):
            self._note("info", f"{name} has left")
        elif machine.asked:
            self._note("info", f"{name} was ended")
        elif machine.has("notice.json"):
            self._note("interruption", f"{name} was taken away")
            self.failures.pop(machine.rank, None)
        else:
            self._note("error", f"{name} {machine.epitaph()}")
            self._slow_down(machine.rank, machine.born)

    def _slow_down(self, rank: int, born: float) -> None:
        """Wait for longer and longer before a machine that won't live is tried again."""
        if time.time() - born >= YOUNG:
            self.failures.pop(rank, None)
            return
        failures = self.failures[rank] = self.failures.get(rank, 0) + 1
        self.pauses[rank] = time.time() + min(2 ** (failures - 1), LONGEST_PAUSE)

    def _missing(self, wish: Wish) -> Collection[int]:
        """List the ranks which have no machine and should."""
        return () if wish.over else set(wish.ranks) - {machine.rank for machine in self.machines}

    def _grow(self, rank: int, command: Sequence[str]) -> None:
        """Create a machine, in place of earlier ones of its rank."""
        older = list(self.directory.glob(f"machines/{rank}.*"))
        number = 1 + max(map(records.incarnation, older), default=0)
        name = f"{rank}.{number}"
        try:
            self.machines.append(Machine.create(self.directory / "machines" / name, command))
        except OSError as error:
            self._note("error", f"machine {name} can't be started: {error}")
            self._slow_down(rank, time.time())
            return
        self._note("info", f"machine {name} started")
        for path in older:
            with suppress(OSError):
                files.remove(path)

    def _close(self, wish: Wish) -> bool:
        """Delete all but the record, or the group alone; False if it was created anew."""
        if wish.over == "finished":
            (self.directory / "bucket" / records.SETTINGS).unlink(missing_ok=True)
        with suppress(OSError):  # of files that aren't ours, say
            files.remove(self.directory / "machines")
        with files.locked(self.directory.parent):
            found = records.wish(self.directory)
            if found and not found.over:
                return False
            if wish.over == "finished":
                for path in self.directory.glob("bucket/*"):
                    if not path.name.startswith(RECORD):
                        files.remove(path)
            self._release(wish)
            for name in ("group.json", "keeper.log", "keeper.json", "keeper.lock"):
                (self.directory / name).unlink(missing_ok=True)
        return True

    def _release(self, wish: Wish) -> None:
        """Give the lease of a task up that is over; of one with data it lives as long as these."""
        path = self.directory / "lease.json"
        claim = records.claim(self.directory)
        if claim and claim.keeps and claim.launched:
            files.save(path, replace(claim, expires=None))
        elif wish.over == "finished":
            path.unlink(missing_ok=True)

    def _pause(self, wish: Wish) -> float:
        """Find out for how long there is nothing to do; a minute at most, as clocks get set."""
        now = time.time()
        times = [now + 60, *(machine.end for machine in self.machines)]
        times += [self.pauses.get(rank, 0) for rank in self._missing(wish)]
        if wish.expires and not wish.over:
            times.append(wish.expires.timestamp())
        if any(machine.child is None for machine in self.machines):
            times.append(now + GLANCE)
        return max(0, min(times) - now)

    def _note(self, kind: Literal["info", "interruption", "error"], message: str) -> None:
        """Write an event down; a full disk must not keep us from our work."""
        line = msgspec.json.encode(Happening(at=files.now(), kind=kind, message=message)) + b"\n"
        with suppress(OSError), open(self.directory / "bucket" / "events.jsonl", "ab") as events:
            events.write(line)


def _without(rank: int, wish: Wish) -> Wish:
    """Take a rank away for good; with the last one, the task is over."""
    ranks = tuple(one for one in wish.ranks if one != rank)
    return replace(wish, ranks=ranks, over="" if ranks or not wish.ranks else "finished")
