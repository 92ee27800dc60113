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

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.clouds.azure.session import Session

log = logging.getLogger(__name__)

NAME = "cml-runner"
SUBNET = "machines"
LEASES, TASKS = "leases", "tasks"  # what is in the container
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
        base = f"/subscriptions/{self._place.subscription}/providers"
        paths = [f"{base}/Microsoft.{name}" for name in PROVIDERS]
        new = [path for path in paths if not self._registered(path)]
        for path in new:
            self._session.call("POST", f"{path}/register")
        end = time.monotonic() + REGISTERED
        for path in new:
            while not self._registered(path):
                if time.monotonic() > end:
                    msg = f"gave up waiting for {path.rpartition('/')[2]} to be registered"
                    raise NotReady(msg)
                self._sleep(2)
        return bool(new)

    def _registered(self, path: str) -> bool:
        return bool(self._session.call("GET", path).get("registrationState") == "Registered")

    def _group(self) -> bool:
        return self._make(self._place.scope, {"location": self._place.region})

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
        path = self._place.id("Network/networkSecurityGroups")
        return self._make(path, self._own({"securityRules": [rule]}))

    def _network(self) -> bool:
        guard = {"id": self._place.id("Network/networkSecurityGroups")}
        subnet = {"addressPrefix": "10.0.0.0/16", "networkSecurityGroup": guard}
        properties = {
            "addressSpace": {"addressPrefixes": ["10.0.0.0/8"]},
            "subnets": [{"name": SUBNET, "properties": subnet}],
        }
        return self._make(self._place.id("Network/virtualNetworks"), self._own(properties))

    def _identity(self) -> bool:
        return self._make(self._place.identity, {"location": self._place.region})

    def _role(self) -> bool:
        """Write what machines may do, and give it to their identity."""
        place = self._place
        kind = f"{place.scope}/providers/Microsoft.Authorization"
        definition = f"{kind}/roleDefinitions/{place.guid('machine')}"
        self._session.call("PUT", definition, {"properties": machine_role(place)})
        identity = self._session.call("GET", place.identity)
        properties = {
            "roleDefinitionId": definition,
            "principalId": identity["properties"]["principalId"],
            "principalType": "ServicePrincipal",  # or it must be known everywhere already
        }
        assignment = f"{kind}/roleAssignments/{place.guid('machines')}"
        end = time.monotonic() + SPREAD
        while True:
            try:
                return self._make(assignment, {"properties": properties})
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
        path = self._place.id("Storage/storageAccounts", self._place.storage)
        new = self._make(path, {**self._own(properties), **kind})
        self._session.call("PUT", f"{path}/managementPolicies/default", {"properties": _ageing()})
        return new

    def _container(self) -> bool:
        account = self._place.id("Storage/storageAccounts", self._place.storage)
        path = f"{account}/blobServices/default/containers/{NAME}"
        return self._make(path, {"properties": {"publicAccess": "None"}})

    def _own(self, properties: dict[str, Any]) -> dict[str, Any]:
        return {"location": self._place.region, "properties": properties}

    def _make(self, path: str, body: dict[str, Any]) -> bool:
        """Put something there unless it is there already."""
        try:
            self._session.call("GET", path)
        except NotFound:
            self._session.call("PUT", path, body)
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


def launcher_role(region: str) -> dict[str, Any]:
    """Write the least that a launcher must be allowed, once the region is set up.

    It is what `az role definition create --role-definition` takes.
    """
    subscription = os.environ.get("AZURE_SUBSCRIPTION_ID") or "SUBSCRIPTION"
    place = Place(subscription, region)
    return {
        "Name": f"cml-runner launcher, {region} of {subscription}",
        "IsCustom": True,
        "Description": "What who launches runners with cml-runner may do",
        "Actions": LAUNCHER,
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
