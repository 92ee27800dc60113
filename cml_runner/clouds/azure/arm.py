"""What Resource Manager's errors are; nothing here is sent, or needs the SDK.

https://learn.microsoft.com/azure/azure-resource-manager/management/
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from datetime import datetime, timezone
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

from cml_runner.errors import (
    AlreadyExists,
    CredentialsError,
    NoCapacity,
    NotFound,
    RunnerError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    Kind = Literal["capacity", "quota", "permission", "image", "error"]

# Codes: https://learn.microsoft.com/azure/azure-resource-manager/troubleshooting/common-deployment-errors
# and https://learn.microsoft.com/troubleshoot/azure/virtual-machines/windows/error-messages
CODES: dict[Kind, frozenset[str]] = {
    "capacity": frozenset(
        {
            *("SkuNotAvailable", "AllocationFailed", "ZonalAllocationFailed"),
            *("OverconstrainedAllocationRequest", "OverconstrainedZonalAllocationRequest"),
            *("NotAvailableForSubscription", "SpotPriceTooLow", "LocationNotAvailableForResource"),
        }
    ),
    "quota": frozenset({"QuotaExceeded", "PublicIPCountLimitReached", "ResourceQuotaExceeded"}),
    "permission": frozenset(
        {
            *("AuthorizationFailed", "LinkedAuthorizationFailed", "RequestDisallowedByPolicy"),
            *("ReadOnlyDisabledSubscription", "MissingSubscriptionRegistration", "RoleNotFound"),
            *("LinkedAccessCheckFailed", "DisallowedOperation", "SubscriptionNotRegistered"),
        }
    ),
    "image": frozenset(
        {
            *("ImageNotFound", "PlatformImageNotFound", "GalleryImageNotFound"),
            *("MarketplacePurchaseEligibilityFailed", "ResourcePurchaseValidationFailed"),
            *("VMMarketplaceInvalidInput", "ResourcePurchaseCanceled"),
        }
    ),
}
CREDENTIALS = frozenset(
    {
        *("InvalidAuthenticationToken", "ExpiredAuthenticationToken", "AuthenticationFailed"),
        *("InvalidAuthenticationTokenTenant", "AuthenticationFailedInvalidHeader"),
        *("InvalidAuthenticationTokenAudience", "SubscriptionNotFound", "InvalidSubscriptionId"),
    }
)
OVER_QUOTA = re.compile(r"quota|exceed\w* .*(cores?|limit)", re.IGNORECASE)
UNREGISTERED = re.compile(r"namespace '?([A-Za-z.]+)'?")
DELETING = re.compile(r"being deleted|marked for deletion|under deletion", re.IGNORECASE)


def kind(code: str, text: str = "") -> Kind:
    """Say what an error is about, in the terms of model.Happening."""
    for name, codes in CODES.items():
        if code in codes:
            return name
    if code == "OperationNotAllowed" and OVER_QUOTA.search(text):
        return "quota"
    return "error"


def details(content: Any) -> tuple[str, str]:
    """Find the code of an error that says most, and its message.

    What went wrong with a machine is wrapped into what went wrong with its scale set.
    """
    found = list(_errors(content))
    telling = (one for one in found if kind(*one) != "error" or one[0] in CREDENTIALS)
    return next(telling, found[0] if found else ("", ""))


def parsed(content: bytes) -> Any:
    """Read an answer, which may be none of Resource Manager's."""
    with suppress(ValueError):
        return json.loads(content or b"{}")
    return {"error": {"code": "", "message": content[:200].decode(errors="replace")}}


def failure(status: int, content: Any, action: str) -> RunnerError:
    """Make our error of an answer."""
    code, text = details(content)
    if code in CREDENTIALS or (status == HTTPStatus.UNAUTHORIZED and not code):
        msg = (
            f"Azure refuses our credentials: {text} ({code or status}). Renew them:"
            " AZURE_CLIENT_ID, AZURE_CLIENT_SECRET, AZURE_TENANT_ID and AZURE_SUBSCRIPTION_ID,"
            " or az login"
        )
        return CredentialsError(msg)
    if status == HTTPStatus.NOT_FOUND:
        return NotFound(f"{action}: {text} ({code or status})")
    if status == HTTPStatus.PRECONDITION_FAILED or DELETING.search(text):
        return AlreadyExists(f"{text} ({code or status})")
    return typed(code, text, action)


def typed(code: str, text: str, action: str) -> RunnerError:
    """Make our error of what went wrong, maybe long after the call."""
    found = kind(code, text)
    if code in ("MissingSubscriptionRegistration", "SubscriptionNotRegistered"):
        name = UNREGISTERED.search(text)
        msg = (
            f"{text} ({code}). Whoever owns the subscription has to run: az provider register"
            f" --namespace {name[1] if name else 'Microsoft.Compute'}; cml-runner setup azure does"
        )
        return CredentialsError(msg)
    if found == "permission":
        msg = (
            f"not allowed to {action}: {text} ({code})."
            " What is needed is printed by: cml-runner permissions azure"
        )
        return CredentialsError(msg)
    if found in ("capacity", "quota"):
        return NoCapacity(f"{text} ({code})")
    return RunnerError(f"{action}: {text} ({code})")


def moment(text: str | None, otherwise: datetime | None = None) -> datetime:
    """Read a time, which may have seven digits after its point."""
    if not text:
        return otherwise or datetime.now(timezone.utc)
    plain = re.sub(r"(\.\d{1,6})\d*", lambda part: part[1].ljust(7, "0"), text)
    found = datetime.fromisoformat(plain.replace("Z", "+00:00"))
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


def _errors(content: Any) -> Iterator[tuple[str, str]]:
    """Walk through an error, its details, and what messages have wrapped up, outermost first."""
    if isinstance(content, list):
        for one in content:
            yield from _errors(one)
    if not isinstance(content, dict):
        return
    if "code" in content and "message" in content:
        text = str(content["message"] or "")
        inner = _unwrapped(text)
        yield str(content["code"] or ""), text if inner is None else _said(inner) or text
        yield from _errors(inner)
    for key in ("error", "details", "innererror"):
        yield from _errors(content.get(key))


def _unwrapped(text: str) -> Any:
    """Read the JSON that some messages consist of."""
    with suppress(ValueError):
        return json.loads(text) if text.lstrip().startswith("{") else None
    return None


def _said(inner: Any) -> str:
    return next((text for _, text in _errors(inner)), "")
