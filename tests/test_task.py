"""The whole life of a task on the embedded cloud, with the real program in real processes."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from cml_runner.store import Store
from cml_runner.transfer import History
from tests.conftest import processes_of
from tests.test_life import kill
from tests.worlds import wait

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Cli

RUN = ("task", "run", "--cloud", "local")
# Counts as long as it may, and keeps in two files how far it is; ends when `enough` is there.
COUNT = """\
#!/bin/sh
trap 'echo told until $(cat "$CML_NOTICE") >> told; exit 0' TERM
i=$(cat counter 2>/dev/null || echo 0)
echo "begin at $i, epoch $CML_EPOCH"
while [ ! -e "$ENOUGH" ]; do
  i=$((i + 1))
  echo $i > new && mv new counter
  sleep 0.05
done
echo "end at $i"
echo done > result
"""


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where everything begins."""
    place = tmp_path / "work"
    place.mkdir()
    (place / "input").write_text("some data\n")
    (place / "script").write_text(COUNT)
    monkeypatch.chdir(place)
    monkeypatch.setenv("ENOUGH", str(tmp_path / "enough"))
    return place


def nothing_is_left(home: Path) -> None:
    wait(lambda: processes_of(home) == [], "the last process to end")
    kept = [path for path in (home / "local").rglob("*") if path.is_file()]
    assert [path.name for path in kept if path.name != ".lock"] == []


def detached(cli: Cli, name: str, *more: str) -> str:
    """Run the counting script in the background."""
    arguments = (*RUN, "--name", name, "--environment", "ENOUGH", "--script", "script", *more)
    return cli.run(*arguments, "--detach").out.strip()


def counter(home: Path, identifier: str, rank: int = 0) -> int:
    """How far the script is, in the last snapshot."""
    (bucket,) = home.glob(f"local/*/{identifier}/bucket")
    history = History(Store(bucket.as_uri()), "data", f"{rank:03}")
    manifest = history.latest()
    for entry in manifest.entries if manifest else ():
        if entry.path == b"counter":
            (piece,) = entry.pieces
            content = history.get(piece.blob)
            return int(bytes(content[piece.offset :][: piece.length]))
    return 0


def log(cli: Cli, identifier: str) -> str:
    return cli.run("task", "logs", identifier).out


def states(cli: Cli, name: str) -> dict[str, int]:
    found: dict[str, int] = cli.run("task", "show", name, "--output", "json").json["status"]
    return found


@pytest.mark.parametrize("code", [0, 7])
def test_from_run_to_destroy(cli: Cli, home: Path, workdir: Path, code: int) -> None:
    script = f"cat input; echo made here > made; rm input; env; echo oh >&2; exit {code}"
    (workdir / "ignored.log").touch()
    arguments = (
        "--name",
        "one",
        "--environment",
        "A=1 2",
        "--exclude",
        "*.log",
        "--tags",
        "team=ml",
    )
    done = cli.run(*RUN, *arguments, "--", "sh", "-c", f"ls; {script}", code=code)
    lines = done.out.splitlines()
    assert {
        "some data",
        "A=1 2",
        "CML_RANK=0",
        "CML_WORLD_SIZE=1",
        "CML_EPOCH=1",
        "CI=true",
    } <= set(lines)
    assert {"TPI_TASK=true", "TPI_TASK_CLOUD_PROVIDER=local", "oh", "input"} <= set(lines)
    assert "ignored.log" not in lines
    assert f"the script ended with exit code {code}" in done.err
    assert "sent" in done.err
    wait(lambda: processes_of(home) == [], "the machine to leave")
    (row,) = cli.run("task", "list", "--output", "json").json
    identifier = row["id"]
    assert row["status"] == {"failed" if code else "succeeded": 1}
    assert row["expires"] is None
    details = cli.run("task", "show", "one", "--output", "json").json
    assert details["tags"]["team"] == "ml"
    assert details["machines"][0]["code"] == code
    assert details["events"]
    assert cli.run("task", "logs", identifier).out == done.out
    assert cli.run("task", "logs", "-f", identifier, code=code).out == done.out
    assert "is over" in cli.run("task", "stop", "one", code=4).err
    assert "is over" in cli.run("task", "start", "one", code=4).err
    assert "task destroy" in cli.run("destroy", identifier, code=2).err
    assert cli.run("gc", "--output", "json").json["removed"] == []
    assert "is there already" in cli.run(*RUN, "--name", "one", "--", "true", code=5).err
    assert not (workdir / "made").exists()
    assert "1 new" in cli.run("task", "pull", "one", "--to", "elsewhere").err
    assert (workdir / "elsewhere" / "made").read_text() == "made here\n"
    cli.run("task", "destroy", "one")
    assert (workdir / "made").read_text() == "made here\n"
    assert (workdir / "input").exists(), "nothing is ever deleted here"
    assert "no task" in cli.run("task", "list").err
    nothing_is_left(home)
    cli.run("task", "show", identifier, code=4)


def test_interrupted_in_the_middle(cli: Cli, home: Path, workdir: Path, tmp_path: Path) -> None:
    process = cli.start(
        *RUN, "--name", "spot", "--spot", "0", "--environment", "ENOUGH", "--script", "script"
    )
    wait(lambda: list(home.rglob("work/spot/data/counter")), "the script to begin")
    (counting,) = home.rglob("work/spot/data/counter")
    wait(lambda: int(counting.read_text() or 0) > 10, "it to count")
    cli.run("interrupt", "spot", "--after", "8s")
    wait(
        lambda: list(home.glob("local/*/*/machines/0.2/work/spot/data/counter")), "the next machine"
    )
    (tmp_path / "enough").touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    begins = [line for line in out.splitlines() if line.startswith("begin")]
    assert begins[0] == "begin at 0, epoch 1"
    assert len(begins) == 2
    assert int(begins[1].split()[2].rstrip(",")) > 10, "it began anew"
    cli.run("task", "destroy", "spot")
    assert int((workdir / "counter").read_text()) >= int(begins[1].split()[2].rstrip(","))
    assert (workdir / "result").read_text() == "done\n"
    assert (workdir / "told").read_text().startswith("told until 1")
    nothing_is_left(home)


def test_a_machine_that_vanishes_without_a_word(
    cli: Cli, home: Path, workdir: Path, tmp_path: Path
) -> None:
    identifier = detached(cli, "gone")
    wait(lambda: counter(home, identifier) > 10, "a snapshot", 40)
    for machine in home.glob("local/*/*/machines/*/"):
        kill(machine)
    wait(lambda: "epoch 2" in log(cli, identifier), "the next machine")
    (tmp_path / "enough").touch()
    cli.run("task", "logs", "-f", identifier)
    again = next(line for line in log(cli, identifier).splitlines() if "epoch 2" in line)
    assert int(again.split()[2].rstrip(",")) > 10
    cli.run("task", "destroy", identifier)
    assert (workdir / "result").exists()
    nothing_is_left(home)


def test_stop_and_start(cli: Cli, home: Path, workdir: Path, tmp_path: Path) -> None:
    identifier = detached(cli, "pause", "--timeout", "1h")
    wait(lambda: list(home.rglob("work/pause/data/counter")), "the script to begin")
    cli.run("task", "stop", "pause")
    assert processes_of(home) == []
    assert states(cli, "pause") == {"stopped": 1}
    assert cli.run("task", "show", "pause", "--output", "json").json["expires"] is None
    cli.run("task", "stop", identifier)
    before = counter(home, identifier)
    assert before > 0
    cli.run("task", "pull", identifier)
    assert int((workdir / "counter").read_text()) == before
    assert "was stopped" in cli.run("task", "logs", "-f", identifier, code=11).err
    cli.run("task", "start", identifier)
    cli.run("task", "start", identifier)
    wait(lambda: "epoch 2" in log(cli, identifier), "it to go on")
    assert f"begin at {before}, epoch 2" in log(cli, identifier)
    (tmp_path / "enough").touch()
    cli.run("task", "logs", "-f", identifier)
    assert states(cli, "pause") == {"succeeded": 1}
    cli.run("task", "destroy", identifier)
    nothing_is_left(home)


def test_the_deadline_ends_the_script_and_keeps_its_data(
    cli: Cli, home: Path, workdir: Path
) -> None:
    script = "echo half > half; sleep 60"
    done = cli.run(*RUN, "--timeout", "2s", "--", "sh", "-c", script, code=124)
    assert "the deadline has come" in done.err
    (row,) = cli.run("task", "list", "--output", "json").json
    assert row["status"] == {"failed": 1}
    cli.run("task", "destroy", row["id"])
    assert (workdir / "half").read_text() == "half\n"
    nothing_is_left(home)


def test_ctrl_c_leaves_the_task_alone(cli: Cli, home: Path, workdir: Path, tmp_path: Path) -> None:
    process = cli.start(*RUN, "--name", "far", "--environment", "ENOUGH", "--script", "script")
    wait(lambda: list(home.rglob("work/far/data/counter")), "the script to begin")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "cml-runner task logs -f cml-far-" in err
    assert states(cli, "far") == {"running": 1}
    (tmp_path / "enough").touch()
    assert "end at" in cli.run("task", "logs", "-f", "far").out
    cli.run("task", "destroy", "far", "--no-pull")
    assert not (workdir / "result").exists()
    nothing_is_left(home)


def test_several_machines(cli: Cli, home: Path, workdir: Path) -> None:
    script = "mkdir -p out; echo $CML_RANK of $CML_WORLD_SIZE > out/$CML_RANK; echo I am $CML_RANK"
    arguments = ("--parallelism", "3", "--name", "many", "--output", "out")
    done = cli.run(*RUN, *arguments, "--", "sh", "-c", f"{script}; touch elsewhere")
    assert {f"{rank}| I am {rank}" for rank in range(3)} <= set(done.out.splitlines())
    assert states(cli, "many") == {"succeeded": 3}
    cli.run("task", "destroy", "many")
    assert [(workdir / "out" / str(rank)).read_text() for rank in range(3)] == [
        f"{rank} of 3\n" for rank in range(3)
    ]
    assert not (workdir / "elsewhere").exists()
    nothing_is_left(home)


def test_results_that_clash_are_kept_apart(cli: Cli, home: Path, workdir: Path) -> None:
    script = "mkdir out; echo $CML_RANK > out/model; exit $CML_RANK"
    arguments = ("--parallelism", "2", "--name", "many", "--output", "out")
    cli.run(*RUN, *arguments, "--", "sh", "-c", script, code=1)
    assert states(cli, "many") == {"succeeded": 1, "failed": 1}
    cli.run("task", "destroy", "many")
    assert [(workdir / f"out.{rank}" / "model").read_text() for rank in range(2)] == ["0\n", "1\n"]
    nothing_is_left(home)


def test_what_can_not_be_fetched_is_not_deleted(cli: Cli, home: Path, workdir: Path) -> None:
    done = cli.run(*RUN, "--name", "dear", "--", "sh", "-c", "echo dear > dear")
    assert done
    blobs = list(home.rglob("data/000/b/*/*"))
    hidden = [path.rename(path.with_suffix(".hidden")) for path in blobs]
    assert hidden
    cli.run("task", "destroy", "dear", code=1)
    assert states(cli, "dear") == {"succeeded": 1}
    (workdir / "file").touch()
    cli.run("task", "destroy", "dear", "--to", "file", code=1)
    for path in hidden:
        path.rename(path.with_suffix(""))
    cli.run("task", "destroy", "dear", "--to", "there")
    assert (workdir / "there" / "dear").exists()
    nothing_is_left(home)


def test_nothing_is_left_of_what_can_not_be_sent(cli: Cli, home: Path, workdir: Path) -> None:
    if not os.geteuid():
        pytest.skip("root can read everything")
    (workdir / "secret").touch(mode=0)
    assert "secret" in cli.run(*RUN, "--", "true", code=2).err
    nothing_is_left(home)


def test_defaults_from_a_file(cli: Cli, home: Path, workdir: Path) -> None:
    (workdir / "task.toml").write_text(
        'cloud = "local"\nparallelism = 2\nname = "filed"\nscript = """#!/bin/sh\necho $WHO\n"""\n'
        '[environment]\nWHO = "me"\n[storage]\nexclude = ["input"]\n'
    )
    done = cli.run("task", "run", "--parallelism", "1")
    assert done.out == "me\n"
    (workdir / "task.toml").unlink()
    (workdir / "pyproject.toml").write_text('[tool.cml-runner.task]\ncloud = "local"\nnmae = "x"\n')
    assert "nmae is unknown" in cli.run("task", "run", "--", "true", code=2).err
    cli.run("task", "destroy", "filed")
    nothing_is_left(home)


def test_no_secret_lies_around(
    cli: Cli, home: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workdir
    monkeypatch.setenv("MY_TOKEN", "not-a-real-t0ken")
    arguments = ("--name", "quiet", "--environment", "MY_*", "--log", "debug")
    done = cli.run(*RUN, *arguments, "--", "sh", "-c", "echo $MY_TOKEN; test $MY_TOKEN")
    assert "not-a-real-t0ken" not in done.out + done.err
    wait(lambda: processes_of(home) == [], "the machine to leave")
    kept = [path for path in home.rglob("*") if path.is_file()]
    assert [path for path in kept if b"not-a-real-t0ken" in path.read_bytes()] == []
    cli.run("task", "destroy", "quiet")


def test_a_container_of_ones_own(cli: Cli, home: Path, workdir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "other").touch()
    arguments = ("--name", "kept", "--storage-container", str(tmp_path / "mine"))
    cli.run(*RUN, *arguments, "--", "sh", "-c", "cat input; echo made > made")
    assert (tmp_path / "mine" / "data").is_dir()
    assert not list(home.rglob("data/000"))
    again = ("--name", "again", *arguments[2:])
    assert "another task" in cli.run(*RUN, *again, "--", "true", code=5).err
    cli.run("task", "destroy", "kept")
    assert (workdir / "made").read_text() == "made\n"
    assert [path.name for path in (tmp_path / "mine").rglob("*") if path.is_file()] == ["other"]
    nothing_is_left(home)


def test_what_is_made_elsewhere_is_not_lost(cli: Cli, home: Path, workdir: Path) -> None:
    cli.run(*RUN, "--name", "odd", "--output", "out", "--", "sh", "-c", "echo x > otu")
    assert "but elsewhere" in cli.run("task", "destroy", "odd", code=1).err
    assert states(cli, "odd") == {"succeeded": 1}
    cli.run("task", "destroy", "odd", "--no-pull")
    assert not (workdir / "otu").exists()
    nothing_is_left(home)
