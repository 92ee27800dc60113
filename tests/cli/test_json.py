"""Every command prints JSON if it is asked to: one document, or one a line, and nothing else."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import click
import pytest

from cml_runner.cli import cli as program
from cml_runner.program import digest
from tests.worlds import Local, wait

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Cli

WITHOUT = {
    "completion": "prints a script",
    "ssh": "has the user's terminal, or the output of their command",
    "supervise": "is started by machines",
}
SWITCHES = {"task run": "--json"}  # where --output is TPI's, and means a directory


def commands() -> dict[str, click.Command]:
    context = click.Context(program)
    found: dict[str, click.Command] = {}
    for name in program.list_commands(context):
        command = program.get_command(context, name)
        assert command
        if isinstance(command, click.Group):
            found |= {f"{name} {word}": one for word, one in command.commands.items()}
        else:
            found[name] = command
    return found


@pytest.mark.parametrize("name", sorted(commands().keys() - WITHOUT))
def test_every_command_has_it(name: str) -> None:
    options = [one for one in commands()[name].params if isinstance(one, click.Option)]
    if switch := SWITCHES.get(name):
        assert any(switch in one.opts for one in options)
        return
    (output,) = [one for one in options if "--output" in one.opts]
    assert isinstance(output.type, click.Choice)
    assert "json" in output.type.choices


def documents(cli: Cli, *arguments: str, code: int = 0) -> list[Any]:
    """Run a command; every line of its output must be a document."""
    name = next(one for one in commands() if arguments[: len(one.split())] == tuple(one.split()))
    words = len(name.split())
    switch = (SWITCHES[name],) if name in SWITCHES else ("--output", "json")
    done = cli.run(*arguments[:words], *switch, *arguments[words:], code=code)
    return [json.loads(line) for line in done.out.splitlines()]


def test_a_runners_life(cli: Cli, tmp_path: Path) -> None:
    local = Local(tmp_path)
    (launched,) = documents(
        cli, "launch", "--repo", local.repo, "--cloud", "local", "--idle-timeout", "1h"
    )
    name = launched["id"]
    (rows,) = documents(cli, "list")
    assert [row["id"] for row in rows] == [name]
    (shown,) = documents(cli, "show", name)
    assert shown["id"] == name
    assert [one["program"] for one in shown["machines"]] == [digest()[:12]]
    lines = documents(cli, "logs", name)
    assert all(set(line) == {"rank", "line"} for line in lines)
    (real,) = documents(cli, "interrupt", name, "--real")
    assert real == {"id": name, "after": None}
    (told,) = documents(cli, "interrupt", name, "--after", "1s")
    assert told == {"id": name, "after": 1.0}
    (swept,) = documents(cli, "gc", "--older-than", "0.001", "--dry-run")
    assert swept["found"] == [name]
    assert swept["items"][0]["reason"].startswith("older than")
    (gone,) = documents(cli, "destroy", name)
    assert gone == {"destroyed": [name]}
    assert documents(cli, "list") == [[]]
    assert documents(cli, "setup", "local") == [{"us-west": []}]
    assert documents(cli, "permissions", "local", "--cloud-region", "us-west,us-east") == [{}, {}]


def test_a_tasks_life(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    where = ("--cloud", "local", "--name", "one", "--workdir", str(tmp_path / "work"))
    script = ("--", "/bin/sh", "-c", "echo said; echo made >made; exit 3")
    lines = documents(cli, "task", "run", *where, *script, code=3)
    assert {"rank": 0, "line": "said", "script": True} in lines
    (rows,) = documents(cli, "task", "list")
    name = rows[0]["id"]
    (shown,) = documents(cli, "task", "show", name)
    assert shown["status"] == {"failed": 1}
    assert documents(cli, "task", "logs", name) == documents(
        cli, "task", "logs", "-f", name, code=3
    )
    (pulled,) = documents(cli, "task", "pull", name, "--to", str(tmp_path / "to"))
    assert pulled["files"] == 1
    (gone,) = documents(cli, "task", "destroy", name, "--to", str(tmp_path / "to"))
    assert gone == {"id": name, "destroyed": True}
    other = ("--cloud", "local", "--name", "two", "--workdir", str(tmp_path / "work"), "--detach")
    (begun,) = documents(cli, "task", "run", *other, "--", "sleep", "60")
    assert (begun["cloud"], begun["region"]) == ("local", "us-west")
    (stopped,) = documents(cli, "task", "stop", begun["id"])
    assert stopped == {"id": begun["id"], "stopped": True}
    (started,) = documents(cli, "task", "start", begun["id"])
    assert started == {"id": begun["id"], "started": True}
    documents(cli, "task", "destroy", begun["id"], "--no-pull")


def test_ctrl_c_ends_a_followed_log_silently(cli: Cli, tmp_path: Path) -> None:
    local = Local(tmp_path)
    arguments = ("--repo", local.repo, "--cloud", "local", "--name", "one", "--cloud-spot")
    cli.run("launch", *arguments, "--idle-timeout", "1h")
    follower = cli.start("logs", "-f", "one", "--output", "json")
    assert follower.stdout
    first = json.loads(follower.stdout.readline())
    assert first["rank"] == 0
    cli.run("interrupt", "one", "--after", "0.5")
    wait(lambda: cli.run("logs", "one").out.count("is ready for jobs") == 2, "its successor")
    ready = 0
    while ready < 2:  # it goes on with the machine that has come in place of the other
        ready += "is ready for jobs" in json.loads(follower.stdout.readline())["line"]
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=30)
    assert (follower.returncode, err.strip()) == (130, "")
    cli.run("destroy", "one")
