"""A stand-in for GitLab's runner program, which can't be had from a package registry.

It has the real one's arguments, variables, protocol, log lines, signals and exit codes, as far as
`run-single` with a shell goes; but it asks for jobs five times a second, not every three seconds.
Like the real one it lets a job that it has to abort take its time to end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

POLL = 0.2  # seconds
UNHEALTHY = 300  # seconds
VERSION = "18.5.0"


def main() -> int:
    options = arguments()
    return Single(options).run()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gitlab-runner", allow_abbrev=False)
    parser.add_argument("--log-format", default="runner", choices=["runner", "text", "json"])
    commands = parser.add_subparsers(dest="command", required=True)
    single = commands.add_parser("run-single", allow_abbrev=False)
    single.add_argument("--name", default="")
    single.add_argument("--url", default=os.environ.get("CI_SERVER_URL", ""))
    single.add_argument("--token", default=os.environ.get("CI_SERVER_TOKEN", ""))
    single.add_argument("--executor", default=os.environ.get("RUNNER_EXECUTOR", ""))
    single.add_argument("--env", action="append", default=[])
    single.add_argument("--builds-dir", default="builds")
    single.add_argument("--cache-dir", default="cache")
    single.add_argument("--wait-timeout", type=int, default=0)
    single.add_argument("--max-builds", type=int, default=0)
    single.add_argument("--docker-image", default="")
    single.add_argument("--docker-gpus", default="")
    single.add_argument("--docker-volumes", action="append", default=[])
    return parser.parse_args()


def log(level: str, message: str, **fields: object) -> None:
    stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = json.dumps({**fields, "level": level, "msg": message, "time": stamp})
    os.write(sys.stderr.fileno(), f"{line}\n".encode())  # also from within a signal's handler


class Single:
    """One runner."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.finished = threading.Event()
        self.aborted = threading.Event()
        self.job: Job | None = None

    def run(self) -> int:
        options = self.options
        missing = [one for one in ("url", "token", "executor") if not getattr(options, one)]
        if missing or options.executor != "shell":
            said = [f"Missing {missing[0]}"] if missing else ["Unknown executor:", options.executor]
            log("fatal", " ".join(said))
            return 1
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
            signal.signal(number, self.signalled)
        token = options.token.removeprefix("glrt-")[:9]
        log("info", f"Starting runner for {options.url} with token {token} ...")
        forever, left, since = not options.max_builds, options.max_builds, time.monotonic()
        while not self.finished.is_set():
            if self.build():
                left, since = left - 1, time.monotonic()
            if not forever and left < 1:
                log("info", "This runner has processed its build limit, so now exiting")
                self.finished.set()
            waited = int(time.monotonic() - since)
            if options.wait_timeout and waited > options.wait_timeout:
                words = f"has not received a job in {options.wait_timeout} seconds"
                log("info", f"This runner {words}, so now exiting")
                self.finished.set()
        return 0

    def signalled(self, number: int, _: object) -> None:
        self.finished.set()
        if number == signal.SIGQUIT and not self.aborted.is_set():
            log("warning", "Requested quit, waiting for builds to finish")
            return
        if self.aborted.is_set():
            log("fatal", f"forced exit: {signal.Signals(number).name}")
            os._exit(1)
        log("warning", "Requested exit: terminated")
        self.aborted.set()
        if self.job:
            self.job.abort()

    def build(self) -> bool:
        """Ask for a job and run it; False if there was none."""
        status, _, found = self.ask("POST", "jobs/request", {"token": self.options.token, **INFO})
        if status == 403:
            log("error", "Checking for jobs... forbidden", runner="x")
            log("info", "Runner is not healthy!")
            self.aborted.wait(UNHEALTHY)
            return False
        if status != 201:
            if status != 204:
                log("warning", "Checking for jobs... failed", status=str(status))
            self.aborted.wait(POLL)
            return False
        repository = found["git_info"]["repo_url"]
        log("info", "Checking for jobs... received", job=found["id"], repo_url=repository)
        self.job = Job(self, found)
        self.job.run()
        self.job = None
        return True

    def ask(
        self, method: str, path: str, body: Any, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], Any]:
        raw = isinstance(body, bytes)
        content = body if raw else json.dumps(body).encode()
        kind = {"Content-Type": "text/plain" if raw else "application/json"}
        url = f"{self.options.url}/api/v4/{path}"
        asked = urllib.request.Request(url, content, {**kind, **(headers or {})}, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                text = answer.read()
                found = json.loads(text) if answer.status == 201 else None
                return answer.status, dict(answer.headers), found
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), None
        except OSError as error:
            log("warning", "Checking for jobs... failed", status=str(error))
            return 0, {}, None


INFO = {
    "info": {
        "name": "gitlab-runner",
        "version": VERSION,
        "platform": "linux",
        "executor": "shell",
        "features": {"cancelable": True, "cancel_gracefully": True},
    }
}


class Job:
    """One job, while it runs."""

    def __init__(self, single: Single, found: Any) -> None:
        self.single, self.found, self.sent = single, found, 0
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        options, found = self.single.options, self.found
        directory = Path(options.builds_dir) / str(found["job_info"]["project_id"])
        directory.mkdir(parents=True, exist_ok=True)
        own = {one["key"]: one["value"] for one in found["variables"]}
        own |= dict(one.split("=", 1) for one in options.env)
        script = "\n".join([*(f"export {k}='{v}'" for k, v in own.items()), *self.lines()])
        self.trace(f"Running with gitlab-runner {VERSION}\n".encode())
        self.process = subprocess.Popen(
            ["bash"],
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self.process.stdin
        assert self.process.stdout
        with suppress(BrokenPipeError):  # it may have been aborted by now
            self.process.stdin.write(f"set -eo pipefail\n{script}\n".encode())
            self.process.stdin.close()
        if self.single.aborted.is_set():
            self.abort()
        while piece := os.read(self.process.stdout.fileno(), 65536):
            self.trace(piece)
        self.process.stdout.close()
        self.end(self.process.wait())

    def lines(self) -> list[str]:
        return [line for step in self.found["steps"] for line in step["script"]]

    def abort(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGTERM)  # ten minutes later it would be killed

    def trace(self, piece: bytes) -> None:
        token, path = self.found["token"], f"jobs/{self.found['id']}/trace"
        span = f"{self.sent}-{self.sent + len(piece)}"
        headers = {"JOB-TOKEN": token, "Content-Range": span}
        status, answer, _ = self.single.ask("PATCH", path, piece, headers)
        self.sent += len(piece) if status == 202 else 0
        if answer.get("Job-Status") in ("canceling", "canceled"):
            self.abort()

    def end(self, code: int) -> None:
        fields = {"job": self.found["id"], "duration_s": 1.0}
        body = {"token": self.found["token"], "state": "success", **INFO}
        if self.single.aborted.is_set():
            log("error", "Job failed (system failure): aborted: terminated", **fields)
            body |= {"state": "failed", "failure_reason": "runner_system_failure"}
        elif code:
            reason = {"failure_reason": "script_failure", "exit_code": code}
            said = f"Job failed: exit status {code}\n"
            log("warning", said, **{**fields, **reason, "job-status": "failed"})
            body |= {"state": "failed", **reason}
        else:
            log("info", "Job succeeded", **fields, **{"job-status": "success"})
        time.sleep(0.1)  # the last words take a moment, in which a second signal would be fatal
        self.single.ask("PUT", f"jobs/{self.found['id']}", body)


if __name__ == "__main__":
    sys.exit(main())
