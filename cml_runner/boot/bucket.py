"""Objects in a bucket over HTTP, as the services of all clouds have them in common."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

from cml_runner.boot import web
from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Bucket:
    """A part of a bucket; one that is gone holds nothing. A cloud says how a request is made."""

    unless: Mapping[str, str] = {"If-None-Match": "*"}  # headers: put it unless there is one
    listing: Mapping[str, str] = {"list-type": "2"}  # what asks for a list
    names = "{*}Contents/{*}Key"  # where a page of a list has them …
    following, marker = "{*}NextContinuationToken", "continuation-token"  # … and the next page

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def send(
        self, method: str, path: str, content: bytes | None, headers: Mapping[str, str]
    ) -> web.Answer:
        """Make one request; the path and its query are encoded, and begin at the bucket.

        Raises web.Refused, or RunnerError.
        """
        raise NotImplementedError

    def taken(self, error: web.Refused) -> bool:
        """Say if a claim was refused because there is such an object."""
        return error.status == HTTPStatus.PRECONDITION_FAILED

    def read(self, key: str) -> bytes | None:
        """Return an object's content."""
        found = self._unless_absent("GET", self._path(key))
        return found.content if found else None

    def write(self, key: str, content: bytes) -> None:
        """Put an object there."""
        self.send("PUT", self._path(key), content, {})

    def claim(self, key: str, content: bytes) -> bool:
        """Put an object there unless there is one."""
        try:
            self.send("PUT", self._path(key), content, self.unless)
        except web.Refused as error:
            if not self.taken(error):
                raise
            return False
        return True

    def keys(self, prefix: str) -> list[str]:
        """List names, page by page."""
        base = f"{self._prefix}/"
        query = {**self.listing, "prefix": base + prefix}
        if prefix and "/" not in prefix:
            query["delimiter"] = "/"
        found: list[str] = []
        while query:
            asked = urlencode(query, quote_via=quote, safe="")
            answer = self._unless_absent("GET", f"/?{asked}")
            page = _parsed(answer.content if answer else b"<none/>")
            found += [one.text or "" for one in page.findall(self.names)]
            more = page.findtext(self.following)
            query = {**query, self.marker: more} if more else {}
        return sorted(key[len(base) :] for key in found)

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects."""
        for key in keys:
            self._unless_absent("DELETE", self._path(key))

    def _path(self, key: str) -> str:
        return quote(f"/{self._prefix}/{key}")

    def _unless_absent(self, method: str, path: str) -> web.Answer | None:
        try:
            return self.send(method, path, None, {})
        except web.Refused as error:
            if not error.absent:
                raise
            return None


def _parsed(content: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(content)  # noqa: S314
    except ElementTree.ParseError as error:
        msg = f"not XML: {content[: web.EXCERPT]!r}"
        raise RunnerError(msg) from error
