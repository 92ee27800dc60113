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
    from tests.lab.azure import Azure

KIND = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs"
VERBS = {"GET": "read", "HEAD": "read", "PUT": "write", "DELETE": "delete", "POST": "delete"}
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
        self.containers: dict[tuple[str, str], dict[str, Blob]] = {}
        self._numbers = count(1)
        self._lock = threading.Lock()

    @staticmethod
    def understood(call: Call) -> Call:
        """Say which right a request to the data needs."""
        return replace(call, kind="blob", action=f"{KIND}/{VERBS[call.method]}")

    def serve(self, call: Call) -> tuple[int, list[tuple[str, str]], bytes]:
        """Answer one request. Raises ApiError."""
        _, account, name, *rest = call.path.split("/", 3)
        scope = self._azure.manager.account(account)
        container = self.containers.get((account, name))
        if not scope or container is None:
            raise ApiError("ContainerNotFound", "The specified container does not exist.", 404)
        where = f"{scope}/blobServices/default/containers/{name}"
        self._azure.app.may(call, call.action, where, data=True)
        with self._lock:
            if call.query.get("comp") == "batch":
                return self._batch(container, name, call)
            if call.query.get("comp") == "list":
                return self._list(container, call.query.get("prefix", ""))
            return self._one(container, call, rest[0] if rest else "")

    def _one(
        self, container: dict[str, Blob], call: Call, key: str
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        found = container.get(key)
        if call.method == "PUT":
            if call.headers.get("if-none-match") == "*" and found:
                raise ApiError("BlobAlreadyExists", "The specified blob already exists.", 409)
            wanted = call.headers.get("if-match")
            if wanted and (not found or found.etag != wanted):
                raise ApiError("ConditionNotMet", "The condition is not met.", 412)
            etag = f'"0x{next(self._numbers):X}"'
            container[key] = found = Blob(call.raw, etag, datetime.now(timezone.utc))
            return 201, _headers(found), b""
        if not found:
            raise ApiError("BlobNotFound", "The specified blob does not exist.", 404)
        if call.method == "DELETE":
            del container[key]
            return 202, [], b""
        kind = [("Content-Type", "application/octet-stream")]
        return 200, [*_headers(found), *kind], found.content

    def _list(
        self, container: dict[str, Blob], prefix: str
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        blobs = "".join(
            f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>"
            f"{format_datetime(one.at, usegmt=True)}</Last-Modified><Etag>{escape(one.etag)}</Etag>"
            f"<Content-Length>{len(one.content)}</Content-Length>"
            "<Content-Type>application/octet-stream</Content-Type></Properties></Blob>"
            for key, one in sorted(container.items())
            if key.startswith(prefix)
        )
        text = (
            '<?xml version="1.0" encoding="utf-8"?><EnumerationResults>'
            f"<Prefix>{escape(prefix)}</Prefix><Blobs>{blobs}</Blobs><NextMarker/>"
            "</EnumerationResults>"
        )
        return 200, [("Content-Type", "application/xml")], text.encode()

    def _batch(
        self, container: dict[str, Blob], name: str, call: Call
    ) -> tuple[int, list[tuple[str, str]], bytes]:
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
    return [("ETag", blob.etag), ("Last-Modified", format_datetime(blob.at, usegmt=True))]
