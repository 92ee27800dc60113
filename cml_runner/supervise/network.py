"""How this machine reaches others: which authorities it trusts, and through which proxies it goes.

The settings say it. It holds for us, for the agent and its jobs, and for Docker.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from cml_runner.boot import trust
from cml_runner.trust import use_system_store

if TYPE_CHECKING:
    from cml_runner.model import Settings

log = logging.getLogger(__name__)

INIT = Path("/run/systemd/system")  # is there where systemd is init
DROP_IN = Path("/etc/systemd/system/docker.service.d/cml-runner.conf")
DOCKER = "docker.service"
PATIENCE = 120  # seconds for Docker to start again


def set_up(settings: Settings) -> None:
    """Have it hold for this process and all that it starts; make no client before.

    On a machine that isn't ours alone nothing is changed: it has its own authorities and proxies.
    """
    if not settings.user:
        return
    found = {**trust.variables(settings.proxies), **trust.install(settings.authorities)}
    os.environ.update(found)
    use_system_store()
    if found and not os.geteuid() and INIT.is_dir():
        try:
            _tell_docker(found)
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("Docker may not reach what this machine reaches: %s", error)


def secrets(settings: Settings) -> tuple[str, ...]:
    """Name what must not be read in a log: the logins of proxies.

    Unlike other secrets they aren't kept from jobs, which would reach nothing without them.
    """
    found = []
    for value in settings.proxies.values():
        login, at, _ = urlsplit(value).netloc.rpartition("@") if "://" in value else ("", "", "")
        password = login.partition(":")[2]
        found += [login, password, unquote(password)] if at else []
    return tuple(dict.fromkeys(filter(None, found)))


def _tell_docker(variables: dict[str, str]) -> None:
    """Hand the variables to Docker's daemon, which pulls images, before it starts or once more.

    Older versions of Docker have no other way; and others may read a unit, but not this file.
    """
    file = trust.keep(variables)
    DROP_IN.parent.mkdir(parents=True, exist_ok=True)
    trust.write(DROP_IN, f"[Service]\nEnvironmentFile=-{file}\n", 0o644)
    if shutil.which("docker"):
        _systemctl("daemon-reload")
        _systemctl("try-restart", DOCKER)


def _systemctl(*arguments: str) -> None:
    command = ("systemctl", *arguments)
    subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE
    )
