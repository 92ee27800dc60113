"""A script's data: brought here, and kept safe while it runs."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from typing import TYPE_CHECKING

from cml_runner import store
from cml_runner.errors import NotFound, RunnerError
from cml_runner.model import Superseded
from cml_runner.transfer import Fenced, History, Rules, Writer, restore

if TYPE_CHECKING:
    import queue
    from collections.abc import Sequence
    from pathlib import Path

    from cml_runner.model import Event
    from cml_runner.supervise.user import Account

log = logging.getLogger(__name__)

INTERVAL = 10  # seconds between two snapshots …
SHARE = 5  # … and, at least, so many times as long as one takes
PAUSE = 2  # seconds before a failed one is tried again, when it is the last


class Data:
    """The directory in which a script works."""

    def __init__(self, history: History, directory: Path, exclude: Sequence[str]) -> None:
        self.history, self.directory = history, directory
        self._writer = Writer(history, directory, Rules.of(exclude))
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def restore(self, account: Account | None) -> None:
        """Have here what was there last: on a machine before this one, or at the launcher's."""
        if self.directory.exists():
            shutil.rmtree(self.directory)
        source, manifest = self.history, self.history.latest()
        if manifest is None:
            source = History(self.history.store, store.DATA, store.PUSHED)
            manifest = source.latest()
        if manifest is None:
            msg = "the data of this task are gone"
            raise NotFound(msg)
        start = time.monotonic()
        restore(source, manifest, self.directory)
        log.info("restored %d files in %.1f s", len(manifest.entries), time.monotonic() - start)
        if account:
            account.own(self.directory)
        self._writer.adopt(manifest)

    def watch(self, events: queue.Queue[Event]) -> None:
        """Make snapshots from now on, in a thread of its own."""

        def work() -> None:
            pause = float(INTERVAL)
            while not self._over.wait(pause):
                start = time.monotonic()
                try:
                    self._snapshot()
                except Fenced:
                    events.put(Superseded())
                    return
                except Exception as error:  # the next one may do better
                    log.warning("the data can't be saved now: %s", error)
                pause = max(INTERVAL, SHARE * (time.monotonic() - start))

        self._thread = threading.Thread(target=work, name="snapshots", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Make no more snapshots."""
        self._over.set()
        if self._thread:
            self._thread.join()

    def save(self, until: float) -> None:
        """Make the last one, trying again until it's too late. Raises RunnerError, Fenced."""
        self.close()
        while True:
            try:
                self._snapshot()
            except RunnerError as error:
                if time.monotonic() > until:
                    raise
                log.warning("the data can't be saved yet: %s", error)
                time.sleep(PAUSE)
            else:
                return

    def _snapshot(self) -> None:
        outcome = self._writer.snapshot()
        for path, why in outcome.left_out:
            log.warning("not saved: %s: %s", path, why)
