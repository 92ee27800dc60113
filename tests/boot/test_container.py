"""A container becomes our supervisor: the real script and the real wheel, under several Pythons."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cml_runner import bootstrap, program
from cml_runner.boot import environment, failing
from cml_runner.boot.prepare import INTERRUPTED
from cml_runner.model import Program
from cml_runner.wait import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PROXY = "http://me:secret@proxy.example"
SETTINGS = {"proxies": {"HTTPS_PROXY": PROXY}}
OTHERS = Path(pwd.getpwuid(os.getuid()).pw_dir, ".pyenv", "versions")  # if they are there
# In the place of an environment's Python: it tells how it was started.
PYTHON = """\
#!/bin/sh
echo "$PWD"
echo "$@"
env
"""


class Container:
    """A directory with what a container has, where all that is outside of it is inside."""

    def __init__(self, root: Path) -> None:
        self.root, self.index = root, "http://127.0.0.1:1/simple/"  # nobody answers
        self.settings = root / "settings.json"
        self.settings.write_text(json.dumps(SETTINGS))
        for name in ("bin", "run", "work", "start", "image"):
            (root / name).mkdir()
        self.python(sys.executable)
        self.wheel = root / "start" / f"{program.digest()}.whl"
        self.wheel.write_bytes(_moved(root))

    def python(self, path: str | Path) -> None:
        """Have another Python."""
        link = self.root / "bin" / "python3"
        link.unlink(missing_ok=True)
        link.symlink_to(path)

    def bake(self) -> None:
        """Bring the environment along, as an image may."""
        lock = hashlib.sha256(environment.lock()).hexdigest()[:12]
        place = self.root / "opt" / f"env-{lock}"
        (place / "bin").mkdir(parents=True)
        (place / "complete").touch()
        (place / "bin" / "python").write_text(PYTHON)
        (place / "bin" / "python").chmod(0o755)

    def start(self, **variables: str) -> subprocess.Popen[str]:
        url = f"said://{self.root}/run/bucket?data=/x"
        wanted = Program(index=self.index)
        script = bootstrap.container(str(self.settings), url, wanted, str(self.wheel))
        own = {"PATH": f"{self.root}/bin:/usr/bin:/bin", **variables}
        return subprocess.Popen(
            ["sh", "-c", script],
            env=own,
            cwd=self.root / "image",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(**variables)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess((), process.returncode, out, err)


def _moved(root: Path) -> bytes:
    """Write our wheel, which knows of other places."""
    places = {"/opt/cml-runner-work": str(root / "work"), "/opt/cml-runner": str(root / "opt")}
    new = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(program.wheel())) as files,
        zipfile.ZipFile(new, "w") as moved,
    ):
        for name in files.namelist():
            content = files.read(name)
            for old, place in places.items() if "/boot/" in name else ():
                content = content.replace(f'Path("{old}")'.encode(), f'Path("{place}")'.encode())
            moved.writestr(name, content)
    return new.getvalue()


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(tmp_path)


@pytest.fixture
def slow() -> Iterator[str]:
    """An index that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/simple/"


def told(text: str) -> Mapping[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines()[2:])


@pytest.mark.parametrize("version", ["own", "3.9", "3.10", "3.12", "3.13"])
def test_it_becomes_the_supervisor(container: Container, version: str) -> None:
    if version != "own":
        found = sorted(OTHERS.glob(f"{version}.*/bin/python{version}"))
        if not found:
            pytest.skip(f"no Python {version} here")
        container.python(found[-1])
    container.bake()
    done = container.run()
    assert done.returncode == 0, done.stderr
    root, lines = container.root, done.stdout.splitlines()
    assert lines[:2] == [
        str(root / "work"),
        f"-m cml_runner.supervise said://{root}/run/bucket?data=/x",
    ]
    place = root / "run" / "program" / "programs" / container.wheel.stem
    variables = told(done.stdout)
    assert variables["PYTHONPATH"] == str(place)
    assert (place / "cml_runner" / "supervise" / "__main__.py").exists()
    assert variables["HTTPS_PROXY"] == variables["https_proxy"] == PROXY
    copy = root / "run" / "bucket" / "settings.json"
    assert json.loads(copy.read_text()) == SETTINGS
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert stat.S_IMODE(copy.parent.stat().st_mode) == 0o700
    assert done.stderr == ""


def test_what_an_image_imports_is_not_ours(container: Container) -> None:
    container.bake()
    image = container.root / "image"
    for name in ("cml_runner", "logging", "argparse"):
        (image / f"{name}.py").write_text("raise SystemExit('not this one')")
    done = container.run(PYTHONPATH=str(image))
    assert done.returncode == 0, done.stderr
    variables = told(done.stdout)
    assert str(image) not in variables["PYTHONPATH"]
    assert variables["CML_RUNNER_PYTHONPATH"] == str(image)  # the supervisor gives it to jobs


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "FileNotFoundError: "), ("{", "the settings can't be read: they were damaged")],
)
def test_the_last_line_says_why_not(container: Container, content: str | None, why: str) -> None:
    container.settings.unlink()
    if content:
        container.settings.write_text(content)
    done = container.run()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"{failing.FAILED}: {why}")


def test_an_index_that_is_gone(container: Container) -> None:
    done = container.run(CML_RUNNER_INDEX_PATIENCE="2", NO_PROXY="127.0.0.1")
    assert done.returncode == 1
    *before, last = done.stderr.splitlines()
    assert before
    assert all(line.endswith("; trying again") for line in before)
    assert last.startswith(f"{failing.FAILED}: GET http://127.0.0.1:1/simple/uv/: ")
    assert "secret" not in done.stderr


def test_a_pod_that_has_to_go_before_it_is_ready(container: Container, slow: str) -> None:
    container.index = slow
    process = container.start(NO_PROXY="127.0.0.1")
    until((container.root / "run" / "program" / "installing").exists, "it to begin", 20, 0.02)
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED, err


def test_an_image_without_python(container: Container) -> None:
    (container.root / "bin" / "python3").unlink()
    for name in ("sh", "id", "env"):
        (container.root / "bin" / name).symlink_to(str(shutil.which(name)))
    done = container.run(PATH=str(container.root / "bin"))
    assert done.returncode == 1
    assert "looking for Python 3.9 or newer" in done.stderr.splitlines()[-1]


def test_a_python_that_is_too_old(container: Container) -> None:
    found = sorted(OTHERS.glob("3.8.*/bin/python3.8"))
    if not found:
        pytest.skip("no Python 3.8 here")
    container.python(found[-1])
    done = container.run()
    assert done.returncode == 1
    assert done.stderr.startswith(f"{failing.FAILED}: looking for Python 3.9 or newer")
