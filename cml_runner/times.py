"""Durations as people write them, and times as servers do."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime

from cml_runner.errors import ConfigurationError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
PART = r"(\d+(?:\.\d+)?)\s*(s|secs?|seconds?|m|mins?|minutes?|h|hrs?|hours?|d|days?|w|weeks?)"


def seconds(text: str) -> float:
    """Read "300", "5min" or "1h 30m"; "never", 0 and -1 give 0. Raises ConfigurationError."""
    plain = text.strip().lower()
    if plain in ("never", "-1"):
        return 0
    if re.fullmatch(r"\d+(\.\d+)?", plain):
        return float(plain)
    if re.fullmatch(rf"({PART}[\s,]*)+", plain):
        return sum(float(number) * UNITS[unit[0]] for number, unit in re.findall(PART, plain))
    msg = f"{text!r} is no duration: write 300, 5min, 1h 30m or never"
    raise ConfigurationError(msg)


def text(value: float) -> str:
    """Write a duration briefly: 4 s, 12 min, 3.5 h, 2 d."""
    if value < 120:
        return f"{value:.0f} s"
    if value < 7200:
        return f"{value / 60:.0f} min"
    if value < 2 * UNITS["d"]:
        return f"{value / 3600:.1f} h"
    return f"{value / UNITS['d']:.0f} d"


def of_header(value: str) -> datetime:
    """Read the Date of an answer: UTC, in whole seconds, of which this one isn't over yet.

    Raises ValueError.
    """
    return parsedate_to_datetime(value).replace(tzinfo=timezone.utc) + timedelta(seconds=1)
