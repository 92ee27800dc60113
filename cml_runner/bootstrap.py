"""The first script that a new machine runs: it starts our supervisor, which does the rest.

Nothing secret is in it: whoever may read a machine's metadata, its user data or its disk learns
where the settings are, not what is in them.
"""

from __future__ import annotations

import re
from datetime import timezone
from pathlib import PurePosixPath
from shlex import quote
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cml_runner.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from cml_runner.model import Program

LIMIT = 16 * 1024  # bytes of user data: the least that a cloud takes, which is EC2
INTERRUPTED = 75  # exit code of who was told to end, and expects to be replaced: EX_TEMPFAIL
WORK = "/opt/cml-runner-work"  # where agents live, under an account which can't exchange it
FAILED = "cml-runner: bootstrap failed"  # what the console says then, and the reason
UV = "https://github.com/astral-sh/uv/releases/download/0.11.12/uv-{}-unknown-linux-gnu.tar.gz"
UV_SHA256 = {
    "x86_64": "9acdecddacba550ee616c02bb4616d894352022550c5977524556fd5077ce1d4",
    "aarch64": "d6e3e5183e71bbd40400da3d2913743cefb98835d8312a5e7908c33865597515",
}
PATIENCE = 15  # minutes for the whole script

READY = """\
#!/bin/sh
exec {command} {url}
"""

# Whatever ends the supervisor ends the machine, and nothing outlives the deadline: init sees to it.
UNITS = """\
cat >/etc/systemd/system/cml-runner.service <<'END'
[Unit]
Description=Supervisor of a CI runner
After=network-online.target
Wants=network-online.target
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
ExecStart=/opt/cml-runner/bin/python -m cml_runner.supervise {unit_url}
{stopped}Environment=HOME=/root LANG=C.UTF-8
WorkingDirectory=/root
OOMScoreAdjust=-900
OOMPolicy=continue
TasksMax=infinity
KillMode=mixed
TimeoutStopSec=100
StandardOutput=journal+console
StandardError=inherit

[Install]
WantedBy=multi-user.target
END
"""

DEADLINE = """\
step='the deadline has passed already'
[ "$(date +%s)" -lt {epoch} ]
step='setting the deadline'
cat >/etc/systemd/system/cml-runner-deadline.service <<'END'
[Service]
Type=oneshot
ExecStart=/bin/systemctl --force poweroff
END
cat >/etc/systemd/system/cml-runner-deadline.timer <<'END'
[Timer]
OnCalendar={calendar} UTC
AccuracySec=1s
Persistent=true

[Install]
WantedBy=timers.target
END
systemctl daemon-reload
systemctl enable --quiet --now cml-runner-deadline.timer
"""

INSTALLED = """\
installed() {{
  [ -x "$place/bin/python" ] && "$place/bin/python" - {version} <<'END'
import sys, cml_runner
sys.exit(cml_runner.__version__ != sys.argv[1])
END
}}
"""

# With Python, since it is wherever cloud-init is; curl and wget aren't.
INSTALL = """\
if ! installed; then
  step='downloading uv'
  rm -rf "$place"
  mkdir -p "$place-uv"
  case "$(uname -m)" in
    x86_64) url={uv_x64} sha256={sha256_x64} ;;
    aarch64) url={uv_arm64} sha256={sha256_arm64} ;;
  esac
  python3 - "$url" "$sha256" "$place-uv/uv" <<'END'
import hashlib, io, sys, tarfile, time, urllib.request
url, sha256, place = sys.argv[1:]
for pause in (1, 2, 5, 10, 20, 30, 0):
    try:
        content = urllib.request.urlopen(url, timeout=60).read()
        break
    except OSError as error:
        print(url, error, flush=True)
        if not pause:
            raise
        time.sleep(pause)
if hashlib.sha256(content).hexdigest() != sha256:
    sys.exit(f"{{url}} isn't what it should be: its SHA-256 is another")
archive = tarfile.open(fileobj=io.BytesIO(content))
(member,) = (one for one in archive if one.name.endswith("/uv"))
with open(place, "wb") as file:
    file.write(archive.extractfile(member).read())
END
  chmod 755 "$place-uv/uv"
  step='installing cml-runner'
  "$place-uv/uv" venv --quiet --python '>=3.10' "$place"
  "$place-uv/uv" pip install --quiet --python "$place/bin/python" \\
    {index}{requirement}
  rm -rf "$place-uv"
fi
"""

MACHINE = """\
#!/bin/sh
# Prepares this machine for cml-runner {version}, and starts its supervisor.
set -eu
umask 022
export HOME=/root LANG=C.UTF-8 UV_SYSTEM_CERTS=1 UV_NO_CACHE=1 UV_NO_CONFIG=1 UV_HTTP_RETRIES=8
log=/var/log/cml-runner-bootstrap.log
step=beginning
exec >"$log" 2>&1

failed() {{
  trap - EXIT
  for console in /dev/console /dev/ttyS0; do
    {{ echo "{failed}: $step"; tail -n 20 "$log"; }} 2>/dev/null >"$console" || true
  done
  sync
  sleep 2
{end}  systemctl --force poweroff || poweroff -f
}}
trap failed EXIT
(sleep {patience}m; step='not done within {patience} minutes'; failed) &
watch=$!

{prelude}{deadline}
# Clones of an image that was not cleaned share an identity, by which GitLab tells runners apart.
step='giving this machine an identity of its own'
booted="$(($(date +%s) - $(cut -d . -f 1 /proc/uptime)))"
if [ "$(stat -c %Y /etc/machine-id)" -lt "$((booted - 60))" ]; then
  {{ rm -f /etc/machine-id && systemd-machine-id-setup &&
    systemctl try-restart systemd-journald.service; }} || true
fi

step='stopping automatic upgrades'
systemctl mask --quiet --now apt-daily.timer apt-daily-upgrade.timer \\
  unattended-upgrades.service || true

place=/opt/cml-runner
{installed}{install}
step='starting the supervisor'
{units}
systemctl daemon-reload
systemctl enable --quiet cml-runner.service
systemctl start --no-block cml-runner.service
trap - EXIT
kill "$watch" || true
"""

# Nobody can look into a container that ended: all that is said here goes into its log.
CONTAINER = """\
#!/bin/sh
# Prepares this container for cml-runner {version}, and becomes its supervisor.
set -eu
umask 022
export LANG=C.UTF-8 UV_SYSTEM_CERTS=1 UV_NO_CACHE=1 UV_NO_CONFIG=1 UV_HTTP_RETRIES=8
step=beginning
failed() {{
  trap - EXIT
  echo "{failed}: $step" >&2
  exit 1
}}
trap failed EXIT
trap 'trap - EXIT; exit {interrupted}' TERM

step='reading the settings'
[ "$(id -u)" != 0 ] || chmod 755 {base} {work}
(umask 077 && mkdir -p {directory} && cat {settings} >{directory}/settings.json)

if ! command -v python3 >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  step='installing what the image lacks'
  missing=
  for program in curl git sudo; do
    command -v "$program" >/dev/null || missing="$missing $program"
  done
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update
  apt-get -qq install --no-install-recommends ca-certificates python3 $missing
fi >&2

step='looking for python3, which the image must have unless its user is root'
command -v python3 >/dev/null
place=/opt/cml-runner
{installed}installed || place={base}/program
{install}
step='starting the supervisor'
cd {work}
trap - EXIT TERM
exec "$place/bin/python" -m cml_runner.supervise {url}
"""


def ready(url: str, command: Sequence[str]) -> str:
    """Write the script for machines which have our program already; the URL names the settings."""
    return READY.format(command=" ".join(map(quote, command)), url=quote(url))


def machine(
    url: str, program: Program, expires: datetime | None, *, prelude: str = "", end: str = ""
) -> str:
    """Write the script for a machine of a cloud, which cloud-init runs once, as root.

    It installs exactly this version unless the image has it, in /opt/cml-runner, starts the
    supervisor as a service and arms a timer for the deadline. Whatever fails, the reason is
    written to the console and the machine powers itself off.

    Where this alone doesn't end a machine, `end` names a program that does, called with "failed"
    if the machine couldn't be prepared, and with "over" after the supervisor's end. The prelude
    makes it, and whatever else must be there first.

    Raises ConfigurationError if the script is longer than LIMIT or would tell a secret.
    """
    text = MACHINE.format(
        version=quote(program.version),
        failed=FAILED,
        patience=PATIENCE,
        deadline=_deadline(expires),
        units=UNITS.format(
            unit_url=_escaped(url), stopped=f"ExecStopPost=-{end} over\n" if end else ""
        ),
        prelude=f"step='looking around'\n{prelude}\n" if prelude else "",
        end=f"  {end} failed || true\n" if end else "",
        **_program(program),
    )
    if len(text.encode()) > LIMIT:
        msg = f"the machine's start script has {len(text.encode())} bytes; {LIMIT} are allowed"
        raise ConfigurationError(msg)
    return text


def container(settings: str, url: str, program: Program) -> str:
    """Write the script that a container runs, under whatever user its image has.

    Both the directory above that of the URL and WORK must be there, and writable for the user. It
    puts the settings, a file, into the directory at the URL, installs exactly this version
    unless the image has it, in /opt/cml-runner, and becomes the supervisor. An image without
    Python must be one of Debian's or Ubuntu's, whose user is root. Whatever fails, the reason is
    the last line.

    Raises ConfigurationError if it would tell a secret.
    """
    directory = PurePosixPath(urlsplit(url).path)
    return CONTAINER.format(
        version=quote(program.version),
        failed=FAILED,
        interrupted=INTERRUPTED,
        settings=quote(settings),
        work=WORK,
        base=quote(str(directory.parent)),
        directory=quote(str(directory)),
        url=quote(url),
        **_program(program),
    )


def _program(program: Program) -> dict[str, str]:
    """Write what installs the program. Raises ConfigurationError."""
    for what in (program.requirement, program.index, program.uv):
        _must_be_public(what)
    given, _, sha256 = program.uv.partition("#sha256=")
    archives = {
        arch: (given or UV.format(arch), sha256 if given else UV_SHA256[arch]) for arch in UV_SHA256
    }
    version = quote(program.version)
    return {
        "installed": INSTALLED.format(version=version),
        "install": INSTALL.format(
            uv_x64=quote(archives["x86_64"][0]),
            sha256_x64=quote(archives["x86_64"][1]),
            uv_arm64=quote(archives["aarch64"][0]),
            sha256_arm64=quote(archives["aarch64"][1]),
            index=f"--default-index {quote(program.index)} " if program.index else "",
            requirement=quote(program.requirement),
        ),
    }


def _deadline(expires: datetime | None) -> str:
    if expires is None:
        return ""
    calendar = f"{expires.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S}"
    return DEADLINE.format(epoch=int(expires.timestamp()), calendar=calendar)


def _escaped(text: str) -> str:
    """Quote a word for a unit file, where % and $ are special."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{plain}"'


def _must_be_public(text: str) -> None:
    if re.search(r"://[^/\s]*@", text):
        msg = "a machine's start script holds no credentials: take them out of the address"
        raise ConfigurationError(msg)
