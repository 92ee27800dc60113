"""Stand-ins for ssh, which enters no machine but runs the command here, and for gcloud."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

SSH = """#!{python}
import os, stat, subprocess, sys
words = sys.argv[1:]
token = os.environ["CLOUDSDK_AUTH_ACCESS_TOKEN"]
assert token and not any(token in word for word in words)
key = words[words.index("-i") + 1]
assert stat.S_IMODE(os.stat(key).st_mode) == 0o600
assert "OPENSSH PRIVATE KEY" in open(key).read()
assert any("gcloud compute start-iap-tunnel" in word for word in words)
if "BatchMode=yes" in words:
    sys.exit(255 if os.environ.get("SSH_REFUSES") else 0)
command = words[words.index("--") + 1 :] if "--" in words else []
target = words[words.index("--") - 1] if command else words[-1]
print("entered", target, flush=True)
sys.exit(subprocess.run(["/bin/sh", "-c", *command]).returncode if command else 0)
"""


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put them where programs are looked for."""
    directory = Path(tempfile.mkdtemp(prefix="programs-"))
    for name in ("ssh", "gcloud"):
        (directory / name).write_text(SSH.format(python=sys.executable))
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
