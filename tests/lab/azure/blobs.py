"""Blob storage, as far as obstore uses it: put (also create-only and If-Match), get, list, batches.

https://learn.microsoft.com/rest/api/storageservices/blob-service-rest-api
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from email.utils import format_datetime
from itertools import count
from typing import TYPE_CHECKING
from urllib.parse import unquote
from xml.sax.saxutils import escape

from tests.lab.azure.wire import ApiError, Call

if TYPE_CHECKING:
    from typing import TypeAlias

    from tests.lab.azure import Azure

    Answer: TypeAlias = tuple[int, list[tuple[str, str]], bytes]

KIND = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs"
VERBS = {"GET": "read", "HEAD": "read", "PUT": "write", "DELETE": "delete", "POST": "delete"}
SPAN = re.compile(r"bytes=(\d+)-(\d*)")
PART = re.compile(rb"Content-ID: (\d+)\r\n.*?DELETE (\S+) HTTP", re.DOTALL)


@dataclass(frozen=True)
class Blob:
    """One object."""

    content: bytes
    etag: str
    at: datetime


class Blobs:
    """All containers, by account and name; Resource Manager makes them."""

    def __init__(self, azure: Azure) -> None:
        self._azure = azure
        self._containers: dict[tuple[str, str], dict[str, Blob]] = {}
        self._numbers = count(1)
        self._lock = threading.Lock()
        self.page = 5000  # entries of a list

    @staticmethod
    def understood(call: Call) -> Call:
        """Say which right a request to the data needs."""
        return replace(call, kind="blob", action=f"{KIND}/{VERBS[call.method]}")

    def make(self, account: str, name: str) -> None:
        """Have a container, unless there is one of this name."""
        self._containers.setdefault((account, name), {})

    def clear(self) -> None:
        """Lose all containers."""
        self._containers.clear()

    def content(self, account: str, name: str) -> dict[str, bytes]:
        """Read all that is in a container."""
        found = self._containers.get((account, name), {})
        return {key: one.content for key, one in list(found.items())}

    def serve(self, call: Call) -> Answer:
        """Answer one request. Raises ApiError."""
        _, account, name, *_ = call.path.split("/", 3)
        if scope := self._azure.manager.account(account):
            where = f"{scope}/blobServices/default/containers/{name}"
            self._azure.app.may(call, call.action, where, data=True)
        return self.answer(call, account, name)

    def answer(self, call: Call, account: str, name: str) -> Answer:
        """Answer who may ask. Raises ApiError."""
        container = self._containers.get((account, name))
        if container is None:
            raise ApiError("ContainerNotFound", "The specified container does not exist.", 404)
        key = call.path.partition(f"/{name}/")[2]
        with self._lock:
            if call.query.get("comp") == "batch":
                return self._batch(container, name, call)
            if call.query.get("comp") == "list":
                return self._list(container, call.query)
            return self._one(container, call, key)

    def _one(self, container: dict[str, Blob], call: Call, key: str) -> Answer:
        found = container.get(key)
        if call.method == "PUT":
            if call.headers.get("if-none-match") == "*" and found:
                raise ApiError("BlobAlreadyExists", "The specified blob already exists.", 409)
            wanted = call.headers.get("if-match")
            if wanted and (not found or found.etag != wanted):
                raise ApiError("ConditionNotMet", "The condition is not met.", 412)
            etag = f'"0x{next(self._numbers):X}"'
            container[key] = found = Blob(call.raw, etag, datetime.now(timezone.utc))
            return 201, _headers(found)[:2], b""
        if not found:
            raise ApiError("BlobNotFound", "The specified blob does not exist.", 404)
        if call.method == "DELETE":
            del container[key]
            return 202, [], b""
        if span := SPAN.fullmatch(call.headers.get("x-ms-range") or call.headers.get("range", "")):
            return _part(found, int(span[1]), int(span[2] or len(found.content)))
        return 200, _headers(found), found.content

    def _list(self, container: dict[str, Blob], query: dict[str, str]) -> Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        entries: dict[str, str] = {}
        for key, one in sorted(container.items()):
            inner, found, _ = key.removeprefix(prefix).partition(delimiter or "\0")
            if not key.startswith(prefix):
                continue
            if found and delimiter:
                folder = f"{prefix}{inner}{delimiter}"
                entries[folder] = f"<BlobPrefix><Name>{escape(folder)}</Name></BlobPrefix>"
            else:
                entries[key] = _entry(key, one)
        names = sorted(name for name in entries if name >= query.get("marker", ""))
        marker = escape("".join(names[self.page : self.page + 1]))
        text = (
            '\ufeff<?xml version="1.0" encoding="utf-8"?><EnumerationResults>'
            f"<Prefix>{escape(prefix)}</Prefix>"
            f"<Blobs>{''.join(entries[name] for name in names[: self.page])}</Blobs>"
            f"<NextMarker>{marker}</NextMarker></EnumerationResults>"
        )
        return 200, [("Content-Type", "application/xml")], text.encode()

    def _batch(self, container: dict[str, Blob], name: str, call: Call) -> Answer:
        """Delete several, each with an answer of its own."""
        answers = []
        for number, path in PART.findall(call.raw):
            key = unquote(path.decode()).partition(f"/{name}/")[2]
            known = container.pop(key, None) is not None
            line = "202 Accepted" if known else "404 The specified blob does not exist."
            code = "" if known else "x-ms-error-code: BlobNotFound\r\n"
            head = f"Content-Type: application/http\r\nContent-ID: {number.decode()}"
            own = f"HTTP/1.1 {line}\r\n{code}x-ms-version: 2023-11-03\r\n"
            answers.append(f"--batchresponse\r\n{head}\r\n\r\n{own}\r\n")
        text = f"{''.join(answers)}--batchresponse--\r\n"
        return 202, [("Content-Type", "multipart/mixed; boundary=batchresponse")], text.encode()


def _headers(blob: Blob) -> list[tuple[str, str]]:
    return [
        ("ETag", blob.etag),
        ("Last-Modified", format_datetime(blob.at, usegmt=True)),
        ("Content-Type", "application/octet-stream"),
    ]


def _part(blob: Blob, start: int, end: int) -> Answer:
    if start >= len(blob.content):
        raise ApiError("InvalidRange", "The range specified is invalid.", 416)
    end = min(end, len(blob.content) - 1)
    where = ("Content-Range", f"bytes {start}-{end}/{len(blob.content)}")
    return 206, [*_headers(blob), where], blob.content[start : end + 1]


def _entry(key: str, blob: Blob) -> str:
    return (
        f"<Blob><Name>{escape(key)}</Name><Properties>"
        f"<Last-Modified>{format_datetime(blob.at, usegmt=True)}</Last-Modified>"
        f"<Etag>{blob.etag.strip(chr(34))}</Etag><Content-Length>{len(blob.content)}</Content-Length>"
        "<Content-Type>application/octet-stream</Content-Type></Properties></Blob>"
    )
