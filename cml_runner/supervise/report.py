"""What a machine tells those who watch it from afar: its status and its log, in the bucket."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from cml_runner import program, store
from cml_runner.logs import Formatter
from cml_runner.model import Status

if TYPE_CHECKING:
    from types import TracebackType

HEARTBEAT = 10  # seconds between two signs of life
PAUSE = 1  # second at least between two writes, however much there is to say …
HASTE = 0.2  # … and while somebody waits for the runner to come online


class Report(logging.Handler):
    """Keeps one machine's status and log in the bucket up to date, from a thread of its own.

    A bucket that can't be reached is no reason to stop: everything is written as soon as it can.
    """

    def __init__(
        self, bucket: store.Store, rank: int, runner: str, epoch: int | None = None
    ) -> None:
        super().__init__()
        now = datetime.now(timezone.utc)
        own = program.digest()[:12]
        self.status = Status(state="starting", at=now, since=now, runner=runner, program=own)
        self.setFormatter(Formatter("%(asctime)s %(message)s"))
        self._bucket, self._rank = bucket, rank
        self._log = store.Log(bucket, rank, epoch)
        self._news = threading.Event()
        self._over = threading.Event()
        self.silent = False  # the status is somebody else's business by now
        self._thread = threading.Thread(target=self._run, name="report", daemon=True)

    def __enter__(self) -> Report:
        logging.getLogger("cml_runner").addHandler(self)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        logging.getLogger("cml_runner").removeHandler(self)
        self._over.set()
        self._news.set()
        self._thread.join()
        self._write()

    def tell(self, **changes: Any) -> None:
        """Change the status, and have it written soon."""
        if "state" in changes and changes["state"] != self.status.state:
            changes["since"] = datetime.now(timezone.utc)
        changed = replace(self.status, **changes)
        if changed != self.status:
            self.status = changed
            self._news.set()

    def emit(self, record: logging.LogRecord) -> None:
        """Take one message of ours."""
        self._log.append(self.format(record) + "\n")
        self._news.set()

    def _run(self) -> None:
        while not self._over.is_set():
            self._write()
            self._over.wait(PAUSE if self.status.state in ("ready", "busy") else HASTE)
            self._news.wait(HEARTBEAT)

    def _write(self) -> None:
        self._news.clear()
        self.status = replace(self.status, at=datetime.now(timezone.utc))
        with suppress(Exception):  # whatever the bucket's trouble is, the next round may do better
            if not self.silent:
                self._bucket.save(store.status(self._rank), self.status)
            self._log.flush()
