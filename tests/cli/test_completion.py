"""What a shell offers when somebody presses Tab."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cml_runner import clouds, forges
from cml_runner.cli import COMMANDS
from tests.cli.test_startup import SLOW

if TYPE_CHECKING:
    from tests.conftest import Cli

ASK = """\
source ./script
COMP_WORDS=({words})
COMP_CWORD={place}
COMPREPLY=()
_cml_runner_completion cml-runner
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def offered(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Ask bash itself what comes after some words, the last of which is incomplete."""
    if not (bash := shutil.which("bash")):
        pytest.skip("bash is not there")
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "bin" / "cml-runner"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m cml_runner "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (tmp_path / "script").write_text(cli.run("completion", "bash").out)

    def ask(*words: str) -> list[str]:
        listed = " ".join(f"'{word}'" for word in ("cml-runner", *words))
        script = ASK.format(words=listed, place=len(words))
        done = subprocess.run(
            [bash, "--norc", "-c", script], capture_output=True, text=True, check=True, timeout=30
        )
        assert done.stderr in ("", "bash: compopt: not currently executing completion function\n")
        return done.stdout.split()

    return ask


def test_commands(offered: object) -> None:
    assert callable(offered)
    assert set(offered("")) == COMMANDS.keys() - {"supervise"}
    assert offered("des") == ["destroy"]
    assert set(offered("task", "st")) == {"stop", "start"}
    assert offered("completion", "") == ["bash", "zsh", "fish"]


def test_flags_and_values(offered: object) -> None:
    assert callable(offered)
    assert offered("launch", "--cloud-sp") == [
        "--cloud-spot", "--cloud-spot-price", "--cloud-spot-fallback",
    ]  # fmt: skip
    assert set(offered("launch", "--cloud", "")) == {*clouds.NAMES, "az"}
    assert set(offered("launch", "--driver", "")) == set(forges.NAMES)
    assert offered("list", "--output", "j") == ["json"]
    assert offered("permissions", "k") == ["kubernetes"]
    assert offered("task", "run", "--cloud", "g") == ["gcp"]
    assert offered("task", "run", "--image", "n") == ["nvidia"]


def test_what_a_cloud_has(offered: object) -> None:
    assert callable(offered)
    assert offered("launch", "--cloud", "aws", "--cloud-region", "us-w") == ["us-west", "us-west-2"]
    assert "us-west1" in offered("task", "run", "--cloud", "gcp", "--region", "us-w")
    assert offered("launch", "--cloud", "aws", "--cloud-type", "m+t") == ["m+t4"]
    assert "m-arm" in offered("launch", "--cloud", "aws", "--cloud-type", "m")
    assert "m-arm" not in offered("launch", "--cloud", "kubernetes", "--cloud-type", "m")
    assert offered("launch", "--cloud", "az", "--cloud-gpu", "a10") == ["a10", "a100"]
    assert {"a10g", "a10"} <= set(offered("launch", "--cloud-gpu", "a10"))


def test_lists(offered: object) -> None:
    assert callable(offered)
    assert offered("launch", "--cloud-region", "us-west,eu-n") == ["us-west,eu-north"]
    assert offered("launch", "--cloud-type", "m,x")[0] == "m,xl"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(cli: Cli, shell: str) -> None:
    script = cli.run("completion", shell).out
    assert f"_CML_RUNNER_COMPLETE={shell}_complete" in script
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True, timeout=30)


def test_nothing_big_is_imported_for_it() -> None:
    script = "import sys; from cml_runner.cli import cli; from click.shell_completion import *\n"
    script += "kind = get_completion_class('fish'); it = kind(cli, {}, 'cml-runner', 'X')\n"
    script += "print(len(it.get_completions(['launch', '--cloud-type'], '')))\n"
    script += "print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    count, modules = done.stdout.splitlines()
    assert int(count) > 10
    assert {name.partition(".")[0] for name in modules.split()} & SLOW == set()
