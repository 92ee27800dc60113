"""Addresses of git repositories, in any of the forms that people and git have for them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from cml_runner.errors import ConfigurationError


def split(text: str, forge: str) -> tuple[str, str]:
    """Take an address apart: its server (empty for a slug) and its path.

    The server is as a browser has it, whatever git speaks with it. Raises ConfigurationError.
    """
    text = text.strip()
    if match := re.fullmatch(r"[\w.-]+@([\w.-]+):(?!//)(.+)", text):
        return server("https", match[1].lower(), None), _path(match[2])
    if "://" not in text:
        if not re.match(r"[\w-]+(\.[\w-]+)+(:\d+)?/", text):
            return "", text.removesuffix("/")
        text = f"https://{text}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in {"https", "http", "ssh", "git+ssh"}:
        msg = f"{_tame(text)!r} is no address on {forge}: its URL is malformed"
        raise ConfigurationError(msg)
    web = parts.scheme in {"https", "http"}
    return server(parts.scheme if web else "https", host, port if web else None), _path(parts.path)


def server(scheme: str, host: str, port: int | None) -> str:
    """Write the address of a server; the usual port goes without saying."""
    usual = {"https": 443, "http": 80}[scheme]
    return f"{scheme}://{host}" + (f":{port}" if port and port != usual else "")


def _path(path: str) -> str:
    return path.strip("/").removesuffix(".git")


def _tame(text: str) -> str:
    """Leave out what may be a password."""
    return re.sub(r"//[^/@]*@", "//", text)
