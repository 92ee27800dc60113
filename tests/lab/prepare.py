"""Get what the lab's machines are made of, once: ``python -m tests.lab.prepare DIRECTORY``.

Needs root, mmdebstrap and the package indexes that apt and pip use here. Puts there:

    bookworm/, trixie/  root file systems like those of a cloud's images
    wheels/             our own package and all that a machine on AWS installs with it
    uv.tar.gz           as uv's releases are
    kubernetes/         the programs of a cluster, see cluster_programs.py
    images.tar, *.pem   container images, and the authority that they trust
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tests.lab import cluster_programs, images
from tests.lab.internet import certify

ROOT = Path(__file__).parents[2]
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
    shutil.rmtree(wheels, ignore_errors=True)  # ours changes all the time
    pip = (sys.executable, "-m", "pip")
    _run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(ROOT))
    (own,) = wheels.glob("*.whl")
    for python in SUITES.values():
        only = ("--only-binary=:all:", "--python-version", python, "--dest", str(wheels))
        _run(*pip, "download", "--quiet", *only, f"{own}[aws]", "uv")
    _pack(next(wheels.glob("uv-*.whl")), directory / "uv.tar.gz")
    if not (directory / "ca.pem").exists():
        certify(directory)
    if not (directory / "images.tar").exists():
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


def _pack(wheel: Path, archive: Path) -> None:
    """Make a release's archive of the program that a wheel of uv holds."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith("/scripts/uv"))
        content = files.read(name)
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        entry = tarfile.TarInfo("uv-x86_64-unknown-linux-gnu/uv")
        entry.size, entry.mode = len(content), 0o755
        tar.addfile(entry, io.BytesIO(content))


def _run(*command: str) -> None:
    print(" ".join(command[:6]), "…", flush=True)
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, cwd=ROOT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
