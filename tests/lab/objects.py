"""A small object store that speaks S3: it counts what it is asked, and fails on demand."""

from __future__ import annotations

import hashlib
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Iterator

KEYS = {"AWS_ACCESS_KEY_ID": "lab", "AWS_SECRET_ACCESS_KEY": "lab", "AWS_ALLOW_HTTP": "true"}


class Objects:
    """Buckets of all names, in memory."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.every = 0  # so many requests, one fails
        self.lock = threading.Lock()
        self.url = ""

    @property
    def environment(self) -> dict[str, str]:
        return {**KEYS, "AWS_ENDPOINT_URL": self.url}

    def fails(self, request: str) -> bool:
        with self.lock:
            self.requests.append(request)
            return bool(self.every) and len(self.requests) % self.every == 0

    def put(self, key: str, content: bytes, *, only_new: bool) -> bool:
        with self.lock:
            if only_new and key in self.content:
                return False
            self.content[key] = content
            return True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: Objects

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _failed(self) -> bool:
        if not self.objects.fails(f"{self.command} {self._key()}"):
            return False
        self._body()
        self._answer(503, b"<Error><Code>SlowDown</Code></Error>")
        return True

    def _answer(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_PUT(self) -> None:
        if self._failed():
            return
        content = self._body()
        new = self.objects.put(
            self._key(), content, only_new=self.headers.get("If-None-Match") == "*"
        )
        if new:
            self._answer(200, ETag=_tag(content))
        else:
            self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")

    def do_GET(self) -> None:
        if self._failed():
            return
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "list-type" in query:
            self._list({name: values[0] for name, values in query.items()})
            return
        content = self.objects.content.get(self._key())
        if content is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        head = {"ETag": _tag(content), "Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span:
            start, end = int(span[1]), min(int(span[2]), len(content) - 1)
            head["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
            self._answer(206, content[start : end + 1], **head)
            return
        self._answer(200, content, **head)

    def _list(self, query: dict[str, str]) -> None:
        bucket, prefix = self._key().rstrip("/"), query.get("prefix", "")
        begin = f"{bucket}/"
        with self.objects.lock:
            found = (key for key in self.objects.content if key.startswith(begin))
            there = sorted(key.removeprefix(begin) for key in found)
        keys, folders = [], set()
        for key in there:
            rest = key.removeprefix(prefix)
            if not key.startswith(prefix):
                continue
            if query.get("delimiter") and "/" in rest:
                folders.add(prefix + rest.partition("/")[0] + "/")
            else:
                keys.append(key)
        content = self.objects.content
        parts = [
            f"<Contents><Key>{escape(key)}</Key><Size>{len(content.get(begin + key, b''))}</Size>"
            "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
        ]
        parts += [f"<CommonPrefixes><Prefix>{one}</Prefix></CommonPrefixes>" for one in folders]
        whole = f"<IsTruncated>false</IsTruncated>{''.join(parts)}"
        text = f"<ListBucketResult>{whole}</ListBucketResult>"
        self._answer(200, text.encode())

    def do_DELETE(self) -> None:
        if not self._failed():
            self.objects.content.pop(self._key(), None)
            self._answer(204)

    def do_POST(self) -> None:
        """Delete many."""
        if self._failed():
            return
        keys = [key.decode() for key in re.findall(rb"<Key>(.*?)</Key>", self._body())]
        for key in keys:
            self.objects.content.pop(f"{self._key().rstrip('/')}/{key}", None)
        told = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self._answer(200, f"<DeleteResult>{told}</DeleteResult>".encode())


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Keep quiet: whoever asked may have been killed."""


def _tag(content: bytes) -> str:
    return f'"{hashlib.sha1(content).hexdigest()}"'


@contextmanager
def serving() -> Iterator[Objects]:
    """Serve one on this computer."""
    objects = Objects()
    handler = type("Bound", (Handler,), {"objects": objects})
    server = Server(("127.0.0.1", 0), handler)
    objects.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield objects
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
