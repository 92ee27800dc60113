"""Resource Manager: what there is, what becomes of calls that take their time."""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from tests.lab.azure import models, rules, skus
from tests.lab.azure.machines import MESSAGES, Fleet
from tests.lab.azure.wire import ApiError, Call

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.azure import Azure
    from tests.lab.azure.machines import Machines

    Answer = tuple[int, list[tuple[str, str]], Any]

SUBSCRIPTION = "12345678-1234-1234-1234-123456789012"
SCALE_SETS = "Microsoft.Compute/virtualMachineScaleSets"
MACHINES = "Microsoft.Compute/virtualMachines"
IDENTITIES = "Microsoft.ManagedIdentity/userAssignedIdentities"
SETTINGS = "Microsoft.Insights/autoscalesettings"
TIMES = re.compile(r"T\d\d:\d\d:\d\d\.\d{3}(?=Z)")
STATUS = {  # of what always answers with the same, be it new or not
    "Microsoft.Authorization/roleDefinitions": 201,
    "Microsoft.Storage/storageAccounts/managementPolicies": 200,
}
NOTICE = 0.5  # seconds between the notice of a simulated eviction and the eviction
STATEFUL = {
    SCALE_SETS,
    "Microsoft.Network/networkSecurityGroups",
    "Microsoft.Network/virtualNetworks",
    "Microsoft.Resources/subscriptions/resourceGroups",
    "Microsoft.Storage/storageAccounts",
}
SLOW = ("Microsoft.Compute/", "Microsoft.Network/")
STORAGE = "Microsoft.Storage/storageAccounts"  # slow, too, but not what is in it


@dataclass
class Operation:
    """Something that goes on."""

    ready: float  # when it is done
    error: ApiError | None = None
    then: Callable[[], None] = lambda: None


class Manager:
    """One subscription."""

    def __init__(self, azure: Azure, machines: Machines) -> None:
        self._azure = azure
        self.resources: dict[str, Any] = {}  # by identifier, in small letters
        self.registered = {"Microsoft.Compute", "Microsoft.Storage"}
        self.subscriptions = [SUBSCRIPTION]
        self.missing: set[str] = set()  # sizes that the region hasn't got
        self.usages: dict[str, tuple[int, int]] = dict(skus.USAGES)  # and limits
        self.duration: float = 0  # seconds that every operation takes
        self._written: dict[str, float] = {}
        self.log: list[dict[str, Any]] = []
        self._operations: dict[str, Operation] = {}
        self.lock = threading.RLock()
        self.fleet = Fleet(self, machines)

    def call(self, call: Call) -> Answer:
        """Carry out one request. Raises ApiError."""
        if call.path.startswith("/operations/"):
            return self._look(call)
        if call.path.startswith("/serial/"):
            return 200, [("Content-Type", "text/plain")], self.fleet.lives[call.name].console
        if call.path == "/subscriptions":
            listed = [{"subscriptionId": one, "displayName": "ours"} for one in self.subscriptions]
            return 200, [], {"value": listed}
        special = {
            "Microsoft.Compute/skus": self._skus,
            "Microsoft.Compute/locations/usages": self._usages,
            models.IMAGES: self._images,
            "Microsoft.Authorization/permissions": self._permissions,
            "Microsoft.Insights/eventtypes/values": self._activities,
            "Microsoft.Resources/tags": self._tag,
            MACHINES: self._machine,
        }
        if call.kind in special:
            return special[call.kind](call)
        if "/" not in call.kind:
            return self._provider(call)
        method = getattr(self, f"_{call.method}")
        found: Answer = method(call)
        return found

    def account(self, name: str) -> str:
        """Find the identifier of a storage account."""
        end = f"/storageaccounts/{name}"
        return next((one["id"] for key, one in self.resources.items() if key.endswith(end)), "")

    def age(self, path: str) -> float:
        """Say how many seconds ago something was last written."""
        return time.monotonic() - self._written[path]

    def go_on(self) -> None:
        """Let be what had to become of operations, whether anybody looks at them or not."""
        for operation in list(self._operations.values()):
            if operation.ready <= time.monotonic():
                operation.then()
                operation.then = lambda: None

    def write_down(self, path: str, action: str, status: str, said: Any = None) -> None:
        """Add to the activity log."""
        self.log.append(
            {
                "eventTimestamp": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%S.%f}0Z",
                "resourceId": path,
                "operationName": {"value": action},
                "status": {"value": status},
                "properties": {"statusMessage": json.dumps(said)} if said else {},
            }
        )

    # What can be done with what there is

    def _GET(self, call: Call) -> Answer:
        found = self.resources.get(call.path.lower())
        if found:
            return 200, [], found
        if call.kind in (
            "Microsoft.Network/networkInterfaces",
            "Microsoft.Network/publicIPAddresses",
        ):
            return 200, [], {"value": self._network(call)}
        raise self._absent(call)

    def _PUT(self, call: Call) -> Answer:
        body = call.body
        if wrong := models.problems(call.method, call.kind, body):
            raise ApiError("InvalidRequestContent", "; ".join(wrong))
        old = self.resources.get(call.path.lower())
        self._parents(call)
        rules.tags(body.get("tags", {}))
        if call.kind == SCALE_SETS:
            self._must_be_new(call, old)
            self._linked(call)
            rules.scale_set(body)
        made = {"id": call.path, "name": call.name, "type": call.kind, **body}
        if call.kind == SETTINGS:  # times come back with seven digits
            made = json.loads(TIMES.sub(r"\g<0>0000", json.dumps(made)))
        state = {"provisioningState": "Succeeded"} if call.kind in STATEFUL else {}
        made["properties"] = {**made.get("properties", {}), **state}
        self._born(call, made)
        self.resources[call.path.lower()] = made
        self._written[call.path.lower()] = time.monotonic()
        then = self._forgotten(call.path) if not old else lambda: None
        status = STATUS.get(call.kind, 200 if old else 201)
        return self._accepted(call, status, made, failed=then)

    def _PATCH(self, call: Call) -> Answer:
        if wrong := models.problems(call.method, call.kind, call.body):
            raise ApiError("InvalidRequestContent", "; ".join(wrong))
        found = self.resources.get(call.path.lower())
        if not found:
            raise self._absent(call)
        before = json.loads(json.dumps(found))
        found["sku"] = {**found["sku"], **call.body.get("sku", {})}
        found["properties"] = {**found["properties"], **call.body.get("properties", {})}
        if found["sku"]["name"] != "Mix":
            found["properties"].pop("skuProfile", None)
        rules.sizes(found)
        if code := self.fleet.refused(call.path):
            self.resources[call.path.lower()] = before
            raise ApiError(code, MESSAGES[code], 409)
        error = self.fleet.fit(call.path)
        return self._accepted(call, 200, found, error)

    def _DELETE(self, call: Call) -> Answer:
        found = self.resources.get(call.path.lower())
        if not found:
            return 204, [], None
        if call.kind == SCALE_SETS:
            if self.fleet.of(call.path) and call.query.get("forceDeletion") != "true":
                raise ApiError("OperationNotAllowed", "It still has machines.", 409)
            found["properties"]["provisioningState"] = "Deleting"
            found["sku"]["capacity"] = 0
            self.fleet.fit(call.path)
        return self._accepted(call, 202, None, done=self._forgotten(call.path))

    # What is special about some of them

    def _machine(self, call: Call) -> Answer:
        if call.method == "GET":
            owner = call.query["$filter"].rpartition(" eq ")[2].strip("'")
            return 200, [], {"value": [self.fleet.shown(one) for one in self.fleet.of(owner)]}
        name = call.path.split("/virtualMachines/")[1].partition("/")[0]
        life = self.fleet.lives.get(name)
        if not life or life.ended:
            if call.method == "DELETE":
                return 204, [], None
            raise self._absent(call)
        if call.path.endswith("/retrieveBootDiagnosticsData"):
            where = f"{self._azure.manager_url}/serial/{name}"
            return 200, [], {"serialConsoleLogBlobUri": f"{where}?sig=secret"}
        if call.path.endswith("/simulateEviction"):
            self.fleet.evict(name, after=NOTICE)
            return 204, [], None
        if call.method != "DELETE":
            raise self._absent(call)
        self.fleet.delete(name)
        return self._accepted(call, 202, None)

    def _tag(self, call: Call) -> Answer:
        if wrong := models.problems(call.method, call.kind, call.body):
            raise ApiError("InvalidRequestContent", "; ".join(wrong))
        name = call.path.split("/virtualMachines/")[1].partition("/")[0]
        life = self.fleet.lives.get(name)
        if not life or life.ended:
            raise self._absent(call)
        life.tags.update(call.body["properties"]["tags"])
        return 200, [], {"properties": {"tags": life.tags}}

    def _skus(self, call: Call) -> Answer:
        region = call.query["$filter"].partition("'")[2].rstrip("'")
        return 200, [], {"value": skus.listed(region, self.missing)}

    def _usages(self, _: Call) -> Answer:
        listed = [
            {
                "name": {"value": name, "localizedValue": skus.QUOTAS[name]},
                "currentValue": used,
                "limit": limit,
                "unit": "Count",
            }
            for name, (used, limit) in self.usages.items()
        ]
        return 200, [], {"value": listed}

    def _images(self, call: Call) -> Answer:
        """List an image's versions, or describe one."""
        parts = dict(
            zip(*[iter(call.path.partition("/Microsoft.Compute/")[2].split("/"))] * 2, strict=False)
        )
        versions = skus.IMAGES.get((parts["publishers"], parts["offers"], parts["skus"]), {})
        if call.path.endswith("/versions"):
            return 200, [], [{"name": one, "location": parts["locations"]} for one in versions]
        if call.name not in versions:
            raise ApiError("NotFound", f"Artifact: VMImage was not found: {call.path}", 404)
        described = {"architecture": versions[call.name], "hyperVGeneration": "V2"}
        found = {"name": call.name, "location": parts["locations"], "properties": described}
        return 200, [], found

    def _permissions(self, call: Call) -> Answer:
        """Say what who asks may do in a resource group."""
        scope = call.path.lower().partition("/providers/")[0]
        if scope not in self.resources:
            name = scope.rpartition("/")[2]
            raise ApiError(
                "ResourceGroupNotFound", f"Resource group '{name}' could not be found.", 404
            )
        who = self._azure.app.principals[call.token]
        everything = {"actions": ["*"], "dataActions": [f"{STORAGE}/blobServices/*"]}
        roles = who.roles() if who.roles else None
        here = [
            {"actions": list(one.actions), "dataActions": list(one.data)}
            for one in roles or ()
            if any(scope.startswith(place.lower()) for place in one.scopes)
        ]
        nothing: dict[str, list[str]] = {"notActions": [], "notDataActions": []}
        listed = here if roles is not None else [everything]
        return 200, [], {"value": [{**one, **nothing} for one in listed]}

    def _activities(self, call: Call) -> Answer:
        group = call.query["$filter"].rpartition(" eq ")[2].strip("'")
        since = call.query["$filter"].split("'")[1].rstrip("Z")
        ours = [one for one in self.log if f"/{group}/" in one["resourceId"]]
        return 200, [], {"value": [one for one in ours if one["eventTimestamp"] >= since]}

    def _provider(self, call: Call) -> Answer:
        if call.method == "POST":
            self.registered.add(call.kind)
        state = "Registered" if call.kind in self.registered else "NotRegistered"
        return 200, [], {"namespace": call.kind, "registrationState": state}

    def _network(self, call: Call) -> list[dict[str, Any]]:
        """List the interfaces and public addresses which machines have brought with them."""
        base = call.path.rpartition("/")[0].lower()
        lives = [one for one in self.fleet.lives.values() if not one.ended]
        lives = [
            one for one in lives if one.path.lower().startswith(base.partition("/providers")[0])
        ]
        if call.kind.endswith("publicIPAddresses"):
            return [
                {
                    "id": f"{base}/publicIPAddresses/{one.instance.id}",
                    "properties": {"ipAddress": f"203.0.113.{one.instance.address.split('.')[3]}"},
                }
                for one in lives
            ]
        return [
            {
                "id": f"{base}/networkInterfaces/{one.instance.id}",
                "properties": {
                    "virtualMachine": {"id": one.path},
                    "ipConfigurations": [
                        {
                            "properties": {
                                "privateIPAddress": one.instance.address,
                                "publicIPAddress": {
                                    "id": f"{base}/publicIPAddresses/{one.instance.id}"
                                },
                            }
                        }
                    ],
                },
            }
            for one in lives
        ]

    def _must_be_new(self, call: Call, old: Any) -> None:
        provider = call.kind.partition("/")[0]
        if provider not in self.registered:
            text = f"The subscription is not registered to use namespace '{provider}'."
            raise ApiError("MissingSubscriptionRegistration", text, 409)
        if old and call.headers.get("if-none-match") == "*":
            raise ApiError("PreconditionFailed", "The resource exists already.", 412)

    def _linked(self, call: Call) -> None:
        """Check the rights on what a scale set makes use of."""
        profile = call.body["properties"]["virtualMachineProfile"]
        (interface,) = profile["networkProfile"]["networkInterfaceConfigurations"]
        (address,) = interface["properties"]["ipConfigurations"]
        subnet = address["properties"]["subnet"]["id"]
        action = "Microsoft.Network/virtualNetworks/subnets/join/action"
        self._azure.app.may(call, action, subnet)
        for identity in call.body["identity"]["userAssignedIdentities"]:
            self._azure.app.may(call, f"{IDENTITIES}/assign/action", identity)
            if identity.lower() not in self.resources:
                raise ApiError("LinkedAuthorizationFailed", f"no identity {identity}", 403)
        network, _, name = subnet.partition("/subnets/")
        subnets = self.resources.get(network.lower(), {}).get("properties", {}).get("subnets", [])
        if name not in [one["name"] for one in subnets]:
            raise ApiError("InvalidResourceReference", f"no subnet {subnet}", 400)

    def _parents(self, call: Call) -> None:
        """See that what it belongs to is there."""
        scope = call.path.partition("/providers/")[0].lower()
        if scope != call.path.lower() and scope not in self.resources:
            name = scope.rpartition("/")[2]
            raise ApiError(
                "ResourceGroupNotFound", f"Resource group '{name}' could not be found.", 404
            )
        inner = call.path.rpartition("/providers/")[0]
        if "/providers/" in inner and inner.lower() not in self.resources:
            raise ApiError("ResourceNotFound", f"The Resource '{inner}' was not found.", 404)

    def _born(self, call: Call, made: dict[str, Any]) -> None:
        if call.kind == IDENTITIES:
            made["properties"] |= {"principalId": secrets.token_hex(8), "clientId": "-"}
        if call.kind == "Microsoft.Storage/storageAccounts/blobServices/containers":
            account = call.path.split("/storageAccounts/")[1].partition("/")[0]
            self._azure.blobs.make(account, call.name)

    # What takes its time

    def _accepted(
        self,
        call: Call,
        status: int,
        body: Any,
        error: ApiError | None = None,
        *,
        done: Callable[[], None] = lambda: None,
        failed: Callable[[], None] = lambda: None,
    ) -> Answer:
        fault = self._azure.app.struck(call)
        if fault:
            error, done = ApiError(fault.code, fault.message), failed
        if not call.kind.startswith(SLOW) and call.kind != STORAGE:
            done()
            return (200 if status == 202 else status), [], body
        number = secrets.token_hex(6)
        self._operations[number] = Operation(time.monotonic() + self.duration, error, done)
        url = f"{self._azure.manager_url}/operations/{number}"
        if call.kind == STORAGE:  # which only knows the older way
            return 202, [("Location", url)], body
        return (
            status,
            [("Azure-AsyncOperation", f"{url}?api-version=x"), ("Retry-After", "10")],
            body,
        )

    def _look(self, call: Call) -> Answer:
        operation = self._operations[call.name]
        old = "api-version" not in call.query
        if operation.ready > time.monotonic():
            return (202, [], None) if old else (200, [], {"status": "InProgress"})
        self.go_on()
        if operation.error:
            return 200, [], {"status": "Failed", **operation.error.body()}
        return 200, [], None if old else {"status": "Succeeded"}

    def _forgotten(self, path: str) -> Callable[[], None]:
        def forget() -> None:
            with self.lock:
                self.resources.pop(path.lower(), None)

        return forget

    def _absent(self, call: Call) -> ApiError:
        return ApiError("ResourceNotFound", f"The Resource '{call.path}' was not found.", 404)
