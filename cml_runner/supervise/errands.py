"""Errands to the forge while a job runs: nobody waits for them, and none of them is vital."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from cml_runner.errors import RunnerError
from cml_runner.model import Identified

if TYPE_CHECKING:
    import queue
    from collections.abc import Callable

    from cml_runner.forges import Forge
    from cml_runner.model import Event, Job

log = logging.getLogger(__name__)


def identify(forge: Forge, job: Job, events: queue.Queue[Event]) -> None:
    """Ask which job this is; an event brings the answer, if there is any news in it."""

    def ask() -> None:
        found = forge.job(job)
        if found != job:
            events.put(Identified(job=found))

    _send(ask, f"{job.name} can't be looked up")


def drain(forge: Forge, name: str) -> None:
    """Ask for no other job."""
    _send(lambda: forge.drain(name), f"{name} may be given another job")


def _send(errand: Callable[[], None], otherwise: str) -> None:
    def run() -> None:
        try:
            errand()
        except RunnerError as error:
            log.warning("%s: %s", otherwise, error)
        except Exception:
            log.exception(otherwise)

    threading.Thread(target=run, name="errand", daemon=True).start()
