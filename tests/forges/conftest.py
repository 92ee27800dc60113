"""Real agents as real processes, none of which outlives its test."""

from __future__ import annotations

import os
import secrets
import subprocess
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar

import psutil
import pytest

from cml_runner.wait import until
from tests.lab.github import GitHub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cml_runner.forges import Agent
    from cml_runner.model import Command, Event

E = TypeVar("E", bound="Event")
MARK = "TEST_MARK"


class Started:
    """An agent, started as the supervisor does, and all that it says."""

    def __init__(self, agent: Agent, command: Command, mark: str, prefix: tuple[str, ...]) -> None:
        self.lines: list[str] = []
        self.events: list[Event] = []
        home = {name: os.environ[name] for name in ("PATH", "HOME")}
        self.process = subprocess.Popen(
            [*prefix, *command.arguments],
            cwd=command.directory,
            env={**home, **command.environment, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.pid = self.process.pid
        self._agent = agent
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait(self, kind: type[E], number: int = 1) -> E:
        """Wait for the first, second, … event of a kind."""
        until(lambda: len(self._of(kind)) >= number or not self._reader.is_alive(), "it", 30, 0.02)
        found = self._of(kind)
        assert len(found) >= number, f"{kind.__name__} never came: {self.lines}"
        return found[number - 1]

    def ended(self) -> int:
        """Wait for its end, with all its output read; return the exit code."""
        self._reader.join(30)
        return self.process.wait(30)

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        with suppress(psutil.NoSuchProcess):
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout
        self.process.stdout.close()

    def _of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line)
            if event := self._agent.parse(line.rstrip("\n")):
                self.events.append(event)


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    """Start an agent; a prefix of the command may put it into a special place."""
    mark = secrets.token_hex(8)
    running: list[Started] = []

    def one(agent: Agent, command: Command, prefix: tuple[str, ...] = ()) -> Started:
        running.append(Started(agent, command, mark, prefix))
        return running[-1]

    yield one
    while found := [process for process in psutil.process_iter() if _marked(process, mark)]:
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        for started in running:
            started.process.poll()
    for started in running:
        started.close()


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except (psutil.Error, OSError):
        return False


@pytest.fixture
def gh() -> Iterator[GitHub]:
    with GitHub() as there:
        there.add_repository("owner/repo")
        there.add_organisation("owner")
        there.add_enterprise("big", ["owner"])
        yield there


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it would have slept, in seconds."""
    slept: list[float] = []
    monkeypatch.setattr(
        "cml_runner.forges.github.api.time", SimpleNamespace(sleep=slept.append, time=time.time)
    )
    return slept
