"""Watch over one runner on the machine where it runs, and end it when it is time."""

from __future__ import annotations

import logging
import os
import queue
import signal
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from cml_runner import boot, clouds, forges, logs, signals, steps, store, wait
from cml_runner.boot import failing, places
from cml_runner.boot.prepare import INTERRUPTED
from cml_runner.errors import AgentFailed, AlreadyExists, JobRunning, NotFound, RunnerError
from cml_runner.model import (
    Exited,
    Identified,
    JobEnded,
    JobStarted,
    Notice,
    Ready,
    Retried,
    Settings,
    Signalled,
    Status,
    Tick,
    Troubled,
    renamed,
    stands_for,
)
from cml_runner.supervise import errands, machine, network, recovery, script, user
from cml_runner.supervise.process import Process
from cml_runner.supervise.report import Report
from cml_runner.supervise.rules import Rules, State, Stop, step
from cml_runner.supervise.workdir import Workdir

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cml_runner.clouds import Cloud
    from cml_runner.forges import Forge
    from cml_runner.model import Command, Event, Interruption, Job, Package, Registration
    from cml_runner.supervise.user import Account

log = logging.getLogger(__name__)

TICK = 1  # second between two looks at the clock
ABORT = 15  # seconds for a job to fail once it was told to
GRACE = 10  # seconds for an agent to end once it was asked to
LONGEST_PAUSE = 30  # seconds before an agent which asks for it is started again
LAST_WORD = 3  # seconds for all that comes after the last try
LAST_TRY = 20  # seconds to have a job run again, by a machine which isn't a cloud's
PATIENCE = 60  # seconds for a machine to reach its bucket
EARLY = 60  # seconds before the deadline that an orderly end begins
MARGIN = 300  # seconds before the forge's own limit that a job is stopped


def run(url: str) -> int:
    """Be the supervisor of a machine; the settings are in the bucket at this URL.

    Returns its exit code: 0, or INTERRUPTED if another machine may come in its place.

    What follows a "#", CLOUD/REGION/IDENTIFIER, says which task to end should they be gone.
    """
    bucket = store.opened(url)
    settings = _settings(bucket)
    if settings is None:
        if boot.cloud(url):  # or the group would send one useless machine after the other
            wait.insist(boot.machine(url).finish)
        msg = f"there are no settings at {url}: this task is over"
        raise NotFound(msg)
    network.set_up(settings)
    cloud = clouds.load(settings.cloud, settings.region)
    rank = cloud.rank()
    if rank is None:
        count = len(settings.names)
        rank = places.take(bucket, count, cloud.machine()) if count > 1 else 0
        if rank in places.left(bucket):
            log.info("nobody is needed here any more")
            cloud.leave(settings.id, url, last=places.leave(bucket, rank, count))
            return 0
    kind = Supervisor if settings.script is None else script.Supervisor
    supervisor = kind(settings, bucket, cloud, rank)
    with suppress(RunnerError):
        failing.forget(bucket, rank)
    return INTERRUPTED if supervisor.run().then == "vanish" else 0


def here(settings: Settings) -> None:
    """Make this very machine the runner, until its work is done."""
    with TemporaryDirectory(prefix="cml-runner-") as directory:
        supervisor = Supervisor(settings, store.Store(Path(directory).as_uri()), None)
        supervisor.run()
    if supervisor.signal:
        signal.raise_signal(supervisor.signal)  # its usual end, now that all is cleared up


class Supervisor:
    """One runner, from its registration to its end."""

    def __init__(
        self, settings: Settings, bucket: store.Store, cloud: Cloud | None, rank: int = 0
    ) -> None:
        self.settings, self.bucket, self.cloud, self.rank = settings, bucket, cloud, rank
        self.first_name = self.name = settings.names[rank]
        self.registration = settings.registrations[rank] if settings.registrations else None
        self.agent = forges.agent(settings.driver)
        self.forge = _forge(settings)
        self.account: Account | None = None  # of the agent, if it isn't our own
        self.workdir = Workdir(settings, self.name)
        self.registered = False
        self.signal = 0  # that asked us to end
        self.secrets = _secrets(settings)
        self.events: queue.Queue[Event] = queue.Queue()
        self.process: Process | None = None
        self.unheard = False  # the forge couldn't be asked to let us go
        self.rules = _rules(settings, self.forge)
        self.state = State(since=time.monotonic())
        self.before = _before(bucket, rank)
        self.forgotten = cloud.forgotten() if cloud else None  # machines in our place before
        self.report = Report(bucket, rank, self.name)
        self.recovery = recovery.Recovery(bucket, self.forge, self.events) if self.forge else None

    def run(self) -> Stop:
        """Live, and say why no more. Raises AgentFailed, or whatever else ended it early.

        A failure isn't raised if another machine may do better.
        """
        failure: Exception | None = None
        with self.report, signals.handled(signals.ENDING, self._signalled):
            logs.hide(*self.secrets, *network.secrets(self.settings))
            try:
                stop = self._live()
                failure = AgentFailed(stop.reason) if stop.failed else None
            except KeyboardInterrupt as error:
                stop = Stop(reason=f"{error} while starting", then="vanish")
            except Exception as error:
                log.debug("giving up", exc_info=True)
                stop, failure = Stop(reason=str(error), failed=True), error
            if failure and self._others_may_do_better():
                stop = replace(stop, then="vanish")
            self._clear_up(stop, failure)
        if self.cloud and stop.then == "leave":
            self._leave(self.cloud)
        if failure and stop.then == "leave":
            raise failure
        return stop

    def _leave(self, cloud: Cloud) -> None:
        count = len(self.settings.names)
        try:
            last = places.leave(self.bucket, self.rank, count)
        except RunnerError as error:  # others can't be asked; at worst the deadline ends the group
            log.warning("%s", error)
            last = count == 1
        cloud.leave(self.settings.id, self.bucket.url, last=last)

    def _live(self) -> Stop:
        self._recall()
        self._become_two()
        self.workdir.create()
        machine.startup(self.settings.startup, self.workdir.path)
        machine.provide(
            self.agent.programs(), install=bool(self.settings.user) and not os.geteuid()
        )
        if self.cloud:
            machine.poll(self.cloud.notice, self.events)
        command = self._prepare(self.settings.packages)
        while True:
            self._start(command)
            stop = self._watch()
            self._end(stop)
            if stop.then != "stay":
                return stop
            time.sleep(min(2**self.state.restarts, LONGEST_PAUSE) if self.state.restarts else 0)
            if stop.renew:
                if not self.forge:
                    return replace(stop, then="leave", failed=True)
                self._try_to_unregister()
                self.workdir.renew()
                command = self._prepare(self.forge.packages())

    def _become_two(self) -> None:
        """Have the agent and its jobs live under an account of their own."""
        settings = self.settings
        if settings.user and os.geteuid():  # a container whose image has a user of its own
            if not settings.sudo:
                msg = (
                    "--no-sudo needs an image whose user is root: jobs get an account of their own"
                )
                raise RunnerError(msg)
            log.info("jobs run as this image's own user")
            return
        if settings.docker and settings.user:
            machine.docker()
        if settings.user and self.cloud:
            self.account = user.prepare(
                settings.user,
                sudo=settings.sudo,
                isolated=settings.single or not settings.sudo,
                metadata=self.cloud.metadata_service,
            )
            self.workdir = Workdir(settings, self.name, self.account)

    def _others_may_do_better(self) -> bool:
        """Let the cloud send another machine for an interrupted job; two failures are enough."""
        failed_before = self.before and self.before.state == "failed"
        with suppress(RunnerError):
            return bool(self.cloud and not failed_before and recovery.pending(self.bucket))
        return False

    def _recall(self) -> None:
        """Take up the jobs which were interrupted before us."""
        if not self.recovery or not self.settings.retry:
            return
        if self.before and self.before.state == "busy" and self.before.job:
            recovery.remember(self.bucket, self.before.job)  # it vanished without a word
        if self.forgotten and self.forge:
            for job in self.forge.lost(self.name):
                recovery.remember(self.bucket, job, forgetful=True)
        self.recovery.start()
        for interruption in recovery.pending(self.bucket):
            self._recover(interruption)

    def _recover(self, interruption: Interruption) -> None:
        if self.recovery and interruption.pending:
            self.state = replace(self.state, pending=self.state.pending + 1)
            self.recovery.add(interruption)

    def _prepare(self, packages: Sequence[Package]) -> Command:
        """Install and register the agent."""
        self.report.tell(state="installing")
        version = self.agent.install(self.workdir.path, packages)
        self.report.tell(state="registering", version=version)
        registration = self._register()
        self.registration, self.registered = registration, True
        self.secrets += (registration.secret,)
        logs.hide(registration.secret)
        return self.agent.command(
            self.workdir.path,
            registration,
            volumes=self.settings.docker_volumes,
            idle_timeout=self.settings.idle_timeout,
        )

    def _start(self, command: Command) -> None:
        self.state = replace(self.state, phase="starting", since=time.monotonic(), job=None)
        self.process = Process(self.agent, command, self.secrets, self.events, self.account)

    def _register(self) -> Registration:
        if not self.forge:
            assert self.registration
            return self.registration
        try:
            return self._register_as(self.forge, self.name)
        except AlreadyExists:
            if not self.before and not self.forgotten:
                raise
            # The forge hasn't noticed yet that the machine before us is gone.
            self.name = renamed(self.first_name)
            self.report.tell(runner=self.name)
            return self._register_as(self.forge, self.name)

    def _register_as(self, forge: Forge, name: str) -> Registration:
        settings = self.settings
        return forge.register(
            name,
            settings.labels,
            single=settings.single,
            arch=machine.arch(),
            expires=settings.expires,
        )

    def _watch(self) -> Stop:
        """Take events until one of them makes us stop."""
        while True:
            try:
                event: Event = self.events.get(timeout=TICK)
            except queue.Empty:
                event = Tick()
            self.state, stop = step(self.state, event, time.monotonic(), self.rules)
            self._tell(event)
            if stop and not (stop.polite and self._busy_after_all()):
                log.info("stopping: %s", stop.reason)
                return stop

    def _busy_after_all(self) -> bool:
        """Ask the forge to let us go; it says no if a job came in at the last moment."""
        try:
            self._unregister()
        except JobRunning:
            log.info("a job came in at the last moment: going on")
            self.state = replace(self.state, since=time.monotonic())
            return True
        except RunnerError as error:
            log.warning("%s may still be registered: %s", self.name, error)
            self.unheard = True
        return False

    def _tell(self, event: Event) -> None:
        """Let the world know what happened."""
        match event:
            case Ready():
                log.info("%s is ready for jobs", self.name)
                self.report.tell(state="ready", reason="")
            case JobStarted() | Identified() | JobEnded():
                self._tell_of_a_job(event)
            case Troubled(message=message):
                log.warning("the agent says: %s", message)
                self.report.tell(reason=message)
            case Notice(reason=reason):
                log.warning("this machine will be taken away: %s", reason)
                if self.state.doomed:
                    self._drain()
            case Tick() if self.state.job and not self.state.job.pipeline:
                self.report.tell(job=self._job())

    def _tell_of_a_job(self, event: JobStarted | Identified | JobEnded) -> None:
        match event:
            case JobStarted(job=job):
                log.info("running %s", job.name)
                self.report.tell(state="busy", reason="", job=job)
                self._look_after(job)
            case Identified(job=job):
                log.info("it is %s: %s", job.name, job.url)
                self.report.tell(job=self.state.job)
            case JobEnded(succeeded=succeeded):
                log.info("the job %s", "succeeded" if succeeded else "failed")
                self.report.tell(state="ready", job=None)

    def _look_after(self, job: Job) -> None:
        """Learn more of a job, and take no other if we shan't stay for it."""
        if self.forge and not job.pipeline:
            errands.identify(self.forge, job, self.events)
        if self.settings.single or self.state.doomed:
            self._drain()

    def _drain(self) -> None:
        """Take no other job, where agent and forge can be told so."""
        if self.process and self.state.phase == "busy":
            self.process.drain()
            if self.forge:
                errands.drain(self.forge, self.name)

    def _job(self) -> Job | None:
        """The running job, with all that the agent knows of it."""
        if self.state.job:
            self.state = replace(self.state, job=self.agent.job(self.workdir.path, self.state.job))
        return self.state.job

    def _end(self, stop: Stop) -> None:
        """End the agent, its job first: it must fail at once, or nobody can run it again."""
        assert self.process
        if self.state.phase == "busy":
            self._interrupt(stop)
            if not self.process.wait(0):
                self._settle(ABORT, stop)
        elif stop.ended:  # or it tells the forge how the job ended
            self.process.wait(GRACE)
        self.report.tell(state="stopping", reason=stop.reason, job=None)
        self.process.stop(GRACE)
        self._settle(0, stop)
        self.process = None

    def _interrupt(self, stop: Stop) -> None:
        assert self.process
        job = self._job()
        if job and stop.retry and self.settings.retry and self.forge:
            forgetful = self.forgotten is not None
            if forgetful and stop.then == "vanish" and self._is_better_lost(job):
                log.info("%s can't be run again yet: the forge will find it lost", job.name)
                self.process.kill()  # design 34
                self.unheard = True  # or the forge would forget who ran it
                return
            try:
                self._recover(recovery.remember(self.bucket, job, forgetful=forgetful))
            except RunnerError as error:
                log.warning("%s may not be run again: %s", job.name, error)
        self.process.abort(stop.reason if stop.retry else "")

    def _is_better_lost(self, job: Job) -> bool:
        """Ask the forge, since only this machine will remember that it was interrupted."""
        assert self.forge
        try:
            return self.forge.better_lost(job)
        except RunnerError as error:
            log.warning("%s", error)
            return False

    def _settle(self, patience: float, stop: Stop) -> None:
        """Take what still comes from the agent, and keep what doesn't come from it for later."""
        end = time.monotonic() + patience
        kept: list[Event] = []
        while True:
            try:
                event = self.events.get(timeout=max(0, end - time.monotonic()))
            except queue.Empty:
                break
            if isinstance(event, Notice | Signalled | Retried):
                kept.append(event)
                continue
            self.state, _ = step(self.state, event, time.monotonic(), self.rules)
            if isinstance(event, JobStarted):  # handed out at the very last moment
                self._interrupt(replace(stop, retry=True))
            if patience and isinstance(event, JobEnded | Exited):
                break
        for event in kept:
            self.events.put(event)

    def _clear_up(self, stop: Stop, failure: Exception | None) -> None:
        """Leave nothing on the forge and on the disk, and say a last word."""
        with steps.uninterrupted():
            if self.process:
                self.process.stop(GRACE)
            if not self.unheard:
                self._try_to_unregister()
            if stop.then == "leave" or self.forgotten is not None or not self.cloud:
                self._last_try(self._patience(stop))
            self.workdir.delete()
            code = failure.exit_code if isinstance(failure, RunnerError) else int(bool(failure))
            state = "failed" if failure else "ended" if stop.then == "leave" else "interrupted"
            (log.error if failure else log.info)("%s: %s", state, stop.reason)
            self.report.tell(state=state, reason=stop.reason, code=code, job=None)

    def _patience(self, stop: Stop) -> float:
        """How many seconds there are for what no machine after us will do."""
        if not self.cloud:
            return LAST_TRY
        notice = self.cloud.notice() if stop.then == "vanish" else None
        if not notice or not notice.deadline:
            return 0
        return (notice.deadline - datetime.now(timezone.utc)).total_seconds() - LAST_WORD

    def _last_try(self, patience: float) -> None:
        """Give the forge some time to take interrupted jobs: no machine comes in our place."""
        end = time.monotonic() + patience
        while self.state.pending and time.monotonic() < end:
            with suppress(queue.Empty):
                event = self.events.get(timeout=TICK)
                self.state, _ = step(self.state, event, time.monotonic(), self.rules)
        for interruption in recovery.pending(self.bucket) if self.state.pending else ():
            job = interruption.job
            log.warning("%s can't be run again yet; do it by hand: %s", job.name, job.url)

    def _try_to_unregister(self) -> None:
        try:
            self._unregister()
        except RunnerError as error:
            log.warning("%s may still be registered: %s", self.name, error)

    def _unregister(self) -> None:
        """Take us off the forge, and whoever was in our place before. Raises JobRunning."""
        if not self.forge and self.registered and self.registration:
            self.agent.leave(self.registration)
        for runner in self.forge.runners() if self.forge and self.registered else ():
            if runner.name == self.name or (not runner.online and self._is_of_before(runner.name)):
                assert self.forge
                self.forge.unregister(runner)

    def _is_of_before(self, name: str) -> bool:
        """Say if a machine in whose place we came had this name on the forge."""
        if self.forgotten:
            return stands_for(name, self.first_name)
        return bool(self.before) and name == self.first_name

    def _signalled(self, number: int, _: object) -> None:
        name = signal.Signals(number).name
        self.signal = number
        if not self.process:
            raise KeyboardInterrupt(name)
        self.events.put(Signalled(name=name))


def _settings(bucket: store.Store) -> Settings | None:
    """Read them, as soon as this machine has the network and the rights that it was given."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            content = bucket.read(store.SETTINGS)
        except RunnerError as error:
            if time.monotonic() > end:
                raise
            log.warning("can't read the settings yet: %s", error)
            time.sleep(TICK)
        else:
            return store.decoded(content, Settings, store.SETTINGS) if content is not None else None


def _forge(settings: Settings) -> Forge | None:
    """Without a credential the forge can't be spoken to: a one-time registration must do."""
    if not settings.credential:
        return None
    return forges.load(settings.driver, settings.repo, settings.credential, settings.group)


def _before(bucket: store.Store, rank: int) -> Status | None:
    """What the machine in whose place we come said last, if we understand it."""
    try:
        return bucket.load(store.status(rank), Status)
    except RunnerError as error:
        log.warning("%s", error)
        return None


def _secrets(settings: Settings) -> tuple[str, ...]:
    one = settings.credential
    found = (one.token, one.app_key) if one else ()
    return tuple(filter(None, (*found, *(item.secret for item in settings.registrations))))


def _rules(settings: Settings, forge: Forge | None) -> Rules:
    deadline = 0.0
    if settings.expires:  # the cloud ends us then, so we must have ended by ourselves before
        left = (settings.expires - datetime.now(timezone.utc)).total_seconds()
        deadline = time.monotonic() + left - min(EARLY, left / 10)
    return Rules(
        idle_timeout=settings.idle_timeout,
        job_limit=forge.job_limit - MARGIN if forge else 0,
        deadline=deadline,
        single=settings.single,
    )
