"""Stage 0, as it stands in start scripts, on every cloud and with the Pythons of its images."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cml_runner import bootstrap
from cml_runner.model import Program, Status
from tests.boot.test_pythons import VERSIONS, interpreter
from tests.clouds.conftest import until
from tests.clouds.test_machine_contract import CLOUDS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cml_runner.clouds import Plan
    from tests.clouds.test_machine_contract import BootRig

SAYS = "import sys; print('booted', *sys.argv[1:])"


@pytest.fixture(params=CLOUDS)
def rig(request: pytest.FixtureRequest) -> BootRig:
    found: BootRig = request.getfixturevalue(f"{request.param}_rig")
    return found


@pytest.fixture
def plan(rig: BootRig) -> Plan:
    wheel = made()
    digest = hashlib.sha256(wheel).hexdigest()
    program = Program(wheel=wheel, sha256=digest, index="https://index.example/simple/")
    return rig.launch(1, replace(rig.task("SECRET"), program=program))


def made() -> bytes:
    """Make a wheel whose boot says that it was started."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("cml_runner/__init__.py", "")
        file.writestr("cml_runner/boot/__init__.py", "")
        file.writestr("cml_runner/boot/__main__.py", SAYS)
    return content.getvalue()


class Script:
    """Stage 0 of one machine, below another root."""

    def __init__(self, rig: BootRig, plan: Plan, root: Path) -> None:
        self.rig, self.plan, self.root = rig, plan, root
        self.cloud = type(rig).__name__.removesuffix("Rig").lower()
        self.program = plan.bucket.task.program  # type: ignore[attr-defined]
        text = bootstrap.first({"google": "gcp"}.get(self.cloud, self.cloud))
        for old, new in (
            ("/opt/cml-runner", str(root)),
            ("60 * [10]", "[0.1]"),
            ("time.sleep(10)", "time.sleep(0.1)"),
        ):
            assert old in text
            text = text.replace(old, new)
        self.text = text
        (root / "programs").mkdir()

    @contextmanager
    def on(self, instance: str) -> Iterator[str]:
        with self.rig.machine(self.plan, instance) as machine:
            yield machine.url

    def run(self, instance: str, python: str = sys.executable) -> tuple[int, str]:
        with self.on(instance) as url:
            done = subprocess.run(
                [python, "-u", "-", url, self.program.sha256, "--count", "1"],
                input=self.text,
                env=dict(os.environ),
                cwd=self.root,
                text=True,
                capture_output=True,
                check=False,
                timeout=60,
            )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def script(rig: BootRig, plan: Plan, tmp_path: Path) -> Script:
    return Script(rig, plan, tmp_path)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_program_is_fetched_checked_and_started(script: Script, version: str) -> None:
    (instance,) = script.rig.running(script.plan)
    code, said = script.run(instance, interpreter(version))
    assert code == 0, said
    with script.on(instance) as url:
        assert said == f"booted machine {url} --count 1\n"
    (stored,) = (script.root / "programs").iterdir()
    assert stored.read_bytes() == script.program.wheel
    assert stored.name == f"{script.program.sha256}.whl"


def failure(script: Script) -> Status:
    status = script.plan.bucket.store.load("status-000.json", Status)
    assert status
    assert status.state == "failed"
    return status


def test_a_changed_byte_is_refused_and_told(script: Script) -> None:
    changed = script.program.wheel[:-1] + b"!"
    name = f"{script.program.sha256}.whl"
    script.plan.bucket.programs.write(name, changed)  # type: ignore[attr-defined]
    for number in range(2):
        until(lambda: len(script.rig.running(script.plan)) == 1)
        (instance,) = script.rig.running(script.plan)
        code, said = script.run(instance)
        assert code == 78, said
        assert "booted" not in said
        assert "SHA-256 is another" in failure(script).reason
        until(lambda gone=instance: gone not in script.rig.running(script.plan))  # type: ignore[misc]
        assert script.plan.bucket.store.log(0).count("SHA-256") == number + 1
    assert not list((script.root / "programs").iterdir())
    until(lambda: not script.plan.group.instances())


def test_a_disk_without_room_is_told(script: Script) -> None:
    (script.root / "programs").rmdir()
    (script.root / "programs").symlink_to("/dev/full/programs")
    (instance,) = script.rig.running(script.plan)
    code, said = script.run(instance)
    assert code == 78, said
    assert "/programs/" in failure(script).reason


def test_a_program_that_is_gone_is_told(script: Script) -> None:
    script.plan.bucket.programs.delete(f"{script.program.sha256}.whl")  # type: ignore[attr-defined]
    (instance,) = script.rig.running(script.plan)
    code, said = script.run(instance)
    assert code == 78, said
    assert "can't be fetched" in failure(script).reason
    assert failure(script).program == script.program.sha256[:12]
