"""bin/Runner.Listener: registers, waits for jobs and has a Worker do them."""

from __future__ import annotations

import base64
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from queue import SimpleQueue
from threading import Thread
from typing import Any

from tests.lab.actions_runner_program.wire import RESULTS, RETRY, ROOT, SHUTDOWN, Failed, ask

VERSION, ARCH = (ROOT / "bin/stand-in").read_text().split()
PREFIX = "ACTIONS_RUNNER_INPUT_"
FLAGS = "ephemeral disableupdate no-default-labels replace unattended once local version"
OPTIONS = "url token name labels work runnergroup jitconfig startuptype"
FILES = (".runner", ".credentials", ".credentials_rsaparams")
SUCCESS, TERMINATED, RETRYABLE, UPDATING, ONCE_UPDATING, CONFLICT, REFRESHED, DEPRECATED = range(8)
CONFLICT_LIMIT = float(os.environ.get("STAND_IN_CONFLICT_LIMIT", "15"))  # seconds; really 240
DIAGNOSTICS = ROOT / "_diag"


def say(text: str = "") -> None:
    print(text, flush=True)


def complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def stamped(text: str) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%SZ', time.gmtime())}: {text}"


# What it was told


def arguments(words: list[str]) -> tuple[str, dict[str, str]]:
    """Read the command line, and the variables which say the same; these are removed."""
    command, options = "", {}
    for name in [name for name in os.environ if name.upper().startswith(PREFIX)]:
        options[name[len(PREFIX) :].lower().replace("_", "-")] = os.environ.pop(name)
    rest = iter(words)
    for word in rest:
        name = word.lstrip("-").lower()
        if not word.startswith("-"):
            command = word
        elif name in FLAGS.split():
            options[name] = "true"
        elif name in OPTIONS.split():
            options[name] = next(rest, "")
        else:
            complain(f"Unrecognized command-line input arguments for command {command}: '{name}'.")
    return command, options


def load_variables() -> None:
    """Read .env, which services use."""
    file = ROOT / ".env"
    lines = file.read_text().splitlines() if file.exists() else []
    for line in lines:
        name, equals, value = line.partition("=")
        if name and equals:
            os.environ[name] = value


def settings() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / ".runner").read_text(encoding="utf-8-sig"))
    return found


def save(files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = ROOT / name
        path.write_text(json.dumps(content, indent=2), encoding="utf-8-sig")
        path.chmod(0o600 if "rsa" in name else 0o644)


def forget() -> None:
    for name in FILES:
        (ROOT / name).unlink(missing_ok=True)


def key() -> str:
    text = (ROOT / ".credentials_rsaparams").read_text(encoding="utf-8-sig")
    return f"Bearer {json.loads(text)['d']}"


# configure, remove


def configure(options: dict[str, str]) -> int:
    if (ROOT / ".runner").exists():
        complain(
            "Cannot configure the runner because it is already configured. To reconfigure the "
            "runner, run 'config.cmd remove' or './config.sh remove' first."
        )
        return TERMINATED
    server = re.match(r"https?://[^/]+", options.get("url", ""))
    if not server or not options.get("token"):
        complain("Invalid configuration provided for url or token. Terminating unattended.")
        return TERMINATED
    own = [] if "no-default-labels" in options else ["self-hosted", "Linux", ARCH.upper()]
    body = {
        "url": options["url"],
        "name": options.get("name") or platform.node(),
        "labels": own + [one.strip() for one in options.get("labels", "").split(",") if one],
        "group": options.get("runnergroup", ""),
        "replace": "replace" in options,
        "ephemeral": "ephemeral" in options,
        "work": options.get("work") or "_work",
        "version": VERSION,
        "os": "linux",
        "arch": ARCH,
    }
    url = f"{server[0]}/_runner/configure"
    try:
        files = ask("POST", url, f"RemoteAuth {options['token']}", body)
    except Failed as error:
        return _not_configured(error, url, str(body["name"]))
    save(files)
    for line in ("Connected to GitHub", "Runner successfully added", "Settings Saved."):
        say(f"√ {line}")
    return SUCCESS


def _not_configured(error: Failed, url: str, name: str) -> int:
    if error.status == 404:
        complain(f"Http response code: NotFound from 'POST {url}'")
        complain("Response status code does not indicate success: 404 (Not Found).")
    elif error.status == 409:
        complain(f"A runner exists with the same name {name}.")
    else:
        complain(str(error))
    return TERMINATED


def remove(options: dict[str, str]) -> int:
    if "local" not in options and (ROOT / ".runner").exists():
        known = settings()
        body = {"id": known["agentId"], "url": known["gitHubUrl"]}
        try:
            ask("POST", f"{known['serverUrl']}/remove", f"RemoteAuth {options.get('token')}", body)
        except Failed as error:
            complain(f"Failed: Removing runner from the server. {error}")
            return TERMINATED
    forget()
    say("√ Runner removed successfully")
    return SUCCESS


# run


class Listener:
    """Asks for jobs, and has a Worker do them one after another."""

    def __init__(self, known: dict[str, Any], *, once: bool) -> None:
        self.known = known
        self.hosted = os.environ.get("ACTIONS_RUNNER_RETURN_JOB_RESULT_FOR_HOSTED") == "1"
        self.once = once or self.hosted
        self.server: str = known["serverUrl"]
        self.key = key()
        self.session = ""
        self.events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.job: dict[str, Any] = {}
        self.worker: subprocess.Popen[bytes] | None = None
        self.stopping: int | None = None  # by what signal
        self.cancelled = False
        self.output = ""  # of a worker that died

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: self.events.put(("signal", number)))
        code = self._open()
        if code is None:
            say(f"Current runner version: '{VERSION}'")
            say(stamped("Listening for Jobs"))
            Thread(target=self._poll, daemon=True).start()
            code = self._loop()
            self._close()
        return code

    def _open(self) -> int | None:
        """Open a session; return an exit code if that can't be done."""
        body = {"version": VERSION, "os": "Linux", "arch": ARCH}
        begun, complained = time.monotonic(), False
        while True:
            if not self.events.empty():
                return self._stopped()
            say()
            say("√ Connected to GitHub")
            say()
            try:
                answer = ask("POST", f"{self.server}/session", self.key, body)
            except Failed as error:
                if (code := self._refused(error, time.monotonic() - begun)) is not None:
                    return code
                if not complained:
                    complain(stamped(f"Runner connect error: {error}. Retrying until reconnected."))
                complained = True
                time.sleep(RETRY)
                continue
            if complained:
                say(stamped("Runner reconnected."))
            self.session = answer["session"]
            return None

    def _refused(self, error: Failed, since: float) -> int | None:
        if error.status == 404:
            complain(
                "Failed to create a session. The runner registration has been deleted from the "
                "server, please re-configure."
            )
            return TERMINATED
        if error.status == 410:
            complain(f"An error occurred: {error}")
            asked = os.environ.get("ACTIONS_RUNNER_RETURN_VERSION_DEPRECATED_EXIT_CODE") == "1"
            return DEPRECATED if asked else TERMINATED
        if error.status == 500:
            complain(f"An error occurred: {error}")
            return RETRYABLE
        if error.status in (409, 423):
            complain("A session for this runner already exists.")
            if since > CONFLICT_LIMIT or error.status == 423:
                complain(f"Failed to create session. {error}")
                return CONFLICT
        return None

    def _stopped(self) -> int:
        say("Exiting...")
        return SUCCESS if self.events.get()[1] == signal.SIGINT else TERMINATED

    def _poll(self) -> None:
        complained = False
        while self.stopping is None:
            try:
                url = f"{self.server}/message?session={self.session}"
                if message := ask("GET", url, self.key):
                    self.events.put(("message", message))
                if complained:
                    say(stamped("Runner reconnected."))
                complained = False
            except Failed as error:
                if error.status in (404, 409):
                    self.events.put(("gone", error.status))
                    return
                if not complained and self.stopping is None:
                    complain(stamped(f"Runner connect error: {error}. Retrying until reconnected."))
                complained = True
                time.sleep(RETRY)

    def _loop(self) -> int:
        while True:
            what, value = self.events.get()
            code = getattr(self, f"_on_{what}")(value)
            if code is not None:
                return int(code)

    def _on_message(self, message: dict[str, Any]) -> int | None:
        if message["type"] == "job":
            self._start(message)
        elif message["type"] == "cancel" and self.worker:
            self.cancelled = True
            self._tell("cancel")
        elif message["type"] == "update":
            say("Runner update in progress, do not shutdown runner.")
            say("Runner will exit shortly for update, should be back online within 10 seconds.")
            return ONCE_UPDATING if self.once else UPDATING
        elif message["type"] == "refresh":
            return REFRESHED
        return None

    def _on_signal(self, number: int) -> int | None:
        if self.stopping is None:
            say("Exiting...")
            self.stopping = number
            self._tell(SHUTDOWN)
        return None if self.worker else self._last()

    def _on_gone(self, status: int) -> int | None:
        if self.stopping is not None or (self.worker is None and self.once and self.job):
            return None
        self._tell("cancel")
        complain("The runner no longer exists on the server. Please reconfigure the runner.")
        return TERMINATED if status == 404 else CONFLICT

    def _on_worker(self, code: int) -> int | None:
        """Report the result; a Worker that dies without one has failed."""
        self.worker = None
        known = 100 <= code < 100 + len(RESULTS)
        result = RESULTS[code - 100] if known else "Failed"
        self._report(result)
        say(stamped(f"Job {self.job['name']} completed with result: {result}"))
        if self.hosted:
            return 100 + RESULTS.index(result)
        if self.once:
            forget()
            return SUCCESS
        return None if self.stopping is None else self._last()

    def _last(self) -> int:
        return SUCCESS if self.stopping == signal.SIGINT else TERMINATED

    def _start(self, job: dict[str, Any]) -> None:
        if self.stopping is not None:
            return
        self.job, self.cancelled = job, False
        say(stamped(f"Running job: {job['name']}"))
        command = [str(ROOT / "bin/Runner.Worker"), "spawnclient", "0", "1"]
        pipe, out = subprocess.PIPE, subprocess.STDOUT
        self.worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=out)
        self._tell(json.dumps({**job, "server": self.server, "key": self.key, **self.known}))
        Thread(target=self._wait, args=(self.worker,), daemon=True).start()

    def _wait(self, worker: subprocess.Popen[bytes]) -> None:
        """Wait for its end; what it printed, if it died, is shown to people beside the job."""
        assert worker.stdout
        output = worker.stdout.read().decode(errors="replace")
        DIAGNOSTICS.mkdir(exist_ok=True)
        with (DIAGNOSTICS / f"Worker_{self.job['id']}.log").open("a") as log:
            log.write(output)
        code = worker.wait()
        known = 100 <= code < 100 + len(RESULTS)
        self.output = "" if known else output.strip()
        self.events.put(("worker", code))

    def _tell(self, line: str) -> None:
        if self.worker and self.worker.stdin:
            try:
                self.worker.stdin.write(line.encode() + b"\n")
                self.worker.stdin.flush()
            except OSError:
                return  # it is dead, as its exit code will tell

    def _report(self, result: str) -> None:
        url = f"{self.server}/jobs/{self.job['id']}/finish"
        for _ in range(150):
            try:
                ask("POST", url, self.key, {"result": result, "message": self.output})
                return
            except Failed as error:
                if error.status == 404:
                    return
                time.sleep(RETRY)

    def _close(self) -> None:
        self.stopping = self.stopping or 0
        try:
            ask("DELETE", f"{self.server}/session?session={self.session}", self.key)
        except Failed:
            return


def run(options: dict[str, str]) -> int:
    if blob := options.get("jitconfig"):
        try:
            files = json.loads(base64.b64decode(blob))
            for name, content in files.items():
                (ROOT / name).write_bytes(base64.b64decode(content))
        except (ValueError, AttributeError) as error:
            complain(f"An error occurred: {error}")
            return TERMINATED
    if not (ROOT / ".runner").exists():
        complain("Not configured. Run config.(sh/cmd) to configure the runner.")
        return TERMINATED
    known = settings()
    return Listener(known, once="once" in options or known["ephemeral"]).run()


def main(words: list[str]) -> int:
    load_variables()
    command, options = arguments(words)
    if "version" in options:
        say(VERSION)
        return SUCCESS
    if os.geteuid() == 0 and not os.environ.get("RUNNER_ALLOW_RUNASROOT"):
        complain("Must not run with sudo")
        return TERMINATED
    commands = {"configure": configure, "remove": remove, "run": run}
    if command == "warmup" or command not in commands:
        return SUCCESS
    return commands[command](options)
