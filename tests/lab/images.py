"""Container images, made of files on this computer, as an archive that containerd imports.

lab.example/pause:1, lab.example/busybox:1   a shell, and what pods themselves live on
lab.example/system:1   a Debian like that of a cloud's machines
lab.example/plain:1    the same, which trusts nobody whom a stock image doesn't trust
lab.example/impatient:1   the same, which doesn't wait long for an index
lab.example/ready:1    the same with all that a supervisor depends on
lab.example/bare:1     the same without Python, but with an apt-get that knows where it is
lab.example/agent:1    the same with GitHub's runner program and a user of its own, who isn't
                       root, as ghcr.io/actions/actions-runner
lab.example/plain-agent:1   the same, which trusts nobody else either
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cml_runner.boot import environment
from tests.lab import actions_runner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BUSYBOX = Path("/bin/busybox")
APPLETS = (
    *("sh", "sleep", "cat", "date", "echo", "env", "id", "kill", "ls", "mkdir", "touch", "true"),
    *("false", "tail", "test", "printf", "rm", "tar", "find", "xargs"),
)
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
TRUST = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
PYTHON, PLATFORM = "usr/bin/python3", "x86_64-manylinux_2_36"
MADE_FROM = "images.sha256"  # a file beside the archive
APT = """\
#!/bin/sh
echo "apt-get $*"
case "$*" in
    *install*ca-certificates*python3*) cp /usr/libexec/python /usr/bin/python3 ;;
esac
"""
IMPATIENT = f"{environment.VARIABLE}=8"
HOME, OWN_PATH = "HOME=/home/runner", "PYTHONPATH=/home/runner/own"
USER = "runner:x:1001:1001::/home/runner:/bin/bash\n"


def build(system: Path, authority: Path, directory: Path) -> None:
    """Make images.tar of a root file system, an authority to trust, and the wheels beside it."""
    work = directory / "layers"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    trust = {"Env": [f"{name}={BUNDLE}" for name in TRUST]}
    layers = {
        "busybox": _layer(work / "busybox.tar", _busybox(work / "busybox")),
        "system": _layer(work / "system.tar", system),
        "trust": _files(
            work / "trust",
            {BUNDLE[1:]: (system / BUNDLE[1:]).read_text() + authority.read_text()},
        ),
        "bare": _bare(work / "bare", system),
        "environment": _environment(work / "environment", system, directory / "wheels"),
        "agent": _agent(work / "agent", system),
    }
    sleep = {"Cmd": ["/bin/sh", "-c", "sleep 2147483647"]}
    user = {**trust, "User": "1001", "WorkingDir": "/home/runner"}
    user["Env"] = [*trust["Env"], HOME, OWN_PATH]
    images: dict[str, tuple[list[str], Mapping[str, Any]]] = {
        "pause": (["busybox"], sleep),
        "busybox": (["busybox"], sleep),
        "system": (["system", "trust"], trust),
        "plain": (["system"], {}),
        "impatient": (["system", "trust"], {"Env": [*trust["Env"], IMPATIENT]}),
        "ready": (["system", "trust", "environment"], trust),
        "bare": (["system", "trust", "bare"], trust),
        "agent": (["system", "trust", "agent"], user),
        "plain-agent": (["system", "agent"], {**user, "Env": [HOME]}),
    }
    _write(directory / "images.tar", layers, images)
    shutil.rmtree(work)
    (directory / MADE_FROM).write_text(_made_from())


def are_there(directory: Path) -> bool:
    """Say if images.tar is there, as this module makes it for today's lock."""
    made_from = directory / MADE_FROM
    there = (directory / "images.tar").exists() and made_from.exists()
    return there and made_from.read_text() == _made_from()


def _made_from() -> str:
    return hashlib.sha256(environment.lock() + Path(__file__).read_bytes()).hexdigest()


def _lock() -> str:
    return hashlib.sha256(environment.lock()).hexdigest()


def _write(
    archive: Path,
    layers: Mapping[str, Path],
    images: Mapping[str, tuple[Sequence[str], Mapping[str, Any]]],
) -> None:
    """Write what `docker save` would, for several images with layers in common."""
    digests = {name: _digest(path) for name, path in layers.items()}
    manifest = []
    with tarfile.open(archive, "w") as files:
        for name, path in layers.items():
            files.add(path, f"{name}.tar")
        for image, (parts, config) in images.items():
            description = {
                "architecture": "amd64",
                "os": "linux",
                "config": config,
                "rootfs": {"type": "layers", "diff_ids": [digests[part] for part in parts]},
            }
            _add(files, f"{image}.json", json.dumps(description))
            manifest.append(
                {
                    "Config": f"{image}.json",
                    "RepoTags": [f"lab.example/{image}:1"],
                    "Layers": [f"{part}.tar" for part in parts],
                }
            )
        _add(files, "manifest.json", json.dumps(manifest))


def _busybox(root: Path) -> Path:
    for name in ("bin", "etc", "tmp", "run"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin" / "busybox")
    for name in APPLETS:
        (root / "bin" / name).symlink_to("busybox")
    return root


def _bare(root: Path, system: Path) -> Path:
    python = (system / PYTHON).resolve().name
    found = _files(root, {"usr/bin/apt-get": APT, "usr/bin/.wh.python3": ""}, pack=False)
    (root / "usr" / "libexec").mkdir()
    shutil.copy(system / "usr" / "bin" / python, root / "usr" / "libexec" / "python")
    return _layer(found.with_suffix(".tar"), found)


def install(root: Path, system: Path, wheels: Path) -> None:
    """Put below a root what the lock names, for a system's Python."""
    python = (system / PYTHON).resolve().name
    place = root / str(environment.ROOT)[1:] / f"env-{_lock()[:12]}"
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "python").symlink_to(f"/{PYTHON}")
    (place / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (place / environment.COMPLETE).touch()
    requirements = root.with_suffix(".txt")
    requirements.write_bytes(environment.lock())
    command = (sys.executable, "-m", "uv", "pip", "install", "--quiet", "--target")
    target = place / "lib" / python / "site-packages"
    only = ("--no-deps", "--require-hashes", "--only-binary", ":all:")
    kind = ("--python-version", python.removeprefix("python"), "--python-platform", PLATFORM)
    source = ("--no-cache", "--no-index", "--find-links", str(wheels), "-r", str(requirements))
    subprocess.run([*command, str(target), *only, *kind, *source], check=True)
    requirements.unlink()


def _environment(root: Path, system: Path, wheels: Path) -> Path:
    install(root, system, wheels)
    return _layer(root.with_suffix(".tar"), root)


def _agent(root: Path, system: Path) -> Path:
    account = (system / "etc" / "passwd").read_text() + USER
    found = _files(root, {"etc/passwd": account}, pack=False)
    content, _ = actions_runner.build(python="/usr/bin/python3")
    home = root / "home" / "runner"
    home.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        files.extractall(home, filter="data")
    return _layer(found.with_suffix(".tar"), found, owner=1001)


def _files(root: Path, files: Mapping[str, str], *, pack: bool = True) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755 if content.startswith("#!") else 0o644)
    return _layer(root.with_suffix(".tar"), root) if pack else root


def _layer(path: Path, root: Path, owner: int = 0) -> Path:
    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        """Leave out what no layer may hold."""
        if entry.name.startswith("./home/runner"):
            entry.uid = entry.gid = owner
        return None if entry.isdev() or entry.name.startswith("./var/cache/apt/") else entry

    with tarfile.open(path, "w") as files:
        files.add(root, ".", filter=plain)
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        found = hashlib.sha256()
        while part := file.read(1 << 20):
            found.update(part)
    return f"sha256:{found.hexdigest()}"


def _add(files: tarfile.TarFile, name: str, text: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(text.encode())
    files.addfile(entry, io.BytesIO(text.encode()))
