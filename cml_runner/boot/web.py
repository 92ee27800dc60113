"""Requests over HTTP with no more than the standard library."""

from __future__ import annotations

import json
import urllib.request
from http import HTTPStatus
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError

from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from email.message import Message

TIMEOUT = 60  # seconds for each step of a request
EXCERPT = 500  # characters to show of an answer


class Refused(RunnerError):
    """An answer other than success; `status` is HTTP's, `text` what the answer says."""

    def __init__(self, action: str, status: int, text: str) -> None:
        super().__init__(f"{action}: {status} {text[:EXCERPT]}".rstrip())
        self.status, self.text = status, text

    @property
    def absent(self) -> bool:
        """Say if what was asked for isn't there."""
        return self.status == HTTPStatus.NOT_FOUND

    @property
    def denied(self) -> bool:
        """Say if it is about rights; new ones may take some minutes to be known everywhere."""
        return self.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


class Answer:
    """What a server says."""

    def __init__(self, content: bytes, headers: Message) -> None:
        self.content, self.headers = content, headers

    @property
    def text(self) -> str:
        """The content as text."""
        return self.content.decode(errors="replace")

    def json(self) -> Any:
        """Read the content as JSON; nothing is an empty object. Raises RunnerError."""
        try:
            return json.loads(self.content or b"{}")
        except ValueError as error:
            msg = f"not JSON: {self.text[:EXCERPT]!r}"
            raise RunnerError(msg) from error


def ask(
    method: str,
    url: str,
    headers: Mapping[str, str] | None = None,
    content: bytes | None = None,
    *,
    timeout: float = TIMEOUT,
) -> Answer:
    """Make one request, through the environment's proxies. Raises Refused, or RunnerError."""
    request = urllib.request.Request(url, content, dict(headers or {}), method=method)  # noqa: S310
    opener = urllib.request.build_opener()  # a new one: the environment's proxies may change
    action = f"{method} {url.partition('?')[0]}"
    try:
        try:
            with opener.open(request, timeout=timeout) as answer:
                return Answer(answer.read(), answer.headers)
        except HTTPError as error:
            with error:
                text = error.read().decode(errors="replace")
            raise Refused(action, error.code, text) from error
    except (OSError, ValueError, HTTPException) as error:
        msg = f"{action}: {error or type(error).__name__}"
        raise RunnerError(msg) from error
