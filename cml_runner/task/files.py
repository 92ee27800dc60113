"""The data of a task: sent before its machines come, fetched whenever somebody wants them."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cml_runner import store
from cml_runner.errors import AlreadyExists, ConfigurationError, NotFound, RunnerError
from cml_runner.transfer import Entry, History, Writer, merge
from cml_runner.transfer.manifest import DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cml_runner.store import Store
    from cml_runner.task.options import Order

    Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)

LABEL = store.LABEL
TRIES = 3  # of fetching what changes meanwhile


@dataclass(frozen=True, kw_only=True)
class Label:
    """What has to be known of a task's data, in the bucket beside them."""

    count: int
    output: str  # what is to be fetched, relative to the directory; empty: all that is new
    host: str  # where they come from …
    directory: str  # … and from which directory
    container: str = ""  # where they are, if it's not in the task's own bucket
    container_options: dict[str, str] = field(default_factory=dict)


def push(bucket: Store, data: Store, order: Order, progress: Progress) -> None:
    """Send the working directory.

    Raises ConfigurationError for what can't be read, AlreadyExists if others' data are there.
    """
    if data is not bucket and data.keys(f"{store.DATA}/"):
        msg = f"--storage-container {order.container} holds the data of another task: destroy that"
        raise AlreadyExists(msg)
    label = Label(
        count=order.count,
        output=order.output,
        host=socket.gethostname(),
        directory=str(order.workdir),
        container=order.container,
        container_options=dict(order.container_options),
    )
    bucket.save(LABEL, label)
    history = History(data, store.DATA, store.PUSHED, socket.gethostname())
    history.take()
    outcome = Writer(history, order.workdir, order.rules).snapshot(progress)
    if outcome.left_out:
        listed = (f"{path}: {why}: exclude it, or try again" for path, why in outcome.left_out)
        raise ConfigurationError(*listed)
    if not outcome.steady:
        log.warning("%s changes all the time: it may not have been sent as a whole", order.workdir)


def label(bucket: Store) -> Label:
    """Read it. Raises NotFound."""
    found = bucket.load(LABEL, Label)
    if found is None:
        msg = "this task has no data"
        raise NotFound(msg)
    return found


def home(label: Label, name: str) -> Path:
    """Say where results belong: where the data came from, or in a directory of their own."""
    origin = Path(label.directory)
    if label.host == socket.gethostname() and origin.is_dir():
        return origin
    return Path(name)


def pull(label: Label, data: Store, directory: Path, progress: Progress) -> int:
    """Fetch what the machines have made so far; return how many files are new here.

    Of several machines the results are put together, or apart if two have made the same file:
    OUTPUT.0, OUTPUT.1 … What fails changes nothing in the directory of one machine's results.
    """
    for _ in range(TRIES):
        try:
            return _pull(label, data, directory, progress)
        except FileNotFoundError:
            log.info("there is something newer: trying again")
    msg = "the data change faster than they can be fetched: stop the task first"
    raise RunnerError(msg)


def _pull(label: Label, data: Store, directory: Path, progress: Progress) -> int:
    sent = {entry.path: entry for entry in _latest(History(data, store.DATA, store.PUSHED))}
    results: dict[int, tuple[History, list[Entry]]] = {}
    elsewhere = False
    for rank in range(label.count):
        history = History(data, store.DATA, f"{rank:03}")
        made = [entry for entry in _latest(history) if _new(entry, sent.get(entry.path))]
        results[rank] = history, _within(made, label.output)
        elsewhere = elsewhere or bool(made)
    if elsewhere and not any(entries for _, entries in results.values()):
        msg = f"the script has made nothing in {label.output}, but elsewhere: nothing is fetched"
        raise RunnerError(msg)
    apart = _clash(entries for _, entries in results.values())
    fetched = 0
    for rank, (history, entries) in results.items():
        if apart:
            place, inner = _apart(entries, label.output, rank)
            found = merge(history, inner, directory / place, progress)
        else:
            found = merge(history, entries, directory, progress)
        fetched += sum(1 for entry in found if entry.kind != DIRECTORY)
    return fetched


def _latest(history: History) -> list[Entry]:
    manifest = history.latest()
    return manifest.entries if manifest else []


def _new(entry: Entry, sent: Entry | None) -> bool:
    """Leave alone what was only sent and brought back: here it may have changed since."""
    if sent and entry.kind == sent.kind == DIRECTORY:
        return False
    return entry != sent


def _within(entries: Iterable[Entry], output: str) -> list[Entry]:
    if not output:
        return list(entries)
    name = os.fsencode(output)
    return [one for one in entries if one.path == name or one.path.startswith(name + b"/")]


def _clash(several: Iterable[Iterable[Entry]]) -> bool:
    """Say if two machines have made different things of one name."""
    files = Counter(
        entry.path for entries in several for entry in entries if entry.kind != DIRECTORY
    )
    return any(number > 1 for number in files.values())


def _apart(entries: Sequence[Entry], output: str, rank: int) -> tuple[str, list[Entry]]:
    """Put a machine's results into a directory of their own."""
    prefix = os.fsencode(output) + b"/" if output else b""
    inner = [
        entry._replace(path=entry.path.removeprefix(prefix))
        for entry in entries
        if entry.path != prefix.rstrip(b"/") or entry.kind != DIRECTORY
    ]
    return f"{output or 'results'}.{rank}", inner
