"""Google's own descriptions of its APIs: every request and every answer must be as they say."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

TYPES: dict[str, Any] = {"string": str, "boolean": bool, "array": list, "object": dict}
COMMON = {"alt", "$alt", "prettyPrint", "key", "quotaUser"}


@dataclass
class ApiError(Exception):
    """What a service answers in place of a result."""

    status: int
    reason: str
    message: str
    service: str = ""  # that isn't enabled


@dataclass(frozen=True)
class Method:
    """One thing that can be asked for."""

    id: str
    verb: str
    path: re.Pattern[str]
    names: tuple[str, ...]  # of what stands in the path
    query: frozenset[str]
    request: str
    response: str
    literal: int  # characters of the path which are fixed


@dataclass(frozen=True)
class Call:
    """One request, understood."""

    method: Method
    where: dict[str, str]  # what stands in the path
    query: dict[str, str]
    body: Any


class Api:
    """One API."""

    def __init__(self, name: str) -> None:
        place = files("googleapiclient") / "discovery_cache" / "documents" / f"{name}.json"
        document = json.loads(place.read_text(encoding="utf-8"))
        self.schemas: dict[str, Any] = document["schemas"]
        self._common = COMMON | set(document.get("parameters", {}))
        self.methods = sorted(
            _methods(document, "/" + document.get("servicePath", "")), key=lambda one: -one.literal
        )

    def read(self, verb: str, path: str, query: dict[str, str], body: bytes) -> Call:
        """Understand a request. Raises ApiError if it isn't as described."""
        for method in self.methods:
            match = method.path.fullmatch(path)
            if match and method.verb == verb:
                if unknown := set(query) - method.query - self._common:
                    raise ApiError(400, "invalidParameter", f"{method.id}: what are {unknown}?")
                content = json.loads(body) if body else None
                if content is not None:
                    if not method.request:
                        raise ApiError(400, "parseError", f"{method.id} takes no body")
                    self.check(content, {"$ref": method.request}, method.request)
                return Call(
                    method, dict(zip(method.names, match.groups(), strict=True)), query, content
                )
        raise ApiError(404, "notFound", f"there is no {verb} {path}")

    def check(self, value: Any, schema: Any, what: str) -> None:
        """Compare a value with its description. Raises ApiError."""
        if "$ref" in schema:
            schema = self.schemas[schema["$ref"]]
        kind = schema.get("type", "any")
        if kind in ("integer", "number"):
            fits = isinstance(value, int | float) and not isinstance(value, bool)
        else:
            fits = isinstance(value, TYPES.get(kind, object))
        if kind == "string" and schema.get("format") in ("int64", "uint64"):
            fits = fits and value.lstrip("-").isdigit()
        if not fits or ("enum" in schema and value not in schema["enum"]):
            raise ApiError(400, "invalid", f"{what}: {value!r} isn't as described")
        if kind == "array":
            for number, one in enumerate(value):
                self.check(one, schema["items"], f"{what}[{number}]")
        if kind == "object":
            self._fields(value, schema, what)

    def _fields(self, value: dict[str, Any], schema: Any, what: str) -> None:
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for name, one in value.items():
            if one is None:  # is as good as absent
                continue
            if name in known:
                self.check(one, known[name], f"{what}.{name}")
            elif others is not None:
                self.check(one, others, f"{what}.{name}")
            else:
                raise ApiError(400, "invalid", f"{what} has no field {name}")


@cache
def api(name: str) -> Api:
    """Read one API's description."""
    return Api(name)


def _methods(part: dict[str, Any], base: str) -> list[Method]:
    found = [_method(one, base) for one in part.get("methods", {}).values()]
    for inner in part.get("resources", {}).values():
        found += _methods(inner, base)
    return found


def _method(given: dict[str, Any], base: str) -> Method:
    template = base + (given.get("flatPath") or given["path"])
    names = re.findall(r"\{\+?(\w+)\}", template)
    pattern = "([^/]+)".join(map(re.escape, re.split(r"\{\+?\w+\}", template)))
    query = {
        name for name, one in given.get("parameters", {}).items() if one["location"] == "query"
    }
    return Method(
        id=given["id"],
        verb=given["httpMethod"],
        path=re.compile(pattern),
        names=tuple(names),
        query=frozenset(query),
        request=given.get("request", {}).get("$ref", ""),
        response=given.get("response", {}).get("$ref", ""),
        literal=len(re.sub(r"\{\+?\w+\}", "", template)),
    )
