"""What all tasks of a subscription and region share, and what permissions they need.

The pieces are made once and never deleted by us; making them again changes nothing:

    resource group cml-runner-REGION  in which everything is, that of the tasks too
    security group cml-runner         lets nothing in
    network cml-runner                with one subnet, to which that belongs
    identity cml-runner               of machines: may read our objects and end our groups
    storage account cml…              without keys, private, forgets everything after 30 days
    container cml-runner              in it, with leases and tasks; machines may write there
    container cml-runner-programs     likewise, with what machines run, for 60 days

The last one is made last, so that its existence stands for all of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from cml_runner.errors import CredentialsError, NotFound, NotReady, RunnerError
from cml_runner.leases import LEASES, TASKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.clouds.azure.session import Session

log = logging.getLogger(__name__)

NAME = "cml-runner"
PROGRAMS = f"{NAME}-programs"  # boot.first_azure looks there, too
SUBNET = "machines"
KEPT = 30  # days
PROGRAMS_KEPT = 60  # days; a launch puts its program again at half of that
PROVIDERS = ("Compute", "Network", "Storage", "ManagedIdentity", "Insights")
REGISTERED = 300  # seconds that the registration of a provider may take
SPREAD = 120  # seconds until a new role and a new identity are known everywhere
UNKNOWN = ("RoleDefinitionDoesNotExist", "PrincipalNotFound")
NAMESPACE = uuid.UUID("6d8a1b0e-6f4e-4a53-9a0c-5b6f4f6a2c11")  # of the names of our roles
BLOBS = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs"
READ, CHANGE = [f"{BLOBS}/read"], [f"{BLOBS}/write", f"{BLOBS}/delete"]
OBJECTS = [*READ, *CHANGE]
MACHINE = [
    "Microsoft.Compute/virtualMachines/delete",
    "Microsoft.Compute/virtualMachineScaleSets/delete",
    "Microsoft.Insights/autoscalesettings/read",
    "Microsoft.Insights/autoscalesettings/write",
    "Microsoft.Insights/autoscalesettings/delete",
]
LAUNCHER = [
    "Microsoft.Compute/virtualMachineScaleSets/read",
    "Microsoft.Compute/virtualMachineScaleSets/write",
    "Microsoft.Compute/virtualMachineScaleSets/delete",
    "Microsoft.Compute/virtualMachines/read",
    "Microsoft.Compute/virtualMachines/delete",
    "Microsoft.Compute/virtualMachines/retrieveBootDiagnosticsData/action",
    "Microsoft.Compute/virtualMachines/simulateEviction/action",
    "Microsoft.Insights/autoscalesettings/read",
    "Microsoft.Insights/autoscalesettings/write",
    "Microsoft.Insights/autoscalesettings/delete",
    "Microsoft.Insights/eventtypes/values/read",
    "Microsoft.ManagedIdentity/userAssignedIdentities/assign/action",
    "Microsoft.Network/networkInterfaces/read",
    "Microsoft.Network/publicIPAddresses/read",
    "Microsoft.Network/virtualNetworks/subnets/join/action",
    "Microsoft.Resources/tags/write",
]
DOCTOR = [  # to look at what stands against a launch; none of them changes anything
    "Microsoft.Authorization/permissions/read",
    "Microsoft.ManagedIdentity/userAssignedIdentities/read",
    "Microsoft.Network/virtualNetworks/read",
]


@dataclass(frozen=True)
class Place:
    """One region of one subscription, and the names of what is there."""

    subscription: str
    region: str

    @property
    def group(self) -> str:
        """The resource group's name."""
        return f"{NAME}-{self.region}"

    @property
    def scope(self) -> str:
        """The resource group's identifier, with which all others begin."""
        return f"/subscriptions/{self.subscription}/resourceGroups/{self.group}"

    def id(self, kind: str, name: str = NAME) -> str:
        """Name something in it; the kind is PROVIDER/TYPE, without "Microsoft."."""
        return f"{self.scope}/providers/Microsoft.{kind}/{name}"

    @property
    def identity(self) -> str:
        """The machines' identity."""
        return self.id("ManagedIdentity/userAssignedIdentities")

    def container(self, name: str) -> str:
        """Name one of the containers in it."""
        account = self.id("Storage/storageAccounts", self.storage)
        return f"{account}/blobServices/default/containers/{name}"

    @property
    def subnet(self) -> str:
        """Where machines are."""
        return f"{self.id('Network/virtualNetworks')}/subnets/{SUBNET}"

    @property
    def storage(self) -> str:
        """The storage account's name, which nobody else in the world has.

        If somebody does, our token doesn't open it: an account belongs to one directory.
        """
        seed = f"{self.subscription}/{self.region}".lower()
        return f"cml{hashlib.sha256(seed.encode()).hexdigest()[:21]}"

    def guid(self, what: str) -> str:
        """Name a role definition or assignment of this place."""
        return str(uuid.uuid5(NAMESPACE, f"{self.scope}/{what}"))


class Shared:
    """The shared pieces of one place."""

    def __init__(
        self, session: Session, place: Place, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._session, self._place, self._sleep = session, place, sleep

    def setup(self) -> list[str]:
        """Make what is missing; say what is new.

        Raises CredentialsError if we may not, with all that there should be.
        """
        place = self._place
        new: list[str] = []
        steps: list[tuple[str, Callable[[], bool]]] = [
            ("resource providers", self._providers),
            (f"resource group {place.group}", self._group),
            (f"security group {NAME}", self._security_group),
            (f"network {NAME}", self._network),
            (f"identity {NAME}", self._identity),
            ("role of machines", self._role),
            (f"storage account {place.storage}", self._storage),
            (f"container {NAME}", partial(self._container, NAME)),
            (f"role of machines in {NAME}", self._inner_role),
            (f"container {PROGRAMS}", partial(self._container, PROGRAMS)),
        ]
        for label, make in steps:
            try:
                if make():
                    log.info("made %s", label)
                    new.append(label)
            except CredentialsError as error:
                msg = (
                    f"this subscription isn't set up for {place.region}: {label} is missing, and"
                    f" we may not make it: {error}\nAsk somebody who may to run:"
                    f" cml-runner setup azure --cloud-region {place.region}"
                )
                raise CredentialsError(msg) from error
        return new

    def _providers(self) -> bool:
        """Have the subscription know what we use, which may take some minutes the first time."""
        names = [f"Microsoft.{name}" for name in PROVIDERS]
        new = [name for name in names if not self._registered(name)]
        for name in new:
            self._session.call("resource", "providers", "register", name)
        end = time.monotonic() + REGISTERED
        for name in new:
            while not self._registered(name):
                if time.monotonic() > end:
                    msg = f"gave up waiting for {name} to be registered"
                    raise NotReady(msg)
                self._sleep(2)
        return bool(new)

    def _registered(self, name: str) -> bool:
        found = self._session.call("resource", "providers", "get", name)
        return bool(found.get("registrationState") == "Registered")

    def _group(self) -> bool:
        names, body = (self._place.group,), {"location": self._place.region}
        return self._make("resource", "resource_groups", names, body, "create_or_update")

    def _security_group(self) -> bool:
        """Refuse what other machines of the network send, too."""
        rule = {
            "name": "nothing-comes-in",
            "properties": {
                "priority": 4096,
                "direction": "Inbound",
                "access": "Deny",
                "protocol": "*",
                "sourceAddressPrefix": "*",
                "sourcePortRange": "*",
                "destinationAddressPrefix": "*",
                "destinationPortRange": "*",
            },
        }
        names, body = (self._place.group, NAME), self._own({"securityRules": [rule]})
        return self._make("network", "network_security_groups", names, body)

    def _network(self) -> bool:
        guard = {"id": self._place.id("Network/networkSecurityGroups")}
        subnet = {"addressPrefix": "10.0.0.0/16", "networkSecurityGroup": guard}
        properties = {
            "addressSpace": {"addressPrefixes": ["10.0.0.0/8"]},
            "subnets": [{"name": SUBNET, "properties": subnet}],
        }
        names = (self._place.group, NAME)
        return self._make("network", "virtual_networks", names, self._own(properties))

    def _identity(self) -> bool:
        names, body = (self._place.group, NAME), {"location": self._place.region}
        return self._make("msi", "user_assigned_identities", names, body, "create_or_update")

    def _role(self) -> bool:
        """Write what machines may do, and give it to their identity."""
        return self._give("machine", machine_role(self._place), self._place.scope)

    def _inner_role(self) -> bool:
        """Likewise, what they may do in the one container, and not with programs."""
        role, scope = objects_role(self._place), self._place.container(NAME)
        return self._give("machine in container", role, scope)

    def _give(self, what: str, role: dict[str, Any], scope: str) -> bool:
        """Write a role, and give it to the machines' identity, somewhere."""
        place, own = self._place, ("authorization", "role_definitions", "create_or_update")
        base, name = place.scope.lstrip("/"), place.guid(what)
        self._session.call(*own, base, name, {"properties": role})
        identity = self._session.call("msi", "user_assigned_identities", "get", place.group, NAME)
        properties = {
            "roleDefinitionId": place.id("Authorization/roleDefinitions", name),
            "principalId": identity["properties"]["principalId"],
            "principalType": "ServicePrincipal",  # or it must be known everywhere already
        }
        names, body = (scope.lstrip("/"), place.guid(f"{what}s")), {"properties": properties}
        end = time.monotonic() + SPREAD
        while True:
            try:
                return self._make("authorization", "role_assignments", names, body, "create")
            except RunnerError as error:  # what was just made isn't known everywhere
                if not any(code in str(error) for code in UNKNOWN) or time.monotonic() > end:
                    raise
                self._sleep(2)

    def _storage(self) -> bool:
        properties = {
            "allowBlobPublicAccess": False,
            "allowSharedKeyAccess": False,
            "minimumTlsVersion": "TLS1_2",
            "supportsHttpsTrafficOnly": True,
            "accessTier": "Hot",
        }
        kind = {"kind": "StorageV2", "sku": {"name": "Standard_LRS"}}
        names, body = (self._place.group, self._place.storage), {**self._own(properties), **kind}
        new = self._make(
            "storage", "storage_accounts", names, body, "begin_create", "get_properties"
        )
        policy = (*names, "default", {"properties": _ageing()})
        self._session.call("storage", "management_policies", "create_or_update", *policy)
        return new

    def _container(self, name: str) -> bool:
        names = (self._place.group, self._place.storage, name)
        body = {"properties": {"publicAccess": "None"}}
        return self._make("storage", "blob_containers", names, body, "create")

    def _own(self, properties: dict[str, Any]) -> dict[str, Any]:
        return {"location": self._place.region, "properties": properties}

    def _make(
        self,
        service: str,
        group: str,
        names: tuple[str, ...],
        body: dict[str, Any],
        make: str = "begin_create_or_update",
        get: str = "get",
    ) -> bool:
        """Put something there unless it is there already."""
        try:
            self._session.call(service, group, get, *names)
        except NotFound:
            self._session.call(service, group, make, *names, body)
            return True
        return False


def machine_role(place: Place) -> dict[str, Any]:
    """Write what a machine may do; the same for all, so tasks of one place trust each other."""
    return _custom(place, "machine", "What a machine of cml-runner may do", MACHINE, READ)


def objects_role(place: Place) -> dict[str, Any]:
    """Write what a machine may do besides, in the container of tasks and leases."""
    what = "What a machine of cml-runner may do with objects of tasks"
    return _custom(place, "machine's objects", what, [], CHANGE)


def launcher_role(region: str, *, doctor: bool = False) -> dict[str, Any]:
    """Write the least that a launcher must be allowed, once the region is set up.

    It is what `az role definition create --role-definition` takes.
    """
    subscription = os.environ.get("AZURE_SUBSCRIPTION_ID") or "SUBSCRIPTION"
    place = Place(subscription, region)
    return {
        "Name": f"cml-runner launcher, {region} of {subscription}",
        "IsCustom": True,
        "Description": "What who launches runners with cml-runner may do",
        "Actions": [*LAUNCHER, *(DOCTOR if doctor else ())],
        "NotActions": [],
        "DataActions": OBJECTS,
        "NotDataActions": [],
        "AssignableScopes": [place.scope],
    }


def _custom(
    place: Place, name: str, description: str, actions: list[str], data: list[str]
) -> dict[str, Any]:
    return {
        "roleName": f"cml-runner {name}, {place.region} of {place.subscription}",
        "description": description,
        "type": "CustomRole",
        "permissions": [{"actions": actions, "dataActions": data}],
        "assignableScopes": [place.scope],
    }


def _ageing() -> dict[str, Any]:
    rules = [
        _forgotten("forget", KEPT, f"{NAME}/{TASKS}/", f"{NAME}/{LEASES}/"),
        _forgotten("forget-programs", PROGRAMS_KEPT, f"{PROGRAMS}/"),
    ]
    return {"policy": {"rules": rules}}


def _forgotten(name: str, days: int, *prefixes: str) -> dict[str, Any]:
    definition = {
        "actions": {"baseBlob": {"delete": {"daysAfterModificationGreaterThan": days}}},
        "filters": {"blobTypes": ["blockBlob"], "prefixMatch": list(prefixes)},
    }
    return {"enabled": True, "name": name, "type": "Lifecycle", "definition": definition}
