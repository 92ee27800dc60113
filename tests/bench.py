"""How fast and how small the program is: `python tests/bench.py` prints a table.

It judges nothing and never fails; what can't be measured is said to be so. Everything happens in
a directory of its own below the temporary one, and is ended and removed afterwards.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.worlds import World

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = str(Path(sys.executable).parent / "cml-runner")
TIMES = 7  # how often something short is run
IDLE = 5.0  # seconds for which an idle process is watched
SETTLING = 3.0  # seconds from "online" until nothing happens any more


class Bench:
    """A home of its own, and the results so far."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        kept = ("PATH", "LANG", "TMPDIR", "PYTHONPATH")
        self.environment = {name: os.environ[name] for name in kept if name in os.environ}
        self.environment |= {"HOME": str(root), "CML_RUNNER_HOME": str(self.home)}

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> tuple[float, str]:
        """Run a program; return how long it took, and what it printed."""
        start = time.perf_counter()
        done = subprocess.run(
            command,
            env={**self.environment, **(environment or {})},
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        spent = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
        return spent, done.stdout

    def usual(self, *command: str) -> float:
        """How long a short program usually takes, once its files are in memory."""
        return median([self.run(*command)[0] for _ in range(TIMES + 1)][1:])

    def processes(self) -> Iterator[psutil.Process]:
        """All that runs on our machines or looks after them, and nobody else's."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                own = process.environ()
                machine = own.get("LOCAL_CLOUD_MACHINE", "").startswith(str(self.home))
                if machine or own.get("CML_RUNNER_HOME") == str(self.home):
                    yield process

    def find(self, *words: str) -> psutil.Process:
        for process in self.processes():
            with suppress(psutil.Error):
                if all(word in process.cmdline() for word in words):
                    return process
        msg = f"no process {' '.join(words)}"
        raise RuntimeError(msg)

    def end(self) -> None:
        """End whatever a failed measurement has left."""
        patience = time.monotonic() + 10
        while left := list(self.processes()):
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            if time.monotonic() > patience:
                return
            time.sleep(0.05)


def show(what: str, *values: str, aim: str = "") -> None:
    cells = "".join(f"{value:>12}" for value in values)
    print(f"{what:44}{cells}{f'   aim: {aim}' if aim else ''}", flush=True)


@contextmanager
def tried(what: str) -> Iterator[None]:
    """Go on after a failure, whatever it is."""
    try:
        yield
    except Exception as error:
        show(what, "failed:", f" {error}")


def start_up(bench: Bench) -> None:
    importing = "import time; s = time.perf_counter(); import cml_runner.cli; "
    importing += "print(time.perf_counter() - s)"
    with tried("start-up"):
        show("python, doing nothing", seconds(bench.usual(sys.executable, "-c", "pass")))
        imports = [float(bench.run(sys.executable, "-c", importing)[1]) for _ in range(TIMES)]
        show("import cml_runner.cli", seconds(median(imports)))
        for arguments in (("--version",), ("launch", "--help")):
            spent = bench.usual(PROGRAM, *arguments)
            show(f"cml-runner {' '.join(arguments)}", seconds(spent), aim="100 ms")
        show("cml-runner list", seconds(bench.usual(PROGRAM, "list")))


def launches(bench: Bench, world: World, forge: str, *counts: int) -> None:
    """Launch, wait until it is online, watch it being idle, and destroy it."""
    for count in counts:
        what = f"{count} machine{'s' * (count > 1)}, {forge}"
        more = ("--name", f"bench-{count}", "--count", str(count), "--idle-timeout", "never")
        with tried(what):
            arguments = ("launch", "--repo", world.repo, "--cloud", "local", *more)
            spent, out = bench.run(PROGRAM, *arguments, environment=world.environment)
            fields: dict[str, Any] = json.loads(out)
            show(f"launch to online: {what}", seconds(spent), aim="2 s" if count == 1 else "")
            if count == 1:
                idle(bench, forge)
            spent, _ = bench.run(PROGRAM, "destroy", fields["id"])
            show(f"destroy: {what}", seconds(spent))
        bench.end()


def idle(bench: Bench, forge: str) -> None:
    time.sleep(SETTLING)
    supervisor = bench.find("cml_runner.supervise")
    watched = {"supervisor": supervisor, "keeper": bench.find("cml_runner.clouds.local")}
    watched |= {f"agent ({one.name()})": one for one in supervisor.children()}
    before = {name: cpu(process) for name, process in watched.items()}
    start = time.monotonic()
    time.sleep(IDLE)
    passed = time.monotonic() - start
    for name, process in watched.items():
        share = (cpu(process) - before[name]) / passed
        megabytes = f"{process.memory_info().rss / 1e6:.1f} MB"
        aim = "60 MB, 1 % of a core" if name == "supervisor" else ""
        show(f"idle {name}: {forge}", megabytes, percent(share, passed), aim=aim)


def percent(share: float, passed: float) -> str:
    """A share of a core; the system counts a process's time in ticks."""
    tick = 1 / os.sysconf("SC_CLK_TCK") / passed
    return f"{share:.1%}" if share >= tick else f"< {tick:.1%}"


def cpu(process: psutil.Process) -> float:
    """Seconds of a core that it has used, with what it has started and waited for."""
    used = process.cpu_times()
    return float(used.user + used.system + used.children_user + used.children_system)


def seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def measure(bench: Bench) -> None:
    from tests import bench_aws, bench_azure, bench_gcp, bench_kubernetes
    from tests.worlds import WORLDS, Local

    python = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"{python} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores\n")
    start_up(bench)
    with tried("local forge"):
        launches(bench, Local(bench.root), "local forge", 1, 10)
    for forge in ("github", "gitlab", "bitbucket"):
        with tried(forge), closing(WORLDS[forge](bench.root)) as world:
            launches(bench, world, forge, 1)
    with tried("AWS"):
        bench_aws.launches(bench.run, show, PROGRAM, Local(bench.root).repo)
    with tried("Azure"):
        bench_azure.launches(bench.run, show, PROGRAM, Local(bench.root).repo)
    with tried("Google Cloud"):
        bench_gcp.launches(bench.run, show, PROGRAM, Local(bench.root).repo)
    with tried("the program's wheel"):
        bench_aws.wheels(show)
    with tried("AWS, in the lab"):
        bench_aws.boots(show)
    with tried("Kubernetes, in the lab"):
        bench_kubernetes.launches(show)


@contextmanager
def closing(world: World) -> Iterator[World]:
    try:
        yield world
    finally:
        world.leave_alone()


def main() -> None:
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(
        prefix="cml-runner-bench-", ignore_cleanup_errors=True
    ) as root:
        bench = Bench(Path(root).resolve())
        try:
            measure(bench)
        finally:
            bench.end()


if __name__ == "__main__":
    main()
