from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cml_runner.errors import RunnerError
from cml_runner.transfer import Entry, Manifest, merge, restore
from cml_runner.transfer import manifest as manifests
from tests.transfer.conftest import begin, listing, reader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cml_runner.store import Store

KILLED = """
import os, sys
from pathlib import Path
from cml_runner.store import Store
from cml_runner.transfer import History, restore
history = History(Store(sys.argv[1]), "data", "000")
def progress(done, total):
    if done > total / 2:
        os._exit(9)
restore(history, history.latest(), Path(sys.argv[2]), progress)
"""


def latest(bucket: Store) -> Manifest:
    found = reader(bucket).latest()
    assert found
    return found


def test_killed_in_the_middle(bucket: Store, source: Path, tmp_path: Path) -> None:
    for number in range(8):
        (source / f"{number}").write_bytes(os.urandom(1 << 20))
    begin(bucket, source).snapshot()
    target = tmp_path / "target"
    command = (sys.executable, "-c", KILLED, bucket.url, str(target))
    assert subprocess.run(command, check=False).returncode == 9
    assert not target.exists()
    assert list(tmp_path.glob(".target*"))
    restore(reader(bucket), latest(bucket), target)
    assert listing(target) == listing(source)
    assert not list(tmp_path.glob(".target*"))


def test_merging_fetches_what_is_new_and_touches_nothing_else(
    bucket: Store, source: Path, tmp_path: Path
) -> None:
    (source / "sub").mkdir()
    (source / "sub" / "old").write_text("old")
    (source / "sub" / "new").write_text("new")
    (source / "link").symlink_to("sub")
    (source / "locked").mkdir()
    (source / "locked" / "file").write_text("x")
    (source / "locked").chmod(0o500)
    begin(bucket, source).snapshot()
    target = tmp_path / "target"
    (target / "sub").mkdir(parents=True)
    (target / "mine").write_text("mine")
    manifest = latest(bucket)
    assert len(merge(reader(bucket), manifest.entries, target)) == 5
    (target / "sub" / "new").write_text("changed here")
    assert [one.path for one in merge(reader(bucket), manifest.entries, target)] == [b"sub/new"]
    assert merge(reader(bucket), manifest.entries, target) == []
    (target / "mine").unlink()
    assert listing(target).keys() == listing(source).keys()
    assert (target / "sub" / "new").read_text() == "new"


def test_nothing_leads_out_of_the_directory(bucket: Store, source: Path, tmp_path: Path) -> None:
    """Neither names nor links, whether they are in the snapshot or were there."""
    for path in (b"../evil", b"/etc/evil", b"a/../../evil", b"", b"a//b", b"."):
        content = manifests.pack(Manifest([Entry(path, manifests.FILE, 0o600, 0)]))
        with pytest.raises(RunnerError, match="damaged"):
            manifests.unpack(content)
    outside = tmp_path / "outside"
    outside.mkdir()
    link = Entry(b"a", manifests.LINK, 0o777, 0, target=os.fsencode(outside))
    inside = Entry(b"a/evil", manifests.FILE, 0o600, 0)
    with pytest.raises(RunnerError):
        restore(reader(bucket), Manifest([link, inside]), tmp_path / "target")
    (source / "a").mkdir()
    (source / "a" / "file").write_text("x")
    begin(bucket, source).snapshot()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "a").symlink_to(outside)
    merge(reader(bucket), latest(bucket).entries, tmp_path / "target")
    assert list(outside.iterdir()) == []
    assert (tmp_path / "target" / "a" / "file").read_text() == "x"


def test_a_manifest_that_is_cut_off() -> None:
    entries = [Entry(b"%d" % number, manifests.FILE, 0o600, 0) for number in range(12_000)]
    content = manifests.pack(Manifest(entries))
    assert manifests.unpack(content).entries == entries
    for length in (0, 1, len(content) // 2, len(content) - 1):
        with pytest.raises(RunnerError, match="damaged"):
            manifests.unpack(content[:length])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("the lab needs root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place), check=True)
    yield place
    subprocess.run(("umount", place), check=True)


@pytest.mark.lab
def test_a_disk_that_is_full(bucket: Store, source: Path, small_disk: Path) -> None:
    for number in range(8):
        (source / f"{number}").write_bytes(os.urandom(1 << 20))
    begin(bucket, source).snapshot()
    with pytest.raises(RunnerError, match="No space left"):
        restore(reader(bucket), latest(bucket), small_disk / "target")
    assert list(small_disk.iterdir()) == []
    with pytest.raises(RunnerError, match="No space left"):
        merge(reader(bucket), latest(bucket).entries, small_disk)
    assert list(small_disk.iterdir()) == []
