"""What a launch needs of this computer."""

from __future__ import annotations

import getpass
import os
import shutil
from typing import TYPE_CHECKING

from cml_runner import checkup
from cml_runner.checkup import Probe
from cml_runner.errors import CredentialsError
from cml_runner.model import Check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LEAST = 1 << 30  # bytes of disk that are not much


def checks(region: Path, read: Callable[[], object]) -> Iterator[Check]:
    """Look at the user, the directory, and what the machines are to be."""
    yield Check(what="login", state="ok", message=getpass.getuser())
    yield Check(what="clock", state="ok", message="it is ours")
    _, mistakes = checkup.understood(read)
    yield from mistakes
    hint = "choose another directory: CML_RUNNER_HOME"
    yield from checkup.made(
        [
            Probe(what="directory", look=lambda: _directory(region), hint=hint),
            Probe(what="disk", look=lambda: _disk(region)),
        ]
    )


def _directory(region: Path) -> str:
    there = _nearest(region)
    if not os.access(there, os.W_OK | os.X_OK):
        msg = f"this user may not write to {there}"
        raise CredentialsError(msg)
    return f"{region} can be written"


def _disk(region: Path) -> Check | str:
    free = shutil.disk_usage(_nearest(region)).free
    message = f"{free / 1e9:.0f} GB are free"
    if free < LEAST:
        hint = "make room, or choose another directory: CML_RUNNER_HOME"
        return Check(what="disk", state="warning", message=message, hint=hint)
    return message


def _nearest(path: Path) -> Path:
    """Return what is there of a path."""
    return next(one for one in (path, *path.parents) if one.exists())
