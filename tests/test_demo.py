from __future__ import annotations

import signal
import tempfile
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.worlds import wait

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.conftest import Cli


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for temporary files that nobody else uses."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def nothing_is_left(temporary: Path) -> None:
    wait(lambda: not list(temporary.glob("cml-runner-demo-*")), "the directory to go")
    wait(lambda: not machines(temporary), "the machines to go")


def machines(temporary: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            machine = process.environ().get("LOCAL_CLOUD_MACHINE", "")
            if machine.startswith(str(temporary)) or f"{temporary}/cml" in str(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_the_whole_demo(cli: Cli, temporary: Path) -> None:
    done = cli.run("demo", "--output", "json")
    assert done.json["machines"] == 2
    assert done.json["jobs"] == [
        {"name": "train", "state": "succeeded", "attempts": 2},
        {"name": "report", "state": "succeeded", "attempts": 1},
    ]
    assert done.json["left"] == []
    for line in ("takes the spot machine away", "train: running on demo (attempt 2)"):
        assert line in done.err
    nothing_is_left(temporary)


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "creating bucket"),
        (signal.SIGINT, "machine 0.1 started"),
        (signal.SIGQUIT, "train: running"),
        (signal.SIGTERM, "takes the spot machine away"),
        (signal.SIGHUP, "attempt 2"),
    ],
)
def test_whatever_key_is_pressed(
    cli: Cli, temporary: Path, number: signal.Signals, moment: str
) -> None:
    process = cli.start("demo")
    read_until(process, moment)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode > 128
    nothing_is_left(temporary)


def test_it_can_not_be_put_to_sleep(cli: Cli, temporary: Path) -> None:
    process = cli.start("demo")
    read_until(process, "train: running")
    process.send_signal(signal.SIGTSTP)
    read_until(process, "takes the spot machine away")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    nothing_is_left(temporary)


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"{text!r} was never said")
