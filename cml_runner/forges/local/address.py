"""Where an embedded forge is."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from cml_runner.errors import ConfigurationError


def path(url: str) -> Path:
    """Understand file:///an/absolute/directory, or a plain path. Raises ConfigurationError."""
    if not url.startswith("file:") and "://" not in url and url:
        return Path(url).absolute()
    parts = urlsplit(url)
    found = Path(unquote(parts.path))
    if parts.scheme != "file" or parts.netloc not in {"", "localhost"} or not found.is_absolute():
        msg = f"{url!r} is no directory: write file:///an/absolute/path"
        raise ConfigurationError(msg)
    return found
