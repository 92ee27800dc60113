"""A bucket, on a disk or far away, and directories to compare."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from cml_runner.store import Store
from cml_runner.transfer import History, Rules, Writer
from tests.lab import objects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Begin = Callable[..., Writer]


@pytest.fixture(params=["disk", "far"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "disk":
        (tmp_path / "bucket").mkdir()
        yield Store((tmp_path / "bucket").as_uri())
        return
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    with objects.serving() as far:
        for name, value in far.environment.items():
            monkeypatch.setenv(name, value)
        yield Store("s3://bucket/tasks/one?region=us-east-1")


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[objects.Objects]:
    with objects.serving() as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def begin(
    bucket: Store, directory: Path, *rules: str, machine: str = "m", **more: object
) -> Writer:
    """Take over the history of a directory."""
    history = History(bucket, "data", "000", machine)
    history.take()
    return Writer(history, directory, Rules(rules), **more)  # type: ignore[arg-type]


def reader(bucket: Store) -> History:
    return History(bucket, "data", "000")


def listing(directory: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything that there is to say about what is in a directory."""
    found: dict[bytes, tuple[object, ...]] = {}
    root = os.fsencode(directory)
    for parent, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = os.path.join(parent, name)
            status = os.lstat(path)
            content: object = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    content = file.read()
            found[os.path.relpath(path, root)] = (status.st_mode, status.st_mtime_ns, content)
    return found
