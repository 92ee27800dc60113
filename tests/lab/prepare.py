"""Get what the lab's machines are made of, once: ``python -m tests.lab.prepare DIRECTORY``.

Needs root, mmdebstrap and the package indexes that apt and pip use here. Puts there:

    bookworm/, trixie/  root file systems like those of a cloud's images
    wheels/             our own package and all that a machine on AWS installs with it
    uv.tar.gz           as uv's releases are
    kubernetes/         the programs of a cluster, built from source with Go unless an earlier
                        call has left them in ~/.cache/cml-runner-lab
    images.tar, *.pem   container images, and the authority that they trust
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tests.lab import images
from tests.lab.internet import certify

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("programs")
KUBERNETES = "v1.36.3"  # as in programs/go.mod
PROGRAMS = (
    "go.etcd.io/etcd/server/v3",
    "k8s.io/kubernetes/cmd/kube-apiserver",
    "k8s.io/kubernetes/cmd/kube-controller-manager",
    "k8s.io/kubernetes/cmd/kube-scheduler",
    "k8s.io/kubernetes/cmd/kubelet",
)
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
        link.symlink_to(_kubernetes())


def _debootstrap(suite: str, system: Path) -> None:
    if not system.exists():
        new = system.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        _run("mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, str(new))
        new.rename(system)


def _kubernetes() -> Path:
    """Build the programs of a cluster; that takes some minutes, and three gigabytes of cache."""
    digest = hashlib.sha256((SOURCE / "go.sum").read_bytes()).hexdigest()[:12]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    final = home / "cml-runner-lab" / f"kubernetes-{KUBERNETES}-{digest}"
    if final.exists():
        return final
    new = final.with_name(f"{final.name}.new")
    new.mkdir(parents=True, exist_ok=True)
    version = f"-X k8s.io/component-base/version.gitVersion={KUBERNETES}"
    flags = ("-trimpath", f"-ldflags=-s -w {version}", "-o", f"{new}/")
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod"}
    with tempfile.TemporaryDirectory() as directory:
        source = shutil.copytree(SOURCE, Path(directory, "source"))  # go may write there
        _run("go", "build", *flags, *PROGRAMS, cwd=source, environment=environment)
    (new / "server").rename(new / "etcd")
    new.rename(final)
    return final


def _pack(wheel: Path, archive: Path) -> None:
    """Make a release's archive of the program that a wheel of uv holds."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith("/scripts/uv"))
        content = files.read(name)
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        entry = tarfile.TarInfo("uv-x86_64-unknown-linux-gnu/uv")
        entry.size, entry.mode = len(content), 0o755
        tar.addfile(entry, io.BytesIO(content))


def _run(*command: str, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> None:
    print(" ".join(command[:6]), "…", flush=True)
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, cwd=cwd, env=environment)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
