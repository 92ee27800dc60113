"""The package of GitHub's runner program, with a stand-in inside (actions_runner_program).

The real one can't be had from a package registry.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from functools import lru_cache
from pathlib import Path

LAB = Path(__file__).parent
START = """\
#!{2} -ISB
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tests.lab.actions_runner_program import {0}

sys.exit({0}.main({1}))
"""
CONFIG = """\
#!/bin/sh
case "$1" in
    remove) command= ;;
    *) command=configure ;;
esac
exec "$(dirname "$0")/bin/Runner.Listener" $command "$@"
"""
RUN = """\
#!/bin/sh
"$(dirname "$0")/bin/Runner.Listener" run "$@"
code=$?
case $code in
    2|7) exit $code ;;
    *) exit 0 ;;
esac
"""


@lru_cache(maxsize=8)
def build(
    version: str = "2.337.0", arch: str = "x64", python: str = sys.executable
) -> tuple[bytes, str]:
    """Make actions-runner-linux-ARCH-VERSION.tar.gz; return its bytes and their SHA-256."""
    files = {
        "config.sh": CONFIG,
        "run.sh": RUN,
        "bin/Runner.Listener": START.format("listener", "sys.argv[1:]", python),
        "bin/Runner.Worker": START.format("worker", "", python),
        "bin/stand-in": f"{version} {arch}\n",
    }
    for path in sorted((LAB / "actions_runner_program").glob("*.py")):
        files[f"bin/tests/lab/actions_runner_program/{path.name}"] = path.read_text()
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, script in files.items():
            data = script.encode()
            entry = tarfile.TarInfo(f"./{name}")
            entry.size, entry.mode = len(data), 0o644 if name.endswith(".py") else 0o755
            tar.addfile(entry, io.BytesIO(data))
    return content.getvalue(), hashlib.sha256(content.getvalue()).hexdigest()
