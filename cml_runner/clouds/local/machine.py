"""One machine of the embedded cloud, as its keeper sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

from cml_runner import bootstrap
from cml_runner.clouds.local import files, processes, records
from cml_runner.model import Notice

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PASSED_ON = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ", "TMPDIR", "PYTHONPATH"),
        *("CML_RUNNER_HOME", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"),
        *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"),
        "GIT_SSL_CAINFO",
    }
)


@dataclass
class Machine:
    """A directory, and the process which leads all others of the machine."""

    directory: Path
    leader: psutil.Process | None = None  # None: it was gone before we came
    child: subprocess.Popen[bytes] | None = None  # None: it is an earlier keeper's
    born: float = field(default_factory=time.time)
    end: float = float("inf")  # when to kill it
    asked: bool = False  # to go

    @classmethod
    def create(cls, directory: Path, command: Sequence[str]) -> Machine:
        """Boot one. Raises OSError, and leaves nothing behind then."""
        child = None
        try:
            files.make(directory)
            child = _boot(directory, command)
            leader = psutil.Process(child.pid)
            files.save(directory / "machine.json", processes.identify(leader))
        except OSError:
            if child:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            with suppress(OSError):
                files.remove(directory)
            raise
        return cls(directory, leader, child)

    @classmethod
    def adopt(cls, directory: Path) -> Machine:
        """Take over what an earlier keeper booted; whether it still runs will be seen."""
        leader = processes.find(files.read(directory / "machine.json", processes.Process))
        return cls(directory, leader, born=leader.create_time() if leader else 0)

    @property
    def rank(self) -> int:
        """Its place in the group."""
        return records.rank(self.directory)

    @property
    def alive(self) -> bool:
        """Whether the leader runs; the others don't count."""
        return processes.alive(self.leader)

    def has(self, mark: str) -> bool:
        """Say if there is such a file."""
        return (self.directory / mark).exists()

    def heed(self) -> None:
        """Let a notice that was given hold."""
        notice = files.read(self.directory / "notice.json", Notice)
        if notice and notice.deadline:
            self.end = min(self.end, notice.deadline.timestamp())

    def ask(self) -> None:
        """Ask it once to end."""
        if not self.asked and self.leader:
            with suppress(psutil.NoSuchProcess):
                self.leader.terminate()
        self.asked = True

    def epitaph(self) -> str:
        """Tell how it ended, and what it said last."""
        code = self.child.poll() if self.child else None
        text = "ended" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            text = f"was killed by {signal.Signals(-code).name}"
        with suppress(OSError), open(self.directory / "console.log", "rb") as console:
            console.seek(max(0, os.fstat(console.fileno()).st_size - 500))
            lines = console.read().decode(errors="replace").strip().splitlines()
            text = ": ".join([text, *lines[-3:]])
        return text


def kill(machines: Sequence[Machine]) -> None:
    """Kill every process of these machines, and wait until there is none."""
    processes.kill(
        {str(machine.directory) for machine in machines},
        {one.leader.pid for one in machines if one.leader and _leads(one.leader)},
    )


def environment() -> dict[str, str]:
    """Pick the variables that a machine may see; it isn't the launcher, and has no secrets."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in PASSED_ON or name.startswith("LC_")
    }


def _boot(directory: Path, command: Sequence[str]) -> subprocess.Popen[bytes]:
    url = (directory.parent.parent / "bucket").as_uri()
    script = directory / "bootstrap.sh"
    files.write(script, bootstrap.ready(url, command).encode())
    with open(directory / "console.log", "ab") as console:
        return subprocess.Popen(
            ("/bin/sh", str(script)),
            cwd=directory,
            env={**environment(), processes.VARIABLE: str(directory)},
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )


def _leads(leader: psutil.Process) -> bool:
    """Say if its number can't be another process's by now, so that it stands for a session."""
    return leader.is_running() or not psutil.pid_exists(leader.pid)
