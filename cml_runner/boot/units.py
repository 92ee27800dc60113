"""What init does for us: it runs the supervisor, and afterwards what ends this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from cml_runner.boot import trust

if TYPE_CHECKING:
    from collections.abc import Sequence

SYSTEM = Path("/etc/systemd/system")
NAME = "cml-runner.service"

# Whatever ends the supervisor ends the machine. First the cloud is asked to do it, for as long as
# that takes; power comes last. Jobs can't take the supervisor with them when memory runs out.
SUPERVISOR = """\
[Unit]
Description=Supervisor of a CI runner
After=network-online.target
Wants=network-online.target
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
ExecStart={run}
ExecStopPost=-{end}
Environment=HOME=/root LANG=C.UTF-8
Environment={path}
EnvironmentFile=-{file}
WorkingDirectory=/root
OOMScoreAdjust=-900
OOMPolicy=continue
TasksMax=infinity
KillMode=mixed
TimeoutStopSec=1h
StandardOutput=journal+console
StandardError=inherit

[Install]
WantedBy=multi-user.target
"""


def start(run: Sequence[str], end: Sequence[str], program: Path, system: Path = SYSTEM) -> None:
    """Have init run one command, and another one after its end; both import our program.

    Raises CalledProcessError, or OSError.
    """
    text = SUPERVISOR.format(
        run=" ".join(map(quoted, run)),
        end=" ".join(map(quoted, end)),
        path=quoted(f"PYTHONPATH={program}"),
        file=trust.HOME / trust.ENVIRONMENT,
    )
    (system / NAME).write_text(text)
    systemctl("daemon-reload")
    systemctl("enable", "--quiet", NAME)
    systemctl("start", "--no-block", NAME)


def systemctl(*arguments: str) -> None:
    """Ask init for something. Raises CalledProcessError."""
    subprocess.run(("systemctl", *arguments), check=True, stdin=subprocess.DEVNULL)


def quoted(text: str) -> str:
    """Quote a word for a unit file, where % and $ are special."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{plain}"'
