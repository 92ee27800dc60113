"""Who may do what: the part of IAM's evaluation that our policies use.

Actions, resources with wildcards, and the conditions StringEquals, StringLike, ArnLike and Bool.
Not modelled: NotAction, permission boundaries, session policies, resource policies.
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic.html
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class Request:
    """One thing that somebody wants to do."""

    action: str  # service:Action
    resource: str  # ARN, or *
    context: dict[str, str] = field(default_factory=dict)


def allowed(policies: list[dict[str, Any]], request: Request) -> bool:
    """Say if some statement allows it, and none denies it."""
    effects = {
        statement["Effect"]
        for policy in policies
        for statement in _several(policy["Statement"])
        if _applies(statement, request)
    }
    return "Allow" in effects and "Deny" not in effects


def _applies(statement: dict[str, Any], request: Request) -> bool:
    action = request.action.lower()
    return (
        any(fnmatchcase(action, one.lower()) for one in _several(statement["Action"]))
        and any(_like(request.resource, one) for one in _several(statement["Resource"]))
        and all(
            _condition(operator, key, _several(values), request.context)
            for operator, pairs in statement.get("Condition", {}).items()
            for key, values in pairs.items()
        )
    )


def _condition(operator: str, key: str, values: list[str], context: dict[str, str]) -> bool:
    if key not in context:
        return False
    found = context[key]
    if operator in ("StringLike", "ArnLike"):
        return any(fnmatchcase(found, one) for one in values)
    if operator in ("StringEquals", "Bool"):
        return found in values
    msg = f"the fake doesn't know the condition {operator}"
    raise NotImplementedError(msg)


def _like(text: str, pattern: str) -> bool:
    return fnmatchcase(text, pattern) or (text == "*" and pattern == "*")


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
