"""The first script of a new machine: it fetches our program and starts it, which does the rest.

Nothing in it is secret. Someone who reads a machine's metadata, its user data or its disk learns
where the settings are, but not what they say.
"""

from __future__ import annotations

import ast
import re
from datetime import timezone
from pkgutil import get_data
from shlex import quote
from typing import TYPE_CHECKING

from cml_runner import boot
from cml_runner.boot.failing import FAILED
from cml_runner.boot.prepare import IMAGES_PATH, INTERRUPTED, TOLD
from cml_runner.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from cml_runner.model import Program

LIMIT = 16 * 1024  # bytes of user data: the least that a cloud takes, which is EC2

READY = """\
#!/bin/sh
exec {command} {url}
"""

# The timer comes first, so that nothing outlives the deadline, whatever fails.
DEADLINE = """\
step='the deadline'
[ "$(date +%s)" -lt {epoch} ]
unit=cml-runner-deadline
cat >/etc/systemd/system/$unit.service <<END
[Service]
ExecStart=systemctl --force poweroff
END
cat >/etc/systemd/system/$unit.timer <<END
[Timer]
OnCalendar={calendar} UTC
AccuracySec=1s
Persistent=true
[Install]
WantedBy=timers.target
END
systemctl enable -q --now $unit.timer
"""

# Debian's place for them, or else Red Hat's.
AUTHORITIES = """\
step='trusting more authorities'
cat >/run/cml-runner.crt <<'END'
{authorities}
END
if command -v update-ca-certificates; then
  cp /run/cml-runner.crt /usr/local/share/ca-certificates
  update-ca-certificates
else
  cp /run/cml-runner.crt /etc/pki/ca-trust/source/anchors
  update-ca-trust
fi
"""

# With Python, since it is wherever cloud-init is; curl and wget aren't.
MACHINE = """\
#!/bin/sh
set -eu
export HOME=/root LANG=C.UTF-8{proxies}
log=/var/log/cml-runner-bootstrap.log
exec >$log 2>&1
failed() {{
  [ $? = {told} ] || for console in /dev/console /dev/ttyS0; do
    {{ echo "{failed}: $step"; tail -n 20 $log; }} >$console || :
  done
  trap - EXIT
  sync
  sleep 2
  systemctl --force poweroff || poweroff -f
}}
trap failed EXIT
{deadline}{authorities}step='fetching the program'
mkdir -p /opt/cml-runner/programs
python3 -u - {arguments} <<'END'
{first}
END
trap - EXIT
"""

# Nobody can look into a container that ended: all that is said here goes into its log.
CONTAINER = """\
#!/bin/sh
# Starts the program of cml-runner, which prepares this container.
set -eu
umask 022
export LANG=C.UTF-8{proxies}
step=beginning
failed() {{
  trap - EXIT
  echo "{failed}: $step" >&2
  exit 1
}}
trap failed EXIT
trap 'trap - EXIT; exit {interrupted}' TERM
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
step='looking for Python 3.9 or newer, which the image must have unless its user is root'
python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))'
export {images_path}="${{PYTHONPATH-}}" PYTHONPATH={wheel}
cd /
trap - EXIT TERM
exec python3 -m cml_runner.boot container {arguments}
"""


def ready(url: str, command: Sequence[str]) -> str:
    """Write the script for machines which have our program already; the URL names the settings."""
    return READY.format(command=" ".join(map(quote, command)), url=quote(url))


def machine(url: str, program: Program, expires: datetime | None, count: int = 1) -> str:
    """Write the script for one of so many machines of a cloud; cloud-init runs it once, as root.

    It arms a timer for the deadline, fetches the program from the bucket in which the settings
    are, checks it, and has it prepare the machine (`cml_runner.boot`). If that can't even begin,
    the machine powers itself off; the console says why.

    Raises ConfigurationError if the script is longer than LIMIT or would tell a secret.
    """
    more = ("--index", _public(program.index), "--count", str(count))
    text = MACHINE.format(
        failed=FAILED,
        told=TOLD,
        proxies=_exported(program),
        deadline=_deadline(expires),
        authorities=_authorities(program.authorities),
        arguments=" ".join(map(quote, (url, program.sha256, *more))),
        first=first(boot.cloud(url)),
    )
    if len(text.encode()) > LIMIT:
        msg = f"the machine's start script has {len(text.encode())} bytes; {LIMIT} are allowed"
        raise ConfigurationError(msg)
    return text


def container(settings: str, url: str, program: Program, wheel: str) -> str:
    """Write the script that a container runs, under whatever user its image has.

    The settings and the wheel are files in it. Both the directory above that of the URL and
    boot.prepare.WORK must be there, and writable for the user. An image without Python must be
    one of Debian's or Ubuntu's, whose user is root. Whatever fails, the reason is the last line.

    Raises ConfigurationError if it would tell a secret.
    """
    more = ("--index", _public(program.index), "--settings", settings)
    return CONTAINER.format(
        failed=FAILED,
        interrupted=INTERRUPTED,
        proxies=_exported(program),
        images_path=IMAGES_PATH,
        wheel=quote(wheel),
        arguments=" ".join(map(quote, (url, *more))),
    )


def first(cloud: str) -> str:
    """Write stage 0 for a cloud's machines: its modules, without what only readers need."""
    body: list[ast.stmt] = []
    for name in (f"first_{cloud}.py", "first.py"):
        content = get_data(boot.__name__, name)
        assert content is not None
        body += _Bare().visit(ast.parse(content)).body
    text = ast.unparse(ast.Module([*_imports(body), *_others(body)], []))
    lines = (re.sub("^ +", lambda indent: indent[0][::4], one) for one in text.splitlines() if one)
    return "\n".join((*lines, "main(*sys.argv[1:])"))


class _Bare(ast.NodeTransformer):
    """Leaves out docstrings, types, and what is imported for them."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Keep what a function does."""
        node.returns = None
        for one in (*node.args.args, *([node.args.vararg] if node.args.vararg else ())):
            one.annotation = None
        node.body = [one for one in node.body if not _is_text(one)]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """Keep none of a module's own words."""
        return None if _is_text(node) else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        """Keep what is needed when it runs."""
        return None if node.module in ("__future__", "typing") else node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        """Likewise."""
        return None if getattr(node.test, "id", "") == "TYPE_CHECKING" else node


def _imports(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Import in one line what comes from one place."""
    found: dict[str, dict[str, None]] = {}
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = found.setdefault(getattr(node, "module", ""), {})
            names.update({one.name: None for one in node.names})
    return [
        ast.ImportFrom(module, [ast.alias(name) for name in names], 0)
        if module
        else ast.Import([ast.alias(name) for name in names])
        for module, names in found.items()
    ]


def _others(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    return [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _exported(program: Program) -> str:
    """Export the proxies, which may be needed before the settings can be read."""
    pairs = sorted(program.proxies.items())
    return "".join(f" {name}={quote(_public(value))}" for name, value in pairs)


def _authorities(text: str) -> str:
    return AUTHORITIES.format(authorities=text.strip()) if text else ""


def _deadline(expires: datetime | None) -> str:
    if expires is None:
        return ""
    calendar = f"{expires.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S}"
    return DEADLINE.format(epoch=int(expires.timestamp()), calendar=calendar)


def _public(text: str) -> str:
    if re.search(r"://[^/\s]*@", text):
        msg = "a machine's start script holds no credentials: take them out of the address"
        raise ConfigurationError(msg)
    return text
