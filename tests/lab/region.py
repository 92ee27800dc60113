"""A region of AWS with machines that really boot, GitHub, and an index of packages: all of the lab.

    with Region(prepared, directory) as region:
        region.cli("launch", "--cloud", "aws", …)

Everything has the name that it has in the world, but for GitHub, which is an Enterprise Server.
The forge is another one on demand: gitlab.com, or Bitbucket.
"""

from __future__ import annotations

import http.client
import os
import shutil
import sys
import threading
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from tests.lab.aws import AWS
from tests.lab.internet import Internet
from tests.lab.machines import Instance, Machine
from tests.lab.prepare import ROOT, SUITES
from tests.worlds import WORLDS, OnGitHub

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from tests.lab.github import GitHub
    from tests.lab.machines import Instance
    from tests.worlds import World

Own = TypeVar("Own", bound="Region")
PACKAGES, FORGE = "packages.lab.example", "git.lab.example"
TOOLS = ("systemd-nspawn", "ip", "nsenter", "mount")
AFTER = 1  # second, of many that clouds take to end a machine
HOP = ("connection", "keep-alive", "transfer-encoding", "content-length")


def missing(prepared: Path) -> str:
    """Say why the lab can't be had here; empty if it can."""
    if os.geteuid():
        return "needs root"
    if tools := [name for name in TOOLS if not shutil.which(name)]:
        return f"needs {', '.join(tools)}"
    if not (prepared / "wheels").exists():
        return "needs LAB_DIRECTORY, as made by python -m tests.lab.prepare"
    return ""


class Region:
    """All of it."""

    def __init__(
        self,
        prepared: Path,
        directory: Path,
        suite: str = next(iter(SUITES)),
        forge: str = "github",
    ) -> None:
        self.prepared, self.directory, self.suite = prepared, directory, suite
        self.machines: dict[str, Machine] = {}
        self.consoles: dict[str, list[str]] = {}
        self.booted: dict[str, datetime] = {}
        self._numbers = count(1)
        self._stack = ExitStack()
        self.internet = Internet(directory)
        self.index = Index(prepared)
        self.open()
        self.world: World = WORLDS[forge](directory)
        self.stock = False  # machines bring nothing of what our program depends on
        self.more_files: dict[str, str] = {}  # on the disks of machines
        self.launcher: dict[str, str] = {}  # keys; empty: those of an administrator

    def __enter__(self: Own) -> Own:
        self.internet = self._stack.enter_context(self.internet)
        sites = self.enter(self._stack)
        self._stack.callback(self.world.leave_alone)
        self._stack.callback(self._end_all)
        for host, application in self.world.move_out(FORGE).items():
            self.internet.serve(host, application or proxy(self.github.own_url))
        for host, application in sites.items():
            self.internet.serve(host, application)
        self.internet.serve(PACKAGES, self.index)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def github(self) -> GitHub:
        """The forge, if it is GitHub."""
        assert isinstance(self.world, OnGitHub)
        return self.world.github

    @property
    def token(self) -> str:
        """The launcher's credential for the forge."""
        return self.world.environment["REPO_TOKEN"]

    def environment(self, keys: dict[str, str] | None = None) -> dict[str, str]:
        """Name the variables of a launcher."""
        return {
            **self.login(keys or self.launcher),
            **self.world.environment,
            "CML_RUNNER_REPO": self.world.repo,
            "CML_RUNNER_MACHINE_INDEX": self.index.url,
        }

    def cli(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        checkout: Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        """Run the program on somebody's laptop in this internet, from some checkout."""
        command = ["env", "-C", str(checkout), sys.executable, "-m", "cml_runner", *arguments]
        return self.internet.run(command, {**self.environment(), **(environment or {})})

    # What is AWS's own; another cloud's region is a class which replaces it

    def open(self) -> None:
        """Have the cloud."""
        self.aws = AWS(self)

    def enter(self, stack: ExitStack) -> Mapping[str, Callable[..., Iterable[bytes]]]:
        """Start it; say who answers for which of its hosts."""
        self.aws = stack.enter_context(self.aws)
        return {"amazonaws.com": self.aws.app, "checkip.amazonaws.com": _address}

    def login(self, keys: dict[str, str]) -> dict[str, str]:
        """Name the variables with somebody's keys; empty: an administrator's."""
        found = keys or self.aws.admin
        return {
            "AWS_ACCESS_KEY_ID": found["id"],
            "AWS_SECRET_ACCESS_KEY": found["secret"],
            "AWS_SESSION_TOKEN": found["token"],
        }

    def metadata(self, instance: str) -> Callable[..., Iterable[bytes]]:
        """Serve a machine's metadata."""
        return self.aws.metadata(instance, first=True)

    def powered_off(self, instance: str) -> None:
        """Tell the cloud that a machine has ended by itself."""
        self.aws.instances.powered_off(instance)

    def life(self, instance: str) -> Any:
        """Return what the cloud knows of a machine: its `console`, and if it has `ended`."""
        return self.aws.instances.lives[instance]

    def files(self, instance: Instance) -> Mapping[str, str]:
        """Write what a machine's disk has that isn't in its image."""
        assert instance
        return {}

    # Machines

    def start(self, instance: Instance) -> None:
        """Boot one."""
        number = next(self._numbers)
        lines = self.consoles[instance.id] = []

        def say(line: str) -> None:
            lines.append(line)
            self.life(instance.id).console += line

        machine = Machine(
            instance,
            self.internet,
            self.prepared / self.suite,
            self.directory / f"machine-{number}",
            number,
            say,
            lambda: self.powered_off(instance.id),
            {**self.files(instance), **self.more_files},
            () if self.stock else (self.prepared / "environments" / self.suite,),
        )
        self.internet.metadata(instance.address, self.metadata(instance.id))
        self.machines[instance.id] = machine
        self.booted[instance.id] = datetime.now(timezone.utc)
        machine.start()

    def end(self, instance: str) -> None:
        """Take its power away, some time after the cloud has said that it will."""
        if machine := self.machines.get(instance):
            timer = threading.Timer(AFTER, machine.end)
            timer.daemon = True
            timer.start()

    def said(self) -> str:
        """Return the last lines of every console, to tell what went wrong."""
        texts = [f"{name}:\n{''.join(lines[-25:])}" for name, lines in self.consoles.items()]
        return "\n".join(texts)

    def alive(self) -> list[Machine]:
        """List the machines that run, the oldest first."""
        return [one for name, one in self.machines.items() if not self.life(name).ended]

    def _end_all(self) -> None:
        for machine in self.machines.values():
            with suppress(RuntimeError):
                machine.end()


class Index:
    """A simple index of packages, as PEP 503 has it; it hasn't got ours."""

    url = f"https://{PACKAGES}/simple/"

    def __init__(self, prepared: Path) -> None:
        self._wheels = prepared / "wheels"
        self.away = False
        self.faults = 0  # so many times more it is away
        self.asked: list[str] = []  # paths
        self.sent = 0  # bytes

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        parts = environ["PATH_INFO"].strip("/").split("/")
        self.asked.append(environ["PATH_INFO"])
        self.faults, fault = max(0, self.faults - 1), self.faults > 0
        content, kind = b"", "application/octet-stream"
        if self.away or fault or parts[-1] == "cml-runner":
            start("403 No" if parts[-1] == "cml-runner" else "503 Away", [("Content-Length", "0")])
            return []
        if parts[0] == "simple" and len(parts) == 2:
            found = [one for one in self._wheels.iterdir() if _project(one.name) == parts[1]]
            links = "".join(f'<a href="/files/{one.name}">{one.name}</a>\n' for one in found)
            page = f"<!DOCTYPE html><html><body>{links}</body></html>"
            content, kind = page.encode() if found else b"", "text/html"
        elif parts[0] == "files" and (self._wheels / parts[-1]).exists():
            content = (self._wheels / parts[-1]).read_bytes()
        self.sent += len(content)
        status = "200 OK" if content else "404 Not Found"
        start(status, [("Content-Type", kind), ("Content-Length", str(len(content)))])
        return [content]


def _project(wheel: str) -> str:
    return wheel.partition("-")[0].lower().replace("_", "-").replace(".", "-")


def _address(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    """Tell who asks from where: an address that is kept for documentation."""
    assert environ
    content = b"203.0.113.7\n"
    start("200 OK", [("Content-Length", str(len(content)))])
    return [content]


def proxy(url: str) -> Callable[..., Iterable[bytes]]:
    """Hand everything on to a server on this computer."""
    host = urlsplit(url).netloc

    def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        headers = {
            name[5:].replace("_", "-"): value
            for name, value in environ.items()
            if name.startswith("HTTP_") and name != "HTTP_HOST"
        }
        if environ.get("CONTENT_TYPE"):
            headers["Content-Type"] = environ["CONTENT_TYPE"]
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        query = f"?{environ['QUERY_STRING']}" if environ.get("QUERY_STRING") else ""
        connection = http.client.HTTPConnection(host, timeout=120)
        try:
            path = environ.get("RAW_URI", environ["PATH_INFO"] + query)
            connection.request(environ["REQUEST_METHOD"], path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            kept = [one for one in answer.getheaders() if one[0].lower() not in HOP]
            length = answer.getheader("Content-Length") or str(len(content))
            start(f"{answer.status} {answer.reason}", [*kept, ("Content-Length", length)])
            return [content]
        finally:
            connection.close()

    return application
