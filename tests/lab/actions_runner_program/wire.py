"""What listener and worker share: where they are, and how they ask the server."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(sys.argv[0]).resolve().parent.parent
RESULTS = ("Succeeded", "SucceededWithIssues", "Failed", "Canceled", "Skipped", "Abandoned")
RETRY = 0.2  # seconds; really 15 to 60
SHUTDOWN = (
    "The runner has received a shutdown signal. This can happen when the runner service is "
    "stopped, or a manually started runner is canceled."
)


class Failed(Exception):
    """The server said no; `status` 0: it said nothing."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def ask(method: str, url: str, authorization: str, body: Any = None) -> dict[str, Any]:
    """Send one request; raise Failed."""
    raw = isinstance(body, bytes)
    content = body if raw else None if body is None else json.dumps(body).encode()
    kind = "application/octet-stream" if raw else "application/json"
    headers = {"Authorization": authorization, "Content-Type": kind}
    request = urllib.request.Request(url, content, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as response:
            found: dict[str, Any] = json.loads(response.read() or b"{}")
            return found
    except urllib.error.HTTPError as error:
        with error:
            message = json.loads(error.read() or b"{}").get("message", "")
        raise Failed(error.code, message) from None
    except (OSError, ValueError, EOFError) as error:
        raise Failed(0, str(error) or type(error).__name__) from None
    except Exception as error:  # http.client has a family of its own
        raise Failed(0, type(error).__name__) from None
