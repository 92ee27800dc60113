"""What all tasks of a subscription and region share, and what permissions they need.

The pieces are made once and never deleted by us; making them again changes nothing:

    resource group cml-runner-REGION  in which everything is, that of the tasks too
    security group cml-runner         lets nothing in
    network cml-runner                with one subnet, to which that belongs
    identity cml-runner               of machines: may touch our container and end our groups
    storage account cml…              without keys, private, forgets everything after 30 days
    container cml-runner              in it

The container is made last, so that its existence stands for all of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cml_runner.errors import CredentialsError, NotFound, NotReady, RunnerError
from cml_runner.leases import LEASES, TASKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.clouds.azure.session import Session

log = logging.getLogger(__name__)

NAME = "cml-runner"
SUBNET = "machines"
KEPT = 30  # days
PROVIDERS = ("Compute", "Network", "Storage", "ManagedIdentity", "Insights")
REGISTERED = 300  # seconds that the registration of a provider may take
SPREAD = 120  # seconds until a new role and a new identity are known everywhere
UNKNOWN = ("RoleDefinitionDoesNotExist", "PrincipalNotFound")
NAMESPACE = uuid.UUID("6d8a1b0e-6f4e-4a53-9a0c-5b6f4f6a2c11")  # of the names of our roles
BLOBS = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs"
OBJECTS = [f"{BLOBS}/read", f"{BLOBS}/write", f"{BLOBS}/delete"]
MACHINE = [
    "Microsoft.Compute/virtualMachines/delete",
    "Microsoft.Compute/virtualMachines/deallocate/action",
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
            (f"container {NAME}", self._container),
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
        place = self._place
        scope, name = place.scope.lstrip("/"), place.guid("machine")
        role = {"properties": machine_role(place)}
        self._session.call(
            "authorization", "role_definitions", "create_or_update", scope, name, role
        )
        identity = self._session.call("msi", "user_assigned_identities", "get", place.group, NAME)
        properties = {
            "roleDefinitionId": place.id("Authorization/roleDefinitions", name),
            "principalId": identity["properties"]["principalId"],
            "principalType": "ServicePrincipal",  # or it must be known everywhere already
        }
        names, body = (scope, place.guid("machines")), {"properties": properties}
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

    def _container(self) -> bool:
        names = (self._place.group, self._place.storage, NAME)
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
    return {
        "roleName": f"cml-runner machine, {place.region} of {place.subscription}",
        "description": "What a machine of cml-runner may do",
        "type": "CustomRole",
        "permissions": [{"actions": MACHINE, "dataActions": OBJECTS}],
        "assignableScopes": [place.scope],
    }


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


def _ageing() -> dict[str, Any]:
    actions = {"baseBlob": {"delete": {"daysAfterModificationGreaterThan": KEPT}}}
    filters = {"blobTypes": ["blockBlob"], "prefixMatch": [f"{NAME}/{TASKS}/", f"{NAME}/{LEASES}/"]}
    definition = {"actions": actions, "filters": filters}
    rule = {"enabled": True, "name": "forget", "type": "Lifecycle", "definition": definition}
    return {"policy": {"rules": [rule]}}
