"""A script as a program, and what it finds when it starts."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from cml_runner.model import Command, Exited

if TYPE_CHECKING:
    from pathlib import Path

    from cml_runner.model import Settings

NOTICE = "notice"  # the file that says until when the script has time


class Shell:
    """A script as a program: all its lines are its own business, and so is its end."""

    def parse(self, line: str) -> None:
        """Understand nothing."""

    def exited(self, code: int) -> Exited:
        """It is done."""
        return Exited(code=code)

    def abort(self, pid: int, reason: str = "") -> None:
        """It has no jobs."""

    def drain(self, pid: int) -> None:
        """It has no jobs."""

    def stop(self, pid: int) -> None:
        """Ask it, and all that it has started, to end."""
        os.killpg(pid, signal.SIGTERM)


def command(settings: Settings, rank: int, epoch: int, place: Path) -> Command:
    """Write the script down, and say how to start it among its data."""
    assert settings.script
    content = settings.script.content
    directory = place / "script"
    directory.mkdir(exist_ok=True)
    path = directory / "run"
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o700), "w") as file:
        file.write(content)
    program = () if content.startswith("#!") else ("/bin/sh",)
    enter = ("/bin/sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", str(place / "data"))
    return Command(
        arguments=(*enter, *program, str(path)),
        environment={
            **settings.script.environment,
            **_variables(settings),
            "CML_RANK": str(rank),
            "CML_EPOCH": str(epoch),
            "CML_NOTICE": str(place / NOTICE),
        },
        directory=directory,
    )


def _variables(settings: Settings) -> dict[str, str]:
    """Name those which are the same on all machines."""
    return {
        "CI": "true",
        "TPI_TASK": "true",
        "TPI_TASK_CLOUD_PROVIDER": settings.cloud,
        "TPI_TASK_CLOUD_REGION": settings.region,
        "TPI_TASK_IDENTIFIER": str(settings.id),
        "CML_WORLD_SIZE": str(len(settings.names)),
        "CML_DEADLINE": str(int(settings.expires.timestamp())) if settings.expires else "",
    }
