"""Messages for people, on stderr; no secret gets through."""

from __future__ import annotations

import logging
import sys


class Formatter(logging.Formatter):
    """Formats a message, and blots out what must not be read."""

    def __init__(self, pattern: str) -> None:
        super().__init__(pattern, "%H:%M:%S")
        self.hidden: tuple[str, ...] = ()

    def format(self, record: logging.LogRecord) -> str:
        """Write one message."""
        text = super().format(record)
        for secret in self.hidden:
            text = text.replace(secret, "***")
        return text


class Stderr(logging.Handler):
    """Writes to whatever sys.stderr is at the moment, so that a live display can stand in."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except (OSError, ValueError):
            self.handleError(record)


def set_up(level: str = "info", *, stamped: bool = False) -> None:
    """Send our own messages to stderr, from a level on: error, warn, info or debug."""
    handler = Stderr()
    handler.setFormatter(Formatter("%(asctime)s %(message)s" if stamped else "%(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("cml_runner").setLevel(logging.getLevelName(level.upper()))
    if level == "debug":
        root.setLevel(logging.INFO)


def hide(*secrets: str) -> None:
    """Never write these again, whatever message they are in."""
    found = tuple(secret for secret in secrets if len(secret) > 3)
    for handler in (*logging.getLogger().handlers, *logging.getLogger("cml_runner").handlers):
        if isinstance(handler.formatter, Formatter):
            handler.formatter.hidden += found
