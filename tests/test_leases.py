from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from cml_runner import leases
from cml_runner.model import Identifier

BEGAN = datetime(2026, 11, 30, tzinfo=timezone.utc)
IDENTIFIER = Identifier.new("some task")


def after(hours: float | None) -> datetime | None:
    return None if hours is None else BEGAN + timedelta(hours=hours)


@pytest.mark.parametrize(
    ("written", "expires", "launched", "until"),
    [
        (0, 5, False, 1),  # its launcher had an hour
        (0, 0.5, False, 0.5),
        (0, None, False, 1),
        (3, 5, False, 4),  # by the bucket's clock it began later …
        (-3, 5, False, 1),  # … or earlier
        (0, 5, True, 5),
        (0, None, True, None),
    ],
)
def test_a_task_whose_launcher_died_is_given_up_after_an_hour(
    written: float, expires: float | None, *, launched: bool, until: float | None
) -> None:
    claim = leases.Claim(created=BEGAN, expires=after(expires), launched=launched)
    at = after(written)
    assert at
    assert leases.lease(IDENTIFIER, claim, at).expires == after(until)
