from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cml_runner import store
from cml_runner.errors import CredentialsError
from cml_runner.forges.local import Forge
from cml_runner.model import Interruption, Job
from cml_runner.store import Store
from cml_runner.supervise import recovery

if TYPE_CHECKING:
    from pathlib import Path

JOB = Job(name="train", pipeline="1", attempt=1)


def attempt(number: int) -> Job:
    return Job(name="train", pipeline="1", attempt=number)


@pytest.fixture
def bucket(tmp_path: Path) -> Store:
    return Store(tmp_path.as_uri())


def test_a_job_is_run_again_three_times_at_most(bucket: Store) -> None:
    found = [recovery.remember(bucket, attempt(number)) for number in (1, 2, 3, 4, 5)]
    assert [one.times for one in found] == [1, 2, 3, 4, 5]
    assert [one.pending for one in found] == [True, True, True, False, False]
    assert recovery.pending(bucket) == []


def test_one_interruption_counts_once(bucket: Store) -> None:
    first = recovery.remember(bucket, JOB)
    assert recovery.remember(bucket, JOB) == first
    assert recovery.pending(bucket) == [first]
    recovery.remember(bucket, Job(name="other", pipeline="1", attempt=1))
    assert len(recovery.pending(bucket)) == 2


def test_where_nothing_is_remembered_every_attempt_counts(bucket: Store) -> None:
    for attempt, pending in ((1, True), (3, True), (4, False)):
        job = replace(JOB, name=f"job {attempt}", attempt=attempt)
        assert recovery.remember(bucket, job, forgetful=True).pending is pending


class Slow(Forge):
    """Takes a re-run only after some refusals."""

    def __init__(self, root: Path, refusals: int) -> None:
        super().__init__(str(root))
        self.refusals, self.asked = refusals, 0

    def retry(self, job: Job) -> bool:
        self.asked += 1
        if self.refusals < 0:
            msg = "no permission"
            raise CredentialsError(msg)
        return self.asked > self.refusals


def test_it_insists_with_growing_pauses(bucket: Store, tmp_path: Path) -> None:
    pauses: list[float] = []
    one = recovery.remember(bucket, JOB)
    assert recovery.insist(bucket, Slow(tmp_path, 7), one, pauses.append) == ""
    assert pauses == [1, 2, 4, 8, 15, 15, 15]
    assert recovery.pending(bucket) == []
    kept = bucket.load(store.interruption(JOB), Interruption)
    assert kept
    assert kept.times == 1, "it must be remembered, or it would be run again for ever"


def test_it_gives_up_when_the_forge_never_will(bucket: Store, tmp_path: Path) -> None:
    one = recovery.remember(bucket, JOB)
    assert recovery.insist(bucket, Slow(tmp_path, -1), one) == "no permission"
    assert recovery.pending(bucket) == []
