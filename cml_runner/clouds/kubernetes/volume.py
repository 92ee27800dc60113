"""The volume of a task, from afar: a store whose objects come and go in streams of tar.

They go through one of the task's own pods while one runs, else through a pod which is there only
as long as data move.
"""

from __future__ import annotations

import io
import logging
import shutil
import tarfile
import threading
import weakref
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import IO, TYPE_CHECKING, Any

from cml_runner import store, wait
from cml_runner.clouds.kubernetes import pod
from cml_runner.clouds.kubernetes.stream import Running
from cml_runner.errors import CredentialsError, NotReady, RunnerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cml_runner.clouds.kubernetes.session import Session

log = logging.getLogger(__name__)

LONGEST = 300  # seconds for a pod to come
HOPELESS = ("InvalidImageName", "ImagePullBackOff", "CreateContainerConfigError")
PUT = f"cd {pod.DATA} && exec tar -xof -"
GET = f"cd {pod.DATA} && exec xargs -r tar -cf -"
# Heads and words are small, and all that one has to know to ask for the rest.
LOOK = f"cd {pod.DATA} && find {store.DATA} -type f ! -path '*/b/*' | xargs -r tar -cf -"
PASSING = (0, 123)  # exit codes: all is well; for tar something was gone meanwhile


class Volume(store.Store):
    """The store in one task's claim. What was read is also here, in a temporary directory."""

    def __init__(self, session: Session, task: str) -> None:
        super().__init__(f"kubernetes:{task}/volume")
        self._session, self._task = session, task
        self._lock = threading.RLock()
        self._known = False  # what is there is here, but for blobs
        self._door: tuple[str, weakref.finalize[..., Any]] | None = None
        self._sending: tuple[Running, tarfile.TarFile] | None = None

    @cached_property
    def _place(self) -> Path:
        """A directory that goes with us."""
        path = Path(mkdtemp(prefix="cml-runner-"))
        weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
        return path

    @cached_property
    def _here(self) -> store.Store:
        return store.Store(self._place.as_uri())

    def claim(self, key: str, content: bytes) -> bool:
        """Put an object there; all that was written before is there when this returns."""
        if self.read(key) is not None:
            return False
        self.write(key, content)
        self.flush()
        return True

    def write(self, key: str, content: bytes) -> None:
        """Send an object; it is there after the next claim, or flush."""
        with self._lock:
            if not self._sending:
                running = self._run(PUT)
                archive = tarfile.open(mode="w|", fileobj=_Sink(running))  # noqa: SIM115
                self._sending = running, archive
            info = tarfile.TarInfo(key)
            info.size, info.mode = len(content), 0o644
            self._sending[1].addfile(info, io.BytesIO(content))
            self._known = False

    def flush(self) -> None:
        """Wait until all that was written is there."""
        with self._lock:
            if not self._sending:
                return
            (running, archive), self._sending = self._sending, None
            archive.close()
            running.end()
            running.close()

    def read(self, key: str) -> bytes | None:
        """Return an object's content."""
        content = self.view(key)
        return None if content is None else bytes(content)

    def view(self, key: str, start: int = 0, end: int = 0) -> memoryview | None:
        """Return an object's content, all or a part of it."""
        self._look()
        self.expect([key] if "/b/" in key else [])
        return self._here.view(key, start, end)

    def expect(self, keys: Sequence[str]) -> None:
        """Fetch objects, all in one stream, but for those that are here."""
        with self._lock:
            if missing := [key for key in keys if not Path(self._place, key).exists()]:
                self._fetch(GET, "".join(f"{key}\n" for key in missing).encode())
                # Who asks again for what is gone should see what there is instead.
                self._known = self._known and all(
                    Path(self._place, key).exists() for key in missing
                )

    def keys(self, prefix: str) -> list[str]:
        """List the names of objects, but not of blobs."""
        self._look()
        return self._here.keys(prefix)

    def close(self) -> None:
        """Let go of the pod through which data moved."""
        with self._lock:
            self.flush()
            if self._door:
                self._door[1]()
            self._door = None

    def _look(self) -> None:
        """Fetch all but blobs, unless nothing can have changed since."""
        with self._lock:
            self.flush()
            if not self._known:
                for old in self._here.keys(""):
                    if "/b/" not in old:
                        self._here.delete(old)
                self._fetch(LOOK, b"")
                self._known = True

    def _fetch(self, command: str, names: bytes) -> None:
        """Bring here what a command writes; a pod of the task's may end in the middle of it."""
        try:
            self._receive(command, names)
        except RunnerError as error:
            if self._door:
                raise
            log.debug("trying again: %s", error)
            self._receive(command, names)

    def _receive(self, command: str, names: bytes) -> None:
        running = self._run(command)
        if names:
            running.write(names)
        running.end()
        source = _Source(running)
        try:
            # of very many names xargs makes several archives
            with tarfile.open(mode="r|", fileobj=source, ignore_zeros=True) as archive:
                for one in archive:
                    content = archive.extractfile(one) if one.isreg() else None
                    if content and _safe(one.name):
                        self._keep(one.name, content)
        except tarfile.TarError as error:
            running.close(PASSING)  # which knows better what the trouble is
            if source.read_any:
                msg = f"data can't be moved: {error}"
                raise RunnerError(msg) from error
        running.close(PASSING)

    def _keep(self, name: str, content: IO[bytes]) -> None:
        path = Path(self._place, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}#1")  # which a store doesn't see
        with new.open("wb") as file:
            shutil.copyfileobj(content, file)
        new.replace(path)

    def _run(self, command: str) -> Running:
        """Start a command where the volume is."""
        if not self._door and (name := self._own_pod()):
            try:
                return self._begin(name, command)
            except CredentialsError:
                raise
            except RunnerError as error:  # it has just ended
                log.debug("%s: %s", name, error)
        self._door = self._door or self._new_pod()
        return self._begin(self._door[0], command)

    def _begin(self, name: str, command: str) -> Running:
        return Running(self._session, name, pod.CONTAINER, ["/bin/sh", "-c", command])

    def _own_pod(self) -> str:
        """Find a pod of the task which runs, and will for a while; empty if there is none."""
        for one in self._session.items("pods", labelSelector=f"{pod.TASK}={self._task}"):
            going = "deletionTimestamp" in one["metadata"]
            if one["status"].get("phase") == "Running" and not going:
                return str(one["metadata"]["name"])
        return ""

    def _new_pod(self) -> tuple[str, weakref.finalize[..., Any]]:
        """Have a pod for this alone, which goes with us at the latest."""
        job = self._session.call("GET", "jobs", self._task)
        found = self._session.call("POST", "pods", body=pod.mover(job))
        name = found["metadata"]["name"]
        farewell = weakref.finalize(self, _delete, self._session, name)
        seen: dict[str, Any] = {}

        def runs() -> bool:
            nonlocal seen
            found = self._session.items("pods", fieldSelector=f"metadata.name={name}")
            seen = found[0] if found else {}
            begun = seen.get("status", {}).get("phase") in ("Running", "Failed")
            return begun or bool(_hindrance(seen, HOPELESS))

        try:
            wait.until(runs, "a pod that moves data", LONGEST, every=0.2)
        except NotReady as error:
            farewell()
            msg = f"no pod comes to move data: {_hindrance(seen) or error}"
            raise NotReady(msg) from error
        if reason := _hindrance(seen, HOPELESS):
            farewell()
            msg = f"no pod comes to move data: {reason}"
            raise NotReady(msg)
        return name, farewell


class _Sink(io.RawIOBase):
    """The input of a command, as a file."""

    def __init__(self, running: Running) -> None:
        super().__init__()
        self._running = running

    def write(self, content: Any) -> int:
        return self._running.write(content)


class _Source(io.RawIOBase):
    """The output of a command, as a file."""

    def __init__(self, running: Running) -> None:
        super().__init__()
        self._running = running
        self.read_any = False

    def read(self, size: int = -1) -> bytes:
        found = self._running.read(size)
        self.read_any = self.read_any or bool(found)
        return found


def _hindrance(one: dict[str, Any], reasons: Sequence[str] = ()) -> str:
    """Say why a pod doesn't run, if that is for one of some reasons, or for any."""
    status = one.get("status", {})
    waiting = [
        found["state"]["waiting"]
        for found in status.get("containerStatuses", ())
        if "waiting" in found["state"]
    ]
    unscheduled = [found for found in status.get("conditions", ()) if found["status"] == "False"]
    for found in (*waiting, *([] if reasons else unscheduled)):
        if not reasons or found.get("reason") in reasons:
            return f"{found.get('reason', '')}: {found.get('message', '')}"
    return ""


def _delete(session: Session, name: str) -> None:
    with suppress(RunnerError):
        session.call("DELETE", "pods", name)


def _safe(name: str) -> bool:
    """Know a name of ours: what comes from a pod is somebody else's work."""
    return name.startswith(f"{store.DATA}/") and ".." not in name.split("/")
