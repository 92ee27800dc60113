"""Importing does nothing: no SDK, no environment and no thread is needed before its use."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.cli.test_startup import SLOW

RUN = """\
import json, os, sys, threading
from importlib import import_module
from pkgutil import walk_packages

import cml_runner

def fail(name):
    raise ImportError(name)

before = dict(os.environ)
names = [one.name for one in walk_packages(cml_runner.__path__, "cml_runner.", onerror=fail)]
for name in names:
    import_module(name)
print(json.dumps({
    "ours": names,
    "all": sorted(sys.modules),
    "threads": threading.active_count(),
    "changed": before != dict(os.environ),
}))
"""
DATA_ONLY = {"msgspec", "psutil"}  # small, and their own modules do nothing either


def test_no_module_does_anything_when_it_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    found = json.loads(done.stdout)
    assert "cml_runner.clouds.local.keeper" in found["ours"]
    assert {name.partition(".")[0] for name in found["all"]} & (SLOW - DATA_ONLY) == set()
    assert (found["threads"], found["changed"], done.stderr) == (1, False, "")
