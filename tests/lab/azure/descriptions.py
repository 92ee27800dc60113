"""What the vendor's own models say: those in the SDK which is installed, so in its APIs' versions.

There are models of two kinds: newer ones have a field for each property, whose visibility says
what it may be sent with; older ones have two tables.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, ForwardRef, Union, get_args, get_origin

ALL = frozenset({"read", "create", "update"})
OLDER = {"iso-8601": str, "duration": str, "object": object}


@dataclass(frozen=True)
class Property:
    """One property of a model."""

    kind: Any  # str, …; list[…], dict[str, …], a model, an enumeration; object is anything
    required: bool
    uses: frozenset[str] = ALL  # what it may be sent with; "read": it comes in answers


def model(service: str, name: str) -> Any:
    """Find one."""
    return getattr(importlib.import_module(f"azure.mgmt.{service}.models"), name)


@cache
def properties(found: Any) -> dict[str, Any]:
    """Read a model: its properties by their names; those of older ones may be in others."""
    if hasattr(found, "_attribute_map"):
        return _older(found)
    known: dict[str, Any] = {}
    for base in reversed(found.__mro__):
        for attribute, field in vars(base).items():
            if type(field).__name__ == "_RestField":
                kind, optional = _kind(found, base.__annotations__[attribute])
                uses = frozenset(field._visibility or ALL)
                known[field._rest_name_input or attribute] = Property(kind, not optional, uses)
    return known


def _kind(owner: Any, hint: Any) -> tuple[Any, bool]:
    """Understand an annotation: what it may be, and if it may be left out."""
    if isinstance(hint, (str, ForwardRef)):
        text = hint if isinstance(hint, str) else hint.__forward_arg__
        return _named(owner, text), False
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Union:
        inside = [one for one in parts if one is not type(None)]
        kinds = [_kind(owner, one)[0] for one in inside if one is not str or len(inside) == 1]
        return (kinds[0] if len(kinds) == 1 else object), len(inside) < len(parts)
    if origin is list:
        return list[_kind(owner, parts[0])[0]], False  # type: ignore[misc]
    if origin is dict:
        return dict[str, _kind(owner, parts[1])[0]], False  # type: ignore[misc]
    if getattr(hint, "__module__", "") == "datetime":
        return str, False
    return (object if hint is Any else hint), False


def _older(found: Any) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for attribute, place in found._attribute_map.items():
        rule = found._validation.get(attribute, {})
        uses = frozenset({"read"}) if rule.get("readonly") else ALL
        *outer, last = place["key"].split(".")
        inside = known
        for one in outer:
            inside = inside.setdefault(one, {})
        kind = _of_older(found, place["type"])
        inside[last] = Property(kind, bool(rule.get("required")), uses)
    return known


def _of_older(owner: Any, text: str) -> Any:
    if text.startswith("["):
        return list[_of_older(owner, text[1:-1])]  # type: ignore[misc]
    if text.startswith("{"):
        return dict[str, _of_older(owner, text[1:-1])]  # type: ignore[misc]
    plain = {one.__name__: one for one in (str, bool, int, float)}
    return OLDER.get(text) or plain.get(text) or _named(owner, text)


def _named(owner: Any, text: str) -> Any:
    """Find what an annotation only names."""
    package = owner.__module__.rpartition(".")[0]
    return getattr(sys.modules[package], text.rpartition(".")[2], object)
