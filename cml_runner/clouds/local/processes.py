"""The processes of the embedded cloud: who they are, and how to end all of a machine's."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Collection

VARIABLE = "LOCAL_CLOUD_MACHINE"  # on a machine: its directory
PATIENCE = 10  # seconds for what was killed to be gone


@dataclass(frozen=True)
class Process:
    """A process that is told apart from a later one of the same number."""

    pid: int
    started: float  # seconds after this computer was: people set clocks


def identify(process: psutil.Process) -> Process:
    """Say what tells it apart."""
    return Process(process.pid, process.create_time() - psutil.boot_time())


def find(process: Process | None) -> psutil.Process | None:
    """Return a process if it still is the one that we mean, though it may be dead."""
    with suppress(psutil.Error):
        found = psutil.Process(process.pid) if process else None
        if process and found and abs(identify(found).started - process.started) < 0.1:
            return found
    return None


def alive(process: psutil.Process | None) -> bool:
    """Say if it runs; one that only waits for its parent to notice doesn't."""
    with suppress(psutil.Error):
        return (
            process is not None
            and process.is_running()
            and process.status() != psutil.STATUS_ZOMBIE
        )
    return False


def kill(directories: Collection[str], sessions: Collection[int]) -> None:
    """Kill every process of these machines, again and again until there is none.

    Raises RunnerError if that takes too long: the disk may hang.
    """
    patience = time.monotonic() + PATIENCE
    quiet = 0
    while quiet < 2:  # twice: what is being executed has no environment for a moment
        found = _members(directories, sessions)
        quiet = 0 if found else quiet + 1
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        if time.monotonic() > patience:
            msg = f"these processes won't die: {[process.pid for process in found]}"
            raise RunnerError(msg)
        if quiet < 2:
            time.sleep(0.005)


def _members(directories: Collection[str], sessions: Collection[int]) -> list[psutil.Process]:
    """Find the processes of machines by session, environment or descent."""
    everybody = [process for process in psutil.process_iter() if process.pid != os.getpid()]
    parents = {process.pid: _parent(process) for process in everybody}
    found = {one.pid for one in everybody if _belongs(one, directories, sessions)}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return [process for process in everybody if process.pid in found and alive(process)]


def _belongs(
    process: psutil.Process, directories: Collection[str], sessions: Collection[int]
) -> bool:
    with suppress(psutil.Error, OSError):
        if os.getsid(process.pid) in sessions:
            return True
        return process.environ().get(VARIABLE) in directories
    return False


def _parent(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return process.ppid()
    return 0
