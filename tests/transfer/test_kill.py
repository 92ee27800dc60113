"""Whoever is killed, at whatever moment: what is restored has been there, and nothing safe is lost.

A helper process forks writers, which have everything imported, and kills them at random moments.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cml_runner.transfer import restore
from tests.transfer.conftest import reader

if TYPE_CHECKING:
    from pathlib import Path

    from cml_runner.store import Store

TIMES = 100
SIZE = 5 << 20  # bytes of the large file: two blobs

HELPER = """
import os, signal, sys, time
from pathlib import Path
from cml_runner.store import Store
from cml_runner import transfer
import obstore, obstore.store, pathspec

url, size, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])

def work(report):
    history = transfer.History(Store(url), "data", "000", str(os.getpid()))
    history.take()
    place = directory / str(os.getpid())
    manifest = history.latest()
    if manifest:
        transfer.restore(history, manifest, place)
    else:
        place.mkdir()
    writer = transfer.Writer(history, place)
    if manifest:
        writer.adopt(manifest)
    number = int((place / "counter").read_text()) if manifest else 0
    os.write(report, b"restored %d\\n" % number)
    while True:
        number += 1
        (place / "large").write_bytes(number.to_bytes(4, "big") * (size // 4))
        (place / "counter").write_text(str(number))
        (place / f"file {number}").touch()
        (place / f"file {number - 1}").unlink(missing_ok=True)
        writer.snapshot()
        os.write(report, b"safe %d\\n" % number)

usual = 0.0  # seconds until two snapshots are safe, on this computer now
for line in sys.stdin:
    start = time.monotonic()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        work(write)
    os.close(write)
    report = os.fdopen(read)
    said = []
    if not usual:
        said = [report.readline().strip() for _ in range(3)]
        usual = time.monotonic() - start
    else:
        time.sleep(usual * float(line))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said += report.read().split("\\n")
    print(" ".join(said), flush=True)
"""


@pytest.mark.parametrize("bucket", ["disk", "far"], indirect=True)
def test_kill_at_random_moments(bucket: Store, tmp_path: Path) -> None:
    moments = random.Random(20)
    (tmp_path / "machines").mkdir()
    command = (sys.executable, "-c", HELPER, bucket.url, str(SIZE), str(tmp_path / "machines"))
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    ) as helper:
        assert helper.stdin
        assert helper.stdout
        safe = reached = 0
        for number in range(TIMES // 2):
            print(1.2 * moments.random(), file=helper.stdin, flush=True)
            words = helper.stdout.readline().split()
            said = [(words[at], int(words[at + 1])) for at in range(0, len(words) - 1, 2)]
            for what, count in said:
                if what == "restored":
                    assert safe <= count <= reached + 1, "work is lost"
                safe = max(safe, count)
            reached = max(reached, safe)
            if number % 5 == 0 and reached:
                reached = max(reached, check(bucket, tmp_path / f"target-{number}", safe))
        helper.stdin.close()
    assert safe > 1, "nothing was ever safe"


def check(bucket: Store, target: Path, safe: int) -> int:
    """Restore; see that all in it belongs together."""
    history = reader(bucket)
    manifest = history.latest()
    assert manifest
    restore(history, manifest, target)
    number = int((target / "counter").read_text())
    assert number >= safe, "work is lost"
    assert {one.name for one in target.iterdir()} == {"counter", "large", f"file {number}"}
    content = (target / "large").read_bytes()
    assert content == number.to_bytes(4, "big") * (SIZE // 4)
    return number
