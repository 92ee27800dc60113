"""Cloud Storage: buckets, and objects as its XML API has them.

https://cloud.google.com/storage/docs/xml-api/overview
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import count
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote
from xml.sax.saxutils import escape

from tests.lab.gcp.discovery import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.gcp.discovery import Call

VERBS = {"GET": "get", "HEAD": "get", "PUT": "create", "DELETE": "delete"}
PAGE = 1000  # names in one answer
SPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


@dataclass
class Object:
    """One object."""

    content: bytes
    generation: int
    modified: datetime


@dataclass
class Bucket:
    """One bucket."""

    project: str
    settings: dict[str, Any]
    objects: dict[str, Object] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=lambda: {"etag": "CAE=", "bindings": []})


@dataclass(frozen=True)
class Answer:
    """What the XML API answers."""

    status: int
    content: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


class Storage:
    """The service."""

    def __init__(self) -> None:
        self.buckets: dict[str, Bucket] = {}
        self._numbers = count(1)
        self._lock = threading.RLock()

    # The JSON API, for buckets

    def insert(self, call: Call) -> Any:
        """Make a bucket; its name is the world's."""
        name = call.body["name"]
        if name in self.buckets:
            raise ApiError(409, "conflict", "The requested bucket name is not available.")
        self.buckets[name] = Bucket(call.query["project"], call.body)
        return self._described(name)

    def list(self, call: Call) -> Any:
        """List a project's own."""
        found = [
            self._described(name)
            for name, one in self.buckets.items()
            if one.project == call.query["project"] and name.startswith(call.query["prefix"])
        ]
        return {"kind": "storage#buckets", **({"items": found} if found else {})}

    def patch(self, call: Call) -> Any:
        """Change settings."""
        self.buckets[call.where["bucket"]].settings |= call.body
        return self._described(call.where["bucket"])

    def get_policy(self, call: Call) -> Any:
        """Say who may do what; only who asks for version 3 understands conditions."""
        found = self.buckets[call.where["bucket"]].policy
        if call.query.get("optionsRequestedPolicyVersion") != "3" and _conditions(found):
            raise ApiError(
                400, "badRequest", "Requested policy version does not support conditions"
            )
        return {"kind": "storage#policy", **found}

    def set_policy(self, call: Call) -> Any:
        """Change that."""
        bucket, new = self.buckets[call.where["bucket"]], call.body
        if new.get("etag") != bucket.policy["etag"]:
            raise ApiError(412, "conditionNotMet", "The policy was changed meanwhile")
        access = bucket.settings.get("iamConfiguration", {}).get("uniformBucketLevelAccess", {})
        if _conditions(new) and not (new.get("version") == 3 and access.get("enabled")):
            text = "Conditions need version 3 and uniform bucket-level access"
            raise ApiError(400, "badRequest", text)
        bucket.policy = {**new, "etag": f"CAE{next(self._numbers):06}="}
        return bucket.policy

    def _described(self, name: str) -> dict[str, Any]:
        return {"kind": "storage#bucket", "id": name, **self.buckets[name].settings}

    # The XML API, for objects

    def object(
        self,
        verb: str,
        path: str,
        query: dict[str, str],
        headers: dict[str, str],
        body: bytes,
        allowed: Callable[[str, str, str], bool],
    ) -> Answer:
        """Carry out one request; `allowed` says if a permission is had on an object."""
        bucket, _, key = unquote(path).lstrip("/").partition("/")
        with self._lock:
            if bucket not in self.buckets:
                return _refusal(404, "NoSuchBucket", "The specified bucket does not exist.")
            right = f"storage.objects.{VERBS[verb] if key else 'list'}"
            if not allowed(right, bucket, key):
                text = f"Caller does not have {right} access to the Google Cloud Storage object."
                return _refusal(403, "AccessDenied", f"Access denied. {text}")
            there = self.buckets[bucket].objects
            if not key:
                return _listing(there, bucket, query)
            if verb == "PUT":
                old = key in there and "x-goog-if-generation-match" not in headers
                if old and not allowed("storage.objects.delete", bucket, key):
                    text = "Caller does not have storage.objects.delete access, to overwrite it."
                    return _refusal(403, "AccessDenied", f"Access denied. {text}")
                return self._put(there, key, headers, body)
            if key not in there:
                return _refusal(404, "NoSuchKey", "The specified key does not exist.")
            if verb == "DELETE":
                del there[key]
                return Answer(204)
            return _got(there[key], headers, verb)

    def _put(
        self, there: dict[str, Object], key: str, headers: dict[str, str], body: bytes
    ) -> Answer:
        condition = headers.get("x-goog-if-generation-match")
        now = there[key].generation if key in there else 0
        if condition is not None and int(condition) != now:
            text = "At least one of the pre-conditions you specified did not hold."
            return _refusal(412, "PreconditionFailed", text)
        new = Object(body, next(self._numbers), datetime.now(timezone.utc))
        there[key] = new
        return Answer(200, b"", _headers(new))


def _headers(one: Object) -> tuple[tuple[str, str], ...]:
    return (
        ("ETag", f'"{one.generation}"'),
        ("x-goog-generation", str(one.generation)),
        ("Last-Modified", f"{one.modified:%a, %d %b %Y %H:%M:%S GMT}"),
    )


def _got(one: Object, headers: dict[str, str], verb: str) -> Answer:
    content, more = one.content, _headers(one)
    if wanted := headers.get("range", ""):
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        end = int(last) + 1 if last else len(content)
        piece = content[int(first) : end]
        span = f"bytes {first}-{int(first) + len(piece) - 1}/{len(content)}"
        return Answer(206, piece, (*more, ("Content-Range", span)))
    length = (("Content-Length", str(len(content))),) if verb == "HEAD" else ()
    return Answer(200, content, (*more, *length))


def _listing(there: dict[str, Object], bucket: str, query: dict[str, str]) -> Answer:
    prefix, after = query.get("prefix", ""), query.get("continuation-token", "")
    found: dict[str, str] = {}
    for key in sorted(key for key in there if key.startswith(prefix)):
        name, slash, _ = key[len(prefix) :].partition(query.get("delimiter") or "\0")
        entry = f"{prefix}{name}{slash}" if slash else key
        if entry > after:
            found[entry] = _folder(entry) if slash else _row(entry, there[entry])
    names = list(found)[: int(query.get("max-keys", PAGE))]
    more = len(found) > len(names)
    token = f"<NextContinuationToken>{escape(names[-1])}</NextContinuationToken>" if more else ""
    text = (
        f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="{SPACE}">'
        f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
        f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}"
        f"{''.join(found[name] for name in names)}</ListBucketResult>"
    )
    return Answer(200, text.encode(), (("Content-Type", "application/xml"),))


def _row(key: str, one: Object) -> str:
    return (
        f"<Contents><Key>{escape(key)}</Key><LastModified>"
        f"{one.modified:%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
        f'<ETag>"{one.generation}"</ETag><Size>{len(one.content)}</Size></Contents>'
    )


def _folder(name: str) -> str:
    return f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"


def _conditions(policy: dict[str, Any]) -> bool:
    return any("condition" in one for one in policy.get("bindings", []))


def _refusal(status: int, code: str, message: str) -> Answer:
    text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}"
    return Answer(
        status, f"{text}</Message></Error>".encode(), (("Content-Type", "application/xml"),)
    )
