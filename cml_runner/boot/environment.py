"""The program and what it depends on, on this machine: installed from one index, or there already.

    /opt/cml-runner/programs/SHA256/   the wheel, unpacked
    /opt/cml-runner/env-LOCK/          what the wheel's lock names; an image may bring it

The lock (lock.txt) has the hash of every file, and so has that of uv (uv.txt), which installs them.
"""

from __future__ import annotations

import hashlib
import html
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from pkgutil import get_data
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urljoin

import cml_runner
from cml_runner.boot import web
from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

ROOT = Path("/opt/cml-runner")
COMPLETE = "complete"  # a file in an environment to which nothing is missing
PYTHON = ">=3.10"
PATIENCE = 90  # seconds for an index that doesn't answer …
VARIABLE = "CML_RUNNER_INDEX_PATIENCE"  # … unless an image knows better
PAUSES = (1, 2, 5, 10)  # seconds between two attempts, the last one again and again
KINDS = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
FINAL = re.compile(r"hash mismatch|no solution found|requires-python|no space left", re.IGNORECASE)
LINK = re.compile(r"""href\s*=\s*["']([^"']+)""", re.IGNORECASE)
OWN = {"UV_SYSTEM_CERTS": "1", "UV_NO_CACHE": "1", "UV_NO_CONFIG": "1"}


class WrongFile(RunnerError):
    """The index has another file than the lock names, or none for this machine."""


def unpack(root: Path = ROOT) -> Path:
    """Unpack the wheel from which we run, programs/SHA256.whl; return the directory."""
    wheel = Path(cml_runner.__file__).parents[1]
    if wheel.is_dir():  # it was unpacked before
        return wheel
    place = root / "programs" / wheel.stem
    if not place.exists():
        new = place.with_name(f".{place.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        with zipfile.ZipFile(wheel) as files:
            files.extractall(new)
        new.rename(place)
    return place


def lock(name: str = "lock.txt") -> bytes:
    """Read one of the wheel's locks."""
    content = get_data(__package__, name)
    assert content is not None
    return content


def is_complete(root: Path = ROOT) -> bool:
    """Say if the environment is there already."""
    return (_place(root) / COMPLETE).exists()


def install(index: str, root: Path = ROOT, sleep: Callable[[float], None] = time.sleep) -> Path:
    """Have an environment with what the lock names; return its Python.

    Raises RunnerError, with what the index or uv said last.
    """
    place = _place(root)
    python = place / "bin" / "python"
    if is_complete(root):
        return python
    work = root / "installing"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    requirements = work / "lock.txt"
    requirements.write_bytes(lock())
    end = time.monotonic() + float(os.environ.get(VARIABLE) or PATIENCE)
    uv = _persistent(lambda: fetch_uv(index, work), end, sleep)
    shutil.rmtree(place, ignore_errors=True)
    make = (str(uv), "venv", "--quiet", "--python", PYTHON, str(place))
    _persistent(lambda: _run(*make), end, sleep)
    fill = (
        *(str(uv), "pip", "install", "--quiet", "--python", str(python)),
        *("--require-hashes", "--only-binary", ":all:", "--no-deps"),
        *("--default-index", index, "--requirements", str(requirements)),
    )
    _persistent(lambda: _run(*fill), end, sleep)
    (place / COMPLETE).touch()
    shutil.rmtree(work)
    return python


def fetch_uv(index: str, directory: Path) -> Path:
    """Download uv's wheel for this machine, check it, and take the program out of it.

    Raises RunnerError.
    """
    pinned = lock("uv.txt").decode()
    hashes = set(re.findall(r"sha256:([0-9a-f]{64})", pinned))
    version = re.search(r"^uv==(\S+)", pinned, re.MULTILINE)
    assert version
    name, url = _wheel(f"{index.rstrip('/')}/uv/", f"uv-{version[1]}-")
    content = web.ask("GET", url).content
    if hashlib.sha256(content).hexdigest() not in hashes:
        msg = f"{name} from {index} isn't the file that our lock names: its SHA-256 is another"
        raise WrongFile(msg)
    with zipfile.ZipFile(io.BytesIO(content)) as files:
        (member,) = (one for one in files.namelist() if one.endswith("/scripts/uv"))
        place = directory / "uv"
        place.write_bytes(files.read(member))
    place.chmod(0o755)
    return place


def _place(root: Path) -> Path:
    return root / f"env-{hashlib.sha256(lock()).hexdigest()[:12]}"


def _wheel(page: str, start: str) -> tuple[str, str]:
    """Find the wheel that fits this machine on an index's page: its name and address.

    https://packaging.python.org/specifications/simple-repository-api/
    """
    answer = web.ask("GET", page, {"Accept": KINDS})
    if "json" in (answer.headers.get("Content-Type") or ""):
        links = [one["url"] for one in answer.json()["files"]]
    else:
        links = [html.unescape(one) for one in LINK.findall(answer.text)]
    libc = "manylinux" if platform.libc_ver()[0] == "glibc" else "musllinux"
    for link in links:
        url = urljoin(page, link).partition("#")[0]
        name = url.rpartition("/")[2]
        if name.startswith(start) and libc in name and name.endswith(f"_{platform.machine()}.whl"):
            return name, url
    msg = f"{page} has no wheel {start}…{libc}…_{platform.machine()}.whl"
    raise WrongFile(msg)


def _run(*command: str) -> None:
    """Run uv. Raises RunnerError with what it said."""
    own = {**os.environ, **OWN}
    own.setdefault("UV_HTTP_RETRIES", "3")
    done = subprocess.run(
        command,
        env=own,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip()
        msg = f"{' '.join(command[1:3])}: {said or done.returncode}"
        raise RunnerError(msg)


def _persistent(action: Callable[[], T], end: float, sleep: Callable[[float], None]) -> T:
    """Try until it works or the time is over, as an index may be away for a moment."""
    pauses = iter(PAUSES)
    while True:
        try:
            return action()
        except RunnerError as error:
            pause = next(pauses, PAUSES[-1])
            if _is_final(error) or time.monotonic() + pause > end:
                raise
            print(f"{error}; trying again", file=sys.stderr, flush=True)
            sleep(pause)


def _is_final(error: RunnerError) -> bool:
    """Say if trying again makes no sense."""
    if isinstance(error, web.Refused):
        return error.status < 500 and error.status not in (408, 429)
    return isinstance(error, WrongFile) or bool(FINAL.search(str(error)))
