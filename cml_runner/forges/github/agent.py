"""GitHub's own runner program, https://github.com/actions/runner."""

from __future__ import annotations

import ctypes.util
import hashlib
import logging
import os
import re
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from shlex import quote
from typing import TYPE_CHECKING

import psutil

from cml_runner.errors import AgentFailed
from cml_runner.forges.github.install import install
from cml_runner.forges.github.interruptions import INTERRUPTED
from cml_runner.model import Command, Exited, Job, JobEnded, JobStarted, Ready, Troubled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from cml_runner.model import Event, Package, Registration

log = logging.getLogger(__name__)

SYSTEM_LABELS = ("self-hosted", "Linux")  # with the architecture, those that every runner has
LISTENER, WORKER = "Runner.Listener", "Runner.Worker"
CONFIGURED = (".runner", ".credentials", ".credentials_rsaparams")
MIGRATED = tuple(f"{name}_migrated" for name in CONFIGURED)
RECEIPT = ".cml-runner-registration"  # the digest of the token that was used
JOB = ".cml-runner-job"
PATIENCE = 180  # seconds for the program to register itself

# What the program sees of our environment while it registers itself.
KEPT = re.compile(r"PATH|HOME|USER|LANG|LC_\w+|TMPDIR|SSL_CERT_\w+|(?i:(https?|no|all)_proxy)")

STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ: ")
ENDED = re.compile(r"Job .* completed with result: (\w+)")
COMPLAINTS = (
    "A session for this runner already exists",
    "An error occurred",
    "An error occured",
    "Failed to create a session",
    "Failed to create session",
    "Runner connect error",
    "The local machine's clock may be out of sync",
    "The runner no longer exists",
    "The runner registration has been deleted",
)

# https://github.com/actions/runner/blob/main/src/Runner.Common/Constants.cs (ReturnCode)
EXITS = {
    0: Exited(code=0, reason="it was done"),
    1: Exited(code=1, reason="it gave up, and said why in its output"),
    2: Exited(code=2, reason="it had trouble that may pass", again=True),
    3: Exited(code=3, reason="it wants a newer version", again=True, outdated=True),
    4: Exited(code=4, reason="it wants a newer version", again=True, outdated=True),
    5: Exited(code=5, reason="another one uses its registration", again=True),
    6: Exited(code=6, reason="its configuration was renewed", again=True),
    7: Exited(code=7, reason="GitHub no longer accepts its version", outdated=True),
}

# A hook must never fail a job, and nothing that a job is called may break it.
STARTED = """\
#!/bin/sh
(
    umask 077
    printf '%s\\0' "$PPID" "$GITHUB_SERVER_URL" "$GITHUB_REPOSITORY" "$GITHUB_RUN_ID" \\
        "$GITHUB_RUN_ATTEMPT" "$RUNNER_NAME" > {file}.new && mv -f {file}.new {file}
) > /dev/null 2>&1 || :
exit 0
"""
COMPLETED = """\
#!/bin/sh
(rm -f {file}) > /dev/null 2>&1 || :
exit 0
"""


class Agent:
    """The runner program: how to install, start, understand and end it."""

    def install(self, directory: Path, packages: Sequence[Package]) -> str:
        """Put it there, its checksum verified, unless it is there; return its version.

        Raises AgentFailed.
        """
        return install(directory, packages)

    def programs(self) -> Mapping[str, str]:
        """Name nothing: it brings all it needs."""
        return {}

    def command(
        self,
        directory: Path,
        registration: Registration,
        *,
        volumes: Sequence[str] = (),
        idle_timeout: float = 0,
    ) -> Command:
        """Make it ready to take this registration, and say how to start it.

        Raises AgentFailed, when GitHub refuses the registration say. The command may be started
        again.
        """
        del volumes, idle_timeout
        try:
            environment = {**_settings(), **_hooks(directory)}
            if registration.single:
                _forget(directory)
                environment["ACTIONS_RUNNER_INPUT_JITCONFIG"] = registration.secret
            else:
                _configure(directory, registration)
        except OSError as error:
            msg = f"GitHub's runner program can't be set up in {directory}: {error}"
            raise AgentFailed(msg) from error
        return Command(
            arguments=(str(directory / "bin" / LISTENER), "run"),
            environment=environment,
            directory=directory,
        )

    def parse(self, line: str) -> Event | None:
        """Understand one line of its output.

        What it says about jobs is stamped; the names in it are their authors' own words.
        """
        line = line.strip("\r\n")
        stamp = STAMP.match(line)
        text = line[stamp.end() :] if stamp else line
        if text.startswith(COMPLAINTS):
            return Troubled(message=text)
        if not stamp:
            return None
        if text == "Listening for Jobs":
            return Ready()
        if text.startswith("Running job: "):
            return JobStarted(job=Job(name=text.removeprefix("Running job: ")))
        if match := ENDED.fullmatch(text):
            return JobEnded(succeeded=match[1] in {"Succeeded", "SucceededWithIssues"})
        return None

    def job(self, directory: Path, seen: Job) -> Job:
        """Complete what its output said about the running job with what our hook wrote down.

        The hook runs some moments later; until then the job is returned as it was seen.
        """
        try:
            worker, server, repository, run, attempt, runner, _ = _note(directory)
            number = int(attempt)
            if not psutil.pid_exists(int(worker)):  # it was killed, and left its note behind
                return seen
        except (OSError, ValueError):
            return seen
        pipeline = f"{repository}/actions/runs/{run}"
        return replace(
            seen,
            pipeline=pipeline,
            attempt=number,
            runner=runner or seen.runner,
            url=f"{server}/{pipeline}/attempts/{number}",
        )

    def exited(self, code: int) -> Exited:
        """Say what its exit code means; a negative one is the signal that ended it."""
        if code < 0:
            return Exited(code=code, reason=f"it was ended by {signal.Signals(-code).name}")
        return EXITS.get(code) or Exited(code=code, reason=f"exit code {code}")

    def abort(self, pid: int, reason: str = "") -> None:
        """Make the running job fail at once: to GitHub a worker that dies is a job that failed.

        What a dying worker has printed last is shown beside its job.
        """
        with suppress(psutil.Error):
            for child in psutil.Process(pid).children():
                if _is_worker(child):
                    if reason:
                        _print_as(child, f"{INTERRUPTED}: {reason}\n")
                    _kill(child)

    def drain(self, pid: int) -> None:
        """Do nothing: it has no way to be told."""

    def stop(self, pid: int) -> None:
        """Ask it to end; a running job is cancelled."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)

    def leave(self, registration: Registration) -> None:
        """Do nothing: GitHub itself removes a runner that was for one job."""


def _settings() -> dict[str, str]:
    settings = {"ACTIONS_RUNNER_RETURN_VERSION_DEPRECATED_EXIT_CODE": "1"}
    if os.geteuid() == 0:
        settings["RUNNER_ALLOW_RUNASROOT"] = "1"
    if not ctypes.util.find_library("icuuc"):  # .NET programs don't start without it, unless told
        settings["DOTNET_SYSTEM_GLOBALIZATION_INVARIANT"] = "1"
    return settings


def _hooks(directory: Path) -> dict[str, str]:
    """Write the scripts that tell which job is running.

    https://docs.github.com/en/actions/how-tos/manage-runners/self-hosted-runners/run-scripts
    """
    found = {}
    (directory / JOB).unlink(missing_ok=True)
    for when, script in (("started", STARTED), ("completed", COMPLETED)):
        path = directory / f"cml-runner-job-{when}.sh"
        path.write_text(script.format(file=quote(str(directory / JOB))))
        path.chmod(0o755)
        found[f"ACTIONS_RUNNER_HOOK_JOB_{when.upper()}"] = str(path)
    return found


def _note(directory: Path) -> list[str]:
    return (directory / JOB).read_text().split("\0")


def _forget(directory: Path) -> None:
    for name in (*CONFIGURED, *MIGRATED, RECEIPT):
        (directory / name).unlink(missing_ok=True)


def _configure(directory: Path, registration: Registration) -> None:
    """Have the program register itself, unless it did so with this very token."""
    digest = hashlib.sha256(registration.secret.encode()).hexdigest()
    receipt = directory / RECEIPT
    if receipt.exists() and receipt.read_text() == digest and (directory / ".runner").exists():
        return
    _forget(directory)
    _register(directory, registration)
    receipt.write_text(digest)


def _register(directory: Path, registration: Registration) -> None:
    kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    secret = {"ACTIONS_RUNNER_INPUT_TOKEN": registration.secret}
    try:
        done = subprocess.run(
            _configuration(directory, registration),
            cwd=directory,
            env={**kept, **_settings(), **secret},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        msg = f"GitHub's runner program didn't register itself within {PATIENCE} s"
        raise AgentFailed(msg) from error
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        said = "\n".join(lines[-5:]).replace(registration.secret, "***")
        msg = f"GitHub's runner program couldn't register itself (exit {done.returncode}):\n{said}"
        raise AgentFailed(msg)


def _configuration(directory: Path, registration: Registration) -> list[str]:
    """Write the command, but for the token; labels that it adds by itself are left out."""
    own = {label.lower() for label in (*SYSTEM_LABELS, "x64", "arm64")}
    labels = ",".join(label for label in registration.labels if label.lower() not in own)
    return [
        str(directory / "bin" / LISTENER),
        *("configure", "--unattended", "--replace", "--disableupdate"),
        *("--url", registration.url),
        *("--name", registration.name),
        *("--work", "_work"),
        *(("--labels", labels) if labels else ()),
        *(("--runnergroup", registration.group) if registration.group else ()),
    ]


def _is_worker(process: psutil.Process) -> bool:
    """Know a worker, even if an interpreter runs it."""
    return any(part.rpartition("/")[2] == WORKER for part in process.cmdline()[:3])


def _print_as(worker: psutil.Process, line: str) -> None:
    """Write into the pipe through which the program listens to its worker, if it is one.

    The account that runs both might have put something else in its place, which we could change
    and it could not: so what is opened is looked at before it can be written to.
    """
    with suppress(OSError):
        seen = os.open(f"/proc/{worker.pid}/fd/2", os.O_PATH)
        try:
            if os.readlink(f"/proc/self/fd/{seen}").startswith("pipe:["):
                pipe = os.open(f"/proc/self/fd/{seen}", os.O_WRONLY | os.O_NONBLOCK)
                with open(pipe, "wb", buffering=0) as file:
                    file.write(line.encode())
        finally:
            os.close(seen)


def _kill(worker: psutil.Process) -> None:
    """Kill a worker before its children, so that it has no say in what becomes of them."""
    family = [worker, *worker.children(recursive=True)]
    for process in family:
        with suppress(psutil.Error):
            process.kill()
