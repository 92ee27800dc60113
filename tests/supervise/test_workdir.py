from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cml_runner.errors import AgentFailed
from cml_runner.model import Identifier, Settings
from cml_runner.supervise import workdir
from cml_runner.supervise.workdir import Workdir
from tests.supervise.test_user import STRANGER, shared

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["shared"]

SETTINGS = Settings(
    id=Identifier.fixed("x"), driver="local", repo="file:///x", names=("x",), labels=("x",)
)
ADMIN = replace(STRANGER, sudo=True)


def of(directory: str = "", **changes: object) -> Settings:
    return replace(SETTINGS, workdir=directory, **changes)  # type: ignore[arg-type]


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Workdir(of(), "x").path == tmp_path / "work" / "x"
    assert Workdir(of("here"), "x").path == tmp_path / "here"
    assert Workdir(of("here", names=("x-0", "x-1")), "x-1").path == tmp_path / "here" / "x-1"
    assert Workdir(of(), "x", STRANGER).path == workdir.COMMON / "x"
    assert Workdir(of("/mnt"), "x", STRANGER).path.as_posix() == "/mnt"
    for text in ("~/here", "here"):
        assert Workdir(of(text), "x", STRANGER).path == STRANGER.home / "here"


@pytest.mark.lab
def test_root_runs_nothing_that_jobs_may_have_made(shared: Path) -> None:
    one = Workdir(of(str(shared / "work")), "x", STRANGER)
    one.create()
    (one.path / "agent").write_text("good")
    STRANGER.own(one.path)
    (one.path / "agent").write_text("bad")
    (one.path / "link").symlink_to(shared)
    (shared / "ours").touch()
    one.renew()
    assert {path.name for path in one.path.iterdir()} == {workdir.LOCK, workdir.MARKER}
    assert one.path.stat().st_uid == 0
    assert (shared / "ours").exists()
    one.delete()
    assert not one.path.exists()


@pytest.mark.lab
def test_nor_after_a_restart_of_the_machine(shared: Path) -> None:
    (shared / "ours").write_text("ours")
    path = shared / "work"
    path.mkdir()
    (path / workdir.MARKER).touch()
    STRANGER.own(path)
    for name in (workdir.LOCK, "agent"):
        (path / name).symlink_to(shared / "ours")
    second = Workdir(of(str(path)), "x", STRANGER)
    second.create()
    assert not (path / "agent").exists()
    assert (shared / "ours").read_text() == "ours"
    second.delete()


@pytest.mark.lab
def test_jobs_that_may_be_root_anyway_keep_what_they_have(shared: Path) -> None:
    one = Workdir(of(str(shared / "work")), "x", ADMIN)
    one.create()
    (one.path / "cache").touch()
    ADMIN.own(one.path)
    one.renew()
    assert (one.path / "cache").exists()
    one.delete()


@pytest.mark.lab
@pytest.mark.parametrize("way", ["home", "open", "theirs", "link"])
def test_a_place_that_jobs_rule_is_refused(shared: Path, way: str) -> None:
    path = shared / "parent" / "work"
    path.parent.mkdir()
    if way == "home":
        os.chown(path.parent, STRANGER.uid, STRANGER.gid)
    elif way == "open":
        path.parent.chmod(0o777)
    elif way == "theirs":
        path.mkdir()
        os.chown(path, STRANGER.uid, STRANGER.gid)
    else:
        path.symlink_to(shared)
        os.chown(path, STRANGER.uid, STRANGER.gid, follow_symlinks=False)
    with pytest.raises(AgentFailed, match="use another --workdir"):
        Workdir(of(str(path)), "x", STRANGER).create()
