"""Machines run the program that launched them; one that can't start says so and ends."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from cml_runner import program
from cml_runner.boot import environment
from cml_runner.model import Identifier
from tests.lab.prepare import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lab.stage import Stage

pytestmark = pytest.mark.lab

OLD, NEW = "is ready for jobs", "is eager to have jobs"
IMPATIENT = {
    "etc/systemd/system.conf.d/patience.conf": "[Manager]\n"
    f"DefaultEnvironment={environment.VARIABLE}=8\n"
}
AWAY = {"aws": 5}  # times that the index is away: for half a minute, elsewhere for a moment


def test_machines_run_what_launched_them(stage: Stage, tmp_path: Path) -> None:
    """It was never released, and the index knows nothing of its name, and is away at first."""
    checkout = tmp_path / "checkout"
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "cml_runner", checkout / "cml_runner", ignore=unwanted)
    changed = checkout / "cml_runner" / "supervise" / "__init__.py"
    text = changed.read_text()
    assert OLD in text
    changed.write_text(text.replace(OLD, NEW))
    stage.region.stock = True
    index = stage.region.index
    index.faults = AWAY.get(stage.cloud, 2)
    found = stage.launch("--idle-timeout", "9s", checkout=checkout)
    assert not index.faults
    assert "/simple/uv/" in index.asked
    assert not [path for path in index.asked if "cml" in path]
    said = stage.cli("logs", found["id"], *stage.place).stdout
    assert NEW in said
    assert OLD not in said
    version = stage.cli("--version", checkout=checkout).stdout
    shown = stage.cli("show", found["id"], *stage.place, "--output", "json").stdout
    assert f"({json.loads(shown)['machines'][0]['program']})" in version
    assert stage.cli("--version").stdout != version
    stage.nothing_is_left()


def test_a_changed_program_is_refused(stage: Stage) -> None:
    anything = str(Identifier.new("x"))
    stage.write("programs", anything, f"{program.digest()}.whl", "something else")
    done = stage.try_launch(code=11)
    assert "SHA-256 is another" in done.stderr
    stage.nothing_is_left()


def test_an_index_that_is_gone_ends_the_task(stage: Stage) -> None:
    stage.region.stock, stage.region.more_files = True, IMPATIENT
    stage.region.index.away = True
    found = stage.launch("--no-wait", "--cloud-spot")
    stage.wait(lambda: not stage.there.left(), "the end of all", 120)
    assert len(stage.region.machines) == 2
    assert "simple/uv/: 503" in stage.cli("logs", found["id"], *stage.place).stdout


def test_settings_that_can_not_be_read_end_the_task(stage: Stage) -> None:
    found = stage.launch("--no-wait", "--cloud-spot")
    stage.write("store", found["id"], "settings.json", "{")
    stage.wait(lambda: not stage.there.left(), "the end of all", 120)
    assert len(stage.region.machines) == 2
    said = stage.cli("logs", found["id"], *stage.place).stdout
    assert "the settings can't be read: they were damaged" in said
