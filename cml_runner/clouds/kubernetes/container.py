"""Buckets of the user's own, for pods that have an identity which may use them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from cml_runner.errors import ConfigurationError
from cml_runner.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping

ADDRESS = re.compile(r"(?P<scheme>s3|gs|az)://(?P<name>[a-z0-9][a-z0-9._-]+)/(?P<path>[^?#]*)")


def opened(address: str, options: Mapping[str, str]) -> Store:
    """Open one: pods with what their service account is, we with what our environment says.

    Raises ConfigurationError.
    """
    match = ADDRESS.fullmatch(address)
    if not match:
        msg = f"--storage-container {address}: on Kubernetes, s3://, gs:// or az://NAME/PATH"
        raise ConfigurationError(msg)
    query = f"?{urlencode(options)}" if options else ""
    return Store(f"{match['scheme']}://{match['name']}/{quote(match['path'])}{query}")
