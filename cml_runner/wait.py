"""Wait for something to become true."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from cml_runner.errors import NotReady

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, timeout: float, every: float = 1) -> T:
    """Return the condition's value once it is true; raise NotReady after the timeout, in seconds.

    What the condition itself raises ends the wait at once.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        left = deadline - time.monotonic()
        if left <= 0:
            msg = f"gave up after {timeout:.0f} s waiting for {what}"
            raise NotReady(msg)
        time.sleep(min(every, left))
    return value
