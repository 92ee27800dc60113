"""Programs that tests start listen to signals, however the tests were started themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest

STARTER = """
import subprocess, sys
from tests.conftest import pytest_configure
pytest_configure()
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""


@pytest.mark.parametrize("name", ["INT", "HUP", "TERM", "QUIT"])
def test_what_a_script_or_nohup_has_us_ignore(name: str) -> None:
    program = f"import signal; print(signal.getsignal(signal.SIG{name}) is signal.SIG_IGN)"
    inner = (sys.executable, "-c", STARTER, program)
    command = ("sh", "-c", f'trap "" {name}; exec "$@"', "sh", *inner)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
