"""Snapshots of a directory in a bucket: whole, in order, and from one machine at a time.

What is below one prefix of a bucket is one directory's history:

    h/EPOCH-NUMBER   a head: the manifest of one snapshot, which names everything in the directory
    b/EPOCH/HASH     a blob: up to 4 MiB of content, many small files or a piece of a large one

Blobs are immutable and named after their content; a head is put, last, in one request that fails
if it exists. So whatever is killed whenever, there is a newest head, and all that it names. What
has been deleted is what a manifest doesn't name; blobs which no manifest names any more are deleted
an hour later, as somebody may be reading.

A machine that takes over puts the empty head EPOCH-0 of the next epoch, whose heads are newer than
all of older epochs. Whoever has put a head looks if there is a newer epoch: if so it is fenced, its
work doesn't count, and it stops. Who takes over looks for the newest snapshot after that: so one
whose writer has been told that it is safe is never lost. This takes nothing but "put unless it is
there" and a strongly consistent listing, which S3, GCS, Azure and a local disk have alike (a local
disk can't put under the condition that an object is still the same). No clock has a say in it.
"""

from cml_runner.transfer.history import Fenced, History
from cml_runner.transfer.manifest import Entry, Manifest
from cml_runner.transfer.restore import merge, restore
from cml_runner.transfer.rules import Rules
from cml_runner.transfer.snapshot import Outcome, Writer

__all__ = (
    "Entry",
    "Fenced",
    "History",
    "Manifest",
    "Outcome",
    "Rules",
    "Writer",
    "merge",
    "restore",
)
