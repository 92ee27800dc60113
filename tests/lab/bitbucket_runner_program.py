"""A stand-in for Bitbucket's runner program, in the place of its runner.jar.

It has the real one's properties, log lines and signals, as far as a shell goes; the protocol is
made up, and it asks five times a second. What is started as "java" is a stand-in, too, which runs
this file.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path

POLL = 0.2  # seconds
NAME = "bitbucket.pipelines.runner."


def main(arguments: list[str]) -> int:
    """Understand what Java would: options, or a file with them, before -jar."""
    words: list[str] = []
    for one in arguments:
        words += shlex.split(Path(one[1:]).read_text()) if one.startswith("@") else [one]
    own = dict(one[2:].split("=", 1) for one in words if one.startswith("-D"))
    found = {name.removeprefix(NAME): value for name, value in own.items()}
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    return Program(found).run()


def say(message: str) -> None:
    stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S,%f")[:-3]
    print(f"[{stamp}] {message}", flush=True)


class Program:
    def __init__(self, properties: dict[str, str]) -> None:
        self.properties = properties
        self.server = os.environ["LAB_BITBUCKET"]

    def run(self) -> int:
        if self.properties["runtime"] != "linux-shell":
            say("Error: unknown runtime")
            return 1
        self.online()
        while True:
            step = self.ask("next")
            if step is None:
                return 1
            if step:
                self.work(step)
                self.online()
            time.sleep(POLL)

    def online(self) -> None:
        say(
            'Updating runner status to "ONLINE" and checking for new steps assigned to the runner'
            " after 0 seconds and then every 30 seconds."
        )

    def work(self, step: dict[str, str]) -> None:
        names = ("account", "repository", "pipeline", "step")
        ids = ", ".join(f"{name}Uuid={step[name]}" for name in names)
        say(f"Getting step StepId{{{ids}}}.")
        directory = Path(self.properties["directory.working"]) / step["step"].strip("{}")
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                ["bash", "-e", "-c", step["script"]],
                cwd=directory,
                env={**os.environ, "CI": "true", "BITBUCKET_BUILD_NUMBER": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            while process.poll() is None:
                self.ask("end", log=_read(log.fileno()))
                time.sleep(0.05)
            good = process.returncode == 0
            status = "PASSED" if good else "FAILED"
            say(f"Completing step with result Result{{status={status}, error=None}}.")
            result = "SUCCESSFUL" if good else "FAILED"
            self.ask("end", log=_read(log.fileno()), result=result)

    def ask(self, what: str, **more: str) -> dict[str, str] | None:
        properties = self.properties
        own = {
            "uuid": properties["uuid"],
            "client": properties["oauth.client.id"],
            "secret": properties["oauth.client.secret"],
        }
        content = json.dumps({**own, **more}).encode()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{self.server}/_runner/{what}", content, headers)
        try:
            with urllib.request.urlopen(asked, timeout=10) as answer:
                found: dict[str, str] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            say(f"An error occurred whilst updating runner state: {error.code} Unauthorized")
            time.sleep(1)
            return {}
        except OSError as error:
            say(f"Failed to reach Bitbucket: {error}")
            time.sleep(1)
            return {}


def _read(file: int) -> str:
    return os.pread(file, 1 << 20, 0).decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
