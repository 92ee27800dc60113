"""When to stop, and how: nothing but decisions, so that every rule is easy to test."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from cml_runner.model import (
    Exited,
    Identified,
    JobEnded,
    JobStarted,
    Notice,
    Ready,
    Retried,
    Signalled,
    Tick,
    Troubled,
)

if TYPE_CHECKING:
    from cml_runner.model import Event, Job

RESTARTS = 5  # in a row, of an agent which asks to be started again


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What was asked for; all times in seconds of one clock, zero means never."""

    idle_timeout: float = 300
    job_limit: float = 0
    ready_timeout: float = 600
    deadline: float = 0
    single: bool = False


@dataclass(frozen=True, kw_only=True)
class State:
    """All that a supervisor remembers."""

    phase: Literal["starting", "idle", "busy"] = "starting"
    since: float
    job: Job | None = None
    pending: int = 0  # interrupted jobs which the forge has yet to queue again
    restarts: int = 0  # of the agent, since it last took a job
    doomed: bool = False  # the cloud may soon take this machine


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The decision to stop the agent.

    Then this machine leaves (its part of the task is over), vanishes (the cloud takes it, and may
    send another), or stays, and the agent starts again.
    """

    reason: str
    then: Literal["leave", "vanish", "stay"] = "leave"
    retry: bool = False  # the running job must be run again
    polite: bool = False  # only if the forge agrees that the runner is idle
    failed: bool = False
    ended: bool = False  # the agent is about to end by itself
    renew: bool = False  # before it starts again, the agent is installed and registered anew


def step(state: State, event: Event, now: float, rules: Rules) -> tuple[State, Stop | None]:
    """Decide what an event means."""
    match event:
        case Ready() if state.phase == "starting":
            return replace(state, phase="idle", since=now), None
        case JobStarted() | Identified() | JobEnded() | Retried():
            return _of_a_job(state, event, now, rules)
        case Troubled(cut_off=True) if state.phase != "busy":
            return state, Stop(reason=f"the agent was cut off: {event.message}", failed=True)
        case Exited():
            return replace(state, restarts=state.restarts + 1), _after_exit(state, event, rules)
        case Notice() | Signalled():
            return _told_to_go(state, event)
        case Tick():
            return state, _overdue(state, now, rules)
    return state, None


def _of_a_job(
    state: State, event: JobStarted | Identified | JobEnded | Retried, now: float, rules: Rules
) -> tuple[State, Stop | None]:
    match event:
        case JobStarted(job=job):
            return replace(state, phase="busy", since=now, job=job, restarts=0), None
        case Identified(job=job) if state.job and state.job.id == job.id:
            return replace(state, job=job), None
        case JobEnded():
            return replace(state, phase="idle", since=now, job=None), _after_job(state, rules)
        case Retried():
            return replace(state, pending=max(0, state.pending - 1), since=_later(state, now)), None
    return state, None


def _told_to_go(state: State, event: Notice | Signalled) -> tuple[State, Stop | None]:
    if isinstance(event, Signalled):
        return state, Stop(reason=event.name, then="vanish", retry=state.phase == "busy")
    if state.phase == "busy" and not event.deadline:
        return replace(state, doomed=True), None  # the job may still be done in time: design 18
    return state, Stop(reason=event.reason, then="vanish", retry=state.phase == "busy")


def _later(state: State, now: float) -> float:
    """An idle runner has a reason to wait anew; a busy one keeps counting."""
    return now if state.phase == "idle" else state.since


def _after_job(state: State, rules: Rules) -> Stop | None:
    if not rules.single:
        doomed = Stop(reason="the cloud may take this machine soon", then="vanish")
        return doomed if state.doomed else None
    if state.pending:  # it was somebody else's job: ours is yet to come
        reason = "single job done, another is pending"
        return Stop(reason=reason, then="stay", ended=True, renew=True)
    return Stop(reason="single job done", ended=True)


def _after_exit(state: State, event: Exited, rules: Rules) -> Stop:
    busy = state.phase == "busy"
    reason = f"the agent ended: {event.reason or f'exit code {event.code}'}"
    if event.outdated and not state.restarts:
        return Stop(reason=reason, then="stay", retry=busy, renew=True)
    if event.again and state.restarts < RESTARTS:
        return Stop(reason=reason, then="stay", retry=busy)
    fine = event.code == 0 and rules.single and state.phase == "idle"
    return Stop(reason=reason, retry=busy, failed=not fine)


def _overdue(state: State, now: float, rules: Rules) -> Stop | None:
    waited = now - state.since
    if 0 < rules.deadline <= now:
        return Stop(reason="the deadline has come")
    if state.phase == "starting" and 0 < rules.ready_timeout <= waited:
        reason = f"the agent was not ready within {rules.ready_timeout:.0f} s"
        return Stop(reason=reason, failed=True)
    if state.phase == "busy" and 0 < rules.job_limit <= waited:
        return Stop(reason="the job reached the forge's time limit", then="stay", retry=True)
    idle = state.phase == "idle" and not state.pending
    if idle and 0 < rules.idle_timeout <= waited:
        return Stop(reason=f"idle for {waited:.0f} s", polite=True)
    return None
