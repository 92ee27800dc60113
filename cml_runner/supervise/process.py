"""The agent as a process: a scrubbed environment, its output as events, its end."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import psutil

from cml_runner.errors import AgentFailed
from cml_runner.supervise.user import expendable

if TYPE_CHECKING:
    import queue
    from collections.abc import Mapping

    from cml_runner.model import Command, Event
    from cml_runner.supervise.user import Account

log = logging.getLogger(__name__)

# CML's own: names of further variables to hide from jobs, delimited with colons.
SENSITIVE = "_CML_RUNNER_SENSITIVE_ENV"
HARMLESS = re.compile(r"(_REGION|_ENDPOINT|_CA_BUNDLE)$")  # though they are a cloud's variables
SECRET = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|ACCESS_KEY|API_KEY|APP_KEY|KUBECONFIG"
    r"|KUBERNETES_CONFIGURATION|^CML_RUNNER_|^AWS_|^AZURE_|^ARM_|^GOOGLE_|^ACTIONS_|^CI_JOB_JWT",
    re.IGNORECASE,
)


def scrubbed(environment: Mapping[str, str], secrets: tuple[str, ...] = ()) -> dict[str, str]:
    """Leave out whatever a job has no business to see: by name, by list, and by value."""
    listed = {SENSITIVE, *environment.get(SENSITIVE, "").split(":")}
    return {
        name: value
        for name, value in environment.items()
        if name not in listed
        and (HARMLESS.search(name) or not SECRET.search(name))
        and not any(secret in value for secret in secrets)
    }


REST = 2  # seconds for the last output of an agent that has ended; who hides may keep it open


class Program(Protocol):
    """What has to be known of what runs: an agent, or a script."""

    def parse(self, line: str) -> Event | None:
        """Understand a line of its output."""

    def exited(self, code: int) -> Event:
        """Say what its end means."""

    def abort(self, pid: int, reason: str = "") -> None:
        """Make its job fail at once, and say why if it must be run again."""

    def drain(self, pid: int) -> None:
        """Have it take no other job."""

    def stop(self, pid: int) -> None:
        """Ask it to end."""


class Process:
    """A running agent, with all that it has started."""

    def __init__(
        self,
        agent: Program,
        command: Command,
        secrets: tuple[str, ...],
        events: queue.Queue[Event],
        account: Account | None = None,
    ) -> None:
        """Start it, under another account if one is given. Raises AgentFailed."""
        self._agent, self._events, self._account = agent, events, account
        self._over = False
        own = account.environment() if account else {}
        environment = {**scrubbed(os.environ, secrets), **own, **command.environment}
        try:
            if account:
                account.own(command.directory)
            self._process = subprocess.Popen(
                command.arguments,
                cwd=command.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for us, and we can end all that it started
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=account.groups if account else None,
            )
        except OSError as error:
            msg = f"the agent can't be started: {error}"
            raise AgentFailed(msg) from error
        self.pid = self._process.pid
        if account:
            expendable(self.pid)
        self._reader = threading.Thread(target=self._read, name="agent", daemon=True)
        self._reader.start()

    def abort(self, reason: str = "") -> None:
        """Make the running job fail at once, and say why if it must be run again."""
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            self._agent.abort(self.pid, reason)

    def drain(self) -> None:
        """Have it take no other job."""
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            self._agent.drain(self.pid)

    def stop(self, grace: float) -> None:
        """Ask it to end, and make it after the grace, in seconds; nothing it started survives.

        All events have come when this returns.
        """
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            self._agent.stop(self.pid)
        self.wait(grace)
        self.kill()
        self._reader.join(REST)
        self._over = True

    def kill(self) -> None:
        """End it without giving it time to tell anybody, least of all the forge."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self._account:
            self._account.end()
        self._process.wait()

    def wait(self, timeout: float) -> bool:
        """Say whether it has ended, within so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return self._process.poll() is not None

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                log.info("| %s", line.rstrip())
                if event := self._agent.parse(line.rstrip("\n")):
                    self._put(event)
        self._put(self._agent.exited(self._process.wait()))

    def _put(self, event: Event) -> None:
        """Tell, unless nobody wants to know any more: another agent may run by now."""
        if not self._over:
            self._events.put(event)
