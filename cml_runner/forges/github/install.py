"""Bring GitHub's runner program onto this machine: download, verify, keep, unpack."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cml_runner.errors import AgentFailed
from cml_runner.forges.github.api import trouble

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import requests

    from cml_runner.model import Package

log = logging.getLogger(__name__)

MARK = ".cml-runner-version"  # in the directory of an installed one, once it is complete
ARCHES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}
ATTEMPTS = 3
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of the file
PIECE = 1 << 20  # bytes
PART, LOCK = ".part-", ".lock"


def install(directory: Path, packages: Sequence[Package]) -> str:
    """Put the program there, unless it is there; return its version. Raises AgentFailed."""
    package = _choose(packages)
    mark = directory / MARK
    try:
        if mark.exists() and mark.read_text() == package.version:
            return package.version
        directory.mkdir(parents=True, exist_ok=True)
        mark.unlink(missing_ok=True)
        with _archive(package) as file:
            _unpack(file, directory)
        mark.write_text(package.version)
    except (OSError, tarfile.TarError, EOFError, subprocess.CalledProcessError) as error:
        msg = f"GitHub's runner program can't be installed in {directory}: {error}"
        raise AgentFailed(msg) from error
    return package.version


def _choose(packages: Sequence[Package]) -> Package:
    """Choose the package for this machine. Raises AgentFailed if there is none."""
    arch = ARCHES.get(platform.machine().lower(), "")
    for package in packages:
        if package.arch == arch and sys.platform == "linux":
            return package
    offered = ", ".join(f"linux-{package.arch}" for package in packages) or "nothing"
    here = f"{sys.platform}-{arch or platform.machine()}"
    msg = f"there is no runner program for {here}: GitHub offers {offered}"
    raise AgentFailed(msg)


@contextmanager
def _archive(package: Package) -> Iterator[IO[bytes]]:
    """Open the package's file, which is downloaded unless we have it, by one of us at a time.

    The open file stays good even if somebody else clears up meanwhile.
    """
    home = os.environ.get("CML_RUNNER_HOME") or Path.home() / ".cml-runner"
    agents = Path(home) / "agents"
    agents.mkdir(parents=True, exist_ok=True)
    final = agents / f"actions-runner-linux-{package.arch}-{package.version}.tar.gz"
    with (agents / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _prune(agents, final)
        file = _kept(final, package.sha256) or _fetched(final, package)
    with file:
        file.seek(0)
        yield file


def _prune(agents: Path, final: Path) -> None:
    """Remove other versions, and what those who were killed left half done."""
    for file in agents.iterdir():
        if file.name.startswith((PART, "actions-runner-")) and file != final:
            file.unlink()


def _kept(path: Path, sha256: str) -> IO[bytes] | None:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    digest = hashlib.sha256()
    while piece := file.read(PIECE):
        digest.update(piece)
    if digest.hexdigest() == sha256:
        return file
    file.close()
    return None


def _fetched(final: Path, package: Package) -> IO[bytes]:
    """Download the package, and leave it at its final place. Raises AgentFailed."""
    import requests

    log.info("downloading version %s of GitHub's runner program", package.version)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _fetch(final, package)
        except requests.RequestException as error:
            status = 0 if error.response is None else error.response.status_code
            if attempt == ATTEMPTS or 400 <= status < 500:
                msg = f"GitHub's runner program can't be downloaded: {package.url} {_why(error)}"
                raise AgentFailed(msg) from error
            log.warning("%s %s: trying again", package.url, _why(error))
            time.sleep(attempt)
    raise AssertionError


def _why(error: requests.RequestException) -> str:
    if error.response is None:
        return trouble(error)
    return f"answers with status {error.response.status_code}"


def _fetch(final: Path, package: Package) -> IO[bytes]:
    """Download under another name, which goes away if anything fails."""
    import requests

    file = tempfile.NamedTemporaryFile(dir=final.parent, prefix=PART, delete=False)  # noqa: SIM115
    try:
        digest = hashlib.sha256()
        headers = {"Accept-Encoding": "identity"}
        with requests.get(package.url, stream=True, timeout=TIMEOUT, headers=headers) as response:
            response.raise_for_status()
            for piece in response.iter_content(PIECE):
                digest.update(piece)
                file.write(piece)
        file.flush()
        _verify(digest.hexdigest(), package)
        os.replace(file.name, final)
    except BaseException:
        with suppress(OSError):  # what can't be written can't be flushed either
            file.close()
        Path(file.name).unlink(missing_ok=True)
        raise
    return file


def _verify(sha256: str, package: Package) -> None:
    if sha256 != package.sha256:
        msg = (
            f"{package.url} is not what GitHub says it should be: its SHA-256 is {sha256},"
            f" expected was {package.sha256}. Nothing of it was installed"
        )
        raise AgentFailed(msg)


def _unpack(file: IO[bytes], directory: Path) -> None:
    """Unpack beside the older version, if there is one, and then take its place."""
    fresh = Path(tempfile.mkdtemp(dir=directory, prefix=".new-"))
    try:
        _extract(file, fresh)
        for item in fresh.iterdir():
            _remove(directory / item.name)
            item.rename(directory / item.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _extract(file: IO[bytes], directory: Path) -> None:
    """Unpack a file whose names may not lead out of the directory."""
    if hasattr(tarfile, "data_filter"):
        with tarfile.open(fileobj=file, mode="r:gz") as tar:
            tar.extractall(directory, filter="data")
    else:  # early 3.10; the system's own program minds what the filter does
        command = ["tar", "-xz", "--no-same-owner", "-C", str(directory)]
        subprocess.run(command, stdin=file, check=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
