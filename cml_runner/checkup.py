"""Look at many things at once: what can't be looked at is unknown, and hides nothing else."""

from __future__ import annotations

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from cml_runner.errors import (
    ConfigurationError,
    CredentialsError,
    MissingDependency,
    NoCapacity,
    NoCredentials,
    NotFound,
    RunnerError,
)
from cml_runner.model import Check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Seen: TypeAlias = str | Check | Iterable[Check]  # a string: all is well, and so it is

T = TypeVar("T")

log = logging.getLogger(__name__)

AT_ONCE = 8
FAILURES = (ConfigurationError, CredentialsError, NotFound, NoCapacity, MissingDependency)
SOON = timedelta(days=7)
DRIFT = timedelta(minutes=1)  # clouds refuse signatures when it is five


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One look at something, and what it means if that can't be done."""

    what: str
    look: Callable[[], Seen]
    hint: str = ""  # what to do if it fails
    own: bool = False  # a launch doesn't ask this, so who may not ask may launch all the same


class Clock:
    """How far a far side's clock is from ours, as the dates of its answers tell."""

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(timezone.utc)) -> None:
        self._now = now
        self.ahead: timedelta | None = None  # of ours, theirs is

    def hear(self, date: str | None) -> None:
        """Take the header Date of an answer that came just now."""
        try:
            told = parsedate_to_datetime(date or "")
        except ValueError:  # there is none, or it makes no sense
            return
        self.ahead = told.astimezone(timezone.utc) - self._now()

    def check(self) -> Check:
        """Compare them."""
        if self.ahead is None:
            return Check(what="clock", state="unknown", message="it didn't tell the time")
        seconds = self.ahead.total_seconds()
        if abs(self.ahead) <= DRIFT:
            return Check(what="clock", state="ok", message="as ours")
        said = f"this computer's clock is {abs(seconds):.0f} s {'slow' if seconds > 0 else 'fast'}"
        why = "logins fail when it is five minutes"
        hint = "set it: timedatectl set-ntp true"
        return Check(what="clock", state="warning", message=f"{said}: {why}", hint=hint)


def login(look: Callable[[], Seen], clock: Clock, hint: str) -> tuple[list[Check], bool]:
    """Log in, and compare clocks; False if that failed.

    Raises NoCredentials and MissingDependency: then there is nothing to look at.
    """
    try:
        found = list(_checks("login", look()))
    except (NoCredentials, MissingDependency):
        raise
    except RunnerError as error:
        found = [failed("login", _line(error), hint, type(error))]
    except Exception as error:  # of a program that makes tokens, say
        found = [failed("login", _unexpected("login", error), hint, RunnerError)]
    well = all(one.state in ("ok", "warning") for one in found)
    return [*found, clock.check()], well


def understood(read: Callable[[], T]) -> tuple[T | None, list[Check]]:
    """Read the description of the machine; what makes no sense is told, mistake by mistake."""
    try:
        return read(), []
    except ConfigurationError as error:
        hint = "ask for another one"
        return None, [failed("machine", one, hint, ConfigurationError) for one in error.mistakes]


def made(probes: Iterable[Probe]) -> Iterator[Check]:
    """Make all of them at the same time, and tell in their order what each one found."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="check") as pool:
        for found in pool.map(_made, probes):
            yield from found


def failed(what: str, message: str, hint: str, kind: type[RunnerError]) -> Check:
    """Say that a launch would fail, and with which kind of error."""
    return Check(what=what, state="failed", message=message, hint=hint, code=kind.exit_code)


def piece(
    what: str, look: Callable[[], object], hint: str, *, own: bool = False, vital: bool = True
) -> Probe:
    """See if something that `setup` makes is there: `look` raises NotFound if it isn't.

    A launch would make it, too, or fail for want of permission. What isn't vital only some miss.
    """

    def seen() -> Seen:
        try:
            look()
        except NotFound:
            if vital:
                return failed(what, "it's missing", hint, CredentialsError)
            return Check(what=what, state="warning", message="it's missing", hint=hint)
        return "it's there"

    return Probe(what=what, look=seen, hint=hint, own=own)


def expiry(at: datetime, now: datetime) -> Check:
    """Say when a credential expires; machines may hold it as long as they live."""
    left = at - now
    message = f"on {at:%Y-%m-%d %H:%M} UTC"
    if left > SOON:
        return Check(what="expiry", state="ok", message=message)
    hint = "renew it before machines that have to register again need it"
    return Check(what="expiry", state="warning", message=f"{message}, soon", hint=hint)


def allowed(missing: Sequence[str], number: int, hint: str, only: str = "") -> Iterator[Check]:
    """Name each permission that isn't there; or say that all are.

    With `only` they are needed for something that not everybody wants, which it names.
    """
    for name in missing:
        what = f"permission {name}"
        if only:
            message = f"not allowed; {only}"
            yield Check(what=what, state="warning", message=message, hint=hint)
        else:
            yield failed(what, "not allowed", hint, CredentialsError)
    if not missing and number:
        yield Check(what="permissions", state="ok", message=f"all {number} that a launch needs")


def room(what: str, used: float, limit: float, wanted: float, hint: str) -> Check:
    """Compare a quota with what is wanted."""
    message = f"{wanted:g} wanted, {used:g} of {limit:g} in use"
    if used + wanted > limit:
        return failed(what, message, hint, NoCapacity)
    return Check(what=what, state="ok", message=message)


def _made(probe: Probe) -> list[Check]:
    try:
        found = list(_checks(probe.what, probe.look()))
    except RunnerError as error:
        found = [_troubled(probe, error)]
    except Exception as error:  # an answer that nobody thought of mustn't hide the others
        message = _unexpected(probe.what, error)
        found = [Check(what=probe.what, state="unknown", message=message)]
    return [_with_hint(one, probe.hint) for one in found]


def _checks(what: str, seen: Seen) -> Iterable[Check]:
    if isinstance(seen, str):
        return [Check(what=what, state="ok", message=seen)]
    return [seen] if isinstance(seen, Check) else seen


def _troubled(probe: Probe, error: RunnerError) -> Check:
    """Say what an error means: that a launch would fail like this, or that nobody knows."""
    message = _line(error)
    if isinstance(error, FAILURES) and not (probe.own and isinstance(error, CredentialsError)):
        return failed(probe.what, message, probe.hint, type(error))
    if probe.own:  # what it takes to know is more than what it takes to launch
        message = re.sub(r"(cml-runner permissions \w+)$", r"\1 --doctor", message)
    return Check(what=probe.what, state="unknown", message=message)


def _unexpected(what: str, error: Exception) -> str:
    log.debug("%s", what, exc_info=error)
    return " ".join(f"unexpected {type(error).__name__}: {error}".split())


def _line(error: RunnerError) -> str:
    return " ".join(str(error).split())


def _with_hint(check: Check, hint: str) -> Check:
    if check.state == "failed" and not check.hint:
        return replace(check, hint=hint)
    return check
