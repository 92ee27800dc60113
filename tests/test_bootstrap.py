from __future__ import annotations

import re
import shutil
import subprocess
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest

from cml_runner import bootstrap
from cml_runner.errors import ConfigurationError
from cml_runner.model import Program

if TYPE_CHECKING:
    from pathlib import Path

URL = "s3://cml-runner-123456789012-us-west-2/tasks/cml-x-1-2?region=us-west-2#aws/us-west-2/x"
PROGRAM = Program(version="1.2.3", requirement="cml-runner[aws]==1.2.3")
EXPIRES = datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))


def test_a_ready_machine_just_starts() -> None:
    script = bootstrap.ready("file:///a b", ("python", "-c", "x y"))
    assert script == "#!/bin/sh\nexec python -c 'x y' 'file:///a b'\n"


@pytest.mark.parametrize("expires", [None, EXPIRES])
@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_every_shell_understands_it(expires: datetime | None, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    script = bootstrap.machine(URL, PROGRAM, expires)
    subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_the_deadline_is_set_first_and_in_utc() -> None:
    script = bootstrap.machine(URL, PROGRAM, EXPIRES)
    assert "OnCalendar=2030-01-02 01:04:05 UTC" in script
    assert str(int(EXPIRES.timestamp())) in script
    assert script.index("OnCalendar") < script.index("python3 -")
    assert "OnCalendar" not in bootstrap.machine(URL, PROGRAM, None)


def test_what_ends_a_machine_that_is_paid_for_without_power() -> None:
    script = bootstrap.machine(URL, PROGRAM, EXPIRES, prelude="make /sbin/end", end="/sbin/end")
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    assert script.index("trap failed EXIT") < script.index("make /sbin/end")
    assert script.index("make /sbin/end") < script.index("OnCalendar")
    assert script.index("/sbin/end failed || true") < script.index("systemctl --force poweroff ||")
    assert "ExecStopPost=-/sbin/end over\n" in script
    assert "ExecStopPost" not in bootstrap.machine(URL, PROGRAM, EXPIRES)


def test_exactly_this_version_is_installed() -> None:
    script = bootstrap.machine(URL, PROGRAM, None)
    assert "bin/python\" \\\n    'cml-runner[aws]==1.2.3'\n" in script
    assert "--default-index" not in script


def test_a_private_mirror() -> None:
    program = Program(
        version="1.2.3",
        requirement="cml-runner[aws] @ https://mirror.example/x.whl",
        index="https://mirror.example/simple/",
        uv="https://mirror.example/uv.tar.gz#sha256=abc",
    )
    script = bootstrap.machine(URL, program, None)
    assert "--default-index https://mirror.example/simple/ 'cml-runner[aws] @ https" in script
    assert len(re.findall("url=https://mirror.example/uv.tar.gz sha256=abc", script)) == 2
    assert "github.com" not in script


@pytest.mark.parametrize("name", ["requirement", "index", "uv"])
def test_credentials_are_refused(name: str) -> None:
    program = Program(**{"version": "1", "requirement": "x", name: "https://me:secret@host/x"})
    with pytest.raises(ConfigurationError, match="no credentials") as caught:
        bootstrap.machine(URL, program, None)
    assert "secret" not in str(caught.value)


def test_odd_words_stay_words(tmp_path: Path) -> None:
    program = Program(version="1", requirement="$(touch here); `touch here` 'x", index="a'b $c")
    script = bootstrap.machine('s3://x/%u $HOME "y" \\', program, None)
    unit = re.search("ExecStart=.*", script)
    assert unit
    assert unit[0].endswith(r'cml_runner.supervise "s3://x/%%u $$HOME \"y\" \\"')
    (line,) = [line for line in script.splitlines() if "--default-index" in line]
    words = line.strip()
    done = subprocess.run(
        ["sh", "-c", f'printf "%s\\n" {words}'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["--default-index", program.index, program.requirement]
    assert not list(tmp_path.iterdir())


def test_a_greedy_job_does_not_take_the_supervisor_with_it() -> None:
    unit = bootstrap.machine(URL, PROGRAM, None).splitlines()
    assert {"OOMScoreAdjust=-900", "OOMPolicy=continue", "TasksMax=infinity"} <= set(unit)
    assert not [line for line in unit if line.startswith("UMask=")]  # jobs would inherit it


def test_what_is_too_long_is_refused() -> None:
    assert len(bootstrap.machine(URL, PROGRAM, EXPIRES)) < bootstrap.LIMIT / 3
    with pytest.raises(ConfigurationError, match="16384 are allowed"):
        bootstrap.machine(URL, Program(version="1", index="https://x/" + "y" * 16384), None)


def test_a_failure_is_told_and_ends_the_machine(tmp_path: Path) -> None:
    """Run it for real, where all that it calls is a stub which writes down how it was called."""
    calls = tmp_path / "calls"
    tools = tmp_path / "bin"
    tools.mkdir()
    answers = {"date": "echo 9999999999", "sleep": '[ "$1" != 15m ] || exec /bin/sleep 5'}
    for name in ("systemctl", "sync", "poweroff", "sleep", "date"):
        text = f'#!/bin/sh\necho {name} "$@" >>{calls}\n{answers.get(name, "")}\n'
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    script = bootstrap.machine(URL, PROGRAM, EXPIRES)
    there = {"/var/log": "", "/dev/console": "/console", "/dev/ttyS0": "/no/such/console"}
    for path, place in {**there, "/etc/systemd/system": ""}.items():
        script = script.replace(path, f"{tmp_path}{place}")
    path = f"{tools}:/usr/bin:/bin"
    subprocess.run(["sh"], input=script, text=True, env={"PATH": path}, check=False)
    said = (tmp_path / "console").read_text()
    assert said.startswith(f"{bootstrap.FAILED}: the deadline has passed already\n")
    assert "systemctl --force poweroff" in calls.read_text()
