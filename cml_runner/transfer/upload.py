"""Content on its way into a bucket."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from cml_runner.transfer.manifest import Blob, Piece
from cml_runner.transfer.tree import content

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.transfer.history import History

    Progress = Callable[[int, int], None]  # bytes that are done, of how many

CHUNK = 4 << 20  # bytes of a blob at most: design 40
AT_ONCE = 6  # blobs under way: with their size, what decides how much memory is needed


class Upload:
    """Content on its way into the bucket, so much at a time that it doesn't take much memory."""

    def __init__(
        self, history: History, known: dict[str, Blob], total: int, progress: Progress
    ) -> None:
        self._history, self._known, self._total, self._progress = history, known, total, progress
        self._done = 0
        self._lock = threading.Lock()
        self._room = threading.Semaphore(AT_ONCE)
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="upload")
        self._files = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="file")

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)

    def file(self, work: Callable[..., None], *arguments: object) -> Future[None]:
        """Do some work on a file, at the same time as on others."""
        return self._files.submit(work, *arguments)

    def send(self, content: bytes) -> Future[Blob]:
        """Send some content, as soon as there is room for it."""
        self._room.acquire()
        future = self._pool.submit(self._put, content)
        future.add_done_callback(lambda _: self._room.release())
        return future

    def pieces(self, number: int, size: int) -> tuple[Piece, ...]:
        """Send an open file, piece by piece. Raises Changing."""

        def put(start: int) -> Piece:
            length = min(CHUNK, size - start)
            return Piece(self._put(content(number, length, start)), 0, length)

        futures = [self._pool.submit(put, start) for start in range(0, size, CHUNK)]
        wait(futures)  # before the file is closed
        return tuple(future.result() for future in futures)

    def _put(self, content: bytes) -> Blob:
        digest = hashlib.sha256(content).hexdigest()
        blob = self._known.get(digest)
        if blob is None:
            blob = self._known[digest] = self._history.put(content, digest)
        with self._lock:
            self._done += len(content)
            self._progress(self._done, self._total)
        return blob
