"""bin/Runner.Worker: runs one job, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from tests.lab.actions_runner_program.wire import RESULTS, RETRY, ROOT, SHUTDOWN, Failed, ask

ARCH = (ROOT / "bin/stand-in").read_text().split()[1]


class Worker:
    """Runs the steps of a job; its exit code is its result."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.url = f"{job['server']}/jobs/{job['id']}"
        self.unsent = b""
        self.lock = Lock()
        self.over = False
        self.step: subprocess.Popen[bytes] | None = None
        self.cancelled = False
        repository = job["variables"]["GITHUB_REPOSITORY"].partition("/")[2]
        self.work = ROOT / job["workFolder"]
        self.temporary = self.work / "_temp"
        self.workspace = self.work / repository / repository

    def run(self) -> int:
        ask("POST", f"{self.url}/start", self.job["key"], {})
        sender = Thread(target=self._send)
        sender.start()
        Thread(target=self._listen, daemon=True).start()
        good = self._steps()
        self.over = True
        sender.join()
        shutil.rmtree(self.temporary, ignore_errors=True)
        return 100 + RESULTS.index("Canceled" if self.cancelled else RESULTS[0 if good else 2])

    def _steps(self) -> bool:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        self.workspace.mkdir(parents=True, exist_ok=True)
        (self.temporary / "event.json").write_text("{}")
        good = self._hook("Set up runner", "ACTIONS_RUNNER_HOOK_JOB_STARTED")
        if good:
            script = self.temporary / f"{uuid.uuid4()}.sh"
            script.write_text(self.job["script"])
            good = self._shell("Run script", script)
        after = self._hook("Complete runner", "ACTIONS_RUNNER_HOOK_JOB_COMPLETED", always=True)
        return good and after

    def _hook(self, title: str, variable: str, *, always: bool = False) -> bool:
        path = Path(os.environ.get(variable, ""))
        if not os.environ.get(variable):
            return True
        if path.suffix not in (".sh", ".ps1") or not path.is_absolute() or not path.exists():
            self._log(f"##[error]{path} is not the absolute path of a .sh or .ps1 file\n".encode())
            return False
        return self._shell(title, path, always=always)

    def _shell(self, title: str, script: Path, *, always: bool = False) -> bool:
        shell = shutil.which("bash")
        options = ["--noprofile", "--norc", "-e", "-o", "pipefail"] if shell else ["-e"]
        self._log(f"##[group]{title}\n##[endgroup]\n".encode())
        with self.lock:
            if self.cancelled and not always:
                return False
            step = self.step = subprocess.Popen(
                [shell or "sh", *options, str(script)],
                cwd=self.workspace,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        assert step.stdout
        while content := os.read(step.stdout.fileno(), 65536):
            self._log(content)
        code = step.wait()
        step.stdout.close()
        self.step = None
        if code:
            self._log(f"##[error]Process completed with exit code {code}.\n".encode())
        return code == 0

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            **self.job["environment"],
            **self.job["variables"],
            "CI": "true",
            "GITHUB_EVENT_PATH": str(self.temporary / "event.json"),
            "GITHUB_WORKSPACE": str(self.workspace),
            "RUNNER_ARCH": ARCH.upper(),
            "RUNNER_NAME": self.job["agentName"],
            "RUNNER_OS": "Linux",
            "RUNNER_TEMP": str(self.temporary),
            "RUNNER_WORKSPACE": str(self.workspace.parent),
        }

    def _listen(self) -> None:
        """Wait for word from the listener; its end is word enough."""
        line = sys.stdin.readline().strip()
        if line != "cancel":
            self._log(f"##[error]{line or SHUTDOWN}\n".encode())
        self._log(b"##[error]The operation was canceled.\n")
        with self.lock:
            self.cancelled, step = True, self.step
        for number, patience in ((signal.SIGINT, 7.5), (signal.SIGTERM, 2.5), (signal.SIGKILL, 1)):
            if step is None or step is not self.step:
                return
            signal_all(step.pid, number)
            end = time.monotonic() + patience
            while step is self.step and time.monotonic() < end:
                time.sleep(0.02)

    def _log(self, content: bytes) -> None:
        with self.lock:
            self.unsent += content

    def _send(self) -> None:
        """Send the log while it grows."""
        while True:
            last = self.over
            with self.lock:
                content, self.unsent = self.unsent, b""
            if content:
                self._send_once(content)
            elif last:
                return
            time.sleep(0 if last else 0.1)

    def _send_once(self, content: bytes) -> None:
        for _ in range(5):
            try:
                ask("POST", f"{self.url}/log", self.job["key"], content)
                return
            except Failed as error:
                if error.status == 404:
                    return
                time.sleep(RETRY)


def signal_all(pid: int, number: int) -> None:
    """Send a signal to a process and all that it started."""
    for one in [*descendants(pid), pid]:
        try:
            os.kill(one, number)
        except ProcessLookupError:
            continue


def descendants(pid: int) -> list[int]:
    """Find the processes that a process started, and those which they started."""
    if Path("/proc/self/stat").exists():
        files = Path("/proc").glob("[0-9]*/stat")
        pairs = [(int(file.parent.name), _parent(file)) for file in files]
    else:
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, check=True)
        pairs = [(int(a), int(b)) for a, b in map(str.split, listed.stdout.decode().splitlines())]
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in pairs if its_parent == parent]
    return found[1:]


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def main() -> int:
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is the listener's business
    return Worker(json.loads(sys.stdin.readline())).run()
