"""Show that something is going on: live on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)


@contextmanager
def shown(name: str) -> Iterator[Callable[[str], None]]:
    """Give a function that takes what is being waited for, as often as it likes."""
    if not sys.stderr.isatty():
        yield _Lines(name).tell
        return
    from rich.console import Console

    start = time.monotonic()
    with Console(stderr=True).status(f"{name}: checking") as status:

        def tell(text: str) -> None:
            status.update(f"{name}: {text} ({time.monotonic() - start:.0f} s)")

        yield tell


class _Lines:
    def __init__(self, name: str) -> None:
        self.name, self.last = name, ""

    def tell(self, text: str) -> None:
        """Say only what is new."""
        if text != self.last:
            log.info("%s: %s", self.name, text)
        self.last = text
