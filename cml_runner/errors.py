"""Everything that we raise on purpose.

RunnerError                   exit code
├── ConfigurationError        2   the options make no sense together (all mistakes at once)
├── CredentialsError          3   missing, expired or refused; says which variable
├── NotFound                  4   no such runner, task, repository or resource
├── AlreadyExists             5   the name is taken
├── NoCapacity                6   the cloud has no such machine for us now, or the quota is used up
├── JobRunning                7   the runner is busy, so it can't be removed
├── AgentFailed               8   the forge's runner program gave up
├── MissingDependency         9   a package or a program isn't installed; says how to install it
├── CleanupFailed            10   something that costs money may still exist: it is listed
└── NotReady                 11   launched, but not online in time; says why and what was deleted
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class RunnerError(Exception):
    """Its message is meant for people; the command line prints it without a traceback."""

    exit_code = 1


class ConfigurationError(RunnerError):
    """The options make no sense; `mistakes` holds every one of them."""

    exit_code = 2

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


class CredentialsError(RunnerError):
    """A cloud or a forge refused our credentials, or we found none."""

    exit_code = 3


class NoCredentials(CredentialsError):
    """We found none, so nobody was asked; to who looks at all places that is no failure."""


class NotFound(RunnerError):
    """No such runner, task, repository or resource."""

    exit_code = 4


class AlreadyExists(RunnerError):
    """The name is taken."""

    exit_code = 5


class NoCapacity(RunnerError):
    """The cloud has no such machine for us now; another region or type may do."""

    exit_code = 6


class JobRunning(RunnerError):
    """The runner is busy, so the forge refuses to remove it."""

    exit_code = 7


class AgentFailed(RunnerError):
    """The forge's runner program can't be installed, or gave up."""

    exit_code = 8


class MissingDependency(RunnerError):
    """What was asked for, a cloud mostly, needs packages or a program that aren't installed."""

    exit_code = 9


class CleanupFailed(RunnerError):
    """Some resources could not be deleted, so they may still cost money."""

    exit_code = 10

    def __init__(self, failures: Sequence[tuple[str, Exception]]) -> None:
        lines = [f"  {label}: {error}" for label, error in failures]
        super().__init__("\n".join(["could not delete, and may still cost money:", *lines]))
        self.failures = failures


class NotReady(RunnerError):
    """The machines were launched, but no runner came online in time."""

    exit_code = 11


def by_code(code: int) -> type[RunnerError]:
    """Find the kind of error that a machine reported by its exit code."""
    for kind in RunnerError.__subclasses__():
        if kind.__module__ == __name__ and kind.exit_code == code and kind is not CleanupFailed:
            return kind
    return RunnerError
