"""What a machine learns from its metadata service, and how it ends; nothing here needs an SDK.

The service: https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import datetime, timedelta, timezone
from functools import cache
from http import HTTPStatus
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import ProxyHandler, Request, build_opener

from cml_runner.clouds.gcp.account import LABEL
from cml_runner.errors import RunnerError
from cml_runner.model import Notice

SERVICE = "169.254.169.254"
VARIABLE = "GCE_METADATA_HOST"  # the SDK's own, to put it elsewhere
TIMEOUT = 2  # seconds
CHANGE = 5  # seconds that a question waits for news
SOFT_OFF = 30  # seconds from the notice of a preemption until the power is off
NOTICE = "cml-runner-notice"  # key of our own: seconds of notice before that, if there are any
EARLY = 60  # seconds before an end that was moved
INTERRUPT, DEADLINE = "cml-runner-interrupt", "cml-runner-deadline"  # keys of our own
API = "https://compute.googleapis.com/compute/v1"
CALL, WAIT = 60, 150  # seconds; an operation's own wait ends after two minutes


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
        with self._opener.open(request, timeout=timeout) as answer:
            return answer.read().decode(), answer.headers.get("ETag", "")


def metadata() -> Metadata:
    """Return this machine's, with what it has told already."""
    return _metadata(os.environ.get(VARIABLE) or SERVICE)


@cache
def _metadata(host: str) -> Metadata:
    return Metadata(host)


def instance() -> str:
    """Return this instance's number, which no other ever has; empty if this isn't one.

    Its name may be another's, since a group makes machines anew under their old name.
    """
    try:
        return metadata().get("instance/id")
    except OSError:
        return ""


def belongs(identifier: str) -> bool:
    """Say if this instance is of a task; if nobody answers, nothing speaks against it."""
    try:
        return metadata().get(f"instance/attributes/{LABEL}") == identifier
    except OSError:
        return True


def notice() -> Notice | None:
    """Ask whether this instance will be taken away.

    There are 120 seconds' notice of a preemption, or 30, and of a host's maintenance some without
    a deadline; `cml-runner interrupt` leaves a mark, and so does who moves the end.
    """
    found = metadata().news()
    now = datetime.now(timezone.utc)
    marks = found.get("attributes", {})
    if found.get("preempted") == "TRUE":
        left = int(marks.get(NOTICE) or SOFT_OFF)  # after a long one those 30 aren't promised
        return Notice(reason="preemption", deadline=now + timedelta(seconds=left))
    if text := marks.get(INTERRUPT):
        return Notice(reason="interruption on demand", deadline=datetime.fromisoformat(text))
    if text := marks.get(DEADLINE):
        at = datetime.fromisoformat(text)
        if at - timedelta(seconds=EARLY) < now:
            return Notice(reason="the end of its life", deadline=at)
    if found.get("maintenanceEvent") == "TERMINATE_ON_HOST_MAINTENANCE":
        return Notice(reason="maintenance of the host")
    return None


class Departure:
    """A machine's way out of its group, with the rights of its own service account."""

    def __init__(self, group: str, region: str) -> None:
        here = metadata()
        self.project = here.get("project/project-id")
        self._zone = here.get("instance/zone").rpartition("/")[2]
        self._name = here.get("instance/name")
        self._region, self._group = region, group
        self._opener = build_opener()

    def dismiss(self) -> None:
        """Have the group delete this machine, and hold one less. Absent is dismissed already."""
        self._manage("deleteInstances")

    def abandon(self) -> None:
        """Have the group forget this machine, which lives on; return once it has."""
        if not self._manage("abandonInstances"):
            return
        path = f"{self._manager}/listManagedInstances"
        while any(
            one.get("instance", "").endswith(f"/{self._own}")
            for one in (self._ask("POST", path) or {}).get("managedInstances", [])
        ):
            time.sleep(1)

    def delete_group(self) -> None:
        """Delete the group, with machines that have left it already, and its templates."""
        self._change("DELETE", self._manager)
        templates = f"projects/{self.project}/global/instanceTemplates"
        query = urlencode({"filter": f'name eq "{self._group}(-[0-9]+)?"'})
        found = self._ask("GET", f"{templates}?{query}") or {}
        for one in found.get("items", []):
            self._change("DELETE", f"{templates}/{quote(one['name'])}")

    def delete_machine(self) -> None:
        """Delete this very machine."""
        self._change("DELETE", f"projects/{self.project}/{self._own}", wait=False)

    @property
    def _own(self) -> str:
        return f"zones/{self._zone}/instances/{self._name}"

    @property
    def _manager(self) -> str:
        place = f"projects/{self.project}/regions/{self._region}"
        return f"{place}/instanceGroupManagers/{self._group}"

    def _manage(self, method: str) -> bool:
        """Have the group do something with this machine; False if it hasn't got it (any more)."""
        try:
            return self._change("POST", f"{self._manager}/{method}", {"instances": [self._own]})
        except RunnerError as error:
            if "not a member" in str(error) or "is not managed" in str(error):
                return False
            raise

    def _change(self, method: str, path: str, body: Any = None, *, wait: bool = True) -> bool:
        """Make a change, and wait until it is made; False if there is nothing to change.

        It is made once, however often it must be asked for until there is an answer.
        """
        operation = self._ask(method, f"{path}?requestId={uuid.uuid4()}", body)
        if operation is None:
            return False
        while wait and operation["status"] != "DONE":
            link = operation["selfLink"].partition("/projects/")[2]
            operation = self._ask("POST", f"projects/{link}/wait", timeout=WAIT) or {
                "status": "DONE"
            }
        for error in operation.get("error", {}).get("errors", []):
            msg = f"{operation.get('operationType')}: {error.get('message')} ({error.get('code')})"
            raise RunnerError(msg)
        return True

    def _ask(self, method: str, path: str, body: Any = None, timeout: float = CALL) -> Any:
        """Make one call; None if it is about nothing that is there. Raises RunnerError."""
        content = json.dumps(body).encode() if body is not None else b""
        request = Request(f"{API}/{path}", data=content or None, method=method)  # noqa: S310
        request.add_header("Authorization", f"Bearer {self._token()}")
        request.add_header("Content-Type", "application/json")
        if method == "POST" and not content:
            request.data = b""
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                return json.loads(answer.read() or b"{}")
        except HTTPError as error:
            with error:
                if error.code == HTTPStatus.NOT_FOUND:
                    return None
                msg = f"{method} {path}: {error.code} {_message(error.read())}"
            raise RunnerError(msg) from error
        except (OSError, ValueError) as error:
            msg = f"{method} {path}: {error}"
            raise RunnerError(msg) from error

    def _token(self) -> str:
        try:
            found = metadata().get("instance/service-accounts/default/token")
            return str(json.loads(found)["access_token"])
        except (OSError, ValueError) as error:
            msg = f"this machine has no service account that could end it: {error}"
            raise RunnerError(msg) from error


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace")[:200]
