"""The resources of a task, but for its group: the claim and the settings."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from urllib.request import getproxies

from cml_runner import leases as base
from cml_runner.boot.azure import TAG
from cml_runner.clouds.azure.account import NAME, PROGRAMS, Place, Shared
from cml_runner.errors import CredentialsError, NotFound
from cml_runner.leases import LEASES, TASKS
from cml_runner.store import Store

if TYPE_CHECKING:
    from cml_runner.clouds.azure.session import Session
    from cml_runner.clouds.azure.site import Site
    from cml_runner.model import Identifier, Task

LONGEST_TAG = 256  # characters of a value
ENDPOINTS = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")  # obstore's, to put blobs elsewhere


def task_url(place: Place, identifier: Identifier, identity: str = "") -> str:
    """Say where a task's objects are and, for machines, with whose rights to read them."""
    own = f"&msi_resource_id={quote(identity, safe='')}" if identity else ""
    return f"az://{NAME}/{TASKS}/{identifier}?account_name={place.storage}{own}"


def lease_url(place: Place) -> str:
    """Say where the leases are, which tell what tasks there are."""
    return f"az://{NAME}/{LEASES}?account_name={place.storage}"


def program_url(place: Place) -> str:
    """Say where programs are: in a container of their own, where machines may only read."""
    return f"az://{PROGRAMS}?account_name={place.storage}"


def exists(place: Place) -> bool:
    """Say if there is such a storage account; that needs no rights, as its name is a host's."""
    if any(map(os.environ.get, ENDPOINTS)) or "https" in getproxies():
        return True
    try:
        socket.getaddrinfo(f"{place.storage}.blob.core.windows.net", 443)
    except socket.gaierror:
        return False
    return True


@dataclass(frozen=True, eq=False)
class Bucket(base.Bucket):
    """The task's part of the container. Who has put its lease object there has the task."""

    session: Session
    region: str
    site: Site | None  # None: it won't be created

    @cached_property
    def place(self) -> Place:
        """Where all of it is; asks for the subscription."""
        return Place(self.session.subscription, self.region)

    @cached_property
    def store(self) -> Store:
        """Where the task's objects are."""
        return Store(task_url(self.place, self.task.id), self.session.credentials)

    @cached_property
    def leases(self) -> Store:
        """Where its lease is."""
        return Store(lease_url(self.place), self.session.credentials)

    @cached_property
    def programs(self) -> Store:
        """Where the programs of machines are."""
        return Store(program_url(self.place), self.session.credentials)

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
        if exists(self.place):
            super().delete()

    def _claim(self) -> bool:
        try:
            return super().create()
        except CredentialsError as error:
            msg = (
                f"{error}. Even who owns the subscription needs a role for blobs, such as the one"
                " which is printed by: cml-runner permissions azure"
            )
            raise CredentialsError(msg) from error


@dataclass(frozen=True, eq=False)
class Program(base.Program):
    """What the machines run."""

    bucket: Bucket

    def create(self) -> bool:
        """Put it there; its container, which is made last, may be all that a setup has left out."""
        try:
            return super().create()
        except NotFound:
            Shared(self.bucket.session, self.bucket.place).setup()
            return super().create()


@dataclass(frozen=True, eq=False)
class Settings(base.Settings):
    """What the machines read; there is none without a storage account."""

    bucket: Bucket

    def delete(self) -> None:
        """Delete them, and all else that nobody wants to read when the task is over."""
        if exists(self.bucket.place):
            super().delete()


def tags(task: Task, **more: Any) -> dict[str, str]:
    """Tag resources as the task's own; names that differ in nothing but case are one to Azure."""
    own = {TAG: str(task.id), **more}
    found: dict[str, tuple[str, Any]] = {}
    for name, value in {**task.tags, **own}.items():
        found[name.lower()] = (name, value)
    return {name: str(value)[:LONGEST_TAG] for name, value in found.values()}
