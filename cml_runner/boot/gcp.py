"""A machine of Google Cloud: its metadata server, its objects, and the calls that end it.

The metadata server: https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys
"""

from __future__ import annotations

import json
import os
import time
import uuid
from functools import cache
from http import HTTPStatus
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from cml_runner.boot import bucket, objects, web
from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVICE = "169.254.169.254"
VARIABLE = "GCE_METADATA_HOST"  # the SDK's own, to put it elsewhere
TIMEOUT = 2  # seconds
CHANGE = 5  # seconds that a question waits for news
LABEL = "cml-runner-id"  # on all that belongs to one task; the value is its identifier
STORAGE = "https://storage.googleapis.com"
COMPUTE = "https://compute.googleapis.com/compute/v1"
WAIT = 150  # seconds; an operation's own wait ends after two minutes
LOOK = 1  # seconds between two looks if the group has forgotten this machine


class Metadata:
    """The metadata of the machine that we are on."""

    def __init__(self, host: str) -> None:
        self._service = f"http://{host}/computeMetadata/v1"
        self._opener = build_opener(ProxyHandler({}))  # it is never behind a proxy
        self._seen = ""  # the state that was read last

    def get(self, path: str) -> str:
        """Read one value; empty if there is none. Raises OSError."""
        try:
            return self._ask(path, {}, TIMEOUT)[0]
        except HTTPError as error:
            error.close()
            if error.code == HTTPStatus.NOT_FOUND:
                return ""
            raise

    def news(self) -> Any:
        """Read everything about the instance; the second time, wait a little for a change."""
        query = {"recursive": "true", "alt": "json"}
        if self._seen:
            more = {"wait_for_change": "true", "last_etag": self._seen, "timeout_sec": str(CHANGE)}
            query |= more
        text, self._seen = self._ask("instance/", query, CHANGE + TIMEOUT)
        return json.loads(text)

    def _ask(self, path: str, query: dict[str, str], timeout: float) -> tuple[str, str]:
        url = f"{self._service}/{path}" + (f"?{urlencode(query)}" if query else "")
        request = Request(url, headers={"Metadata-Flavor": "Google"})  # noqa: S310
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                return answer.read().decode(), answer.headers.get("ETag", "")
        except HTTPException as error:
            msg = f"the metadata server answers with nonsense: {error or type(error).__name__}"
            raise ConnectionError(msg) from error


def metadata() -> Metadata:
    """Return this machine's, with what it has told already."""
    return _metadata(os.environ.get(VARIABLE) or SERVICE)


@cache
def _metadata(host: str) -> Metadata:
    return Metadata(host)


def instance() -> str:
    """Return this instance's number, which no other ever has. Raises OSError or RunnerError.

    Its name may be another's, since a group makes machines anew under their old name.
    """
    return told("instance/id")


def told(path: str) -> str:
    """Read a value that every instance has. Raises OSError or RunnerError."""
    found = metadata().get(path)
    if not found:
        msg = f"the metadata server doesn't tell {path}"
        raise RunnerError(msg)
    return found


class Bucket(bucket.Bucket):
    """A part of a bucket of Cloud Storage, spoken to as obstore does: through the XML API.

    https://cloud.google.com/storage/docs/xml-api/overview
    """

    unless: Mapping[str, str] = {"x-goog-if-generation-match": "0"}

    def __init__(self, name: str, prefix: str) -> None:
        super().__init__(prefix)
        self._name = name

    def send(
        self, method: str, path: str, content: bytes | None, headers: Mapping[str, str]
    ) -> web.Answer:
        """Make one request."""
        kind = {"Content-Type": "application/octet-stream"} if method == "PUT" else {}
        place = f"{STORAGE}/{self._name}{path.replace('/?', '?')}"
        return web.ask(method, place, {**_login(), **kind, **headers}, content)


class Machine:
    """The machine that we are on.

    Whether it is a machine of the task is looked at before each verb. The group makes machines
    anew that have lost their power; who has left isn't of the group any more, or about to be
    deleted.
    """

    ends_with_power = True

    def __init__(self, url: str) -> None:
        parts, self.url = urlsplit(url), url
        _, self._region, self.task = parts.fragment.split("/")
        self.objects = Bucket(parts.netloc, parts.path.strip("/"))
        self.leases = Bucket(parts.netloc, f"leases/{self._region}")
        self._requests: dict[str, str] = {}  # changes to which there was no answer: their numbers

    def name(self) -> str:
        """Ask the metadata server."""
        return instance()

    def check(self) -> None:
        """Look at what the instance template has given this instance."""
        found = metadata().get(f"instance/attributes/{LABEL}")
        if found != self.task:
            msg = f"this machine isn't one of {self.task}: its {LABEL} is {found or 'missing'}"
            raise RunnerError(msg)

    def replace(self) -> None:
        """Have the group make this machine anew; waiting for it to notice takes minutes.

        One that the group hasn't got any more is just deleted: without power it would be kept.
        https://cloud.google.com/compute/docs/reference/rest/v1/regionInstanceGroupManagers/recreateInstances
        """
        self.check()
        if not self._manage("recreateInstances"):
            self._delete()

    def dismiss(self) -> None:
        """Have the group delete this machine, and hold one less."""
        self.check()
        if not self._manage("deleteInstances", skipInstancesOnValidationError=True):
            self._delete()

    def finish(self) -> None:
        """Delete all, and this machine last: so the group has to forget it first."""
        self.check()
        objects.clear(self.objects)
        self._abandon()
        self._delete_group()
        objects.finish(self.leases, self.task)
        self._delete()

    @property
    def _project(self) -> str:
        return f"projects/{told('project/project-id')}"

    @property
    def _own(self) -> str:
        zone = told("instance/zone").rpartition("/")[2]
        return f"zones/{zone}/instances/{told('instance/name')}"

    @property
    def _group(self) -> str:
        return f"{self._project}/regions/{self._region}/instanceGroupManagers/{self.task}"

    def _manage(self, method: str, **more: Any) -> bool:
        """Have the group do something with this machine; False if it hasn't got it (any more)."""
        body = {"instances": [self._own], **more}
        try:
            return self._change("POST", f"{self._group}/{method}", body)
        except RunnerError:
            if self._is_member():
                raise
            return False

    def _is_member(self) -> bool:
        found = self._ask("POST", f"{self._group}/listManagedInstances") or {}
        there = [one.get("instance", "") for one in found.get("managedInstances", [])]
        return any(one.endswith(f"/{self._own}") for one in there)

    def _abandon(self) -> None:
        """Have the group forget this machine, which lives on; return once it has."""
        if self._manage("abandonInstances"):
            while self._is_member():
                time.sleep(LOOK)

    def _delete_group(self) -> None:
        """Delete the group, with machines that have left it already, and its templates."""
        self._change("DELETE", self._group)
        templates = f"{self._project}/global/instanceTemplates"
        query = urlencode({"filter": f'name eq "{self.task}(-[0-9]+)?"'})
        found = self._ask("GET", f"{templates}?{query}") or {}
        for one in found.get("items", []):
            self._change("DELETE", f"{templates}/{quote(one['name'])}")

    def _delete(self) -> None:
        """Delete this very machine: no other one has its name as long as it is there."""
        self._change("DELETE", f"{self._project}/{self._own}", wait=False)

    def _change(self, method: str, path: str, body: Any = None, *, wait: bool = True) -> bool:
        """Make a change, and wait until it is made; False if there is nothing to change.

        It is made once, however often it must be asked for until there is an answer.
        """
        what = f"{method} {path}"
        number = self._requests.setdefault(what, str(uuid.uuid4()))
        try:
            operation = self._ask(method, f"{path}?requestId={number}", body)
        except web.Refused as error:
            if error.status < HTTPStatus.INTERNAL_SERVER_ERROR:
                del self._requests[what]
            raise
        del self._requests[what]
        if operation is None:
            return False
        while wait and operation.get("status", "DONE") != "DONE":
            link = operation["selfLink"].partition("/projects/")[2]
            found = self._ask("POST", f"projects/{link}/wait", timeout=WAIT)
            operation = found or {}
        for one in operation.get("error", {}).get("errors", []):
            msg = f"{operation.get('operationType')}: {one.get('message')} ({one.get('code')})"
            raise RunnerError(msg)
        return True

    def _ask(self, method: str, path: str, body: Any = None, timeout: float = web.TIMEOUT) -> Any:
        """Make one call; None if it is about nothing that is there. Raises RunnerError."""
        content = b"" if method == "POST" else None
        if body is not None:
            content = json.dumps(body).encode()
        own = {**_login(), "Content-Type": "application/json"}
        try:
            return web.ask(method, f"{COMPUTE}/{path}", own, content, timeout=timeout).json()
        except web.Refused as error:
            if error.absent:
                return None
            action = f"{method} {path.partition('?')[0]}"
            raise web.Refused(action, error.status, _message(error.text)) from error


def _login() -> dict[str, str]:
    """Speak in the name of this machine's service account. Raises RunnerError."""
    try:
        found = metadata().get("instance/service-accounts/default/token")
        token = json.loads(found)["access_token"]
    except (OSError, ValueError, KeyError) as error:
        msg = f"the metadata server gives no token of a service account: {error}"
        raise RunnerError(msg) from error
    return {"Authorization": f"Bearer {token}"}


def _message(text: str) -> str:
    """Read an error of an API, in JSON."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text
