"""What every talk over HTTP needs: words for its troubles, and downloads that can be trusted."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cml_runner import times
from cml_runner.errors import AgentFailed, RunnerError

with suppress(ImportError):  # on Windows, where launchers may be, but no runner
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    import requests

    from cml_runner.model import Package

log = logging.getLogger(__name__)

ARCHES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}
ATTEMPTS = 3
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of the file
PIECE = 1 << 20  # bytes
PART, LOCK = ".part-", ".lock"
BROKEN = (OSError, tarfile.TarError, EOFError, subprocess.CalledProcessError)


class Passing(RunnerError):
    """A service can't be reached or doesn't work now; later it may."""


def trouble(error: Exception) -> str:
    """Say in few words what is wrong with a connection."""
    import requests

    troubles = (
        (requests.exceptions.SSLError, "has a certificate that isn't trusted here"),
        (requests.exceptions.ProxyError, "can't be reached through the proxy"),
        (requests.Timeout, "doesn't answer"),
        (requests.exceptions.RetryError, "goes on answering with errors"),
        (requests.ConnectionError, "can't be reached"),
    )
    text = next((text for kind, text in troubles if isinstance(error, kind)), "fails")
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return f"{text} ({reason or error})"


def clock(url: str) -> datetime:
    """Ask a server what time it is: it says so whatever it answers. Raises RunnerError."""
    import requests

    try:
        answer = requests.head(url, timeout=TIMEOUT)
        return times.of_header(answer.headers["Date"])
    except requests.RequestException as error:
        msg = f"{url} {trouble(error)}"
        raise RunnerError(msg) from error
    except (KeyError, ValueError) as error:
        msg = f"{url} doesn't say what time it is"
        raise RunnerError(msg) from error


class Download:
    """A program that comes as one file, from a vendor who says what its SHA-256 is.

    What was downloaded is kept for the next time, in its newest version alone.
    """

    def __init__(self, vendor: str, name: str) -> None:
        """Name the vendor for people, and the program for the file that is kept."""
        self.vendor, self._name = vendor, name

    def choose(self, packages: Sequence[Package]) -> Package:
        """Choose the package for this machine. Raises AgentFailed if there is none."""
        arch = ARCHES.get(platform.machine().lower(), "")
        for package in packages:
            if package.arch == arch and sys.platform == "linux":
                return package
        offered = ", ".join(f"linux-{package.arch}" for package in packages) or "nothing"
        here = f"{sys.platform}-{arch or platform.machine()}"
        msg = f"there is no runner program for {here}: {self.vendor} offers {offered}"
        raise AgentFailed(msg)

    @contextmanager
    def opened(self, package: Package) -> Iterator[IO[bytes]]:
        """Open the package's file, which is downloaded unless we have it, by one of us at a time.

        The open file stays good even if somebody else clears up meanwhile. Raises AgentFailed.
        """
        home = os.environ.get("CML_RUNNER_HOME") or Path.home() / ".cml-runner"
        agents = Path(home) / "agents"
        agents.mkdir(parents=True, exist_ok=True)
        suffix = "".join(Path(package.url).suffixes[-2:]) if package.url.endswith("gz") else ""
        final = agents / f"{self._name}-linux-{package.arch}-{package.version}{suffix}"
        with (agents / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._prune(agents, final)
            file = _kept(final, package.sha256) or self._fetched(final, package)
        with file:
            file.seek(0)
            yield file

    def _prune(self, agents: Path, final: Path) -> None:
        """Remove other versions, and what those who were killed left half done."""
        for file in agents.iterdir():
            if file.name.startswith((PART, f"{self._name}-")) and file != final:
                file.unlink()

    def _fetched(self, final: Path, package: Package) -> IO[bytes]:
        """Download the package, and leave it at its final place. Raises AgentFailed."""
        import requests

        log.info("downloading version %s of %s's runner program", package.version, self.vendor)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._fetch(final, package)
            except requests.RequestException as error:
                status = 0 if error.response is None else error.response.status_code
                if attempt == ATTEMPTS or 400 <= status < 500:
                    what = f"{self.vendor}'s runner program can't be downloaded"
                    msg = f"{what}: {package.url} {_why(error)}"
                    raise AgentFailed(msg) from error
                log.warning("%s %s: trying again", package.url, _why(error))
                time.sleep(attempt)
        raise AssertionError

    def _fetch(self, final: Path, package: Package) -> IO[bytes]:
        """Download under another name, which goes away if anything fails."""
        import requests

        file = tempfile.NamedTemporaryFile(dir=final.parent, prefix=PART, delete=False)  # noqa: SIM115
        try:
            digest = hashlib.sha256()
            headers = {"Accept-Encoding": "identity"}
            with requests.get(package.url, stream=True, timeout=TIMEOUT, headers=headers) as answer:
                answer.raise_for_status()
                for piece in answer.iter_content(PIECE):
                    digest.update(piece)
                    file.write(piece)
            file.flush()
            self._verify(digest.hexdigest(), package)
            os.replace(file.name, final)
        except BaseException:
            with suppress(OSError):  # what can't be written can't be flushed either
                file.close()
            Path(file.name).unlink(missing_ok=True)
            raise
        return file

    def _verify(self, sha256: str, package: Package) -> None:
        if not package.sha256:
            log.info("%s publishes no checksum: the connection alone vouches for it", self.vendor)
        elif sha256 != package.sha256:
            msg = (
                f"{package.url} is not what {self.vendor} says it should be: its SHA-256 is"
                f" {sha256}, expected was {package.sha256}. Nothing of it was installed"
            )
            raise AgentFailed(msg)


def extract(file: IO[bytes], directory: Path) -> None:
    """Unpack an archive whose names may not lead out of the directory. Raises one of BROKEN."""
    if hasattr(tarfile, "data_filter"):
        with tarfile.open(fileobj=file, mode="r:gz") as tar:
            tar.extractall(directory, filter="data")
    else:  # early 3.10; the system's own program minds what the filter does
        command = ["tar", "-xz", "--no-same-owner", "-C", str(directory)]
        subprocess.run(command, stdin=file, check=True)


def _kept(path: Path, sha256: str) -> IO[bytes] | None:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    if not sha256:
        return file
    digest = hashlib.sha256()
    while piece := file.read(PIECE):
        digest.update(piece)
    if digest.hexdigest() == sha256:
        return file
    file.close()
    return None


def _why(error: requests.RequestException) -> str:
    if error.response is None:
        return trouble(error)
    return f"answers with status {error.response.status_code}"
