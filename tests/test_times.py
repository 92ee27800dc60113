from __future__ import annotations

import pytest

from cml_runner import times
from cml_runner.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("300", 300),
        ("0.5", 0.5),
        ("5min", 300),
        ("5 minutes", 300),
        ("1h 30m", 5400),
        ("1h30m", 5400),
        ("1 day, 2 hours", 93600),
        ("2 WEEKS", 1209600),
        ("never", 0),
        ("-1", 0),
        ("0", 0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert times.seconds(text) == seconds


@pytest.mark.parametrize("text", ["5 parsecs", "", "5 m parsecs", "m", "-5", "1h-30m", "nan"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is no duration: write 300, 5min"):
        times.seconds(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(4, "4 s"), (300, "5 min"), (9000, "2.5 h"), (432000, "5 d")]
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert times.text(seconds) == text
