"""Stage 0 on Azure: requests with a token of the machine's identity. See `cml_runner.boot.first`.

This is embedded into start scripts, so it is short, and it imports nothing of ours.
"""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.error import HTTPError
from urllib.parse import parse_qsl, quote, urlencode, urlsplit
from urllib.request import ProxyHandler, Request, build_opener

MANAGER, STORAGE = "https://management.azure.com", "https://storage.azure.com/"  # services
VARIABLE = "AZURE_INSTANCE_METADATA_ENDPOINT"  # to have the metadata service elsewhere


def metadata(path: str, **query: str) -> Any:
    """Ask the metadata service, which is never behind a proxy. Raises OSError, or ValueError.

    Its errors have no `code`: 404 says that it is just being updated.
    https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service
    """
    service = os.environ.get(VARIABLE) or "http://169.254.169.254"
    url = f"{service}/metadata/{path}?{urlencode(query)}"
    request = Request(url, headers={"Metadata": "true"})  # noqa: S310
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=5) as answer:
            return json.load(answer)
    except HTTPError as error:
        msg = f"the metadata service says {error}"
        raise OSError(msg) from error


def token(url: str, service: str) -> str:
    """Get what opens a service to the identity that a task's URL names; else to the only one.

    https://learn.microsoft.com/entra/identity/managed-identities-azure-resources/how-to-use-vm-token
    """
    query = {"api-version": "2018-02-01", "resource": service}
    own = dict(parse_qsl(urlsplit(url).query)).get("msi_resource_id")
    if own:
        query["msi_res_id"] = own
    return str(metadata("identity/oauth2/token", **query)["access_token"])


def call(method: str, url: str, login: str, content: bytes, headers: dict[str, str]) -> bytes:
    """Make one request with a token. Raises OSError."""
    own = {"Authorization": f"Bearer {login}", **headers}
    request = Request(url, content or None, own, method=method)  # noqa: S310
    with build_opener().open(request, timeout=60) as answer:
        return bytes(answer.read())


def account(url: str) -> str:
    """Say where a task's storage account is; elsewhere if obstore's own variable says so."""
    name = dict(parse_qsl(urlsplit(url).query))["account_name"]
    return os.environ.get("AZURE_STORAGE_ENDPOINT") or f"https://{name}.blob.core.windows.net"


def manager() -> str:
    """Say where Resource Manager is."""
    return (os.environ.get("AZURE_RESOURCE_MANAGER_ENDPOINT") or MANAGER).rstrip("/")


def ask(url: str, path: str, content: bytes = b"", once: bool = False) -> bytes:
    """Read or put a blob of the container in a task's URL; `once` only if there is none.

    Programs are in a container of their own, CONTAINER-programs. Raises OSError, or HTTPException.
    """
    separator = "-" if path.startswith("programs/") else "/"
    place = f"{account(url)}/{urlsplit(url).netloc}{separator}{quote(path)}"
    headers = {"x-ms-version": "2023-11-03", "x-ms-blob-type": "BlockBlob"}
    if once:
        headers["If-None-Match"] = "*"
    return call("PUT" if content else "GET", place, token(url, STORAGE), content, headers)


def end(url: str, last: bool) -> None:
    """End this machine, which is replaced, or its whole scale set. Raises OSError."""
    own = metadata("instance/compute", **{"api-version": "2021-12-13"})["resourceId"]
    paths = [f"{own}?api-version=2024-11-01"]
    if last:
        base, task = own.partition("/providers/")[0], url.rpartition("/")[2]
        group = f"Microsoft.Compute/virtualMachineScaleSets/{task}?forceDeletion=true"
        paths = [
            f"{base}/providers/{group}&api-version=2024-11-01",
            f"{base}/providers/Microsoft.Insights/autoscalesettings/{task}?api-version=2022-10-01",
        ]
    for path in paths:
        call("DELETE", manager() + path, token(url, MANAGER), b"", {})
