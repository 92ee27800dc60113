from __future__ import annotations

import shutil
import stat
from typing import TYPE_CHECKING

import pytest

from cml_runner.errors import RunnerError
from cml_runner.supervise import machine

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has nothing but a shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    shell = shutil.which("sh")
    assert shell
    (folder / "sh").symlink_to(shell)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(stat.S_IRWXU)


def test_docker_is_installed_where_it_is_missing(tools: Path, tmp_path: Path) -> None:
    tool(tools, "apt-get", f'echo "$DEBIAN_FRONTEND" "$@" >>{tmp_path}/calls')
    machine.docker()
    update, install = (tmp_path / "calls").read_text().splitlines()
    assert update == "noninteractive -o DPkg::Lock::Timeout=120 -qq update"
    assert install.endswith("-qq install --no-install-recommends docker.io")


def test_docker_that_is_there_is_left_alone(tools: Path) -> None:
    tool(tools, "docker", "exit 1")
    machine.docker()


def test_docker_that_cant_be_installed(tools: Path) -> None:
    with pytest.raises(RunnerError, match="docker can't be installed"):
        machine.docker()
    tool(tools, "apt-get", "echo no network; exit 100")
    with pytest.raises(RunnerError, match="no network"):
        machine.docker()
