"""A shell on an instance through Google's own proxy (IAP), with a key made for the occasion.

Firewall rules hold for tags: one that `setup` has made lets Google's proxy, and nobody else, in to
machines with a tag which none has. We give it to one machine, and a key that expires by itself,
and take both away again; what a process that dies leaves is a way in for whoever has the right to
use the proxy and a key which nobody has any more.
https://cloud.google.com/iap/docs/using-tcp-forwarding
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cml_runner import keys, signals, wait
from cml_runner.clouds.gcp.account import IAP, Shared
from cml_runner.clouds.gcp.session import last
from cml_runner.errors import MissingDependency, NotFound, RunnerError
from cml_runner.terminal import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cml_runner.clouds.gcp.session import Session

log = logging.getLogger(__name__)

USER = "cml-shell"  # whom Google's agent on the machine makes, and makes root if wanted
VALID = timedelta(minutes=10)  # of the key, for logging in
PATIENCE, EVERY = 90.0, 2.0  # seconds for the machine to learn of it, and between two attempts
TOKEN = "CLOUDSDK_AUTH_ACCESS_TOKEN"  # noqa: S105 - a variable of gcloud's, which needs no login then
KEYS, LOGIN = "ssh-keys", "enable-oslogin"  # metadata of a machine
NEEDED = {
    "gcloud": "https://cloud.google.com/sdk/docs/install",
    "ssh": "your system's package openssh-client",
}


@contextmanager
def opened(session: Session, look: Callable[[], Any], command: Sequence[str]) -> Iterator[Program]:
    """Open a way to the machine that is looked up, and close it."""
    _check(session)
    machine = look()
    with TemporaryDirectory(prefix="cml-runner-") as directory:
        private, public = keys.new_pair()
        _write(Path(directory, "key"), private)
        line = _line(public.decode())
        try:
            _change(session, machine, line, let_in=True)
            found = _program(session, machine, directory)
            wait.until(lambda: _answers(found), f"{machine.name} to take a key", PATIENCE, EVERY)
            more = ("--", shlex.join(command)) if command else ()
            yield Program((*found.arguments, *more), found.environment)
        finally:
            _close(session, look, line)


def _check(session: Session) -> None:
    for name, where in NEEDED.items():
        if not shutil.which(name):
            msg = f"a shell on Google Cloud needs {name}; to install it, see {where}"
            raise MissingDependency(msg)
    if not Shared(session).has_firewall(IAP):
        msg = f"the project has no firewall rule {IAP}: cml-runner setup gcp makes it"
        raise NotFound(msg)


def _close(session: Session, look: Callable[[], Any], line: str) -> None:
    try:
        with signals.undisturbed():
            _change(session, look(), line, let_in=False)
    except NotFound:
        log.debug("the machine is gone, and the way to it")
    except RunnerError as error:
        log.warning(
            "Google's proxy may still reach the machine, with a key that is gone: %s", error
        )


def _change(session: Session, machine: Any, line: str, *, let_in: bool) -> None:
    """Add the key and the tag, or remove them."""
    where = {"instance": machine.name, "zone": last(machine.zone)}
    items = {one.key: one.value for one in machine.metadata.items}
    lines = [one for one in items.get(KEYS, "").splitlines() if one != line]
    own = {KEYS: "\n".join([*lines, *([line] if let_in else [])])}
    if let_in or lines:
        own[LOGIN] = "FALSE"
    items = {key: value for key, value in items.items() if key not in (KEYS, LOGIN)}
    session.change(
        "Instances",
        "set_metadata",
        **where,
        metadata_resource={
            "fingerprint": machine.metadata.fingerprint,
            "items": [{"key": key, "value": one} for key, one in {**items, **own}.items() if one],
        },
    )
    tags = [one for one in machine.tags.items if one != IAP]
    session.change(
        "Instances",
        "set_tags",
        **where,
        tags_resource={
            "fingerprint": machine.tags.fingerprint,
            "items": [*tags, *([IAP] if let_in else [])],
        },
    )


def _line(public: str) -> str:
    """Write a key as Google's agent reads it, which forgets it when its time is over."""
    expires = f"{datetime.now(timezone.utc) + VALID:%Y-%m-%dT%H:%M:%S+0000}"
    note = json.dumps({"userName": USER, "expireOn": expires})
    return f"{USER}:{public.strip()} google-ssh {note}"


def _program(session: Session, machine: Any, directory: str) -> Program:
    zone = last(machine.zone)
    proxy = (
        f"gcloud compute start-iap-tunnel {machine.name} 22 --listen-on-stdin --quiet"
        f" --project {session.project} --zone {zone}"
    )
    options = {
        "IdentitiesOnly": "yes",
        "StrictHostKeyChecking": "accept-new",
        "UserKnownHostsFile": f"{directory}/known",
        "LogLevel": "ERROR",
        "ProxyCommand": proxy,
    }
    given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    arguments = ("ssh", "-F", "none", "-i", f"{directory}/key", *given, f"{USER}@{machine.name}")
    return Program(arguments, {TOKEN: str(session.credentials()["token"])})


def _answers(program: Program) -> bool:
    arguments = (*program.arguments[:-1], "-o", "BatchMode=yes", program.arguments[-1], "true")
    variables = {**os.environ, **program.environment}
    done = subprocess.run(arguments, env=variables, capture_output=True, text=True, check=False)
    log.debug("%s", done.stderr.strip())
    return done.returncode == 0


def _write(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
