from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import pytest

from cml_runner.model import (
    Exited,
    Job,
    JobEnded,
    JobStarted,
    Notice,
    Ready,
    Retried,
    Signalled,
    Tick,
    Troubled,
)
from cml_runner.supervise.rules import RESTARTS, Rules, State, Stop, step

if TYPE_CHECKING:
    from cml_runner.model import Event

JOB = Job(name="train")
SOON = datetime(2030, 1, 1, tzinfo=timezone.utc)
STARTING = State(since=0)
IDLE = State(phase="idle", since=0)
BUSY = State(phase="busy", since=0, job=JOB)
PENDING = replace(IDLE, pending=1)
USUAL = Rules(idle_timeout=300)
SINGLE = Rules(single=True)
LIMITED = Rules(job_limit=60)
DEADLINE = Rules(deadline=1000, idle_timeout=0)
END = Exited(code=1, reason="it crashed")
AGAIN = Exited(code=3, reason="updating", again=True)
OUTDATED = Exited(code=7, reason="too old", outdated=True)
FINE = Exited(code=0)


@pytest.mark.parametrize(
    ("state", "event", "now", "rules", "stop"),
    [
        # waiting for the agent
        (STARTING, Tick(), 599, USUAL, None),
        (
            STARTING,
            Tick(),
            600,
            USUAL,
            Stop(reason="the agent was not ready within 600 s", failed=True),
        ),
        (STARTING, Ready(), 1, USUAL, None),
        (STARTING, END, 1, USUAL, Stop(reason="the agent ended: it crashed", failed=True)),
        # idle
        (IDLE, Tick(), 299, USUAL, None),
        (IDLE, Tick(), 300, USUAL, Stop(reason="idle for 300 s", polite=True)),
        (IDLE, Tick(), 9999, Rules(idle_timeout=0), None),
        (PENDING, Tick(), 9999, USUAL, None),
        (IDLE, Troubled(message="no connection"), 1, USUAL, None),
        # busy
        (BUSY, Tick(), 9999, USUAL, None),
        (BUSY, Tick(), 59, LIMITED, None),
        (
            BUSY,
            Tick(),
            60,
            LIMITED,
            Stop(reason="the job reached the forge's time limit", then="stay", retry=True),
        ),
        (BUSY, JobEnded(succeeded=False), 1, USUAL, None),
        (BUSY, Ready(), 1, USUAL, None),
        # one job only
        (BUSY, JobEnded(succeeded=True), 1, SINGLE, Stop(reason="single job done", ended=True)),
        (BUSY, JobEnded(succeeded=False), 1, SINGLE, Stop(reason="single job done", ended=True)),
        (
            replace(BUSY, pending=1),
            JobEnded(succeeded=True),
            1,
            SINGLE,
            Stop(reason="single job done, another is pending", then="stay", ended=True, renew=True),
        ),
        (IDLE, FINE, 1, SINGLE, Stop(reason="the agent ended: exit code 0")),
        # taken away
        (IDLE, Notice(reason="spot"), 1, USUAL, Stop(reason="spot", then="vanish")),
        (BUSY, Notice(reason="soon"), 1, USUAL, None),
        (
            BUSY,
            Notice(reason="spot", deadline=SOON),
            1,
            USUAL,
            Stop(reason="spot", then="vanish", retry=True),
        ),
        (IDLE, Signalled(name="SIGINT"), 1, USUAL, Stop(reason="SIGINT", then="vanish")),
        (
            BUSY,
            Signalled(name="SIGTERM"),
            1,
            USUAL,
            Stop(reason="SIGTERM", then="vanish", retry=True),
        ),
        # the agent ends
        (IDLE, FINE, 1, USUAL, Stop(reason="the agent ended: exit code 0", failed=True)),
        (BUSY, END, 1, USUAL, Stop(reason="the agent ended: it crashed", retry=True, failed=True)),
        (IDLE, AGAIN, 1, USUAL, Stop(reason="the agent ended: updating", then="stay")),
        (
            replace(IDLE, restarts=RESTARTS),
            AGAIN,
            1,
            USUAL,
            Stop(reason="the agent ended: updating", failed=True),
        ),
        (
            IDLE,
            OUTDATED,
            1,
            USUAL,
            Stop(reason="the agent ended: too old", then="stay", renew=True),
        ),
        (
            replace(IDLE, restarts=1),
            OUTDATED,
            1,
            USUAL,
            Stop(reason="the agent ended: too old", failed=True),
        ),
        # the deadline, whatever goes on
        (STARTING, Tick(), 1000, DEADLINE, Stop(reason="the deadline has come")),
        (IDLE, Tick(), 999, DEADLINE, None),
        (IDLE, Tick(), 1000, DEADLINE, Stop(reason="the deadline has come")),
        (BUSY, Tick(), 1000, DEADLINE, Stop(reason="the deadline has come")),
        (PENDING, Tick(), 1000, DEADLINE, Stop(reason="the deadline has come")),
    ],
)
def test_step(state: State, event: Event, now: float, rules: Rules, stop: Stop | None) -> None:
    assert step(state, event, now, rules)[1] == stop


def test_a_job_may_end_on_a_machine_that_may_go_soon() -> None:
    state, stop = step(BUSY, Notice(reason="soon"), 1, USUAL)
    assert stop is None
    _, stop = step(state, JobEnded(succeeded=True), 2, USUAL)
    assert stop
    assert (stop.then, stop.retry) == ("vanish", False)


def test_a_job_restarts_the_idle_clock() -> None:
    state, _ = step(IDLE, JobStarted(job=JOB), 200, USUAL)
    assert (state.phase, state.job) == ("busy", JOB)
    state, _ = step(state, JobEnded(succeeded=True), 250, USUAL)
    assert (state.phase, state.job) == ("idle", None)
    assert step(state, Tick(), 549, USUAL)[1] is None
    assert step(state, Tick(), 550, USUAL)[1]


def test_a_retried_job_is_waited_for_as_long_as_any_other() -> None:
    state, _ = step(PENDING, Retried(job=JOB), 1000, USUAL)
    assert state.pending == 0
    assert step(state, Tick(), 1299, USUAL)[1] is None
    assert step(state, Tick(), 1300, USUAL)[1]


def test_a_retry_does_not_lengthen_a_running_job() -> None:
    state, _ = step(replace(BUSY, pending=1), Retried(job=JOB), 59, LIMITED)
    assert step(state, Tick(), 60, LIMITED)[1]


def test_an_agent_that_works_again_may_restart_again() -> None:
    state = STARTING
    for _ in range(RESTARTS):
        state, stop = step(state, AGAIN, 1, USUAL)
        assert stop
        assert stop.then == "stay"
    busy, _ = step(state, JobStarted(job=JOB), 2, USUAL)
    assert busy.restarts == 0
    ready, _ = step(state, Ready(), 2, USUAL)
    _, stop = step(ready, AGAIN, 2, USUAL)
    assert stop
    assert stop.failed
