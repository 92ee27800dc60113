from __future__ import annotations

import os
import random
import threading
import time
from itertools import count
from typing import TYPE_CHECKING

import pytest

from cml_runner.errors import RunnerError
from cml_runner.transfer import Fenced, History, Writer, restore
from cml_runner.transfer.snapshot import GRACE, SCRAPS, SMALL
from cml_runner.transfer.upload import CHUNK
from tests.transfer.conftest import begin, listing, reader

if TYPE_CHECKING:
    from pathlib import Path

    from cml_runner.store import Store
    from tests.lab.objects import Objects

NAMES = (
    "plain",
    "with space",
    "line\nbreak",
    "ünïcode ✓",
    "-dash",
    "*glob?[a]",
    "tab\t",
    "%41#&=+",
)


def there_and_back(bucket: Store, target: Path) -> None:
    history = reader(bucket)
    manifest = history.latest()
    assert manifest
    restore(history, manifest, target)


def fill(source: Path) -> None:
    for name in NAMES:
        (source / name).mkdir()
        (source / name / name).write_text(name)
    undecodable = os.fsencode(source) + b"/\xff\xfe"
    with open(undecodable, "wb") as file:
        file.write(b"odd")
    (source / "empty directory").mkdir()
    (source / "empty").touch()
    (source / "large").write_bytes(random.Random(1).randbytes(2 * CHUNK + 17))
    (source / "middle").write_bytes(random.Random(2).randbytes(SMALL))
    (source / "script").write_text("#!/bin/sh")
    (source / "script").chmod(0o751)
    (source / "link").symlink_to("plain/plain")
    (source / "dangling").symlink_to("/nowhere/at all")
    (source / "to directory").symlink_to("plain")
    os.mkfifo(source / "pipe")
    (source / "locked").mkdir()
    (source / "locked" / "inside").write_text("x")
    (source / "locked").chmod(0o555)
    os.utime(source / "script", ns=(10**18 + 7, 10**18 + 7))


def test_everything_survives(bucket: Store, source: Path, tmp_path: Path) -> None:
    fill(source)
    seen: list[tuple[int, int]] = []
    outcome = begin(bucket, source).snapshot(lambda *one: seen.append(one))
    assert (outcome.changed, outcome.steady, outcome.left_out) == (True, True, ())
    assert seen[-1][0] == seen[-1][1] > 2 * CHUNK
    there_and_back(bucket, tmp_path / "target")
    (source / "pipe").unlink()
    assert listing(tmp_path / "target") == listing(source)


def test_changes_and_deletions(bucket: Store, source: Path, tmp_path: Path) -> None:
    fill(source)
    writer = begin(bucket, source)
    writer.snapshot()
    (source / "empty").write_text("no more")
    (source / "plain" / "plain").unlink()
    (source / "script").unlink()
    (source / "script").mkdir()
    with (source / "large").open("ab") as file:
        file.write(b"more")
    assert writer.snapshot().changed
    (source / "middle").chmod(0o600)
    assert writer.snapshot().changed
    (source / "pipe").unlink()
    there_and_back(bucket, tmp_path / "target")
    assert listing(tmp_path / "target") == listing(source)


def test_without_changes_there_is_one_request(far: Objects, source: Path, tmp_path: Path) -> None:
    from cml_runner.store import Store

    bucket = Store("s3://bucket?region=us-east-1")
    fill(source)
    writer = begin(bucket, source)
    writer.snapshot()
    far.requests.clear()
    assert not writer.snapshot().changed
    assert [one.split()[0] for one in far.requests] == ["GET"]
    # Nor on a machine that has just restored it.
    there_and_back(bucket, tmp_path / "target")
    after = begin(bucket, tmp_path / "target")
    manifest = after.history.latest()
    assert manifest
    after.adopt(manifest)
    far.requests.clear()
    assert not after.snapshot().changed
    assert len(far.requests) == 1
    (tmp_path / "target" / "middle").write_text("new")
    after.snapshot()
    sent = [one for one in far.requests if one.startswith("PUT")]
    assert len(sent) == 2, "one blob and one head"


def test_excludes(bucket: Store, source: Path, tmp_path: Path) -> None:
    for name in ("main.tf", "data/raw", "data/fine", "sub/cache/x", "sub/main.tf", "a.tmp"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    begin(bucket, source, "data/raw", "- cache/", "*.tmp").snapshot()
    there_and_back(bucket, tmp_path / "target")
    files = {os.fsdecode(path) for path in listing(tmp_path / "target")}
    assert files == {"data", "data/fine", "sub", "sub/main.tf"}


def test_what_changes_while_it_is_read_is_never_half_stored(
    bucket: Store, source: Path, tmp_path: Path
) -> None:
    """Two files are exchanged, one after the other, all the time."""
    over = threading.Event()
    sizes = {"first": SMALL, "second": 1000}

    def change() -> None:
        pauses = random.Random(3)
        for number in range(1_000_000):
            for name, size in sizes.items():
                (source / "new").write_bytes(number.to_bytes(4, "big") * (size // 4))
                (source / "new").replace(source / name)
            if over.wait(pauses.random() / 3):
                return

    thread = threading.Thread(target=change)
    thread.start()
    try:
        writer = begin(bucket, source, "/new")
        numbers: dict[str, int] = {}
        for number in count():
            outcome = writer.snapshot()
            numbers = restored(bucket, tmp_path / f"target-{number}", sizes)
            if outcome.steady and len(numbers) == 2:
                assert numbers["first"] - numbers["second"] in (0, 1), "this never was on the disk"
            if numbers.get("first", 0) > 7:
                break
    finally:
        over.set()
        thread.join()
    writer.snapshot()
    numbers = restored(bucket, tmp_path / "target", sizes)
    assert numbers["first"] == numbers["second"] > 7


def restored(bucket: Store, target: Path, sizes: dict[str, int]) -> dict[str, int]:
    """Read what the files say, each of which must be whole."""
    there_and_back(bucket, target)
    numbers = {}
    for name, size in sizes.items():
        if (target / name).exists():
            content = (target / name).read_bytes()
            assert content == content[:4] * (size // 4), "it is torn"
            numbers[name] = int.from_bytes(content[:4], "big")
    return numbers


def test_a_file_that_never_holds_still_stays_what_it_was(
    bucket: Store, source: Path, tmp_path: Path
) -> None:
    (source / "log").write_text("first")
    (source / "calm").write_text("calm")
    writer = begin(bucket, source)
    writer.snapshot()
    over = threading.Event()

    def write() -> None:
        with (source / "log").open("a") as file:
            while not over.is_set():
                file.write("x")
                file.flush()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        (source / "calm").write_text("changed")
        outcome = writer.snapshot()
    finally:
        over.set()
        thread.join()
    assert outcome.changed
    there_and_back(bucket, tmp_path / "target")
    assert (tmp_path / "target" / "calm").read_text() == "changed"
    assert {why for _, why in outcome.left_out} <= {"it changes all the time"}
    assert (tmp_path / "target" / "log").read_text().startswith("first")


def test_two_changes_within_one_time_stamp(bucket: Store, source: Path, tmp_path: Path) -> None:
    file = source / "file"
    file.write_text("1")
    writer = begin(bucket, source)
    for number in "2345678":
        at = file.stat().st_mtime_ns
        file.write_text(number)
        os.utime(file, ns=(at, at))
        writer.snapshot()
        there_and_back(bucket, tmp_path / number)
        assert (tmp_path / number / "file").read_text() == number


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_wrong(
    bucket: Store, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """Whose clock is an hour off is neither newer nor older for that."""
    real, wrong = time.time_ns, hours * 3600 * 10**9
    (source / "file").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: real() + wrong)
        old = begin(bucket, source)
        old.snapshot()
    new = begin(bucket, source)
    (source / "file").write_text("new")
    new.snapshot()
    (source / "file").write_text("from the grave")
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: real() + wrong)
        with pytest.raises(Fenced):
            old.snapshot()
    there_and_back(bucket, tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "new"


def test_who_returns_from_the_dead_changes_nothing(
    bucket: Store, source: Path, tmp_path: Path
) -> None:
    (source / "file").write_text("one")
    old = begin(bucket, source, machine="old")
    old.snapshot()
    there_and_back(bucket, tmp_path / "other")
    new = begin(bucket, tmp_path / "other", machine="new")
    (source / "file").write_text("two, from the grave")
    for _ in range(2):
        with pytest.raises(Fenced):
            old.snapshot()
    assert new.history.epoch == old.history.epoch + 1
    (tmp_path / "other" / "file").write_text("two, alive")
    new.snapshot()
    there_and_back(bucket, tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "two, alive"
    with pytest.raises(Fenced):
        old.snapshot()


def test_two_that_take_over_at_once(bucket: Store, source: Path) -> None:
    histories = [History(bucket, "data", "000", str(number)) for number in range(8)]
    threads = [threading.Thread(target=one.take) for one in histories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.epoch for one in histories) == list(range(1, 9))
    fenced = 0
    for history in sorted(histories, key=lambda one: one.epoch):
        try:
            Writer(history, source).snapshot()
        except Fenced:
            fenced += 1
    assert fenced == 7


def test_blobs_are_deleted_when_nobody_needs_them(bucket: Store, source: Path) -> None:
    now = 0.0
    large, small = source / "large", source / "small"

    def blobs() -> int:
        return len(bucket.keys("data/000/b/"))

    writer = begin(bucket, source, clock=lambda: now)
    contents = [random.Random(one).randbytes(SMALL) for one in range(2)]
    for number in (0, 1, 0):
        large.write_bytes(contents[number])
        writer.snapshot()
    assert blobs() == 2
    now = GRACE - 1
    small.write_text("1")
    writer.snapshot()
    assert blobs() == 3
    now = GRACE + 1
    small.write_text("2")
    writer.snapshot()
    assert blobs() == 3, "the first one is needed again, the second is not"
    history = reader(bucket)
    manifest = history.latest()
    assert manifest
    for entry in manifest.entries:
        assert [history.get(piece.blob) for piece in entry.pieces]
    # Who takes over deletes what the one before could not.
    now = 0.0
    after = begin(bucket, source, clock=lambda: now)
    after.adopt(manifest)
    after.snapshot()
    now = GRACE + 1
    left = set(bucket.keys("data/000/b/"))
    after.snapshot()
    small.write_text("3")
    after.snapshot()
    assert blobs() == 3, "two, and the one that has just become needless"
    assert left - set(bucket.keys("data/000/b/"))
    assert len(bucket.keys("data/000/h/")) <= 5


def test_scraps_are_put_together(bucket: Store, source: Path, tmp_path: Path) -> None:
    writer = begin(bucket, source)
    for number in range(SCRAPS + 3):
        (source / f"{number}").write_text(str(number))
        writer.snapshot()
    writer.snapshot()
    manifest = reader(bucket).latest()
    assert manifest
    assert len({piece.blob for entry in manifest.entries for piece in entry.pieces}) < 5
    assert not writer.snapshot().changed
    there_and_back(bucket, tmp_path / "target")
    assert listing(tmp_path / "target") == listing(source)


def test_a_bucket_that_fails_every_third_time(far: Objects, source: Path, tmp_path: Path) -> None:
    from cml_runner.store import Store

    bucket = Store("s3://bucket?region=us-east-1")
    fill(source)
    far.every = 3
    writer = begin(bucket, source)
    writer.snapshot()
    (source / "empty").write_text("changed")
    writer.snapshot()
    there_and_back(bucket, tmp_path / "target")
    (source / "pipe").unlink()
    assert listing(tmp_path / "target") == listing(source)


def test_what_was_damaged_is_noticed(bucket: Store, source: Path, tmp_path: Path) -> None:
    (source / "file").write_bytes(b"x" * SMALL)
    begin(bucket, source).snapshot()
    (key,) = bucket.keys("data/000/b/")
    bucket.write(key, b"y" * SMALL)
    with pytest.raises(RunnerError, match="damaged"):
        there_and_back(bucket, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    bucket.delete(key)
    with pytest.raises(FileNotFoundError):
        there_and_back(bucket, tmp_path / "target")
    assert sorted(one.name for one in tmp_path.iterdir() if one.name != "bucket") == ["source"]
