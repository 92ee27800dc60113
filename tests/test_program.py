"""The program as a wheel: what machines run is what runs here, byte for byte."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from io import BytesIO
from typing import TYPE_CHECKING

import pytest

from cml_runner import __version__, program

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Cli

DIGEST = "from cml_runner import program; print(program.digest())"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where wheels are kept in this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cml-runner"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A directory with a copy of the package."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(program.PACKAGE, tmp_path / "copy" / "cml_runner", ignore=ignored)
    return tmp_path / "copy"


def digest_of(place: Path) -> str:
    """Ask another process, which imports the package from there."""
    done = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env={**os.environ, "PYTHONPATH": str(place)},
        cwd=place.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_same_wheel_wherever_the_files_are(copy: Path, tmp_path: Path) -> None:
    assert program.digest() == hashlib.sha256(program.wheel()).hexdigest()
    assert digest_of(copy) == program.digest()
    with zipfile.ZipFile(tmp_path / "any.zip", "w") as archive:
        for file in copy.rglob("*"):
            archive.write(file, file.relative_to(copy))
    assert digest_of(tmp_path / "any.zip") == program.digest()


def test_a_changed_word_is_another_program(copy: Path) -> None:
    file = copy / "cml_runner" / "times.py"
    assert digest_of(copy) == program.digest()
    file.write_text(file.read_text().replace("hours", "Hours", 1))
    assert digest_of(copy) != program.digest()


def test_what_is_not_ours_changes_nothing(copy: Path) -> None:
    (copy / "cml_runner" / ".times.py.swp").write_text("an editor's")
    (copy / "cml_runner" / "__pycache__").mkdir()
    (copy / "cml_runner" / "__pycache__" / "times.cpython-39.pyc").write_text("Python's")
    (copy / "cml_runner" / "times.pyc").write_text("Python's")
    assert digest_of(copy) == program.digest()


def test_pip_can_install_it(tmp_path: Path) -> None:
    file = tmp_path / f"cml_runner-{__version__}-py3-none-any.whl"
    file.write_bytes(program.wheel())
    command = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet")
    subprocess.run([*command, "--target", tmp_path / "site", file], check=True)
    installed = {
        one.relative_to(tmp_path / "site").as_posix(): one.read_bytes()
        for one in (tmp_path / "site" / "cml_runner").rglob("*")
        if one.is_file() and one.suffix != ".pyc"
    }
    here = program.PACKAGE.parent
    assert installed == {name: (here / name).read_bytes() for name in installed}
    assert {"cml_runner/__init__.py", "cml_runner/boot/lock.txt", "cml_runner/boot/uv.txt"} < set(
        installed
    )
    assert "cml_runner/clouds/aws/catalogue.toml" in installed
    assert digest_of(tmp_path / "site") == program.digest()


def test_it_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_cache", lambda: None)
    assert program.wheel() == program.wheel()
    with zipfile.ZipFile(BytesIO(program.wheel())) as archive:
        entries = archive.infolist()
    assert {one.date_time for one in entries} == {program.EPOCH}
    assert {one.external_attr >> 16 for one in entries} == {0o100644}
    *names, _, _, record = [one.filename for one in entries]
    assert names == sorted(names)
    assert record.endswith("/RECORD")


# The cache


def test_it_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = program.wheel()
    monkeypatch.setattr(program, "_built", lambda _: pytest.fail("it is built anew"))
    assert program.wheel() == first
    assert program.digest() == hashlib.sha256(first).hexdigest()
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_touched_file_makes_it_anew(copy: Path, cache: Path) -> None:
    digest_of(copy)
    (copy / "cml_runner" / "times.py").touch()
    assert digest_of(copy) == program.digest()
    assert len(list(cache.iterdir())) == 3  # two states of the copy, and of the checkout


def test_a_broken_cache_does_no_harm(cache: Path) -> None:
    first = program.wheel()
    (file,) = cache.iterdir()
    file.write_bytes(first[:100])
    assert program.wheel() == first
    assert file.read_bytes() == first, "it is mended"
    shutil.rmtree(cache)
    cache.write_text("in the way")
    assert program.wheel() == first
    assert program.digest() == hashlib.sha256(first).hexdigest()


def test_a_directory_that_others_may_write_to_is_not_trusted(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    program.wheel()
    assert list(cache.iterdir()) == []


def test_old_entries_are_removed(cache: Path) -> None:
    cache.mkdir(parents=True)
    for number in range(9):
        (cache / f"{number}.whl").touch()
        os.utime(cache / f"{number}.whl", (number, number))
    program.wheel()
    left = {file.name for file in cache.iterdir()}
    assert len(left) == program.KEPT
    assert {"6.whl", "7.whl", "8.whl"} < left


# On a machine


@pytest.mark.parametrize("name", ["{}", "{}.whl"])
def test_a_machine_knows_it_by_its_place(tmp_path: Path, name: str) -> None:
    sha256 = "0123456789abcdef" * 4
    place = tmp_path / name.format(sha256)
    with zipfile.ZipFile(BytesIO(program.wheel())) as archive:
        archive.extractall(place)
    if place.suffix:
        shutil.rmtree(place)
        place.write_bytes(program.wheel())
    assert digest_of(place) == sha256


def test_the_version_tells_it(cli: Cli) -> None:
    said = cli.run("--version").out
    assert re.fullmatch(rf"cml-runner, version {__version__} \([0-9a-f]{{12}}\)\n", said)
    assert program.digest()[:12] in said
