"""What runs before our environment is there, with the Pythons of clouds' images."""

from __future__ import annotations

import os
import pkgutil
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from cml_runner import boot, program

# Amazon Linux 2023; Ubuntu 22.04; Debian 12; Ubuntu 24.04; Debian 13
VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13")


def interpreter(version: str) -> str:
    """Find one; skip the test if it isn't here."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        return sys.executable
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)  # HOME is the test's own
    found = sorted(home.glob(f".pyenv/versions/{version}.*/bin/python"))
    if not found:
        pytest.skip(f"no Python {version} here")
    return str(found[-1])


@pytest.mark.parametrize("version", VERSIONS)
def test_all_of_it_can_be_imported_from_the_wheel(version: str, tmp_path: Path) -> None:
    """Without what is installed for this Python: -S leaves its site-packages out."""
    wheel = tmp_path / f"{program.digest()}.whl"
    wheel.write_bytes(program.wheel())
    modules = [
        f"cml_runner.boot.{one.name}"
        for one in pkgutil.iter_modules(boot.__path__)
        if one.name not in ("__main__",)
    ]
    assert "cml_runner.boot.prepare" in modules
    python = (interpreter(version), "-S", "-W", "error")
    own = {"PYTHONPATH": str(wheel), "PATH": os.environ["PATH"]}
    code = f"import {', '.join(modules)}; print(cml_runner.boot.__file__)"
    done = subprocess.run(
        [*python, "-c", code], env=own, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(wheel))
    usage = [*python, "-m", "cml_runner.boot", "--help"]
    done = subprocess.run(usage, env=own, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "--count" in done.stdout
