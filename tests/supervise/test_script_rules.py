from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest

from cml_runner.model import Exited, Notice, Recalled, Signalled, Superseded, Tick
from cml_runner.supervise.script.rules import HASTE, LONGEST, TIMED_OUT, Stop, step

if TYPE_CHECKING:
    from cml_runner.model import Event

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)
LATER = NOW + timedelta(seconds=90)


@pytest.mark.parametrize(
    ("event", "deadline", "stop"),
    [
        (Tick(), None, None),
        (Tick(), LATER, None),
        (Tick(), NOW, Stop(reason="the deadline has come", then="leave", code=TIMED_OUT)),
        (Notice(reason="it may be taken away"), None, None),
        (
            Notice(reason="spot", deadline=NOW + timedelta(seconds=30)),
            None,
            Stop(reason="spot", then="vanish", until=NOW + timedelta(seconds=30), grace=15),
        ),
        (
            Notice(reason="spot", deadline=NOW + timedelta(hours=1)),
            None,
            Stop(reason="spot", then="vanish", until=NOW + timedelta(hours=1), grace=LONGEST),
        ),
        (
            Notice(reason="spot", deadline=NOW - timedelta(seconds=1)),
            None,
            Stop(reason="spot", then="vanish", until=NOW - timedelta(seconds=1), grace=0),
        ),
        (Signalled(name="SIGTERM"), None, Stop(reason="SIGTERM", then="vanish", grace=HASTE)),
        (Recalled(), None, Stop(reason="it was told to stop", then="wait")),
        (
            Superseded(),
            LATER,
            Stop(reason="another machine has taken over", then="vanish", grace=0, save=False),
        ),
    ],
)
def test_rules(event: Event, deadline: datetime | None, stop: Stop | None) -> None:
    assert step(event, NOW, deadline) == stop


@pytest.mark.parametrize(("code", "known"), [(0, 0), (3, 3), (-15, 143), (-9, 137)])
def test_its_own_end(code: int, known: int) -> None:
    stop = step(Exited(code=code), NOW, None)
    assert stop
    assert (stop.then, stop.code, stop.grace, stop.save) == ("leave", known, 0, True)
    assert f"exit code {known}" in stop.reason
