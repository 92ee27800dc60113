"""Small objects in the bucket of a task, on whatever cloud it is; the only file that knows obstore.

On one task's bucket meet its launcher, its machines (one after another, if they are interrupted)
and whoever reads its logs later. They tell each other all they know through the objects named here.
"""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from cml_runner.boot.objects import (
    DATA,
    LEFT,
    PRICE,
    RECALL,
    RESUME,
    SETTINGS,
    kept,
    left,
    log,
    place,
    status,
)
from cml_runner.errors import CredentialsError, NotFound, RunnerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime

    from obstore.store import ObjectStore, RetryConfig

    from cml_runner.model import Job

T = TypeVar("T")

# Machines need some names before msgspec and obstore are there.
__all__ = [
    "DATA",
    "LEFT",
    "PRICE",
    "RECALL",
    "RESUME",
    "SETTINGS",
    "kept",
    "left",
    "place",
    "status",
]

PATIENCE: RetryConfig = {"max_retries": 8, "retry_timeout": timedelta(seconds=30)}
SAID = "cml-runner-status: "  # begins a line of a machine's output which holds its model.Status
TOLD = "cml-runner-result: "  # likewise, a model.Result
LABEL = f"{DATA}/task.json"  # what has to be known of them
WORDS = f"{DATA}/words/"  # what machines that speak aloud have said, once they are gone
PUSHED = "push"  # the name of what its launcher has sent; those of machines are their ranks
GONE = ("NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted")
DENIED = (
    *("AccessDenied", "AuthorizationPermissionMismatch", "AuthorizationFailure"),
    *("InvalidAuthenticationInfo", "AuthenticationFailed"),
)
SEGMENT = 64 * 1024  # bytes; objects can't be appended to, so a log is many of them


def result(rank: int) -> str:
    """Name the object that holds a rank's model.Result."""
    return f"result-{rank:03}.json"


def interruption(job: Job) -> str:
    """Name the object that holds a job's model.Interruption."""
    return f"interrupted-{job.key}.json"


class Store:
    """The objects below one URL: file:///…, s3://…, gs://…, az://….

    What follows a "?" are options of the service, as obstore names them: ?region=us-west-2. What
    follows a "#" isn't part of the address. The credentials are a function that returns them in
    obstore's terms; without it, what this machine has by itself is used.

    What doesn't exist (yet) holds nothing. Raises CredentialsError where access is denied,
    RunnerError for whatever else goes wrong.
    """

    def __init__(
        self, url: str, credentials: Callable[[], Mapping[str, Any]] | None = None
    ) -> None:
        self.url = url
        self._credentials = credentials

    @cached_property
    def _store(self) -> ObjectStore:
        from obstore.store import from_url

        parts = urlsplit(self.url)
        if parts.scheme == "file":
            if not Path(unquote(parts.path)).is_dir():
                raise FileNotFoundError(self.url)
            return from_url(self.url)
        options: dict[str, Any] = dict(parse_qsl(parts.query))
        if self._credentials:
            options["credential_provider"] = self._credentials
        address = parts._replace(query="", fragment="").geturl()
        with _translated(self.url):
            return from_url(address, retry_config=PATIENCE, **options)

    def claim(self, key: str, content: bytes) -> bool:
        """Put an object there unless there is one; False if there is. Only one of many wins."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            with _translated(self.url):
                obstore.put(self._store, key, content, mode="create", use_multipart=False)
        except FileNotFoundError as error:
            raise self._gone() from error
        except RunnerError as error:
            if isinstance(error.__cause__, AlreadyExistsError):
                return False
            raise
        return True

    def read(self, key: str) -> bytes | None:
        """Return an object's content; None if there is no such object."""
        import obstore

        with suppress(FileNotFoundError), _translated(self.url):
            return bytes(obstore.get(self._store, key).bytes())
        return None

    def view(self, key: str, start: int = 0, end: int = 0) -> memoryview | None:
        """Return an object's content, all or a part of it, without copying it; None likewise."""
        import obstore

        with suppress(FileNotFoundError), _translated(self.url):
            if end:
                return memoryview(obstore.get_range(self._store, key, start=start, end=end))
            return memoryview(obstore.get(self._store, key).bytes())
        return None

    def write(self, key: str, content: bytes) -> None:
        """Put an object there at once as a whole, in place of an older one."""
        import obstore

        try:
            with _translated(self.url):
                obstore.put(self._store, key, content, use_multipart=False)
        except FileNotFoundError as error:
            raise self._gone() from error

    def delete(self, key: str) -> None:
        """Remove an object; absent is removed already."""
        import obstore

        with suppress(FileNotFoundError), _translated(self.url):
            obstore.delete(self._store, key)

    def expect(self, keys: Sequence[str]) -> None:
        """Learn which objects will be viewed next."""

    def outlive(self, beyond: Store) -> None:
        """Learn of a store for what is to be kept, unless it is kept here."""

    def remove(self, keys: Sequence[str]) -> None:
        """Remove many objects; absent is removed already."""
        import obstore

        try:
            with _translated(self.url):
                if keys:
                    obstore.delete(self._store, keys)
        except FileNotFoundError:  # some services stop at the first that is absent
            for key in keys:
                self.delete(key)

    def keys(self, prefix: str) -> list[str]:
        """List the names of the objects whose name begins with a prefix, sorted.

        Objects in folders, a/b, are listed if the prefix names their folder, a/, or is empty.
        """
        return list(self.written(prefix))

    def written(self, prefix: str) -> dict[str, datetime]:
        """Say of the same objects when each was written last, by the clock of who keeps them."""
        import obstore

        folder, slash, _ = prefix.rpartition("/")
        with suppress(FileNotFoundError), _translated(self.url):
            if slash or not prefix:
                listed = obstore.list(self._store, prefix=folder + slash or None).collect()
            else:  # there may be very many in folders
                listed = obstore.list_with_delimiter(self._store)["objects"]
            found = {one["path"]: one["last_modified"] for one in listed}
            return {name: found[name] for name in sorted(found) if name.startswith(prefix)}
        return {}

    def when(self, key: str) -> datetime | None:
        """Say when an object was written last; None if there is no such object."""
        import obstore

        with suppress(FileNotFoundError), _translated(self.url):
            found: datetime = obstore.head(self._store, key)["last_modified"]
            return found
        return None

    def there(self) -> bool:
        """Say if there is such a bucket, whatever is in it."""
        import obstore

        with suppress(FileNotFoundError), _translated(self.url):
            next(iter(obstore.list(self._store, prefix="doctor")), None)
            return True
        return False

    def load(self, key: str, kind: type[T]) -> T | None:
        """Return a dataclass that was saved; None if there is no such object."""
        content = self.read(key)
        return None if content is None else decoded(content, kind, f"{self.url}/{key}")

    def save(self, key: str, value: Any) -> None:
        """Keep a dataclass."""
        self.write(key, encoded(value))

    def log(self, rank: int) -> str:
        """Return all that a machine, and those in whose place it came, have logged so far."""
        parts = (self.read(key) or b"" for key in self.keys(log(rank)))
        return b"".join(parts).decode(errors="replace")

    def ranks(self) -> list[int]:
        """List the machines which have said anything yet."""
        told = (*self.keys("log-"), *self.keys("status-"))
        return sorted({int(key.split("-")[1].split(".")[0]) for key in told})

    def _gone(self) -> NotFound:
        return NotFound(f"{self.url} is gone")


class Said(Store):  # design 33
    """A directory of a machine that can write nowhere else, said:///DIRECTORY.

    What others must know it says aloud: its status and its result on stdout, whenever there is
    news. (Its log is on stderr in any case.) What has to outlive the machine is in another store,
    if there is one: ?data=/DIRECTORY, or one of the user's own.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        super().__init__(parts._replace(scheme="file", query="").geturl())
        beyond = dict(parse_qsl(parts.query)).get("data")
        self._beyond = Store(Path(beyond).as_uri()) if beyond else None
        self._own = Store(self.url)
        self._last: dict[str, Any] = {}

    def outlive(self, beyond: Store) -> None:
        """Keep there what is to be kept."""
        if beyond is not self:
            self._beyond = beyond

    def claim(self, key: str, content: bytes) -> bool:
        """Put an object there unless there is one; say it if it is a result."""
        store, name = self._place(key)
        new = store.claim(name, content)
        if new and key.startswith("result-"):
            print(TOLD + content.decode(), flush=True)
        return new

    def read(self, key: str) -> bytes | None:
        """Return an object's content."""
        store, name = self._place(key)
        return store.read(name)

    def view(self, key: str, start: int = 0, end: int = 0) -> memoryview | None:
        """Return an object's content, all or a part of it."""
        store, name = self._place(key)
        return store.view(name, start, end)

    def write(self, key: str, content: bytes) -> None:
        """Write an object; say it as well if it is a status."""
        if key.startswith("status-"):
            news = msgspec.json.decode(content)
            if {**news, "at": ""} != {**self._last, "at": ""}:
                print(SAID + content.decode(), flush=True)
            self._last = news
        store, name = self._place(key)
        store.write(name, content)

    def delete(self, key: str) -> None:
        """Remove an object."""
        store, name = self._place(key)
        store.delete(name)

    def remove(self, keys: Sequence[str]) -> None:
        """Remove many objects, all of them in one place."""
        found = [self._place(key) for key in keys]
        if found:
            found[0][0].remove([name for _, name in found])

    def keys(self, prefix: str) -> list[str]:
        """List the names of objects."""
        store, name = self._place(prefix)
        return [prefix + key.removeprefix(name) for key in store.keys(name)]

    def _place(self, key: str) -> tuple[Store, str]:
        """Say in which store an object is, and under which name."""
        if self._beyond is None or not kept(key):
            return self._own, key
        return self._beyond, key if key.startswith(f"{DATA}/") else f"{WORDS}{key}"


class Log:
    """The log of one machine, as it is being written: a list of objects of bounded size."""

    def __init__(self, store: Store, rank: int, epoch: int | None = None) -> None:
        """Go on where others have ended; with an epoch they may go on writing, too."""
        self._store = store
        self._prefix = log(rank) + ("" if epoch is None else f"{epoch:06}-")
        self._number = len(store.keys(self._prefix))
        self._new: deque[bytes] = deque()  # taken by any thread, written by one
        self._text = b""
        self._dirty = False

    def append(self, text: str) -> None:
        """Add some text; it is safe after the next flush."""
        self._new.append(text.encode(errors="replace"))

    def flush(self) -> None:
        """Write what is new. What can't be written now will be with the next flush."""
        while self._new:
            self._text += self._new.popleft()
            self._dirty = True
        while self._dirty:
            part = self._text[:SEGMENT]
            self._store.write(f"{self._prefix}{self._number:06}.txt", part)
            self._dirty = len(part) == SEGMENT and len(self._text) > SEGMENT
            if len(part) == SEGMENT:
                self._text = self._text[SEGMENT:]
                self._number += 1


def opened(url: str) -> Store:
    """Open the bucket of the machine that we are on."""
    return Said(url) if url.startswith("said:") else Store(url)


def encoded(value: Any) -> bytes:
    """Write a dataclass as it is saved."""
    return msgspec.json.encode(value)


def decoded(content: bytes, kind: type[T], what: str) -> T:
    """Read a dataclass that was saved. Raises RunnerError."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.MsgspecError as error:
        msg = f"{what} was damaged, or written by another version: {error}"
        raise RunnerError(msg) from error


@contextmanager
def _translated(url: str) -> Iterator[None]:
    from obstore import exceptions

    try:
        yield
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        msg = f"no access to {url}: {_first_line(error)}"
        raise CredentialsError(msg) from error
    except (exceptions.BaseError, PermissionError) as error:
        # What S3 and Azure say isn't understood everywhere.
        if any(code in str(error) for code in GONE):
            raise FileNotFoundError(url) from error
        if any(code in str(error) for code in DENIED):
            msg = f"no access to {url}: {_first_line(error)}"
            raise CredentialsError(msg) from error
        msg = f"{url}: {_first_line(error)}"
        raise RunnerError(msg) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
