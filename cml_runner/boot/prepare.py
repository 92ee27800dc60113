"""Prepare a machine or a container for our supervisor, and end the machine after it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import cml_runner
from cml_runner import boot, wait
from cml_runner.boot import environment, objects, places, trust, units
from cml_runner.boot.failing import Failure, fail
from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LIMIT = 900  # seconds for all of it
RIGHTS = 600  # seconds until rights that were just given are known everywhere
PAUSE = 2  # seconds between two attempts to read the settings
INTERRUPTED = 75  # exit code of a supervisor that expects to be replaced: EX_TEMPFAIL
TOLD = 78  # our own, when this machine is ended and the reason is in the bucket: EX_CONFIG
TAIL = 20  # lines of the log to show
LOG = Path("/var/log/cml-runner-bootstrap.log")  # written by the start script
IMAGES_PATH = "CML_RUNNER_PYTHONPATH"  # a container's own PYTHONPATH: for its jobs, not for us
WORK = Path("/opt/cml-runner-work")  # where agents live, under an account which can't exchange it
MACHINE_ID = Path("/etc/machine-id")
UPTIME = Path("/proc/uptime")
UPGRADES = ("apt-daily.timer", "apt-daily-upgrade.timer", "unattended-upgrades.service")

log = logging.getLogger(__name__)


class TooLate(Exception):
    """It takes too long; it isn't one of the errors after which something is tried again."""


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(prog="cml_runner.boot")
    parser.add_argument("what", choices=("machine", "container", "end"))
    parser.add_argument("url", help="the task's part of the bucket")
    parser.add_argument("--index", default="", help="the package index to install from")
    parser.add_argument("--count", type=int, default=1, help="how many machines the task has")
    parser.add_argument("--settings", default="", help="the file with a container's settings")
    asked = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr, level=logging.INFO)
    return {"machine": _machine, "container": _container, "end": _end}[asked.what](asked)


def _machine(asked: argparse.Namespace) -> int:
    """Start the supervisor as a service; a failure is reported, and ends this machine."""
    machine = boot.machine(asked.url)
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(LIMIT)
    try:
        needed = _prepare(machine, asked)
    except Exception as error:
        signal.alarm(0)
        log.debug("giving up", exc_info=True)
        fail(machine, asked.count, Failure(_reason(error), program(), _tail()))
        return TOLD
    signal.alarm(0)
    if needed:
        return 0
    log.warning("there are no settings: this task is over")
    wait.insist(machine.finish)
    return TOLD


def _prepare(machine: boot.Machine, asked: argparse.Namespace) -> bool:
    """Start the supervisor; False if the task is over."""
    place = environment.unpack()
    new_identity()
    with suppress(OSError, subprocess.CalledProcessError):
        units.systemctl("mask", "--quiet", "--now", *UPGRADES)
    settings = read_settings(machine.objects)
    if settings is None:
        return False
    _trust(settings)
    python = environment.install(asked.index)
    run = (str(python), "-m", "cml_runner.supervise", asked.url)
    end = (sys.executable, "-m", "cml_runner.boot", "end", asked.url, "--count", str(asked.count))
    units.start(run, end, place)
    return True


def read_settings(
    bucket: boot.Objects, sleep: Callable[[float], None] = time.sleep
) -> dict[str, Any] | None:
    """Read them as soon as this machine has a network and its rights; None if they are gone.

    Raises RunnerError.
    """
    end = time.monotonic() + RIGHTS
    while True:
        try:
            content = bucket.read(objects.SETTINGS)
        except (RunnerError, OSError) as error:
            if time.monotonic() > end:
                msg = f"the settings can't be read: {error}"
                raise RunnerError(msg) from error
            log.warning("can't read the settings yet: %s", error)
            sleep(PAUSE)
            continue
        return None if content is None else _understood(content)


def _understood(content: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(content)
        if isinstance(found, dict):
            return found
    msg = "the settings can't be read: they were damaged"
    raise RunnerError(msg)


def _trust(settings: dict[str, Any]) -> None:
    """Use the proxies and trust the authorities that the launcher uses and trusts."""
    found = trust.variables(settings.get("proxies") or {})
    found.update(trust.install(settings.get("authorities") or ""))
    os.environ.update(found)
    if found and not os.geteuid():
        trust.keep(found)


def new_identity() -> None:
    """Give a clone of an image that wasn't cleaned a number of its own.

    GitLab tells runners apart by it.
    """
    with suppress(OSError, subprocess.CalledProcessError):
        if MACHINE_ID.stat().st_mtime < _booted() - 60:
            MACHINE_ID.unlink()
            subprocess.run(("systemd-machine-id-setup",), check=True)
            units.systemctl("try-restart", "systemd-journald.service")


def program() -> str:
    """Return the SHA-256 of the wheel from which we run: its name says it."""
    return Path(cml_runner.__file__).parents[1].name.partition(".")[0]


def _end(asked: argparse.Namespace) -> int:
    """End this machine once the supervisor has ended, as init says it did.

    https://www.freedesktop.org/software/systemd/man/systemd.exec.html#%24EXIT_CODE
    """
    machine = boot.machine(asked.url)
    result, code = os.environ.get("SERVICE_RESULT", ""), os.environ.get("EXIT_STATUS", "")
    if code == str(INTERRUPTED):
        wait.insist(machine.replace)
    elif result == "success" or (result == "exit-code" and _has_left(machine, asked.count)):
        if not machine.ends_with_power:
            wait.insist(machine.replace)
    else:
        fail(machine, asked.count, Failure(_last_word(result, code), program()))
    return 0


def _last_word(result: str, code: str) -> str:
    """Say why the supervisor ended, in its own words if it has left any."""
    with suppress(OSError):
        return boot.WORD.read_text()
    return f"the supervisor died: {result or 'no reason is known'} ({code or 'no exit code'})"


def _has_left(machine: boot.Machine, count: int) -> bool:
    """Say if the supervisor of this very machine has told why it ended: it has left then."""
    with suppress(RunnerError, OSError, ValueError):
        rank = places.try_take(machine.objects, count, machine.name()) if count > 1 else 0
        content = machine.objects.read(objects.status(rank)) if rank is not None else None
        status = json.loads(content or b"{}")
        recent = places.moment(status).timestamp() > _booted()
        return recent and status.get("state") in ("ended", "failed")
    return False


def _container(asked: argparse.Namespace) -> int:
    """Become the supervisor, or say why not: last of all, as that is what a cluster remembers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED))
    try:
        command, place = _prepare_container(asked)
        os.environ["PYTHONPATH"] = str(place)
        os.chdir(WORK)
        os.execv(command[0], command)
    except Exception as error:
        log.debug("giving up", exc_info=True)
        print(Failure(_reason(error), program()).text, file=sys.stderr, end="", flush=True)
    return 1


def _prepare_container(asked: argparse.Namespace) -> tuple[list[str], Path]:
    """Return the supervisor's command, and where its program is.

    What the image lacks goes into this container's own directory, beside the bucket: that of the
    image may be somebody else's. Raises RunnerError, OSError.
    """
    bucket = Path(urlsplit(asked.url).path)
    if not os.geteuid():  # volumes are everybody's; jobs get an account of their own
        for place in (bucket.parent, WORK):
            place.chmod(0o755)
    content = Path(asked.settings).read_bytes()
    bucket.mkdir(0o700, exist_ok=True)
    _keep(bucket / objects.SETTINGS, content)
    _trust(_understood(content))
    own = bucket.parent / "program"
    root = environment.ROOT if environment.is_complete() else own
    python = environment.install(asked.index, root)
    return [str(python), "-m", "cml_runner.supervise", asked.url], environment.unpack(own)


def _keep(path: Path, content: bytes) -> None:
    """Write a file that nobody else can read, not even while it is written."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _booted() -> float:
    """Say when this machine booted, in seconds since 1970."""
    return time.time() - float(UPTIME.read_text().split()[0])


def _reason(error: Exception) -> str:
    if isinstance(error, (RunnerError, TooLate)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _tail() -> str:
    with suppress(OSError):
        return "\n".join(LOG.read_text(errors="replace").splitlines()[-TAIL:])
    return ""


def _too_late(*_: object) -> None:
    msg = f"not done within {LIMIT // 60} minutes"
    raise TooLate(msg)
