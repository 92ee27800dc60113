"""The embedded forge: a directory in which jobs wait, run and end as plain files.

It needs no account, no network and no server. A job is a directory, and moves:

    queued/JOB/     script (run by its "#!" line, else by /bin/sh), labels (comma separated; "cml")
    running/JOB/    as well: runner (its name), attempt (1, 2, …), log (as it grows)
    done/JOB/       as well: exit (its code), result (succeeded, failed, cancelled, or lost with
                    its runner, or interrupted)

What an earlier attempt left is kept beside them as log.1, exit.1, result.1, … To put in a job by
hand, make its directory elsewhere on the same disk and move it into queued/; any name will do, and
one that was used before replaces the record of the job which had it. A finished job without a
readable result has failed: the disk was full.

    runners/NAME.json    a registration
    runners/NAME.lock    locked for as long as its agent lives, so that nothing else says "online"
    lock                 locked by whoever changes anything

Who may write to the directory may do everything, so the credential is not looked at.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, ClassVar, Literal, cast
from urllib.parse import unquote

import msgspec

from cml_runner import checkup
from cml_runner.errors import (
    AlreadyExists,
    ConfigurationError,
    CredentialsError,
    JobRunning,
    NotFound,
    RunnerError,
)
from cml_runner.forges.local.address import path
from cml_runner.forges.local.agent import RESULTS, SECRET, Agent
from cml_runner.model import (
    Check,
    Interruption,
    Job,
    Registration,
    Runner,
    stands_for,
)

with suppress(ImportError):  # on Windows, where launchers may be, but no runner
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from cml_runner.model import Credential, Package

__all__ = ["Agent", "Forge"]

Progress = Literal["queued", "running", "succeeded", "failed", "cancelled"]

PLACES = ("queued", "running", "done")
LOST = "lost with its runner"  # a result, too, that counts as failed …
INTERRUPTED = "interrupted"  # … as does this
JOB = re.compile(r"/(queued|running|done)/([^/]+)/?$")  # the end of its address


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job, and how far it is."""

    job: Job
    state: Progress
    exit_code: int | None = None  # 128 + the number of the signal that killed it, as in a shell
    log: Path  # of the last attempt; moves with the job

    @property
    def runner(self) -> str:
        """The runner of its last attempt."""
        return self.job.runner

    @property
    def attempt(self) -> int:
        """How often it was started."""
        return self.job.attempt


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The content of runners/NAME.json."""

    id: str
    labels: tuple[str, ...]
    single: bool
    sha256: str  # of the secret


class Forge:
    """The runners and the jobs of one directory."""

    job_limit: ClassVar = 5 * 24 * 3600.0  # there is none here; this is GitHub's
    one_time: ClassVar = True

    def __init__(self, url: str, credential: Credential | None = None, group: str = "") -> None:
        """Take file:///an/absolute/directory, or a plain path."""
        del credential
        if group:
            msg = "the local forge has no runner groups: leave the group out"
            raise ConfigurationError(msg)
        self.root = path(url)

    @property
    def url(self) -> str:
        """The address of the directory."""
        return self.root.as_uri()

    @staticmethod
    def detect(url: str, environment: Mapping[str, str]) -> str:
        """Claim what begins with "file:", and nothing else."""
        del environment
        return JOB.sub("", url) if url.startswith("file:") else ""

    def check(self, labels: Sequence[str] = ()) -> None:
        """Make sure that the directory is there, and that we may write to it."""
        del labels
        if not self.root.is_dir():
            raise self._absent()
        if not os.access(self.root, os.W_OK | os.X_OK):
            msg = f"this user may not write to {self.root}: change its permissions"
            raise CredentialsError(msg)

    def checks(self, labels: Sequence[str] = ()) -> Iterator[Check]:
        """Look at the directory; there is nothing else."""

        def look() -> str:
            self.check(labels)
            return f"{self.root} is there, and can be written"

        yield Check(what="login", state="ok", message="whoever may write to the directory")
        hint = f"mkdir -p {self.root}, or change its permissions"
        yield from checkup.made([checkup.Probe(what="directory", look=look, hint=hint)])

    def runners(self) -> list[Runner]:
        """List every runner that is registered."""
        with self._locked():
            names = sorted(file.stem for file in (self.root / "runners").glob("*.json"))
            found = [(name, entry) for name in names if (entry := self._entry(name))]
            return [self._runner(name, entry) for name, entry in found]

    def register(
        self,
        name: str,
        labels: Sequence[str],
        *,
        single: bool,
        arch: str,
        expires: datetime | None = None,
    ) -> Registration:
        """Make room for one more runner; any architecture will do.

        The secret is good until the registration is gone.
        """
        del arch, expires
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name):
            msg = f"a runner can't be called {name!r}: up to 64 letters, digits, '-', '_' and '.'"
            raise ConfigurationError(msg)
        secret = secrets.token_urlsafe(24)
        entry = Entry(
            id=secrets.token_hex(6), labels=tuple(labels), single=single, sha256=_sha256(secret)
        )
        with self._locked():
            if self._online(name):
                msg = f"a runner called {name} is online already: choose another name"
                raise AlreadyExists(msg)
            _replace(self.root / "runners" / f"{name}.json", msgspec.json.encode(entry))
        return Registration(
            url=self.url, name=name, labels=entry.labels, single=single, secret=secret
        )

    def unregister(self, runner: Runner) -> None:
        """Remove a runner; its agent then ends by itself."""
        with self._locked():
            entry = self._entry(runner.name)
            if entry is None or entry.id != runner.id:
                return
            if self._busy(runner.name):
                msg = f"the runner {runner.name} is running a job: wait until it has ended"
                raise JobRunning(msg)
            self._forget(runner.name)

    def drain(self, name: str) -> None:
        """Do nothing: an agent takes the jobs that it wants."""

    def job(self, seen: Job) -> Job:
        """Add nothing: the agent has said it all."""
        return seen

    def retry(self, job: Job) -> bool:
        """Queue a finished job again, once for each attempt. One that succeeded needs no more."""
        with self._locked():
            folder = self._find(job.id or job.pipeline)
            last, place = _attempt(folder), folder.parent.name
            if place == "queued" or last > (job.attempt or last):
                return True
            if place == "running":
                return False
            if _progress(folder) == "succeeded":
                return True
            for name in ("log", "exit", "result", "runner"):
                with suppress(FileNotFoundError):
                    (folder / name).rename(folder / f"{name}.{last}")
            folder.rename(self.root / "queued" / folder.name)
            return True

    def better_lost(self, job: Job) -> bool:
        """Say no: jobs of a queue have nothing to do with each other."""
        return not job

    def lost(self, name: str) -> list[Job]:
        """List what a runner of this name was running when it died."""
        with self._locked():
            found = [one for one in self._jobs("done") if _text(one / "result") == LOST]
            return [one.job for one in map(self._state, found) if stands_for(one.job.runner, name)]

    def interrupted(self, pipeline: str, ours: Callable[[str], bool]) -> list[Interruption]:
        """Say if a job, which is its own pipeline, was interrupted or lost with its runner."""
        del ours
        match = JOB.search(pipeline)
        if not match:
            msg = f"{pipeline!r} is no job: give {self.url}/done/JOB"
            raise ConfigurationError(msg)
        with self._locked():
            folder = self._find(unquote(match[2]))
            if folder.parent.name != "done":
                msg = f"{pipeline} is {folder.parent.name}"
                raise JobRunning(msg)
            job = self._state(folder).job
            cut_off = _text(folder / "result") in (LOST, INTERRUPTED)
            return [Interruption(job=job, times=job.attempt)] if cut_off else []

    def retry_together(self, jobs: Sequence[Job]) -> bool:
        """Say no: jobs of a queue have nothing to do with each other."""
        return not jobs

    def packages(self) -> list[Package]:
        """List nothing: the agent comes with us."""
        return []

    def submit(self, name: str, script: str, labels: Sequence[str] = ("cml",)) -> Job:
        """Queue a job; several may have the same name."""
        if not name or re.search("[/\0\ud800-\udfff]", name) or len(name.encode()) > 200:
            msg = f"a job can't be called {name!r}: it must be the name of a directory"
            raise ConfigurationError(msg)
        with self._locked():
            last = max((_number(each.name) for each in self._jobs(*PLACES)), default=0)
            new = self.root / f".new-{secrets.token_hex(6)}"
            new.mkdir()
            try:
                (new / "script").write_text(script, encoding="utf-8")
                (new / "script").chmod(0o755)
                (new / "labels").write_text(",".join(labels), encoding="utf-8")
                folder = new.rename(self.root / "queued" / f"{last + 1:04}-{name}")
            except OSError:
                shutil.rmtree(new, ignore_errors=True)
                raise
            return self._state(folder).job

    def jobs(self) -> list[JobState]:
        """List all jobs, in the order in which they were submitted."""
        with self._locked():
            return [self._state(folder) for folder in self._jobs(*PLACES)]

    # What the agent asks for

    def connect(self, name: str, secret: str) -> tuple[Entry, BinaryIO] | None:
        """Bring a runner online until the file is closed; None if its registration is gone.

        Raises CredentialsError for a wrong secret, AlreadyExists if it is online.
        """
        with self._locked():
            entry = self._entry(name)
            if entry is None:
                return None
            if not hmac.compare_digest(_sha256(secret), entry.sha256):
                msg = f"{SECRET} is not that of the runner {name}: register it again"
                raise CredentialsError(msg)
            if self._online(name):
                msg = f"another agent of the runner {name} is online"
                raise AlreadyExists(msg)
            session = (self.root / "runners" / f"{name}.lock").open("wb", buffering=0)
            fcntl.flock(session, fcntl.LOCK_EX)
            session.write(b"%d\n" % os.getpid())  # for people
            return entry, session

    def registered(self, name: str, entry: Entry) -> bool:
        """Say whether this registration still holds."""
        with self._translated():
            found = self._entry(name)
            if found is None:
                self.root.stat()  # or else everything is gone
            return found == entry

    def claim(self, name: str, entry: Entry) -> JobState | None:
        """Give a runner the oldest job that it can do; None if there is none for it now."""
        with self._locked():
            if self._entry(name) != entry:
                return None
            for folder in self._jobs("queued"):
                target = self.root / "running" / folder.name
                if _fits(folder, entry) and not target.exists():
                    (folder / "attempt").write_text(f"{_attempt(folder) + 1}\n", encoding="utf-8")
                    (folder / "runner").write_text(f"{name}\n", encoding="utf-8")
                    return self._state(folder.rename(target))
        return None

    def finish(self, claimed: JobState, result: str, exit_code: int | None) -> str:
        """Move a job to the done ones; return the result that could be written."""
        with self._locked():
            return self._end(self._find(claimed.job.id), result, exit_code)

    # Inside

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the operating system's errors into ours."""
        try:
            yield
        except PermissionError as error:
            msg = f"this user may not do that in {self.root}: {error}"
            raise CredentialsError(msg) from error
        except OSError as error:
            if not self.root.is_dir():
                raise self._absent() from error
            msg = f"the forge in {self.root} failed: {error}"
            raise RunnerError(msg) from error
        except msgspec.MsgspecError as error:
            msg = f"a file in {self.root / 'runners'} is damaged, delete it: {error}"
            raise RunnerError(msg) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep everybody else from changing anything, with all that is lost swept up."""
        with self._translated(), (self.root / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for name in (*PLACES, "runners"):
                (self.root / name).mkdir(exist_ok=True)
            self._sweep()
            yield

    def _sweep(self) -> None:
        """End the jobs whose agent died without a word."""
        for folder in self._jobs("running"):
            if not self._online(_text(folder / "runner")):
                with suppress(OSError), (folder / "log").open("a", encoding="utf-8") as log:
                    log.write("lost communication with the runner\n")
                self._end(folder, LOST, None)

    def _end(self, folder: Path, result: str, exit_code: int | None) -> str:
        runner = _text(folder / "runner")
        with suppress(OSError):  # a full disk, for one: without a result it has failed
            if exit_code is not None:
                (folder / "exit").write_text(f"{exit_code}\n", encoding="utf-8")
            (folder / "result").write_text(f"{result}\n", encoding="utf-8")
        target = self.root / "done" / folder.name
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
        if (entry := self._entry(runner)) and entry.single:
            self._forget(runner)
        return _progress(target)

    def _forget(self, name: str) -> None:
        for suffix in ("json", "lock"):
            (self.root / "runners" / f"{name}.{suffix}").unlink(missing_ok=True)

    def _entry(self, name: str) -> Entry | None:
        try:
            content = (self.root / "runners" / f"{name}.json").read_bytes()
        except FileNotFoundError:
            return None
        return msgspec.json.decode(content, type=Entry)

    def _online(self, name: str) -> bool:
        """Try the agent's lock; who else might try it is waiting for ours."""
        try:
            with (self.root / "runners" / f"{name}.lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def _busy(self, name: str) -> bool:
        return any(_text(folder / "runner") == name for folder in self._jobs("running"))

    def _runner(self, name: str, entry: Entry) -> Runner:
        return Runner(
            id=entry.id,
            name=name,
            labels=frozenset(entry.labels),
            online=self._online(name),
            busy=self._busy(name),
        )

    def _jobs(self, *places: str) -> list[Path]:
        """List jobs, oldest first; what has no script (yet) isn't one."""
        found = [
            folder
            for place in places
            for folder in (self.root / place).iterdir()
            if (folder / "script").is_file() and not re.search("[\ud800-\udfff]", folder.name)
        ]
        return sorted(found, key=lambda folder: (_number(folder.name), folder.name))

    def _find(self, job: str) -> Path:
        for folder in self._jobs(*PLACES):
            if folder.name == job:
                return folder
        msg = f"there is no job {job} in {self.root}: it can't be run again"
        raise NotFound(msg)

    def _state(self, folder: Path) -> JobState:
        code = _text(folder / "exit")
        job = Job(
            name=re.sub(r"^\d{4,}-", "", folder.name),
            id=folder.name,
            pipeline=folder.name,
            attempt=_attempt(folder),
            runner=_text(folder / "runner"),
            url=(self.root / "done" / folder.name).as_uri(),
        )
        return JobState(
            job=job,
            state=_progress(folder),
            exit_code=int(code) if code.isdecimal() else None,
            log=folder / "log",
        )

    def _absent(self) -> NotFound:
        return NotFound(f"there is no directory {self.root}: make it first, it may be empty")


def _number(job: str) -> int:
    match = re.match(r"(\d{4,})-", job)
    return int(match[1]) if match else 0


def _progress(folder: Path) -> Progress:
    found = _text(folder / "result") if folder.parent.name == "done" else folder.parent.name
    return cast("Progress", found) if found in (*RESULTS, "queued", "running") else "failed"


def _attempt(folder: Path) -> int:
    text = _text(folder / "attempt")
    return int(text) if text.isdecimal() else 0


def _fits(folder: Path, entry: Entry) -> bool:
    text = _text(folder / "labels") or "cml"
    labels = {label.strip() for label in text.split(",") if label.strip()}
    return labels <= set(entry.labels) and os.access(folder, os.W_OK)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""


def _replace(file: Path, content: bytes) -> None:
    new = file.with_suffix(".new")
    new.write_bytes(content)
    new.replace(file)


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
