"""The agent of the embedded forge: how it is started, what it says, how it is told to end."""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from cml_runner import __version__
from cml_runner.forges.local.address import path
from cml_runner.model import Command, Event, Exited, Job, JobEnded, JobStarted, Ready, Troubled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from cml_runner.model import Package, Registration

RESULTS = ("succeeded", "failed", "cancelled")
SECRET = "LOCAL_FORGE_SECRET"  # noqa: S105 - the variable's name
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
ENDED, REFUSED, TRY_AGAIN, DELETED = 0, 1, 2, 7  # exit codes


class Agent:
    """The program in __main__.py, as the supervisor sees it."""

    def install(self, directory: Path, packages: Sequence[Package]) -> str:
        """Do nothing: it is installed with us, and of our version."""
        del directory, packages
        return __version__

    def programs(self) -> Mapping[str, str]:
        """Name nothing."""
        return {}

    def command(
        self,
        directory: Path,
        registration: Registration,
        *,
        volumes: Sequence[str] = (),
        idle_timeout: float = 0,
    ) -> Command:
        """Say how to start it; jobs work in directories of their own below this one."""
        del volumes, idle_timeout
        directory.mkdir(parents=True, exist_ok=True)
        root = str(path(registration.url))
        return Command(
            arguments=(sys.executable, "-m", "cml_runner.forges.local", root, registration.name),
            environment={SECRET: registration.secret},
            directory=directory,
        )

    def parse(self, line: str) -> Event | None:
        """Understand one line. Names in it are JSON, so that they can't pretend to be a line."""
        match = re.fullmatch(rf"{STAMP} agent: (.+)", line.rstrip("\n"))
        said = match[1] if match else ""
        if said == "listening for jobs":
            return Ready()
        if match := re.fullmatch(r"running job (\{.+\})", said):
            with suppress(msgspec.MsgspecError):
                return JobStarted(job=msgspec.json.decode(match[1], type=Job))
        if match := re.fullmatch(rf'job ".+" ended: ({"|".join(RESULTS)})', said):
            return JobEnded(succeeded=match[1] == "succeeded")
        if match := re.fullmatch("trouble: (.+)", said):
            return Troubled(message=match[1])
        return None

    def job(self, directory: Path, seen: Job) -> Job:
        """Add nothing: its output says it all."""
        del directory
        return seen

    def exited(self, code: int) -> Exited:
        """Say what its exit code means; one that was killed may be started again."""
        reasons = {
            REFUSED: "it could not start: the directory is gone, or the secret is wrong",
            TRY_AGAIN: "the directory could not be used for now",
            DELETED: "the registration has been deleted",
        }
        reason = f"killed by signal {-code}" if code < 0 else reasons.get(code, "")
        return Exited(code=code, reason=reason, again=code == TRY_AGAIN or code < 0)

    def abort(self, pid: int, reason: str = "") -> None:
        """Make the running job fail at once."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2 if reason else signal.SIGUSR1)

    def drain(self, pid: int) -> None:
        """Do nothing: it has no way to be told."""

    def stop(self, pid: int) -> None:
        """Ask it to end; a running job is cancelled."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    def leave(self, registration: Registration) -> None:
        """Do nothing: what was for one job is gone with it."""
