"""GitLab's own runner program, https://gitlab.com/gitlab-org/gitlab-runner."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import psutil

from cml_runner import trust
from cml_runner.errors import AgentFailed, RunnerError
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
from cml_runner.web import Download, trouble

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cml_runner.model import Event, Registration

log = logging.getLogger(__name__)

HOME = "https://gitlab-runner-downloads.s3.amazonaws.com"
MIRROR = "GITLAB_RUNNER_DOWNLOADS"  # the variable with another address
BROUGHT = Path("/usr/bin/gitlab-runner")  # where gitlab/gitlab-runner has it
PROGRAM, MARK = "gitlab-runner", ".cml-runner-version"
IMAGE = "ubuntu:24.04"  # for jobs that name none, if they run in containers at all
SPARE = 60  # seconds after our own idle timeout that the program leaves by itself
TIMEOUT = 20  # seconds

SERVER, TOKEN = "CI_SERVER_URL", "CI_SERVER_TOKEN"
FILE, BUNDLES = "SSL_CERT_FILE", ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # the first one counts

# Whoever sets these on the machine knows better: https://docs.gitlab.com/runner/executors/
EXECUTOR, DOCKER_IMAGE = "RUNNER_EXECUTOR", "DOCKER_IMAGE"
SOCKET, GPU = Path("/var/run/docker.sock"), Path("/dev/nvidia0")

COMPLAINTS = ("Checking for jobs... ", "Executor update", "Failed to ")


class Releases:
    """Where the program comes from: GitLab's own place, or a mirror of it."""

    @property
    def url(self) -> str:
        """The address below which each release has a directory."""
        return os.environ.get(MIRROR, "").rstrip("/") or HOME

    def packages(self, version: str) -> list[Package]:
        """List a release's builds for Linux: "v18.5.0" or "latest"; none if there is no such.

        Raises AgentFailed if nobody answers.
        """
        import requests

        sums = f"{self.url}/{version}/release.sha256"
        try:
            answer = requests.get(sums, timeout=TIMEOUT)
        except requests.RequestException as error:
            msg = f"GitLab's runner program can't be found: {sums} {trouble(error)}"
            raise AgentFailed(msg) from error
        if answer.status_code in {403, 404}:
            return []
        if not answer.ok:
            msg = f"GitLab's runner program can't be found: {sums}: status {answer.status_code}"
            raise AgentFailed(msg)
        pattern = r"^([0-9a-f]{64}) [ *](?:\./)?(binaries/gitlab-runner-linux-(amd64|arm64))$"
        return [
            Package(
                version=version if version != "latest" else f"latest-{sha256[:12]}",
                arch=cast("Literal['x64', 'arm64']", {"amd64": "x64"}.get(arch, arch)),
                url=f"{self.url}/{version}/{path}",
                sha256=sha256,
            )
            for sha256, path, arch in re.findall(pattern, answer.text, re.MULTILINE)
        ]


RELEASES = Releases()
DOWNLOAD = Download("GitLab", PROGRAM)


def _brought(program: Path) -> str:
    """Link to the program that GitLab's own container image holds; return its version."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [BROUGHT, "--version"], check=True, capture_output=True, text=True, timeout=60
        )
        if match := re.search(r"^Version:\s+(\S+)", done.stdout, re.MULTILINE):
            program.parent.mkdir(parents=True, exist_ok=True)
            _replaced(program).symlink_to(BROUGHT)
            return match[1]
    return ""


class Agent:
    """The runner program: how to install, start, understand and end it."""

    def __init__(self) -> None:
        self._aborted: set[int] = set()
        self._name = ""
        self._weary = False  # the program is about to end since it has waited long enough

    def install(self, directory: Path, packages: Sequence[Package]) -> str:
        """Put it there, its checksum verified, unless it is there; return its version.

        Raises AgentFailed.
        """
        program, mark = directory / PROGRAM, directory / MARK
        try:
            if not mark.exists() and (version := _brought(program)):
                mark.write_text(version)
                return version
            package = DOWNLOAD.choose(packages)
            if mark.exists() and mark.read_text() == package.version:
                return package.version
            directory.mkdir(parents=True, exist_ok=True)
            with DOWNLOAD.opened(package) as file, _replaced(program).open("wb") as copy:
                shutil.copyfileobj(file, copy)
            program.chmod(0o755)
            mark.write_text(package.version)
        except OSError as error:
            msg = f"GitLab's runner program can't be installed in {directory}: {error}"
            raise AgentFailed(msg) from error
        return package.version

    def programs(self) -> Mapping[str, str]:
        """Name git, with which jobs get their sources unless they run in containers."""
        return {} if _executor() == "docker" else {"git": "git"}

    def command(
        self,
        directory: Path,
        registration: Registration,
        *,
        volumes: Sequence[str] = (),
        idle_timeout: float = 0,
    ) -> Command:
        """Say how to start it. The command may be started again.

        Jobs run in containers where there is Docker, else in a shell that inherits the program's
        environment: so the token's variable is overwritten there.
        """
        self._name = registration.name
        executor = _executor()
        arguments = [
            *(str(directory / PROGRAM), "--log-format", "json", "run-single"),
            *("--name", registration.name),
            *("--env", f"{TOKEN}="),
            *(("--max-builds", "1") if registration.single else ()),
            *(("--wait-timeout", str(int(idle_timeout) + SPARE)) if idle_timeout else ()),
            *(_in_containers(volumes) if executor == "docker" else _in_a_shell(directory)),
        ]
        environment = {
            SERVER: registration.details["server"],
            TOKEN: registration.secret,
            EXECUTOR: executor,
        }
        if bundle := _authorities():
            environment["CI_SERVER_TLS_CA_FILE"] = bundle
        return Command(arguments=tuple(arguments), environment=environment, directory=directory)

    def parse(self, line: str) -> Event | None:
        """Understand one line: an object, in which the names of jobs have no say."""
        try:
            found = json.loads(line)
            said = " ".join(found["msg"].split())
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        if said.startswith("Starting runner for "):
            self._weary = False
            return Ready()
        if said.startswith("This runner has not received a job in "):
            self._weary = True
        if said == "Checking for jobs... received":
            return JobStarted(job=_job(found, self._name))
        if said.startswith(("Job succeeded", "Job failed")):
            return JobEnded(succeeded=said == "Job succeeded")
        return _trouble(said, found)

    def job(self, directory: Path, seen: Job) -> Job:
        """Add nothing: what it knows stands in its output, and the forge knows the rest."""
        del directory
        return seen

    def exited(self, code: int) -> Exited:
        """Say what its exit code means; a negative one is the signal that ended it."""
        if code < 0:
            return Exited(code=code, reason=f"it was ended by {signal.Signals(-code).name}")
        reason = "it was done" if code == 0 else "it gave up, and said why in its output"
        return Exited(code=code, reason=reason, again=self._weary)

    def abort(self, pid: int, reason: str = "") -> None:
        """Make the running job fail at once, and the program end.

        It would let the job's processes take ten minutes to end, so they are killed. A second
        signal would end it before it has told GitLab: so this is its only one.
        """
        del reason  # GitLab calls it a failure of the runner, whatever it was
        if pid in self._aborted:
            return
        self._aborted.add(pid)
        with suppress(psutil.Error):
            program = psutil.Process(pid)
            family = program.children(recursive=True)
            program.send_signal(signal.SIGTERM)
            for process in family:
                with suppress(psutil.Error):
                    process.kill()

    def drain(self, pid: int) -> None:
        """Have it end after the running job."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGQUIT)  # design 28

    def stop(self, pid: int) -> None:
        """Ask it to end; a running job is given up."""
        self.abort(pid)

    def leave(self, registration: Registration) -> None:
        """Remove its runner, with the runner's own token. Raises RunnerError."""
        import requests

        url = f"{registration.details['server']}/api/v4/runners"
        try:
            answer = requests.delete(url, data={"token": registration.secret}, timeout=TIMEOUT)
        except requests.RequestException as error:
            msg = f"{url} {trouble(error)}"
            raise RunnerError(msg) from error
        if not answer.ok and answer.status_code not in {403, 404}:  # it is removed already
            msg = f"{url} answers with status {answer.status_code}"
            raise RunnerError(msg)


def _authorities() -> str:
    """Name a file with more authorities; it reads SSL_CERT_FILE itself.

    Better that one: it gives jobs all of a named file, else only what vouches for its GitLab.
    """
    if os.environ.get(FILE):
        return ""
    return next(filter(None, map(os.environ.get, BUNDLES)), "")


def _trouble(said: str, found: Mapping[str, Any]) -> Troubled | None:
    level = found.get("level")
    grave = level in {"warning", "error"} and said.startswith(COMPLAINTS)
    if not grave and level not in {"fatal", "panic"}:
        return None
    cut_off = said == "Checking for jobs... forbidden"
    reason = "its runner was removed" if cut_off else found.get("status")
    return Troubled(message=f"{said} ({reason})" if reason else said, cut_off=cut_off)


def _executor() -> str:
    chosen = os.environ.get(EXECUTOR, "")
    docker = shutil.which("docker") and SOCKET.exists()
    return chosen or ("docker" if docker else "shell")


def _in_containers(volumes: Sequence[str]) -> list[str]:
    """Say what holds for jobs' containers, which inherit no variables.

    Everybody who lists processes sees this, so a proxy's login isn't among it.
    https://docs.gitlab.com/runner/configuration/proxy/
    """
    found = ["--docker-image", os.environ.get(DOCKER_IMAGE) or IMAGE]
    if GPU.exists():
        found += ["--docker-gpus", "all"]
    for volume in volumes:
        found += ["--docker-volumes", volume]
    for name, value in trust.public(trust.for_containers(os.environ)).items():
        found += ["--env", f"{name}={value}", "--env", f"{name.lower()}={value}"]
    return found


def _in_a_shell(directory: Path) -> list[str]:
    return ["--builds-dir", str(directory / "builds"), "--cache-dir", str(directory / "cache")]


def _replaced(path: Path) -> Path:
    """Make room for a file; the old one may be running."""
    path.unlink(missing_ok=True)
    return path


def _job(found: Mapping[str, Any], runner: str) -> Job:
    """Read which job it got: its number, and the project that it belongs to."""
    number, repo = str(found.get("job", "")), str(found.get("repo_url", ""))
    url = f"{repo.removesuffix('.git')}/-/jobs/{number}" if repo else ""
    return Job(name=f"job {number}", id=number, runner=runner, url=url)
