"""The program starts fast because it imports nothing before it needs it, and helps who mistypes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cml_runner import __version__

if TYPE_CHECKING:
    from tests.conftest import Cli

SLOW = {
    *("azure", "boto3", "botocore", "github", "gitlab", "google", "kubernetes"),
    *("msgspec", "obstore", "psutil", "requests", "rich"),
}
RUN = """\
import json, sys
from cml_runner import cli
sys.argv = ["cml-runner", *{arguments}]
try:
    {arguments} and cli.main()
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def imported(*arguments: str) -> set[str]:
    """Run our program; return the top-level modules that it has imported."""
    script = RUN.format(arguments=list(arguments))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    return {name.partition(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--version",),
        ("--help",),
        ("launch", "--help"),
        ("list", "--help"),
        ("demo", "-h"),
        ("task", "run", "-h"),
    ],
    ids=" ".join,
)
def test_help_imports_nothing_big(arguments: tuple[str, ...]) -> None:
    found = imported(*arguments)
    assert "cml_runner" in found
    assert found & SLOW == set()


def test_what_imports_something_big_is_seen() -> None:
    assert "psutil" in imported("list")


def test_as_a_module(cli: Cli) -> None:
    assert __version__ in cli.run("--version").out


@pytest.mark.parametrize("command", ["lanch", "lsit", "destory"])
def test_unknown_command(cli: Cli, command: str) -> None:
    err = cli.run(command, code=2).err
    assert command in err
    assert "cml-runner --help" in err


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("--cloud-typ", "--cloud-type"), ("--lables", "--labels"), ("--resuse", "--reuse")],
)
def test_unknown_flag(cli: Cli, wrong: str, right: str) -> None:
    err = cli.run("launch", wrong, "m", code=2).err
    assert wrong in err
    assert right in err


def test_unknown_choice(cli: Cli) -> None:
    err = cli.run("list", "--output", "yaml", code=2).err
    assert "json" in err
