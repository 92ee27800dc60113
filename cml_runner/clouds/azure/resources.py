"""The resources of a task, but for its group: the claim and the settings."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from urllib.request import getproxies

import msgspec

from cml_runner import store as stores
from cml_runner.clouds.azure.account import LEASES, NAME, TASKS, Place, Shared
from cml_runner.clouds.azure.machine import IDENTITY, TAG
from cml_runner.errors import CredentialsError, NotFound
from cml_runner.model import Lease

if TYPE_CHECKING:
    from cml_runner.clouds import Resource
    from cml_runner.clouds.azure.session import Session
    from cml_runner.clouds.azure.site import Site
    from cml_runner.model import Identifier, Task

LAUNCH = timedelta(hours=1)  # the longest that one can take
LONGEST_TAG = 256  # characters of a value
ENDPOINTS = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")  # obstore's, to put blobs elsewhere


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the lease object holds."""

    created: datetime
    expires: datetime | None
    launched: bool = False
    tags: dict[str, str] = field(default_factory=dict)


def url(place: Place, prefix: str, identity: str = "") -> str:
    """Say where objects are and, for machines, with whose rights to read them."""
    own = f"&msi_resource_id={quote(identity, safe='')}" if identity else ""
    return f"az://{NAME}/{prefix}?account_name={place.storage}{own}"


def task_url(place: Place, identifier: Identifier, identity: str = "") -> str:
    """Say where a task's objects are."""
    return url(place, f"{TASKS}/{identifier}", identity)


def lease_url(place: Place, identity: str = "") -> str:
    """Say where the leases are, which tell what tasks there are."""
    return url(place, LEASES, identity)


def key(identifier: Identifier) -> str:
    """Name a task's lease."""
    return f"{identifier}.json"


def exists(place: Place) -> bool:
    """Say if there is such a storage account; that needs no rights, as its name is a host's."""
    if any(map(os.environ.get, ENDPOINTS)) or "https" in getproxies():
        return True
    try:
        socket.getaddrinfo(f"{place.storage}.blob.core.windows.net", 443)
    except socket.gaierror:
        return False
    return True


def forget(objects: stores.Store) -> None:
    """Delete the settings, and all else that nobody wants to read when the task is over."""
    for name in sorted(objects.keys(""), key=lambda name: name != stores.SETTINGS):
        if not stores.kept(name):
            objects.delete(name)


def lease(task: Task, claim: Claim) -> Lease:
    """Say how long a task may be there; one whose launcher died before the end isn't long."""
    expires = claim.expires
    if not claim.launched:
        given_up = claim.created + LAUNCH
        expires = min(expires, given_up) if expires else given_up
    return Lease(id=task.id, created=claim.created, expires=expires, tags=claim.tags)


@dataclass(frozen=True, eq=False)
class Bucket:
    """The task's part of the container. Who has put its lease object there has the task."""

    session: Session
    region: str
    task: Task
    site: Site | None  # None: it won't be created
    label: str = "lease"
    needs: tuple[Resource, ...] = ()
    ours: list[Claim] = field(default_factory=list, init=False)  # what we have put there

    @cached_property
    def place(self) -> Place:
        """Where all of it is; asks for the subscription."""
        return Place(self.session.subscription, self.region)

    @cached_property
    def store(self) -> stores.Store:
        """Where the task's objects are."""
        return stores.Store(task_url(self.place, self.task.id), self.session.credentials)

    @cached_property
    def leases(self) -> stores.Store:
        """Where its lease is."""
        return stores.Store(lease_url(self.place), self.session.credentials)

    def create(self) -> bool:
        """Put the lease there, unless there is one; before that, see if all else can be had."""
        assert self.site
        with ThreadPoolExecutor(1) as pool:
            login = pool.submit(self.session.credentials)  # which takes a call of its own
            self.site.look(self.place)
            login.result()
        if exists(self.place):
            try:
                return self._claim()
            except NotFound:
                pass
        Shared(self.session, self.place).setup()
        return self._claim()

    def delete(self) -> None:
        """Delete all of the task's objects, the lease at last."""
        if not exists(self.place):
            return
        for name in self.store.keys(""):
            self.store.delete(name)
        self.leases.delete(key(self.task.id))

    def renew(self, expires: datetime | None) -> None:
        """Write that the task is launched, and until when it may be there."""
        old = self.ours[0] if self.ours else self.leases.load(key(self.task.id), Claim)
        if old is None:
            msg = f"{self.task.id} is gone: launch it again"
            raise NotFound(msg)
        new = Claim(created=old.created, expires=expires, launched=True, tags=old.tags)
        self.leases.save(key(self.task.id), new)

    def _claim(self) -> bool:
        now = datetime.now(timezone.utc)
        content = Claim(created=now, expires=self.task.expires, tags=dict(self.task.tags))
        try:
            new = self.leases.claim(key(self.task.id), msgspec.json.encode(content))
        except CredentialsError as error:
            msg = (
                f"{error}. Even who owns the subscription needs a role for blobs, such as the one"
                " which is printed by: cml-runner permissions azure"
            )
            raise CredentialsError(msg) from error
        if new:
            self.ours.append(content)
        return new


@dataclass(frozen=True, eq=False)
class Settings:
    """What the machines read; the only thing that is secret."""

    bucket: Bucket
    label: str = "settings"

    @property
    def needs(self) -> tuple[Resource, ...]:
        """Without the lease it might be somebody else's."""
        return (self.bucket,)

    def create(self) -> bool:
        """Write them, once the records of an older task of this name are gone."""
        content = self.bucket.task.settings.encode()
        with ThreadPoolExecutor(1) as pool:
            older = pool.submit(self.bucket.store.keys, "")
            new = self.bucket.store.claim(stores.SETTINGS, content)
            if self.bucket.ours:
                for name in older.result():
                    if name != stores.SETTINGS:
                        self.bucket.store.delete(name)
                if not new:  # somebody's who didn't clear up
                    self.bucket.store.write(stores.SETTINGS, content)
        return new or bool(self.bucket.ours)

    def delete(self) -> None:
        """Delete them, and all else that nobody wants to read when the task is over."""
        if exists(self.bucket.place):
            forget(self.bucket.store)


def tags(task: Task, identity: str, **more: Any) -> dict[str, str]:
    """Tag resources as the task's own; names that differ in nothing but case are one to Azure."""
    own = {TAG: str(task.id), IDENTITY: identity, **more}
    found: dict[str, tuple[str, Any]] = {}
    for name, value in {**task.tags, **own}.items():
        found[name.lower()] = (name, value)
    return {name: str(value)[:LONGEST_TAG] for name, value in found.values()}
