"""Run the script of a task on one of its machines; its data survive whatever happens."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from cml_runner import logs, signals, steps, store
from cml_runner.boot import places
from cml_runner.errors import RunnerError
from cml_runner.model import Recalled, Result, Signalled, Status, Tick
from cml_runner.supervise import machine, network, user
from cml_runner.supervise.process import SECRET, Process
from cml_runner.supervise.report import Report
from cml_runner.supervise.script import shell
from cml_runner.supervise.script.data import Data
from cml_runner.supervise.script.rules import HASTE, Stop, step
from cml_runner.supervise.workdir import Workdir
from cml_runner.transfer import Fenced, History

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cml_runner.clouds import Cloud
    from cml_runner.model import Event, Settings
    from cml_runner.supervise.user import Account

log = logging.getLogger(__name__)

TICK = 1  # second between two looks at the clock
ASK = 3  # seconds between two looks at whether it is to stop
PATIENCE = 600  # seconds to save the data when nobody takes the machine away …
HURRY = 2  # … and what is left for a last word when somebody does
WAIT = 600  # seconds in which a stopped machine is ended by who stopped it


class Supervisor:
    """One rank of a task, from its data's arrival to their safety."""

    def __init__(self, settings: Settings, bucket: store.Store, cloud: Cloud, rank: int) -> None:
        assert settings.script
        self.settings, self.bucket, self.cloud, self.rank = settings, bucket, cloud, rank
        self.script = settings.script
        self.name = settings.names[rank]
        data = store.Store(self.script.data) if self.script.data else bucket
        self.history = History(data, store.DATA, f"{rank:03}", cloud.machine())
        self.events: queue.Queue[Event] = queue.Queue()
        self.process: Process | None = None
        self.account: Account | None = None
        self.workdir = Workdir(settings, self.name)
        self.data: Data | None = None
        self.failure: RunnerError | None = None

    def run(self) -> Stop:
        """Live, and say why no more; what fails here is told to whoever asks for the task."""
        self.bucket.outlive(self.history.store)
        done = False
        with self._noted():
            done = self.bucket.read(store.result(self.rank)) is not None
        if done:
            stop = Stop(reason="the script has ended already", then="leave")
            self._leave()
            return stop
        before = self._before()
        with self._noted():
            self.history.take()
        self.report = Report(self.bucket, self.rank, self.name, self.history.epoch)
        with self.report, signals.handled(signals.ENDING, self._signalled):
            logs.hide(*_secrets(self.script.environment), *network.secrets(self.settings))
            stop = self._guarded(again=before != "failed")
        if stop.then == "leave":
            self._leave()
        return stop

    def _guarded(self, *, again: bool) -> Stop:
        """Live; after a failure of ours another machine may do better, once."""
        try:
            stop = self._live()
            self._end(stop)
        except Fenced:
            stop = Stop(reason="another machine has taken over", then="vanish", save=False)
            self._kill()
        except KeyboardInterrupt as error:
            stop = Stop(reason=f"{error} while starting", then="vanish")
            self._kill()
        except Exception as error:
            log.debug("giving up", exc_info=True)
            code = error.exit_code if isinstance(error, RunnerError) else 1
            stop = Stop(
                reason=str(error), then="vanish" if again else "leave", code=code, failed=True
            )
            self._kill()
            if not again:
                self._conclude(stop)
        self._say_goodbye(stop)
        return stop

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Fail later, when there is a log."""
        try:
            yield
        except RunnerError as error:
            self.failure = self.failure or error

    def _live(self) -> Stop:
        if self.failure:
            raise self.failure
        self._become_two()
        self.workdir.create()
        log.info("machine %d of %s", self.history.epoch, self.name)
        self.report.tell(state="restoring")
        place = self.workdir.path
        self.data = Data(self.history, place / "data", self.script.exclude)
        self.data.restore(self.account)
        command = shell.command(self.settings, self.rank, self.history.epoch, place)
        self.process = Process(shell.Shell(), command, (), self.events, self.account)
        self.report.tell(state="busy")
        machine.poll(self.cloud.notice, self.events)
        self._listen()
        self.data.watch(self.events)
        return self._watch()

    def _become_two(self) -> None:
        """Have the script live under an account of its own, where the machine is ours alone."""
        settings = self.settings
        if settings.user and not os.geteuid():
            self.account = user.prepare(
                settings.user,
                sudo=settings.sudo,
                isolated=not settings.sudo,
                metadata=self.cloud.metadata_service,
            )
            self.workdir = Workdir(settings, self.name, self.account)

    def _listen(self) -> None:
        """Notice when somebody wants the task to stop, in a thread of its own."""

        def ask() -> None:
            while True:
                with suppress(RunnerError):
                    if self.bucket.read(store.RECALL) is not None:
                        self.events.put(Recalled())
                        return
                time.sleep(ASK)

        threading.Thread(target=ask, name="recall", daemon=True).start()

    def _watch(self) -> Stop:
        """Take events until one of them means the end."""
        while True:
            try:
                event: Event = self.events.get(timeout=TICK)
            except queue.Empty:
                event = Tick()
            stop = step(event, datetime.now(timezone.utc), self.settings.expires)
            if stop:
                log.info("stopping: %s", stop.reason)
                return stop

    def _end(self, stop: Stop) -> None:
        """End the script, save its data, and only then say how it ended."""
        assert self.process
        assert self.data
        self.report.silent = not stop.save  # another machine speaks for this rank
        self.report.tell(state="stopping", reason=stop.reason)
        self._give_notice(stop)
        self.process.stop(stop.grace)
        if not stop.save:
            self.data.close()
            return
        self.data.save(time.monotonic() + _patience(stop))
        self._conclude(stop)

    def _give_notice(self, stop: Stop) -> None:
        """Tell the script how much time it has, before it is asked to end."""
        if stop.grace:
            until = time.time() + stop.grace
            path = self.workdir.path / shell.NOTICE
            new = path.with_suffix(".new")
            with suppress(OSError):
                new.write_text(f"{until:.0f}\n")
                new.replace(path)

    def _kill(self) -> None:
        if self.process:
            self.process.stop(0)
        if self.data:
            self.data.close()

    def _conclude(self, stop: Stop) -> None:
        """Write down how it ended, once and for all."""
        if stop.then == "leave" and stop.code is not None:
            result = Result(
                code=stop.code,
                at=datetime.now(timezone.utc),
                reason=stop.reason,
                epoch=self.history.epoch,
            )
            self.bucket.claim(store.result(self.rank), store.encoded(result))

    def _say_goodbye(self, stop: Stop) -> None:
        with steps.uninterrupted():
            self.report.silent = not stop.save
            self.workdir.delete()
            states = {"leave": "ended", "vanish": "interrupted", "wait": "stopped"}
            failed = stop.failed or (stop.then == "leave" and stop.code)
            state = "failed" if failed else states[stop.then]
            (log.error if stop.failed else log.info)("%s: %s", state, stop.reason)
            self.report.tell(state=state, reason=stop.reason, code=stop.code or 0)
        if stop.then == "wait":
            self._wait_for_the_end()

    def _wait_for_the_end(self) -> None:
        """Who stopped the task is about to end this machine, and has none sent in its place."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            with suppress(queue.Empty):
                if isinstance(self.events.get(timeout=TICK), Signalled):
                    return

    def _leave(self) -> None:
        count = len(self.settings.names)
        try:
            last = places.leave(self.bucket, self.rank, count)
            if last:
                self.bucket.delete(store.RESUME)
        except RunnerError as error:  # others can't be asked; at worst the deadline ends the group
            log.warning("%s", error)
            last = count == 1
        self.cloud.leave(self.settings.id, self.bucket.url, last=last)

    def _before(self) -> str:
        """Say how the machine before us ended."""
        with suppress(RunnerError):
            status = self.bucket.load(store.status(self.rank), Status)
            return status.state if status else ""
        return ""

    def _signalled(self, number: int, _: object) -> None:
        name = signal.Signals(number).name
        if not self.process:
            raise KeyboardInterrupt(name)
        self.events.put(Signalled(name=name))


def _patience(stop: Stop) -> float:
    """For how many seconds to try to save the data."""
    if stop.until:
        return max(0, (stop.until - datetime.now(timezone.utc)).total_seconds() - HURRY)
    return HASTE if stop.then == "vanish" else PATIENCE


def _secrets(environment: object) -> list[str]:
    assert isinstance(environment, dict)
    return [value for name, value in environment.items() if SECRET.search(name)]
