"""The machine around the agent: its startup script, its cloud's notices."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cml_runner.errors import RunnerError
from cml_runner.supervise.process import scrubbed

if TYPE_CHECKING:
    import queue
    from collections.abc import Callable, Mapping, Sequence

    from cml_runner.model import Event, Notice

log = logging.getLogger(__name__)

TICK = 1  # second between two looks at the cloud's notices


def arch() -> str:
    """Say which of the forges' packages fit: x64 or arm64."""
    return "arm64" if platform.machine() in ("aarch64", "arm64") else "x64"


def startup(script: str, directory: Path) -> None:
    """Run what the user wants to be run first. Raises RunnerError if it fails."""
    if not script:
        return
    log.info("running the startup script")
    path = directory / "startup"
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o700), "w") as file:
        file.write(script)
    command = [str(path)] if script.startswith("#!") else ["/bin/sh", str(path)]
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=directory,
            env=scrubbed(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    finally:
        path.unlink(missing_ok=True)  # jobs needn't know what is in it
    for line in done.stdout.splitlines():
        log.info("| %s", line)
    if done.returncode:
        msg = f"the startup script failed with exit code {done.returncode}"
        raise RunnerError(msg)


def provide(programs: Mapping[str, str], *, install: bool) -> None:
    """Have programs on this machine, given with their packages. Raises RunnerError."""
    missing = {name: package for name, package in programs.items() if not shutil.which(name)}
    if not missing:
        return
    if not install:
        msg = f"this machine lacks what the agent needs: install {', '.join(missing.values())}"
        raise RunnerError(msg)
    what = ", ".join(missing)
    log.info("installing %s", what)
    _run(what, ("apt-get", "-qq", "update"))
    _run(what, ("apt-get", "-qq", "install", "--no-install-recommends", *missing.values()))


def docker() -> None:
    """Have Docker on this machine, and its GPUs in containers. Raises RunnerError."""
    provide({"docker": "docker.io"}, install=True)
    if Path("/dev/nvidia0").exists() and shutil.which("nvidia-ctk"):
        _run("docker", ("nvidia-ctk", "runtime", "configure", "--runtime=docker"))
        _run("docker", ("systemctl", "restart", "docker"))


def _run(what: str, command: Sequence[str]) -> None:
    own = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    lock = ("-o", "DPkg::Lock::Timeout=120") if command[0] == "apt-get" else ()
    try:
        done = subprocess.run(
            (command[0], *lock, *command[1:]),
            check=False,
            env=own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except OSError as error:
        msg = f"{what} can't be installed: {error}"
        raise RunnerError(msg) from error
    if done.returncode:
        msg = f"{what} can't be installed: {' '.join(command)}: {done.stdout.strip()[-500:]}"
        raise RunnerError(msg)


def poll(notice: Callable[[], Notice | None], events: queue.Queue[Event]) -> None:
    """Turn the cloud's interruption notice into an event, in a thread of its own."""

    def ask() -> None:
        silent, told = False, None
        while True:
            try:
                found = notice()
                if found and found != told:
                    events.put(found)
                    if found.deadline:
                        return
                    told = found  # there may be worse to come
                silent = False
            except OSError as error:
                if not silent:
                    log.warning("no answer from the metadata service: %s", error)
                silent = True
            time.sleep(TICK)

    threading.Thread(target=ask, name="notices", daemon=True).start()
