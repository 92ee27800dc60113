"""The whole life of a spot runner on this machine: embedded forge and cloud, no account.

Everything in it is real but its size: a launcher, a cloud that re-creates machines, a supervisor,
an agent, two jobs that are scripts, and an interruption in the middle of the first one.
"""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cml_runner import inventory, launch, signals, steps
from cml_runner.errors import RunnerError
from cml_runner.forges.local import Forge
from cml_runner.launch import options
from cml_runner.launch.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cml_runner.forges.local import JobState
    from cml_runner.launch.options import Order

log = logging.getLogger(__name__)

LONG = """\
#!/bin/sh
for epoch in 1 2 3 4 5 6; do
    echo "epoch $epoch of 6"
    sleep 1
done
echo "model trained"
"""
SHORT = """\
#!/bin/sh
echo "the model is good"
"""
SAID = {
    "starting": "is born",
    "installing": "installs its agent",
    "registering": "registers",
    "ready": "is ready for jobs",
    "busy": "is busy",
    "stopping": "stops its agent",
    "interrupted": "was interrupted",
    "ended": "had nothing more to do, and has left",
    "failed": "has failed",
}
INTERRUPT_AFTER = 2.5  # seconds of the long job
NOTICE = 2.0  # seconds between the notice and the end of the machine
PATIENCE = 90  # seconds for the whole demo; everything is deleted then


@dataclass(frozen=True)
class Entry:
    """A line of the timeline."""

    seconds: float  # since the beginning
    who: str  # launcher, cloud, runner, job
    what: str


@dataclass
class Summary:
    """What came out of it."""

    seconds: float = 0
    machines: int = 0
    jobs: list[JobState] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # what was not cleared up


def run(show: Callable[[Entry], None], busy: Callable[[str], None]) -> Summary:
    """Play it. `show` gets every line of the timeline, `busy` what goes on right now.

    Nothing is left behind, however it ends. Raises RunnerError if it didn't come to a good end.
    """
    root = Path(tempfile.mkdtemp(prefix="cml-runner-demo-"))
    try:
        with _every_key_ends_it():
            return _play(root, show, busy)
    finally:
        with steps.uninterrupted():
            shutil.rmtree(root, ignore_errors=True)


def _play(root: Path, show: Callable[[Entry], None], busy: Callable[[str], None]) -> Summary:
    (root / "forge").mkdir()
    forge = Forge(str(root / "forge"))
    asked = Options(
        repo=forge.url,
        name="demo",
        labels="demo",
        idle_timeout="3s",
        cloud="local",
        cloud_region=str(root / "cloud"),
        cloud_spot=True,
        max_lifetime=f"{PATIENCE}s",
        wait_timeout="30s",
    )
    order = options.read(asked, {})
    film = Film(order, forge, show, busy)
    with film.recorded():
        try:
            film.say("job", "train and report are queued")
            forge.submit("train", LONG, ("demo",))
            forge.submit("report", SHORT, ("demo",))
            launch.launch(order, lambda _: film.look())
            film.until(lambda: film.running("train", 1), "the first job")
            film.until(lambda: film.running_for() > INTERRUPT_AFTER, "the right moment")
            film.say("cloud", f"takes the spot machine away: {NOTICE:.0f} s notice")
            inventory.interrupt(film.found(), "", NOTICE)
            film.until(film.over, "the end")
        finally:
            with steps.uninterrupted():
                inventory.destroy(film.there(), lambda: None)
        return film.summary()


class Film:
    """Watches forge and cloud from outside, as anybody can, and tells what is new."""

    def __init__(
        self,
        order: Order,
        forge: Forge,
        show: Callable[[Entry], None],
        busy: Callable[[str], None],
    ) -> None:
        self.order, self.forge, self.show, self.busy = order, forge, show, busy
        self.began = time.monotonic()
        self.job_began = 0.0
        self.seen: set[str] = set()
        self.machines: set[str] = set()

    def say(self, who: str, what: str) -> None:
        """Add a line."""
        self.show(Entry(time.monotonic() - self.began, who, what))

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Look until something is true. Raises RunnerError when it takes too long."""
        while not condition():
            if time.monotonic() - self.began > PATIENCE:
                msg = f"waited too long for {what}"
                raise RunnerError(msg)
            self.look()
            time.sleep(0.1)
        self.look()

    def look(self) -> None:
        """Tell what is new everywhere."""
        for found in self.there():
            self.machines |= {one.id for one in found.plan.group.instances()}
            for event in found.plan.group.events():
                self._once("cloud", event.message, event.at.isoformat())
            for status in found.statuses().values():
                text = f"{status.runner} {SAID[status.state]}"
                self._once("runner", text, status.since.isoformat())
        for state in self.forge.jobs():
            where = f" on {state.runner}" if state.state == "running" else ""
            times = f" (attempt {state.attempt})" if state.attempt > 1 else ""
            self._once("job", f"{state.job.name}: {state.state}{where}{times}", "")
            if state.state == "running":
                self.busy(f"{state.job.name} runs: {_last_line(state.log)}")

    def running(self, name: str, attempt: int) -> bool:
        """Say whether a job is in this attempt; from then on its time counts."""
        found = any(
            (one.job.name, one.attempt, one.state) == (name, attempt, "running")
            for one in self.forge.jobs()
        )
        self.job_began = time.monotonic() if found else 0
        return found

    def running_for(self) -> float:
        """For how many seconds the job has been running."""
        return time.monotonic() - self.job_began

    def there(self) -> list[inventory.Found]:
        """What is left of it on the cloud."""
        return inventory.tasks(self.order.cloud, self.order.regions[0])

    def found(self) -> inventory.Found:
        """Our runner. Raises NotFound."""
        return inventory.find(str(self.order.id), self.order.cloud, self.order.regions[0])

    def over(self) -> bool:
        """Say whether the runner has left."""
        return not self.there()

    def summary(self) -> Summary:
        """Say what came out of it. Raises RunnerError if that isn't what was promised."""
        left = [f"runner {one.name}" for one in self.forge.runners()]
        left += [f"task {one.id}" for one in self.there()]
        found = Summary(
            seconds=time.monotonic() - self.began,
            machines=len(self.machines),
            jobs=self.forge.jobs(),
            left=left,
        )
        if left or any(one.state != "succeeded" for one in found.jobs):
            msg = f"that was not to be: {[one.state for one in found.jobs]}, left behind: {left}"
            raise RunnerError(msg)
        return found

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Make what the launcher creates and deletes part of the timeline."""
        film = self

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                film.say("launcher", record.getMessage())

        ours, engine = logging.getLogger("cml_runner"), logging.getLogger(steps.__name__)
        handler, propagate = Handler(logging.INFO), ours.propagate
        engine.addHandler(handler)
        ours.propagate = ours.isEnabledFor(logging.DEBUG)
        try:
            yield
        finally:
            engine.removeHandler(handler)
            ours.propagate = propagate

    def _once(self, who: str, what: str, key: str) -> None:
        if f"{who}{what}{key}" not in self.seen:
            self.seen.add(f"{who}{what}{key}")
            self.say(who, what)


def _last_line(path: Path) -> str:
    try:
        return (path.read_text(errors="replace").splitlines() or [""])[-1]
    except OSError:  # the job has just moved on
        return ""


@contextmanager
def _every_key_ends_it() -> Iterator[None]:
    r"""Let Ctrl-\ clear up as Ctrl-C does, and let nothing put us to sleep half-way."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    keys = signals.handled((signal.SIGINT, signal.SIGQUIT), end)
    with keys, signals.handled((signal.SIGTSTP,), signal.SIG_IGN):
        yield
