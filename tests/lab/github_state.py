"""What the fake GitHub knows, and how its runs and jobs go on; nothing here speaks HTTP."""

from __future__ import annotations

import secrets
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from threading import Condition
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

T = TypeVar("T")
READ_ONLY = ("self-hosted", "linux", "macos", "windows", "x64", "arm64", "arm")
CONCLUSIONS = {
    "Succeeded": "success",
    "SucceededWithIssues": "success",
    "Failed": "failure",
    "Canceled": "cancelled",
    "Skipped": "skipped",
    "Abandoned": "failure",
}
LOST = (
    "The self-hosted runner lost communication with the server. Verify the machine is running and "
    "has a healthy network connection. Anything in your workflow that terminates the runner "
    "process, starves it for CPU/Memory, or blocks its network access can cause this error."
)


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass
class Place:
    """What runners belong to: a repository, an organisation or an enterprise."""

    kind: Literal["repos", "orgs", "enterprises"]
    name: str  # owner/repo, org, enterprise
    id: int
    private: bool = True
    members: frozenset[str] = frozenset()  # the organisations of an enterprise
    groups: dict[int, str] = field(default_factory=lambda: {1: "Default"})

    @property
    def path(self) -> str:
        """What stands after the host's name in its address."""
        return f"enterprises/{self.name}" if self.kind == "enterprises" else self.name

    @property
    def owner(self) -> str:
        return self.name.partition("/")[0]


@dataclass
class Token:
    """A credential, and what it opens."""

    value: str
    kind: Literal["classic", "fine-grained", "installation", "workflow"]
    scopes: frozenset[str] = frozenset()
    permissions: Mapping[str, str] = field(default_factory=dict)
    places: frozenset[str] | None = None  # repositories and owners; None: all of them
    role: Literal["admin", "write", "read"] = "admin"  # of its user
    expires: float = float("inf")


@dataclass
class App:
    """A GitHub App; an installation has the id of the account that it is installed on."""

    id: int
    client_id: str
    key: str  # PEM, private
    public: str
    owners: frozenset[str]
    permissions: Mapping[str, str]


@dataclass
class Runner:
    id: int
    name: str
    place: Place
    labels: tuple[str, ...]
    key: str  # what its program shows
    group: int = 1
    ephemeral: bool = False
    work: str = "_work"
    os: str = "unknown"
    arch: str = ""
    version: str | None = None
    session: str = ""
    seen: float = float("-inf")  # time.monotonic()
    online: bool = False
    job: Job | None = None
    messages: deque[dict[str, Any]] = field(default_factory=deque)

    @property
    def busy(self) -> bool:
        return self.job is not None


@dataclass(frozen=True)
class WorkflowJob:
    """A job as its workflow file has it."""

    name: str
    labels: Sequence[str] = ("self-hosted",)
    script: str = "true"
    needs: Sequence[str] = ()  # names of other jobs
    key: str = ""  # what the file calls it; GITHUB_JOB
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Job:
    """A job in one attempt of its run."""

    id: int
    run: Run
    attempt: int
    description: WorkflowJob
    status: Literal["blocked", "queued", "in_progress", "completed"] = "blocked"
    conclusion: str | None = None
    created: float = 0
    started: float | None = None
    completed: float | None = None
    runner_id: int | None = None
    runner_name: str | None = None
    runner_group: int | None = None
    message: str = ""  # what people read next to the result
    output: bytes = b""

    @property
    def name(self) -> str:
        return self.description.name

    @property
    def log(self) -> str:
        return self.output.decode(errors="replace")


@dataclass
class Run:
    id: int
    repository: Place
    attempts: list[list[Job]]
    created: float
    too_old: bool = False  # to be run again
    name: str = "CI"

    @property
    def attempt(self) -> int:
        return len(self.attempts)

    @property
    def jobs(self) -> list[Job]:
        return self.attempts[-1]

    @property
    def status(self) -> str:
        states = {job.status for job in self.jobs}
        if states <= {"completed"}:
            return "completed"
        return "queued" if states <= {"queued", "blocked"} else "in_progress"

    @property
    def conclusion(self) -> str | None:
        if self.status != "completed":
            return None
        found = {job.conclusion for job in self.jobs}
        return next((one for one in ("failure", "cancelled") if one in found), "success")


@lru_cache(maxsize=1)
def _keys() -> tuple[str, str]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()


class State:
    """All of it under one lock, which is also where changes are waited for."""

    poll = 2.0  # seconds that a runner's question for a message may stay open
    offline_after = 5.0  # seconds without a question
    lost_after = 10.0  # seconds without a question, then the job has failed

    def __init__(self) -> None:
        self.changed = Condition()
        self.clock: Callable[[], float] = time.time  # of tokens and time stamps
        self.places: dict[str, Place] = {}
        self.tokens: dict[str, Token] = {}
        self.apps: list[App] = []
        self.registrations: dict[str, tuple[str, Place, float]] = {}
        self.found: dict[int, Runner] = {}
        self.runs: dict[int, Run] = {}
        self.deprecations: dict[str, tuple[str | None, str | None]] = {}
        self.deprecated: set[str] = set()
        self.modes: dict[str, deque[str]] = {}
        self._ids = count(1001)

    # What a test prepares

    def add_repository(self, name: str, *, private: bool = True) -> Place:
        return self._add(Place("repos", name, next(self._ids), private))

    def add_organisation(self, name: str) -> Place:
        return self._add(Place("orgs", name, next(self._ids)))

    def add_enterprise(self, name: str, organisations: Iterable[str] = ()) -> Place:
        members = frozenset(one.lower() for one in organisations)
        return self._add(Place("enterprises", name, next(self._ids), members=members))

    def add_group(self, place: Place, name: str) -> int:
        """Add a group of runners to an organisation or an enterprise; return its id."""
        number = max(place.groups) + 1
        place.groups[number] = name
        return number

    def add_token(self, *scopes: str, role: Literal["admin", "write", "read"] = "admin") -> str:
        """Make a classic personal access token of a user who has this role everywhere."""
        return self.issue(Token(_secret("ghp_"), "classic", frozenset(scopes), role=role))

    def add_fine_grained_token(self, *places: str, **permissions: str) -> str:
        """Make one for some repositories or an organisation: administration="write"."""
        where = frozenset(place.lower() for place in places)
        value = _secret("github_pat_")
        return self.issue(Token(value, "fine-grained", permissions=permissions, places=where))

    def add_workflow_token(self, repository: str, **permissions: str) -> str:
        """Make a GITHUB_TOKEN; it never has "administration"."""
        granted = {"actions": "read", "contents": "read", "metadata": "read", **permissions}
        where = frozenset({repository.lower()})
        value = _secret("ghs_")
        return self.issue(Token(value, "workflow", permissions=granted, places=where))

    def add_app(self, *owners: str, **permissions: str) -> App:
        """Make a GitHub App that is installed on these accounts."""
        private, public = _keys()
        number = next(self._ids)
        where = frozenset(owner.lower() for owner in owners)
        app = App(number, f"Iv23li{number}", private, public, where, permissions)
        self.apps.append(app)
        return app

    def issue(self, token: Token) -> str:
        self.tokens[token.value] = token
        return token.value

    def add_run(
        self, repository: Place | str, jobs: Sequence[WorkflowJob], *, too_old: bool = False
    ) -> Run:
        """Start a workflow; `too_old`: GitHub would refuse to run anything of it again."""
        with self.changed:
            place = self.place("repos", repository) if isinstance(repository, str) else repository
            run = Run(next(self._ids), place, [], self.clock(), too_old)
            run.attempts.append([self._new_job(run, 1, job) for job in jobs])
            self.runs[run.id] = run
            self._release(run)
            return run

    def mode(self, runner: str, *what: str) -> None:
        """Tell what the named runner's program meets at its next starts or questions.

        "conflict", "deprecated", "retryable" when it starts; "update", "refresh" while it waits.
        """
        with self.changed:
            self.modes.setdefault(runner, deque()).extend(what)
            self.changed.notify_all()

    def deprecate(
        self,
        version: str,
        registration: str | None = "2026-01-01T00:00:00Z",
        runtime: str | None = "2026-02-01T00:00:00Z",
        *,
        enforced: bool = True,
    ) -> None:
        """Set the dates after which a version is refused; `enforced`: they are over."""
        with self.changed:
            self.deprecations[version] = registration, runtime
            if enforced:
                self.deprecated.add(version)

    # What a test reads

    def runners(self) -> list[Runner]:
        with self.changed:
            self.sweep()
            return list(self.found.values())

    def runner(self, name: str) -> Runner | None:
        return next((one for one in self.runners() if one.name == name), None)

    def job(self, name: str, run: Run | None = None, attempt: int = 0) -> Job:
        """Find a job by its name, in its run's latest attempt or in the given one."""
        with self.changed:
            self.sweep()
            runs = [run] if run else reversed(self.runs.values())
            attempts = [one.attempts[attempt - 1] for one in runs if attempt <= one.attempt]
            return next(job for jobs in attempts for job in jobs if job.name == name)

    def wait_for(self, condition: Callable[[], T], what: str = "", timeout: float = 20) -> T:
        """Return the first true value of the condition; AssertionError if it takes too long."""
        end = time.monotonic() + timeout
        with self.changed:
            while True:
                self.sweep()
                if value := condition():
                    return value
                if time.monotonic() > end:
                    msg = f"{what or 'the condition'} did not come true in {timeout} s: {self}"
                    raise AssertionError(msg)
                self.changed.wait(0.1)

    def __str__(self) -> str:
        runners = [(one.name, one.online, one.busy) for one in self.found.values()]
        jobs = [job for run in self.runs.values() for job in run.jobs]
        shown = [(job.name, job.attempt, job.status, job.conclusion) for job in jobs]
        return f"runners (name, online, busy) {runners}, jobs {shown}"

    # How it goes on

    def place(self, kind: str, name: str) -> Place:
        try:
            return self.places[f"{kind}/{name}".lower()]
        except KeyError:
            raise Refused(404, "Not Found") from None

    def register(self, place: Place, name: str, labels: Iterable[str], **more: Any) -> Runner:
        """Add a runner; 409 if there is one of this name."""
        with self.changed:
            if any(one.place is place and one.name == name for one in self.found.values()):
                msg = f"Already exists - A runner with the name {name} already exists."
                raise Refused(409, msg)
            unique = tuple({label.lower(): label for label in labels}.values())
            runner = Runner(next(self._ids), name, place, unique, _secret("rsa_"), **more)
            self.found[runner.id] = runner
            self.changed.notify_all()
            return runner

    def remove(self, runner: Runner) -> None:
        with self.changed:
            self.found.pop(runner.id, None)
            self.changed.notify_all()

    def sweep(self) -> None:
        """Notice whose program has been silent for too long."""
        now = time.monotonic()
        for runner in list(self.found.values()):
            silent = now - runner.seen
            runner.online = bool(runner.session) and silent < self.offline_after
            if runner.job and silent >= self.lost_after:
                runner.session = ""
                if runner.job.status == "queued":  # it never started it
                    runner.job = None
                else:
                    runner.job.message = LOST
                    self.finish(runner, "Failed")

    def next_message(self, runner: Runner, alive: Callable[[], bool]) -> dict[str, Any] | None:
        """Return what is new for a runner, at the latest after a while with nothing new."""
        end = time.monotonic() + self.poll
        session = runner.session
        with self.changed:
            runner.seen = time.monotonic()
            while runner.session == session and runner.id in self.found and alive():
                self.sweep()
                if message := self._message(runner):
                    return message
                if (left := end - time.monotonic()) <= 0:
                    return None
                self.changed.wait(left)
        if runner.id not in self.found or not runner.session:
            raise Refused(404, "The runner no longer exists on the server.")
        raise Refused(409, "Another session took over.")

    def next_mode(self, runner: Runner, possible: Iterable[str]) -> str:
        """Return what the test has in store for this runner, if it is one of these."""
        waiting = self.modes.get(runner.name)
        return waiting.popleft() if waiting and waiting[0] in possible else ""

    def start(self, job: Job) -> None:
        with self.changed:
            job.status = "in_progress"
            job.started = self.clock()
            self.changed.notify_all()

    def finish(self, runner: Runner, result: str) -> None:
        """End the job of a runner, and the runner too if it is ephemeral."""
        with self.changed:
            if job := runner.job:
                runner.job = None
                if job.status != "completed":
                    self._complete(job, CONCLUSIONS[result])
            if runner.ephemeral:
                self.remove(runner)

    def rerun(self, run: Run, names: set[str]) -> None:
        """Begin a new attempt of these jobs and those that need them; others stay as they are."""
        with self.changed:
            for job in run.jobs * len(run.jobs):
                if names & set(job.description.needs):
                    names = names | {job.name}
            attempt = run.attempt + 1
            run.attempts.append([self._again(job, attempt, job.name in names) for job in run.jobs])
            self._release(run)

    def cancel(self, run: Run, *, force: bool = False) -> None:
        with self.changed:
            for job in run.jobs:
                runner = next((one for one in self.found.values() if one.job is job), None)
                if runner and job.status == "in_progress":
                    runner.messages.append({"type": "cancel", "job": job.id})
                if job.status in ("queued", "blocked") or (force and job.status != "completed"):
                    self._complete(job, "cancelled")
            self.changed.notify_all()

    def _add(self, place: Place) -> Place:
        with self.changed:
            self.places[f"{place.kind}/{place.name}".lower()] = place
        return place

    def _new_job(self, run: Run, attempt: int, description: WorkflowJob) -> Job:
        return Job(next(self._ids), run, attempt, description, created=self.clock())

    def _again(self, job: Job, attempt: int, new: bool) -> Job:
        again = self._new_job(job.run, attempt, job.description)
        if not new:
            again.status, again.conclusion = job.status, job.conclusion
            again.started, again.completed = job.started, job.completed
            again.runner_id, again.runner_name = job.runner_id, job.runner_name
            again.runner_group, again.output = job.runner_group, job.output
        return again

    def _release(self, run: Run) -> None:
        by_name = {job.name: job for job in run.jobs}
        for job in run.jobs * len(run.jobs):
            needed = [by_name[name] for name in job.description.needs]
            if job.status != "blocked" or any(one.status != "completed" for one in needed):
                continue
            job.status, job.created = "queued", self.clock()
            if any(one.conclusion != "success" for one in needed):
                job.status, job.conclusion, job.completed = "completed", "skipped", self.clock()
        self.changed.notify_all()

    def _complete(self, job: Job, conclusion: str) -> None:
        job.status, job.conclusion, job.completed = "completed", conclusion, self.clock()
        self._release(job.run)

    def _message(self, runner: Runner) -> dict[str, Any] | None:
        if runner.messages:
            return runner.messages.popleft()
        if what := self.next_mode(runner, ("update", "refresh")):
            return {"type": what}
        if runner.job or not (job := self._waiting_job(runner)):
            return None
        runner.job = job
        job.runner_id, job.runner_name, job.runner_group = runner.id, runner.name, runner.group
        self.changed.notify_all()
        return {"type": "job", "job": job.id}

    def _waiting_job(self, runner: Runner) -> Job | None:
        taken = {one.job.id for one in self.found.values() if one.job}
        offered = {label.lower() for label in runner.labels}
        jobs = (job for run in self.runs.values() for job in run.jobs)
        fitting = [
            job
            for job in jobs
            if job.status == "queued"
            and job.id not in taken
            and {label.lower() for label in job.description.labels} <= offered
            and self._serves(runner.place, job.run.repository)
        ]
        return min(fitting, key=lambda job: job.id, default=None)

    def _serves(self, place: Place, repository: Place) -> bool:
        if place.kind == "repos":
            return place is repository
        owner = repository.owner.lower()
        return owner in place.members or (place.kind == "orgs" and owner == place.name.lower())


def _secret(prefix: str) -> str:
    return prefix + secrets.token_hex(18)


def missing() -> NoReturn:
    raise Refused(404, "Not Found")


def runner_of(state: State, key: str) -> Runner:
    """Find the runner whose program shows this key."""
    with suppress(StopIteration):
        return next(one for one in state.found.values() if secrets.compare_digest(one.key, key))
    raise Refused(404, "The runner registration has been deleted from the server.")
