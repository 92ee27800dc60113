from __future__ import annotations

import json
import threading
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Literal

import pytest

from cml_runner import store
from cml_runner.boot import places
from cml_runner.model import Status
from cml_runner.wait import until

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def bucket(tmp_path: Path) -> store.Store:
    return store.Store(tmp_path.as_uri())


def now() -> datetime:
    return datetime.now(timezone.utc)


def says(
    bucket: store.Store,
    rank: int,
    state: Literal["ready", "interrupted", "failed"],
    ago: float = 0,
) -> None:
    at = now() - timedelta(seconds=ago)
    bucket.save(store.status(rank), Status(state=state, at=at, since=at, runner="r"))


def refuse(_: float) -> None:
    pytest.fail("there is no place")


def test_many_machines_at_once_have_different_places(bucket: store.Store) -> None:
    found: list[int] = []

    def take(number: int) -> None:
        found.append(places.take(bucket, 8, f"i-{number}"))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(8))


def test_a_machine_keeps_its_place_when_it_starts_again(bucket: store.Store) -> None:
    assert places.take(bucket, 2, "i-1", refuse) == 0
    assert places.take(bucket, 2, "i-1", refuse) == 0
    assert places.take(bucket, 2, "i-2", refuse) == 1


@pytest.mark.parametrize("state", ["interrupted", "failed"])
def test_the_place_of_a_machine_that_ended_is_taken_at_once(
    bucket: store.Store, state: Literal["interrupted", "failed"]
) -> None:
    places.take(bucket, 2, "i-1", refuse)
    places.take(bucket, 2, "i-2", refuse)
    says(bucket, 0, "ready")
    says(bucket, 1, state)
    assert places.take(bucket, 2, "i-3", refuse) == 1


def test_the_place_of_a_machine_that_fell_silent_is_taken(bucket: store.Store) -> None:
    places.take(bucket, 1, "i-1", refuse)
    long_ago = places.STALE.total_seconds() + 5
    at = (now() - timedelta(seconds=2 * long_ago)).isoformat()
    bucket.write(store.place(0, 0), json.dumps({"machine": "i-1", "at": at}).encode())
    says(bucket, 0, "ready", ago=long_ago)
    assert places.take(bucket, 1, "i-2", refuse) == 0
    assert bucket.keys(store.place(0)) == [store.place(0, 0), store.place(0, 1)]


def test_last_words_of_an_earlier_machine_say_nothing_of_the_next(bucket: store.Store) -> None:
    places.take(bucket, 1, "i-1", refuse)
    says(bucket, 0, "interrupted")
    assert places.take(bucket, 1, "i-2", refuse) == 0
    with pytest.raises(StopAsyncIteration):
        places.take(bucket, 1, "i-3", raising)


def raising(_: float) -> None:
    raise StopAsyncIteration


def test_a_machine_waits_for_a_place(bucket: store.Store) -> None:
    places.take(bucket, 1, "i-1", refuse)
    found: list[int] = []
    pause = threading.Event()

    def wait(_: float) -> None:
        pause.wait(0.01)

    thread = threading.Thread(target=lambda: found.append(places.take(bucket, 1, "i-2", wait)))
    thread.start()
    assert found == []
    says(bucket, 0, "interrupted")
    until(lambda: found == [0], "the place", 5)
    thread.join()


def test_places_that_were_left_are_taken_last(bucket: store.Store) -> None:
    for rank in range(2):
        assert places.take(bucket, 2, f"i-{rank}", refuse) == rank
    for rank in range(2):
        says(bucket, rank, "interrupted")
    assert not places.leave(bucket, 0, 2)
    assert places.take(bucket, 2, "i-3", refuse) == 1
    assert places.take(bucket, 2, "i-4", refuse) == 0
    assert places.left(bucket) == {0}
    assert not places.leave(bucket, 0, 2)
    assert places.leave(bucket, 1, 2)
