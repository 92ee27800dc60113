"""The agent of the embedded forge: a program which polls for jobs and runs them, one at a time.

`python -m cml_runner.forges.local DIRECTORY NAME`, with the secret of the registration in the
variable LOCAL_FORGE_SECRET. SIGUSR1 makes the running job fail, SIGUSR2 as well and calls it
interrupted, SIGTERM or SIGINT cancels it; then the agent ends. Exit codes: 0 it was told to end, or
had its single job; 1 it could not start; 2 it may be started again; 7 its registration was deleted.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import psutil

from cml_runner.errors import CredentialsError, NotFound, RunnerError
from cml_runner.forges.local import INTERRUPTED, Forge
from cml_runner.forges.local.agent import DELETED, ENDED, REFUSED, SECRET, TRY_AGAIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cml_runner.forges.local import Entry, JobState

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
MARK = "LOCAL_FORGE_MARK"  # a variable by which a job's processes are found again
POLL = 0.2  # seconds between two looks at the queue
PATIENCE = 10  # seconds for killed processes to be gone


class Program:
    """One agent, from its start to its end."""

    def __init__(self, forge: Forge, name: str) -> None:
        self.forge, self.name = forge, name
        self.abort = self.stop = self.interrupted = False
        self.wakeup, pen = os.pipe()
        for end in (self.wakeup, pen):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(pen, warn_on_full_buffer=False)
        for number in (*SIGNALS, signal.SIGCHLD):
            signal.signal(number, self._signalled)

    def _signalled(self, number: int, _frame: object) -> None:
        self.abort |= number in {signal.SIGUSR1, signal.SIGUSR2}
        self.interrupted |= number == signal.SIGUSR2
        self.stop |= number in {signal.SIGTERM, signal.SIGINT}

    @property
    def _verdict(self) -> str:
        """What a signal said of the running job, if any."""
        if self.interrupted:
            return INTERRUPTED
        return "failed" if self.abort else "cancelled" if self.stop else ""

    def main(self, secret: str) -> int:
        """Live; return the exit code."""
        try:
            connected = self.forge.connect(self.name, secret)
            if connected is None:
                return self._deleted()
            entry, session = connected
            with session:
                return self._serve(entry)
        except (CredentialsError, NotFound) as error:
            _say(f"trouble: {error}")
            return REFUSED
        except RunnerError as error:
            _say(f"trouble: {error}")
            return TRY_AGAIN

    def _serve(self, entry: Entry) -> int:
        _say("listening for jobs")
        while not (self.stop or self.abort):
            if not self.forge.registered(self.name, entry):
                return self._deleted()
            if claimed := self.forge.claim(self.name, entry):
                self._run(claimed)
                if entry.single:
                    break
            else:
                self._sleep()
        return ENDED

    def _deleted(self) -> int:
        _say("trouble: the registration has been deleted")
        return DELETED

    def _run(self, claimed: JobState) -> None:
        _say(f"running job {json.dumps(asdict(claimed.job))}")
        try:
            result, exit_code = self._execute(claimed)
        except OSError as error:  # a full disk, for one
            _say(f"trouble: the job can't go on: {error}")
            result, exit_code = "failed", None
        result = self.forge.finish(claimed, result, exit_code)
        _say(f"job {json.dumps(claimed.job.name)} ended: {result}")

    def _execute(self, claimed: JobState) -> tuple[str, int | None]:
        """Run the script till it ends, or a signal ends it; return the result and the exit code.

        Raises OSError if its log can't be written.
        """
        mark = secrets.token_hex(8)
        with claimed.log.open("ab", buffering=0) as log, _directory() as work:
            try:
                process = _start(claimed, work, mark)
            except (OSError, ValueError) as error:
                log.write(f"the script can't be started: {error}\n".encode(errors="replace"))
                return "failed", 127
            with process:
                assert process.stdout
                try:
                    self._follow(process, log)
                finally:
                    code = process.poll()
                    _kill(process, mark)
                _copy(process.stdout.fileno(), log)
            if code is None:
                log.write(f"the runner was told to end this job as {self._verdict}\n".encode())
                return self._verdict, None
            return "failed" if code else "succeeded", 128 - code if code < 0 else code

    def _follow(self, process: subprocess.Popen[bytes], log: BinaryIO) -> None:
        """Copy what a job says to its log, until it has ended or a signal asks for its end."""
        assert process.stdout
        source: int = process.stdout.fileno()
        os.set_blocking(source, False)
        watched = [source]
        while process.poll() is None and not self._verdict:
            if self._sleep(*watched) and not _copy(source, log):
                watched = []  # it closed its output, but goes on

    def _sleep(self, *files: int) -> bool:
        """Wait a little: for a signal, or till one of the files can be read (True)."""
        ready, _, _ = select.select([self.wakeup, *files], [], [], POLL)
        if self.wakeup in ready:
            os.read(self.wakeup, 4096)
        return any(file in ready for file in files)


@contextmanager
def _directory() -> Iterator[Path]:
    """Make a fresh directory below the agent's own, for one job."""
    path = Path(tempfile.mkdtemp(prefix="work-", dir=Path.cwd()))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _start(claimed: JobState, work: Path, mark: str) -> subprocess.Popen[bytes]:
    script = claimed.log.with_name("script")
    with script.open("rb") as file:
        head = os.fsdecode(file.readline(4096)).strip()
    interpreter = head[2:].strip().split(maxsplit=1) if head.startswith("#!") else ["/bin/sh"]
    environment = {
        **os.environ,
        "CI": "true",
        "JOB_NAME": claimed.job.name,
        "JOB_ID": claimed.job.id,
        "JOB_ATTEMPT": str(claimed.job.attempt),
        "RUNNER_NAME": claimed.job.runner,
        MARK: mark,
    }
    return subprocess.Popen(
        [*(interpreter or ["/bin/sh"]), str(script)],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=os.setpgrp,  # noqa: PLW1509 - process_group= needs Python 3.11; no threads here
    )


def _copy(source: int, log: BinaryIO) -> bool:
    """Move what a pipe holds to the log; False at its end."""
    try:
        text = os.read(source, 1 << 20)
    except BlockingIOError:
        return True
    left = text
    while left:
        left = left[log.write(left) :]
    return bool(text)


def _kill(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kill all processes of a job, in whatever group or session they hide."""
    deadline = time.monotonic() + PATIENCE
    while (found := _processes(process, mark)) and time.monotonic() < deadline:
        for each in found:
            with suppress(psutil.Error):
                each.kill()
        time.sleep(0.01)
    process.wait()


def _processes(process: subprocess.Popen[bytes], mark: str) -> list[psutil.Process]:
    found = [each for each in psutil.process_iter() if _marked(each, mark)]
    if process.poll() is None:  # else its number may be another's by now
        with suppress(psutil.Error):
            leader = psutil.Process(process.pid)
            found += [leader, *leader.children(recursive=True)]
    return found


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except (psutil.Error, OSError):
        return False


def _say(text: str) -> None:
    """Print one line, whatever is in it, even if nobody listens any more."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = f"{now} agent: {text}".encode("ascii", "backslashreplace")
    with suppress(OSError):
        os.write(1, line.replace(b"\n", b" ").replace(b"\r", b" ") + b"\n")


def main() -> int:
    """Be the agent."""
    if len(sys.argv) != 3:
        print(f"usage: {SECRET}=… python -m cml_runner.forges.local DIRECTORY NAME")
        return REFUSED
    program = Program(Forge(sys.argv[1]), sys.argv[2])
    code = program.main(os.environ.pop(SECRET, ""))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # Python's own end would let them kill us
    return code


if __name__ == "__main__":
    sys.exit(main())
