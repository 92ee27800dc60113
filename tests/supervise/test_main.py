from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cml_runner.boot.prepare import IMAGES_PATH

OWN = str(Path(__file__).parents[2])
TELL = """
import os, sys
from cml_runner.supervise import __main__ as program
program.run = lambda url: print(*map(os.environ.get, sys.argv[2:])) or 0
sys.exit(program.main())
"""


@pytest.mark.parametrize(
    ("given", "image", "left"),
    [(OWN, "", "None"), (f"{OWN}:/theirs", "", "/theirs"), (OWN, "/a:/b", "/a:/b")],
)
def test_jobs_do_not_look_for_modules_where_we_do(given: str, image: str, left: str) -> None:
    """They have what the image of a container says, or nothing."""
    names = ("PYTHONPATH", IMAGES_PATH)
    environment = {**os.environ, "PYTHONPATH": given, **({IMAGES_PATH: image} if image else {})}
    done = subprocess.run(
        [sys.executable, "-c", TELL, "said:///x", *names],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [left, "None"]
