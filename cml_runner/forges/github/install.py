"""Bring GitHub's runner program onto this machine, beside an older one or in its place."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cml_runner.errors import AgentFailed
from cml_runner.web import BROKEN, Download, extract

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cml_runner.model import Package

MARK = ".cml-runner-version"  # in the directory of an installed one, once it is complete
BROUGHT = Path("/home/runner")  # where ghcr.io/actions/actions-runner has it
DOWNLOAD = Download("GitHub", "actions-runner")


def install(directory: Path, packages: Sequence[Package]) -> str:
    """Put the program there, unless it is there; return its version. Raises AgentFailed.

    What a container image brings will do; once it is refused, another is downloaded in its place.
    """
    mark = directory / MARK
    try:
        if not mark.exists() and (version := _brought()):
            _take_over(directory)
            mark.write_text(version)
            return version
        package = DOWNLOAD.choose(packages)
        if mark.exists() and mark.read_text() == package.version:
            return package.version
        directory.mkdir(parents=True, exist_ok=True)
        mark.unlink(missing_ok=True)
        with DOWNLOAD.opened(package) as file:
            _unpack(file, directory)
        mark.write_text(package.version)
    except BROKEN as error:
        msg = f"GitHub's runner program can't be installed in {directory}: {error}"
        raise AgentFailed(msg) from error
    return package.version


def _brought() -> str:
    """Return the version of the program that GitHub's own container image holds, if this is one."""
    program = BROUGHT / "bin" / "Runner.Listener"
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [program, "--version"], check=True, capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip()
    return ""


def _take_over(directory: Path) -> None:
    """Use what the image brings; the program keeps its registration beside its own directory."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copytree(BROUGHT / "bin", directory / "bin", symlinks=True, dirs_exist_ok=True)
    large = directory / "externals"  # which are never written to
    _remove(large)
    if "DOCKER_HOST" in os.environ:  # an engine elsewhere, which has to mount them
        shutil.copytree(BROUGHT / "externals", large, symlinks=True)
    else:
        large.symlink_to(BROUGHT / "externals")


def _unpack(file: IO[bytes], directory: Path) -> None:
    """Unpack beside the older version, if there is one, and then take its place."""
    fresh = Path(tempfile.mkdtemp(dir=directory, prefix=".new-"))
    try:
        extract(file, fresh)
        for item in fresh.iterdir():
            _remove(directory / item.name)
            item.rename(directory / item.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
