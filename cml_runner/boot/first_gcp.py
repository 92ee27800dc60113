"""Stage 0 on Google Cloud: requests with the token of the machine. See `cml_runner.boot.first`.

This is embedded into start scripts, so it is short, and it imports nothing of ours.
"""

from __future__ import annotations

import json
import os
from urllib.parse import quote, urlsplit
from urllib.request import ProxyHandler, Request, build_opener


def metadata(path: str) -> str:
    """Ask the metadata server. Raises OSError."""
    place = os.environ.get("GCE_METADATA_HOST", "169.254.169.254")
    request = Request(f"http://{place}/computeMetadata/v1/{path}")
    request.add_header("Metadata-Flavor", "Google")
    with build_opener(ProxyHandler({})).open(request, timeout=5) as answer:
        return str(answer.read(), "utf-8")


def call(method: str, url: str, content: bytes, headers: dict[str, str]) -> bytes:
    """Make one request in the name of this machine's service account. Raises OSError."""
    token = json.loads(metadata("instance/service-accounts/default/token"))
    request = Request(url, content or None, headers, method=method)  # noqa: S310
    request.add_header("Authorization", "Bearer " + token["access_token"])
    with build_opener().open(request, timeout=60) as answer:
        return bytes(answer.read())


def ask(url: str, path: str, content: bytes = b"", once: bool = False) -> bytes:
    """Read or put an object of the bucket in a task's URL; `once` only if there is none.

    Raises OSError, or HTTPException.
    """
    address = f"https://storage.googleapis.com/{urlsplit(url).netloc}/{quote(path)}"
    headers = {"Content-Type": "text/plain"}
    if once:
        headers["x-goog-if-generation-match"] = "0"
    return call("PUT" if content else "GET", address, content, headers)


def end(url: str, last: bool) -> None:
    """End this machine and, unless it is the last, have it made anew. Raises OSError."""
    _, region, task = urlsplit(url).fragment.split("/")
    project, zone = metadata("project/project-id"), metadata("instance/zone").split("/")[-1]
    group = f"https://compute.googleapis.com/compute/v1/projects/{project}/regions/{region}"
    group += f"/instanceGroupManagers/{task}"
    headers, name = {"Content-Type": "application/json"}, metadata("instance/name")
    own = {"instances": [f"zones/{zone}/instances/{name}"]}
    action = "deleteInstances" if last else "recreateInstances"
    call("POST", f"{group}/{action}", json.dumps(own).encode(), headers)
