"""The program that runs here, as a wheel: machines run exactly what launched them."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cml_runner import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PACKAGE = Path(__file__).parent  # its own parent may be a wheel
INFO = f"cml_runner-{__version__}.dist-info"
METADATA = f"Metadata-Version: 2.1\nName: cml-runner\nVersion: {__version__}\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: cml-runner\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first that a zip file can say
MODE = 0o100644
KEPT = 4  # wheels in the cache
DIGEST = re.compile("[0-9a-f]{64}")


def wheel() -> bytes:
    """Return a wheel of the running package: the same bytes for the same files, and the same zlib.

    It holds exactly what is imported, whether that is a checkout, an installed copy or a wheel
    on sys.path. It says nothing of dependencies: boot/lock.txt does.
    """
    cache, key = _cache(), _key()
    for file in _kept(cache, key):
        with suppress(OSError):
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() == _named(file):
                return content
    content = _built(_files())
    if cache:
        with suppress(OSError):
            _keep(cache, key, content)
    return content


def digest() -> str:
    """Return the SHA-256 of the wheel. On a machine it is the name of what the package lies in."""
    if DIGEST.fullmatch(name := PACKAGE.parent.name.removesuffix(".whl")):
        return name
    for file in _kept(_cache(), _key()):
        return _named(file)
    return hashlib.sha256(wheel()).hexdigest()


def _built(files: Mapping[str, bytes]) -> bytes:
    import zipfile  # noqa: PLC0415 - --version rarely needs it
    from io import BytesIO  # noqa: PLC0415

    everything = {**files, f"{INFO}/METADATA": METADATA.encode(), f"{INFO}/WHEEL": WHEEL.encode()}
    record = f"{INFO}/RECORD"
    lines = [_recorded(name, content) for name, content in everything.items()]
    everything[record] = "".join([*lines, f"{record},,\n"]).encode()
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in everything.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system, entry.external_attr = 3, MODE << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)
    return file.getvalue()


def _recorded(name: str, content: bytes) -> str:
    import base64  # noqa: PLC0415

    code = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    return f"{name},sha256={code},{len(content)}\n"


def _files() -> dict[str, bytes]:
    """Read the package's files, sorted by name."""
    if PACKAGE.is_dir():
        found = {name: Path(entry.path).read_bytes() for name, entry in _entries(PACKAGE)}
        return dict(sorted(found.items()))
    import zipfile  # noqa: PLC0415

    with zipfile.ZipFile(PACKAGE.parent) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("cml_runner/"))
        return {name: archive.read(name) for name in names if _is_ours(name)}


def _entries(directory: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Find all files of the package, each with its name in the wheel."""
    left = [(str(directory), "cml_runner/")]
    while left:
        path, prefix = left.pop()
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    left.append((entry.path, f"{prefix}{entry.name}/"))
                elif _is_ours(f"{prefix}{entry.name}"):
                    yield f"{prefix}{entry.name}", entry


def _is_ours(name: str) -> bool:
    """Tell a file of the package from what Python, an editor or a system puts beside it."""
    return not name.endswith((".pyc", "/")) and "/." not in name and "/__pycache__/" not in name


def _key() -> str:
    """Name this very state of the files, without reading them."""
    if PACKAGE.is_dir():
        found = sorted((name, entry.stat()) for name, entry in _entries(PACKAGE))
    else:
        found = [("", PACKAGE.parent.stat())]
    times = (f"{name} {one.st_size} {one.st_mtime_ns} {one.st_ctime_ns}" for name, one in found)
    text = "\n".join([str(PACKAGE), *times])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _cache() -> Path | None:
    """Return a directory that nobody else may write to, if there can be one."""
    with suppress(OSError, RuntimeError):  # without a home
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        found = home / "cml-runner"
        found.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = found.stat()
        if os.name != "posix" or (about.st_uid == os.geteuid() and not about.st_mode & 0o022):
            return found
    return None


def _kept(cache: Path | None, key: str) -> list[Path]:
    """Find the wheel of this state in the cache."""
    with suppress(OSError):
        return list(cache.glob(f"{key}-*.whl")) if cache else []
    return []


def _keep(cache: Path, key: str, content: bytes) -> None:
    """Put a wheel into the cache, and remove the oldest of the others."""
    final = cache / f"{key}-{hashlib.sha256(content).hexdigest()}.whl"
    part = final.with_name(f"{final.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(final)
    files = sorted(cache.iterdir(), key=lambda one: one.stat().st_mtime)
    for file in files[:-KEPT]:
        file.unlink(missing_ok=True)


def _named(file: Path) -> str:
    return file.stem.rpartition("-")[2]
