from __future__ import annotations

from email.message import Message
from typing import TYPE_CHECKING

import pytest

from cml_runner.boot import web
from cml_runner.boot.bucket import Bucket
from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Answering(Bucket):
    """A service that answers in the same way to all."""

    def __init__(self, status: int, content: bytes = b"") -> None:
        super().__init__("tasks/x")
        self.status, self.answer = status, content
        self.asked: list[str] = []

    def send(
        self, method: str, path: str, content: bytes | None, headers: Mapping[str, str]
    ) -> web.Answer:
        self.asked.append(f"{method} {path}")
        if self.status >= 400:
            raise web.Refused(f"{method} {path}", self.status, "NoSuchBucket")
        return web.Answer(self.answer, Message())


def test_a_bucket_that_is_gone_holds_nothing() -> None:
    gone = Answering(404)
    assert gone.read("settings.json") is None
    assert gone.keys("") == []
    gone.remove(["settings.json"])
    for change in (gone.write, gone.claim):
        with pytest.raises(web.Refused):
            change("status-000.json", b"{}")


@pytest.mark.parametrize("status", [403, 409, 500])
def test_what_else_is_refused_is_an_error(status: int) -> None:
    refusing = Answering(status)
    with pytest.raises(web.Refused):
        refusing.read("x")
    with pytest.raises(web.Refused):
        refusing.keys("")
    with pytest.raises(web.Refused):
        refusing.remove(["x"])
    with pytest.raises(web.Refused):
        refusing.claim("x", b"")


def test_names_are_encoded_and_folders_are_left_out() -> None:
    bucket = Answering(200, b"<ListBucketResult/>")
    bucket.read("data/a b+c?d")
    bucket.keys("log-")
    bucket.keys("data/")
    assert bucket.asked == [
        "GET /tasks/x/data/a%20b%2Bc%3Fd",
        "GET /?list-type=2&prefix=tasks%2Fx%2Flog-&delimiter=%2F",
        "GET /?list-type=2&prefix=tasks%2Fx%2Fdata%2F",
    ]


def test_a_list_that_makes_no_sense_is_an_error() -> None:
    with pytest.raises(RunnerError, match="not XML"):
        Answering(200, b"<html").keys("")
