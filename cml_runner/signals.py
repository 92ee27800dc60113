"""Deal with signals for a while."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Handler = Callable[[int, object], None] | signal.Handlers

# Whatever asks us to end: Ctrl-C, somebody's kill, the terminal that goes away (not on Windows).
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
ENDING = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


@contextmanager
def handled(numbers: Sequence[signal.Signals], handler: Handler) -> Iterator[None]:
    """Have this handler deal with these signals, and the former ones afterwards again.

    SIGHUP stays ignored where it is: nohup means that we go on when the terminal goes away.
    """
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
    taken = [number for number in numbers if number not in ignored or number.name != "SIGHUP"]
    before = [signal.signal(number, handler) for number in taken]
    try:
        yield
    finally:
        for number, former in zip(taken, before, strict=True):
            signal.signal(number, former)


def _nothing(*_: object) -> None:
    """Not even say something."""


@contextmanager
def undisturbed(handler: Handler = _nothing) -> Iterator[None]:
    """Let nothing that asks us to end disturb what must not be left half done."""
    if threading.current_thread() is threading.main_thread():
        with handled(ENDING, handler):
            yield
    else:  # which signals never reach
        yield
