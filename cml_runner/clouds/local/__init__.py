"""The embedded cloud: this computer, which needs no account and costs nothing.

It behaves as the others do. A machine is a group of processes with a directory of its own, the
bucket is a directory, and the group is a small detached program, the keeper, which outlives the
launcher: it re-creates machines that die and ends everything at the deadline. A task lives in
$CML_RUNNER_HOME (~/.cml-runner)/local/REGION/IDENTIFIER, or in ABSOLUTE-PATH/IDENTIFIER:

    lease.json       since when the task exists, until when, and who launches it: the claim
    bucket/          settings, logs, status, and events.jsonl: what happened in the group
    group.json       which machines there should be, and until when; exists with the group
    keeper.lock      locked while the keeper lives; who that is stands in keeper.json
    keeper.log       what a keeper can't tell anybody
    machines/0.1/    rank 0, first incarnation: bootstrap.sh, console.log, machine.json;
                     notice.json once it is about to be taken away, `left` once it has left
                     its task, `ended` when no process of it exists any more

Once all machines have left, or at the deadline, only logs, status and events stay, for a week;
of a task with data the lease and the data stay too, until it is deleted.
Whoever asks about a task starts its keeper again, should somebody have killed it.
"""

from __future__ import annotations

import errno
import os
import platform
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cml_runner import clouds
from cml_runner.clouds.local import checks, files, processes, records
from cml_runner.clouds.local.keeper import wake
from cml_runner.clouds.local.processes import VARIABLE
from cml_runner.clouds.local.resources import Bucket, Group
from cml_runner.errors import ConfigurationError, RunnerError
from cml_runner.model import Identifier, Lease, Notice, Quote
from cml_runner.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime

    from cml_runner.model import Check, Task

LAUNCH = timedelta(hours=1)  # the longest that one can take


class Cloud:
    """The computer that we are on. A region is a directory, and all sizes are the same."""

    dedicated = metadata_service = False
    keeps = True
    command: Sequence[str] = records.COMMAND  # what runs on a machine; a test may take another
    grace: float = records.GRACE  # likewise

    def __init__(self, region: str) -> None:
        if region not in clouds.REGIONS and not os.path.isabs(region):
            names = ", ".join(clouds.REGIONS)
            msg = f"region {region!r}: the local cloud has {names}, or any absolute path"
            raise ConfigurationError(msg)
        home = os.environ.get("CML_RUNNER_HOME") or "~/.cml-runner"
        self.region = Path(home).expanduser().joinpath("local", region).resolve()

    def plan(self, task: Task) -> clouds.Plan:
        """Take anything that means something here, or nothing; spot machines are welcome."""
        if mistakes := _mistakes(task):
            raise ConfigurationError(*mistakes)
        bucket = Bucket(self.region / str(task.id), task)
        group = Group(bucket, tuple(self.command), self.grace)
        arm = platform.machine().lower() in ("aarch64", "arm64")
        arch: Literal["x64", "arm64"] = "arm64" if arm else "x64"
        return clouds.Plan(resources=(bucket, group), group=group, bucket=bucket, arch=arch)

    def container(self, address: str, options: Mapping[str, str]) -> Store:
        """Open a directory, which must be there; no option makes sense."""
        path = Path(address)
        if not path.is_absolute() or not path.is_dir() or options:
            msg = f"--storage-container {address}: on the local cloud, a directory that is there"
            raise ConfigurationError(msg)
        return Store(path.as_uri())

    def tasks(self) -> list[Lease]:
        """List the tasks of this region.

        One whose launcher died before it was done has expired already.
        """
        found = []
        for directory in sorted(self.region.glob("*-*-*")):
            with suppress(ConfigurationError, FileNotFoundError):
                identifier = Identifier.parse(directory.name)
                if claim := records.claim(directory):
                    found.append(_lease(identifier, claim))
                    with suppress(RunnerError):  # it is listed all the same
                        wake(directory)
        return found

    def lease(self, identifier: Identifier) -> Lease | None:
        """Read its claim."""
        with suppress(FileNotFoundError):
            claim = records.claim(self.region / str(identifier))
            return _lease(identifier, claim) if claim else None
        return None

    def older(self) -> list[Lease]:
        """Know none."""
        return []

    def now(self) -> datetime:
        """Look at this computer's clock, which is the cloud's."""
        return files.now()

    def setup(self) -> list[str]:
        """Make nothing: the tasks share nothing."""
        return []

    def permissions(self, *, doctor: bool = False) -> Mapping[str, Any]:
        """Ask for nothing: whoever may use this computer may use the cloud."""
        del doctor
        return {}

    def checks(self, task: Task) -> Iterator[Check]:
        """Look at this computer."""
        return checks.checks(self.region, lambda: self.plan(task))

    def quotes(self, task: Task) -> list[Quote]:
        """Ask nothing for what is there already."""
        return [Quote(type=name, price=0, on_demand=0) for name in task.machine.types]

    @staticmethod
    def rank() -> int:
        """Read it from the name of this machine's directory."""
        machine = os.environ.get(VARIABLE)
        return records.rank(Path(machine)) if machine else 0

    @staticmethod
    def notice() -> Notice | None:
        """Read this machine's metadata, which is a file."""
        machine = os.environ.get(VARIABLE)
        if machine and not os.path.isdir(machine):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), machine)
        return files.read(Path(machine, "notice.json"), Notice) if machine else None

    @staticmethod
    def forgotten() -> None:
        """The bucket keeps it all."""

    @staticmethod
    def machine() -> str:
        """Read it from the name of this machine's directory."""
        return Path(os.environ.get(VARIABLE) or "/").name

    def leave(self, identifier: Identifier, url: str, *, last: bool) -> None:
        """Mark this machine as not needed any more; the caller has some seconds left to exit.

        Does nothing on what isn't a machine of this task. The keeper sees who is the last one.
        """
        machine = Path(os.environ.get(VARIABLE) or "/")
        directory = machine.parent.parent
        if directory.name == str(identifier) and machine.is_dir():
            with files.translated():
                (machine / "left").touch()
                wake(directory)


def _mistakes(task: Task) -> list[str]:
    """List all that can't be had here."""
    machine, refused = task.machine, "makes no sense on the local cloud: leave it out"
    sizes = ", ".join(clouds.SIZES)
    found = [
        f"type {one!r}: use one of {sizes}" for one in machine.types if one not in clouds.SIZES
    ]
    named = {
        f"gpu {machine.gpu}": machine.gpu not in ("", "nogpu"),
        f"image {machine.image}": machine.image not in ("", "ubuntu"),
        "permission-set": machine.permissions,
        "ssh-private": machine.ssh_key,
        **dict.fromkeys(machine.options, True),
    }
    return found + [f"--cloud-{name} {refused}" for name, given in named.items() if given]


def _lease(identifier: Identifier, claim: records.Claim) -> Lease:
    expires = claim.expires
    if not claim.launched:
        alive = processes.alive(processes.find(claim.launcher))
        expires = claim.created + (LAUNCH if alive else timedelta())
    return Lease(
        id=identifier,
        created=claim.created,
        expires=expires,
        tags=claim.tags,
        keeps=claim.keeps and claim.launched,
        launched=claim.launched,
    )
