"""A machine of Azure: its metadata service, its blobs, and the calls that end it.

The metadata service: https://learn.microsoft.com/azure/virtual-machines/instance-metadata-service
Blobs: https://learn.microsoft.com/rest/api/storageservices/blob-service-rest-api
"""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

from cml_runner.boot import bucket, objects, web
from cml_runner.boot import first_azure as first
from cml_runner.boot.first_azure import MANAGER, STORAGE
from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Mapping

COMPUTE = "2021-12-13"  # version of what the metadata service says of a machine
KNOWN = ("name", "resourceId", "vmId")  # of each machine
VERSIONS = {"Microsoft.Compute": "2024-11-01", "Microsoft.Insights": "2022-10-01"}  # of the APIs
BLOBS = "2023-11-03"  # likewise
TAG = "cml-runner-id"  # on everything that belongs to one task; the value is its identifier
COUNT = "cml-runner-count"  # tag: how many machines are wanted, and have left already
GONE = "gone-"  # what the names of objects begin with by which machines say that they leave
RUN = "run"  # the autoscale profile until the deadline
SAID = (  # the form of errors of Resource Manager, and of Blob Storage
    re.compile(r'"code":\s*"(.*?)",\s*"message":\s*"(.*?)"'),
    re.compile(r"<Code>(.*?)</Code>\s*<Message>(.*?)[\n<]"),
)


def metadata(path: str, **query: str) -> Any:
    """Read a document of the metadata service. Raises OSError."""
    try:
        return first.metadata(path, **query)
    except (ValueError, HTTPException) as error:
        msg = f"the metadata service doesn't answer as it should: {error}"
        raise OSError(msg) from error


def compute() -> dict[str, Any]:
    """Ask which machine this is. Raises OSError."""
    found = metadata("instance/compute", **{"api-version": COMPUTE})
    if isinstance(found, dict) and all(map(found.get, KNOWN)):
        return found
    msg = f"the metadata service doesn't say which machine this is: {found!r}"
    raise OSError(msg)


def tags(machine: Mapping[str, Any]) -> dict[str, str]:
    """Read a machine's tags."""
    return {one["name"]: one["value"] for one in machine.get("tagsList") or ()}


class Login:
    """The identity of this machine, as Azure's services see it."""

    def __init__(self, url: str) -> None:
        """Take a task's URL, which may name one of several identities."""
        self._url = url
        self._tokens: dict[str, str] = {}  # by service

    def ask(
        self,
        service: str,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> web.Answer:
        """Make one request. Raises web.Refused, or RunnerError."""
        known = service in self._tokens
        own = {"Authorization": f"Bearer {self._token(service)}", **(headers or {})}
        try:
            return web.ask(method, url, own, content)
        except web.Refused as error:
            if error.status == HTTPStatus.UNAUTHORIZED and self._tokens.pop(service) and known:
                return self.ask(service, method, url, headers, content)  # it has expired
            action = f"{method} {url.partition('?')[0]}"
            raise web.Refused(action, error.status, _plain(error.text)) from error

    def _token(self, service: str) -> str:
        try:
            if service not in self._tokens:
                self._tokens[service] = first.token(self._url, service)
        except (OSError, ValueError, KeyError, HTTPException) as error:
            msg = f"this machine's identity gets no token for {service}: {error}"
            raise RunnerError(msg) from error
        return self._tokens[service]


class Container(bucket.Bucket):
    """A part of the container that a task's URL names."""

    listing: Mapping[str, str] = {"restype": "container", "comp": "list"}
    names, following, marker = "Blobs/Blob/Name", "NextMarker", "marker"

    def __init__(self, login: Login, url: str, prefix: str) -> None:
        super().__init__(prefix)
        self._login, self._url = login, url

    def send(
        self, method: str, path: str, content: bytes | None, headers: Mapping[str, str]
    ) -> web.Answer:
        """Make one request."""
        place = f"{first.account(self._url)}/{urlsplit(self._url).netloc}"
        kind = {"x-ms-blob-type": "BlockBlob"} if method == "PUT" else {}
        own = {"x-ms-version": BLOBS, **kind, **headers}
        return self._login.ask(STORAGE, method, f"{place}{path.replace('/?', '?')}", own, content)

    def taken(self, error: web.Refused) -> bool:
        """Go by the code: HTTP's status has several meanings."""
        return "BlobAlreadyExists" in error.text


class Machine:
    """The machine that we are on."""

    ends_with_power = False  # without power it is still paid for, and never replaced

    def __init__(self, url: str) -> None:
        parts, self.url = urlsplit(url), url
        self.task = parts.fragment.rpartition("/")[2]
        self._login = Login(url)
        self.objects = Container(self._login, url, parts.path.strip("/"))
        self.leases = Container(self._login, url, "leases")

    def name(self) -> str:
        """Ask the metadata service."""
        return str(compute()["vmId"])

    def check(self) -> None:
        """Look whose machine this is."""
        self._own()

    def replace(self) -> None:
        """Delete this machine: autoscale makes another one."""
        own = self._own()
        self._delete(_sibling(own, "Compute/virtualMachines", own["name"]))

    def dismiss(self) -> None:
        """Delete this machine, and lower the number of machines that there must be before."""
        own = self._own()
        self._mark(own["name"])
        self._lower(_sibling(own, "Insights/autoscalesettings", self.task))
        self._delete(_sibling(own, "Compute/virtualMachines", own["name"]))

    def finish(self) -> None:
        """Delete all; once the scale set is on its way out, so are we."""
        own = self._own()
        objects.clear(self.objects)
        group = _sibling(own, "Compute/virtualMachineScaleSets", self.task)
        self._delete(group, forceDeletion="true")
        self._delete(_sibling(own, "Insights/autoscalesettings", self.task))
        objects.finish(self.leases, self.task)

    def _own(self) -> dict[str, Any]:
        """Return what the metadata service says of this machine, if it is one of the task's.

        A machine of a scale set in Flexible mode has the scale set's identifier; that it has its
        name as well isn't documented.
        """
        found = compute()
        group = str((found.get("virtualMachineScaleSet") or {}).get("id") or "").rpartition("/")[2]
        seen = {
            "vmScaleSetName": str(found.get("vmScaleSetName") or ""),
            "virtualMachineScaleSet.id": group,
            f"tag {TAG}": tags(found).get(TAG, ""),
        }
        if self.task.lower() not in map(str.lower, seen.values()):
            told = ", ".join(f"{name}: {value or 'none'}" for name, value in seen.items())
            msg = f"this machine isn't one of {self.task}, says the metadata service ({told})"
            raise RunnerError(msg)
        return found

    def _mark(self, name: str) -> None:
        """Note that we leave. All such marks together say how many machines to keep."""
        try:
            self.objects.claim(f"{GONE}{name}", b"")
        except web.Refused as error:
            if not error.absent:  # without a container, who comes in our place ends the group
                raise

    def _lower(self, setting: str) -> None:
        """Lower the number below which Azure makes new machines, not that above which it ends some.

        Who left at the same time may have written at the same time, so look again afterwards.
        """
        for _ in range(10):
            try:
                found = self._manage("GET", setting).json()
            except web.Refused as error:
                if not error.absent:
                    raise
                return
            lower = lowered(found, len(self.objects.keys(GONE)))
            if lower is None:
                return
            self._manage("PUT", setting, lower)
        msg = "others keep changing how many machines there should be"
        raise RunnerError(msg)

    def _delete(self, path: str, **query: str) -> None:
        try:
            self._manage("DELETE", path, **query)
        except web.Refused as error:
            if not error.absent:
                raise

    def _manage(self, method: str, path: str, body: Any = None, **query: str) -> web.Answer:
        """Make one call of Resource Manager, and don't wait for what it begins."""
        provider = path.rpartition("/providers/")[2].partition("/")[0]
        asked = urlencode({**query, "api-version": VERSIONS[provider]})
        content = None if body is None else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        return self._login.ask(MANAGER, method, f"{first.manager()}{path}?{asked}", kind, content)


def lowered(found: dict[str, Any], gone: int) -> dict[str, Any] | None:
    """Lower how many machines an autoscale setting keeps at least; None if it is low enough.

    The most that there may be stays: by that, Azure would end machines of its own choice.
    """
    properties = found["properties"]
    least = max(0, int(found["tags"][COUNT]) - gone)
    profiles = []
    for one in properties["profiles"]:
        capacity = one["capacity"]
        if one["name"] == RUN:
            if int(capacity["minimum"]) <= least:
                return None
            capacity = {**capacity, "minimum": str(least), "default": str(least)}
        profiles.append({**one, "capacity": capacity})
    kept = {name: properties[name] for name in ("enabled", "targetResourceUri")}
    return {
        "location": found["location"],
        "tags": found["tags"],
        "properties": {**kept, "profiles": profiles},
    }


def _sibling(machine: Mapping[str, Any], kind: str, name: str) -> str:
    """Name something in the machine's resource group; the kind is without "Microsoft."."""
    return f"{machine['resourceId'].partition('/providers/')[0]}/providers/Microsoft.{kind}/{name}"


def _plain(text: str) -> str:
    """Say what an error says, without its wrapping."""
    for pattern in SAID:
        if found := pattern.search(text):
            return f"{found[1]}: {found[2]}"
    return text
