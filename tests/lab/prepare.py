"""Get what the lab's machines are made of, once: ``python -m tests.lab.prepare DIRECTORY``.

Needs root, mmdebstrap and the package indexes that apt and pip use here. Puts there:

    bookworm/, trixie/  root file systems like those of a cloud's images
    wheels/             all that our locks name, for these systems: never our own package
    environments/       what the lock names, installed: a layer for each of these systems
    kubernetes/         the programs of a cluster, see cluster_programs.py
    images.tar, *.pem   container images, and the authority that they trust
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.lab import cluster_programs, images
from tests.lab.internet import certify

ROOT = Path(__file__).parents[2]
LOCKS = tuple((ROOT / "cml_runner" / "boot").glob("*.txt"))
SUITES = {"bookworm": "3.11", "trixie": "3.13"}  # and their Python
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "udev", "cloud-init", "iproute2", "netbase", "procps"),
    *("curl", "ca-certificates", "openssh-server", "sudo", "iptables", "git"),
)


def main(directory: Path) -> None:
    """Make what isn't there."""
    directory.mkdir(parents=True, exist_ok=True)
    for suite in SUITES:
        _debootstrap(suite, directory / suite)
    wheels = directory / "wheels"
    for python in SUITES.values():
        only = ("--only-binary=:all:", "--python-version", python, "--dest", str(wheels))
        for lock in LOCKS:
            given = ("--no-deps", "--require-hashes", "--requirement", str(lock))
            _run(sys.executable, "-m", "pip", "download", "--quiet", *only, *given)
    shutil.rmtree(directory / "environments", ignore_errors=True)
    for suite in SUITES:
        images.install(directory / "environments" / suite, directory / suite, wheels)
    if not (directory / "ca.pem").exists():
        certify(directory)
    if not images.are_there(directory):
        images.build(directory / next(iter(SUITES)), directory / "ca.pem", directory)
    link = directory / "kubernetes"
    if not link.exists():
        link.symlink_to(cluster_programs.build())


def _debootstrap(suite: str, system: Path) -> None:
    if not system.exists():
        new = system.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        _run("mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, str(new))
        new.rename(system)


def _run(*command: str) -> None:
    print(" ".join(command[:6]), "…", flush=True)
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, cwd=ROOT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
