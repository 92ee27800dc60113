"""What a new machine runs before our environment is there, and after our supervisor's end.

It runs with the system's Python, 3.9 or newer, from the wheel that the start script has fetched:
so nothing here needs more than the standard library, and nothing imports the rest of the package
but `errors` and `wait`.

    machine   prepare this machine and start its supervisor as a service
    container become the supervisor of this container
    end       end this machine as its cloud does, after the supervisor's end

Each cloud with machines has a module here. It says how a machine, with nothing but its own
identity, reads and writes its task's objects, and how it ends.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

WORD = Path("/run/cml-runner-word")  # a file: why the supervisor failed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    class Objects(Protocol):
        """A part of a bucket: objects by name. Each method raises RunnerError."""

        def read(self, key: str) -> bytes | None:
            """Return an object's content; None if there is no such object."""

        def write(self, key: str, content: bytes) -> None:
            """Put an object there, in place of an older one."""

        def claim(self, key: str, content: bytes) -> bool:
            """Put an object there unless there is one; False if there is."""

        def keys(self, prefix: str) -> list[str]:
            """List the names that begin with a prefix, sorted.

            Objects in folders, a/b, are listed if the prefix names their folder, a/, or is empty.
            """

        def remove(self, keys: Sequence[str]) -> None:
            """Remove objects; an absent one is removed already."""

    class Machine(Protocol):
        """The one of a task's machines that we are on. Nothing is sent before it is asked.

        Each verb makes one attempt and may be repeated. It raises RunnerError or OSError when it
        fails; `wait.insist` goes on until it has worked.
        """

        url: str  # of its part of the bucket
        ends_with_power: bool  # once it has left, powering it off is enough
        objects: Objects  # the task's part of the bucket
        leases: Objects  # the claims on names, one for each task

        def name(self) -> str:
            """Return this machine's own name; no other one ever has it."""

        def check(self) -> None:
            """Raise RunnerError, with what was seen, unless this is one of the task's machines."""

        def replace(self) -> None:
            """End this machine, and have the group send another one at once."""

        def dismiss(self) -> None:
            """End this machine, and have none in its place."""

        def finish(self) -> None:
            """End the group and delete all that the task has; this machine ends with it.

            Only what people may still want to read stays in the bucket (`objects.kept`).
            """


def machine(url: str) -> Machine:
    """Return the machine that we are on, as one of the URL's task. Sends nothing."""
    found: Machine = import_module(f"{__name__}.{cloud(url)}").Machine(url)
    return found


def leave_word(url: str, reason: str) -> None:
    """Note why the supervisor of a cloud's machine failed, for what ends the machine after it."""
    if cloud(url):
        with suppress(OSError):
            WORD.write_text(reason)


def cloud(url: str) -> str:
    """Return the cloud that a task's URL names: its fragment is CLOUD/REGION/ID."""
    return urlsplit(url).fragment.partition("/")[0]
