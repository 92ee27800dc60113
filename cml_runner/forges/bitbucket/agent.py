"""Bitbucket's own runner program: a container where there is Docker, else a program in Java.

https://support.atlassian.com/bitbucket-cloud/docs/runners/
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import psutil

from cml_runner import trust
from cml_runner.errors import AgentFailed
from cml_runner.model import (
    Command,
    Exited,
    Job,
    JobEnded,
    JobStarted,
    Package,
    Ready,
    Troubled,
)
from cml_runner.web import BROKEN, Download, extract

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cml_runner.model import Event, Registration

log = logging.getLogger(__name__)

MAJOR = "3"  # from 5 on it is for those who pay
IMAGE = f"docker-public.packages.atlassian.com/sox/atlassian/bitbucket-pipelines-runner:{MAJOR}"
VERSION = "3.24.0"
HOME = "https://product-downloads.atlassian.com/software/bitbucket/pipelines"
OTHER = "BITBUCKET_RUNNER_PACKAGE"  # the variable with another archive: URL#sha256=HEX
RUNTIME = "BITBUCKET_RUNNER_RUNTIME"  # "shell" where there is Docker, but not for steps
MARK, SECRETS, JAR, WORK = ".cml-runner-version", "java-options", "runner.jar", "temp"
SOCKET, LOGS = Path("/var/run/docker.sock"), Path("/var/lib/docker/containers")
PULL = 600  # seconds
DOWNLOAD = Download("Atlassian", "bitbucket-pipelines-runner")

STAMP = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[,.]\d+\] ")
STEP = re.compile(
    r"Getting step StepId\{accountUuid=(\{.+?\}), repositoryUuid=(\{.+?\}),"
    r" pipelineUuid=(\{.+?\}), stepUuid=(\{.+?\})\}"
)
COMPLAINTS = re.compile(r"(?i)\b(error|exception|unauthorized|forbidden|failed to|not found)\b")
CUT_OFF = re.compile(r"(?i)\b(401|403|unauthorized|forbidden|runner .*not found|deleted)\b")


def runtime() -> Literal["docker", "shell"]:
    """Say where steps run on this machine."""
    docker = shutil.which("docker") and os.access(SOCKET, os.W_OK)
    return "docker" if docker and os.environ.get(RUNTIME) != "shell" else "shell"


def package() -> list[Package]:
    """Name the archive of the program, which is the same for every architecture.

    Atlassian publishes no checksum of it: whoever wants one gives it in BITBUCKET_RUNNER_PACKAGE.
    """
    url = f"{HOME}/atlassian-bitbucket-pipelines-runner-{VERSION}.tar.gz"
    url, _, sha256 = os.environ.get(OTHER, url).partition("#sha256=")
    version = (re.findall(r"\d+(?:\.\d+)+", url.rpartition("/")[2]) or [VERSION])[0]
    return [
        Package(version=version, arch="x64", url=url, sha256=sha256.lower()),
        Package(version=version, arch="arm64", url=url, sha256=sha256.lower()),
    ]


class Agent:
    """The runner program: how to install, start, understand and end it."""

    def __init__(self) -> None:
        self._options: Path | None = None  # of Java, with a secret in them
        self._name = ""
        self._online = False
        self._step = ""

    def install(self, directory: Path, packages: Sequence[Package]) -> str:
        """Put it there, unless it is there; return its version. Raises AgentFailed."""
        directory.mkdir(parents=True, exist_ok=True)
        if runtime() == "docker":
            return _pulled()
        chosen = DOWNLOAD.choose(packages)
        mark = directory / MARK
        try:
            if mark.exists() and mark.read_text() == chosen.version:
                return chosen.version
            with DOWNLOAD.opened(chosen) as file:
                extract(file, directory)
            if not (directory / "bin" / JAR).exists():
                msg = f"{chosen.url} isn't what it should be: it has no bin/{JAR}"
                raise AgentFailed(msg)
            mark.write_text(chosen.version)
        except BROKEN as error:
            msg = f"Bitbucket's runner program can't be installed in {directory}: {error}"
            raise AgentFailed(msg) from error
        return chosen.version

    def programs(self) -> Mapping[str, str]:
        """Name Java and git, unless all is in containers."""
        return {} if runtime() == "docker" else {"java": "default-jre-headless", "git": "git"}

    def command(
        self,
        directory: Path,
        registration: Registration,
        *,
        volumes: Sequence[str] = (),
        idle_timeout: float = 0,
    ) -> Command:
        """Say how to start it.

        Its own start script would show the secret to everybody who lists processes: Java reads it
        from a file instead, which is gone once the program is online.
        """
        del volumes, idle_timeout
        self._name, self._online = registration.name, False
        if runtime() == "docker":
            return _in_a_container(directory, registration)
        self._options = directory / SECRETS  # design 30
        self._options.unlink(missing_ok=True)
        options = [
            f'"-Dbitbucket.pipelines.runner.{name}={value}"'
            for name, value in _properties(directory, registration)
        ]
        options += [f'"-D{name}={value}"' for name, value in _proxies()]
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        with open(os.open(self._options, flags, 0o600), "w") as file:
            file.write("\n".join([*options, "-Dfile.encoding=UTF-8", ""]))
        (directory / WORK).mkdir(exist_ok=True)
        program = str(directory / "bin" / JAR)
        arguments = (_java(), f"@{self._options}", "-jar", program)
        return Command(arguments=arguments, directory=directory)

    def parse(self, line: str) -> Event | None:
        """Understand one line of its output, which a stamp begins."""
        if not (stamp := STAMP.match(line)):
            return None
        said = line[stamp.end() :].strip()
        if said.startswith('Updating runner status to "ONLINE"'):
            return self._came_online()
        if match := STEP.match(said):
            self._step = match[4]
            job = Job(name=f"step {match[4]}", id="/".join(match.groups()[1:]), runner=self._name)
            return JobStarted(job=job)
        if said.startswith("Completing step with result Result{"):
            self._step = ""
            return JobEnded(succeeded="{status=PASSED" in said)
        if COMPLAINTS.search(said):
            return Troubled(message=said, cut_off=bool(CUT_OFF.search(said)) and not self._step)
        return None

    def _came_online(self) -> Event | None:
        if self._online:  # it says so again and again
            return None
        self._online = True
        if self._options:
            self._options.unlink(missing_ok=True)
        return Ready()

    def job(self, directory: Path, seen: Job) -> Job:
        """Add nothing: what it knows stands in its output, and the forge knows the rest."""
        del directory
        return seen

    def exited(self, code: int) -> Exited:
        """Say what its exit code means; a negative one is the signal that ended it."""
        if code < 0:
            return Exited(code=code, reason=f"it was ended by {signal.Signals(-code).name}")
        # Java's own code for an end by SIGTERM or SIGINT
        reason = "it was told to end" if code in {130, 143} else f"exit code {code}"
        return Exited(code=code, reason=reason)

    def abort(self, pid: int, reason: str = "") -> None:
        """Kill what the running step consists of: so it fails, and Bitbucket is told."""
        del reason
        if runtime() == "docker":
            _kill_containers(self._step.strip("{}"))
            return
        with suppress(psutil.Error):
            for process in psutil.Process(pid).children(recursive=True):
                with suppress(psutil.Error):
                    process.kill()

    def drain(self, pid: int) -> None:
        """Do nothing: only Bitbucket can be told."""

    def stop(self, pid: int) -> None:
        """Ask it to end; a running step is given up."""
        self.abort(pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    def leave(self, registration: Registration) -> None:
        """Do nothing: a runner's own credential can't remove it."""


def _properties(directory: Path, registration: Registration) -> list[tuple[str, str]]:
    """Write what its start script would."""
    details = registration.details
    return [
        ("account.uuid", details["workspace"]),
        ("repository.uuid", details.get("repository", "")),
        ("uuid", details["runner"]),
        ("oauth.client.id", details["client"]),
        ("oauth.client.secret", registration.secret),
        ("directory.working", str(directory / WORK)),
        ("environment", "PRODUCTION"),
        ("runtime", "linux-shell"),
        ("docker.uri", ""),
        ("scheduled.state.update.initial.delay.seconds", "0"),
        ("scheduled.state.update.period.seconds", "30"),
        ("cleanup.previous.folders", "false"),
    ]


def _proxies() -> list[tuple[str, str]]:
    """Name the proxies in Java's way, which has no room for a login.

    https://docs.oracle.com/javase/8/docs/technotes/guides/net/proxies.html
    """
    found: list[tuple[str, str]] = []
    own = trust.own_proxies(os.environ)
    for name in ("https", "http"):
        with suppress(ValueError):
            proxy = urlsplit(own.get(f"{name.upper()}_PROXY", ""))
            if proxy.hostname:
                port = str(proxy.port or 80)
                found += [(f"{name}.proxyHost", proxy.hostname), (f"{name}.proxyPort", port)]
    direct = re.findall(r"[^,\s]+", own.get("NO_PROXY", ""))
    hosts = [f"*{one}" if one.startswith(".") else one for one in direct]
    return [*found, ("http.nonProxyHosts", "|".join(hosts))] if found and hosts else found


def _in_a_container(directory: Path, registration: Registration) -> Command:
    """Run the container; its variables are handed on by name, so that no value can be seen.

    https://support.atlassian.com/bitbucket-cloud/docs/configure-a-runner-to-use-a-proxy/
    """
    details = registration.details
    environment = {
        "ACCOUNT_UUID": details["workspace"],
        "RUNNER_UUID": details["runner"],
        "OAUTH_CLIENT_ID": details["client"],
        "OAUTH_CLIENT_SECRET": registration.secret,
        "WORKING_DIRECTORY": "/tmp",  # noqa: S108 - where steps' containers find it, too
        "RUNTIME_PREREQUISITES_ENABLED": "true",
    }
    if repository := details.get("repository"):
        environment["REPOSITORY_UUID"] = repository
    environment.update(trust.for_containers(os.environ))
    variables = [part for name in environment for part in ("--env", name)]
    mounts = ("/tmp:/tmp", f"{SOCKET}:{SOCKET}", f"{LOGS}:{LOGS}:ro")  # noqa: S108
    volumes = [part for mount in mounts for part in ("--volume", mount)]
    name = f"runner-{details['runner'].strip('{}')}"
    return Command(
        arguments=("docker", "run", "--rm", "--name", name, *variables, *volumes, IMAGE),
        environment=environment,
        directory=directory,
    )


def _pulled() -> str:
    """Have the image, before anybody waits for a runner. Raises AgentFailed."""
    try:
        subprocess.run(
            ("docker", "pull", "--quiet", IMAGE),
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PULL,
        )
    except subprocess.CalledProcessError as error:
        msg = f"{IMAGE} can't be pulled: {error.stderr.strip()}"
        raise AgentFailed(msg) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        msg = f"{IMAGE} can't be pulled: {error}"
        raise AgentFailed(msg) from error
    return MAJOR


def _kill_containers(step: str) -> None:
    """Kill the containers of a step, which have its number in their names."""
    if not step:
        return
    command = ("docker", "ps", "--quiet", "--filter", f"name={step}")
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10)
        if found := done.stdout.split():
            subprocess.run(("docker", "kill", *found), check=False, capture_output=True, timeout=10)


def _java() -> str:
    home = os.environ.get("JAVA_HOME", "")
    return str(Path(home) / "bin" / "java") if home else "java"
