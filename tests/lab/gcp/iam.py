"""Who may do what: service accounts, roles and policies, and what each method takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.lab.gcp.compute import PROJECT
from tests.lab.gcp.discovery import ApiError
from tests.lab.gcp.metadata import NUMBER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.gcp.discovery import Call

# What a method takes, by its name in the API's description.
RIGHTS: dict[str, tuple[str, ...]] = {
    "compute.acceleratorTypes.aggregatedList": ("compute.acceleratorTypes.list",),
    "compute.firewalls.get": ("compute.firewalls.get",),
    "compute.firewalls.insert": ("compute.firewalls.create", "compute.networks.updatePolicy"),
    "compute.globalOperations.aggregatedList": ("compute.globalOperations.list",),
    "compute.globalOperations.wait": ("compute.globalOperations.get",),
    "compute.images.get": ("compute.images.get",),
    "compute.images.getFromFamily": ("compute.images.getFromFamily",),
    "compute.instanceTemplates.delete": ("compute.instanceTemplates.delete",),
    "compute.instanceTemplates.insert": ("compute.instanceTemplates.create",),
    "compute.instanceTemplates.list": ("compute.instanceTemplates.list",),
    "compute.instances.aggregatedList": ("compute.instances.list",),
    "compute.instances.delete": ("compute.instances.delete",),
    "compute.instances.getSerialPortOutput": ("compute.instances.getSerialPortOutput",),
    "compute.instances.setMetadata": ("compute.instances.setMetadata",),
    "compute.instances.setTags": ("compute.instances.setTags",),
    "compute.instances.simulateMaintenanceEvent": ("compute.instances.simulateMaintenanceEvent",),
    "compute.machineTypes.aggregatedList": ("compute.machineTypes.list",),
    "compute.regionInstanceGroupManagers.abandonInstances": (
        "compute.instanceGroupManagers.update",
    ),
    "compute.regionInstanceGroupManagers.delete": (
        "compute.instanceGroupManagers.delete",
        "compute.instanceGroups.delete",
    ),
    "compute.regionInstanceGroupManagers.deleteInstances": (
        "compute.instanceGroupManagers.update",
    ),
    "compute.regionInstanceGroupManagers.get": ("compute.instanceGroupManagers.get",),
    "compute.regionInstanceGroupManagers.insert": (
        "compute.instanceGroupManagers.create",
        "compute.instanceGroups.create",
        "compute.instanceTemplates.useReadOnly",
        "compute.instances.create",
        "compute.instances.setLabels",
        "compute.instances.setMetadata",
        "compute.instances.setServiceAccount",
        "compute.instances.setTags",
        "compute.disks.create",
        "compute.disks.setLabels",
        "compute.subnetworks.use",
        "compute.subnetworks.useExternalIp",
    ),
    "compute.regionInstanceGroupManagers.listErrors": ("compute.instanceGroupManagers.get",),
    "compute.regionInstanceGroupManagers.listManagedInstances": (
        "compute.instanceGroupManagers.get",
    ),
    "compute.regionInstanceGroupManagers.recreateInstances": (
        "compute.instanceGroupManagers.update",
    ),
    "compute.regionInstanceGroupManagers.resize": ("compute.instanceGroupManagers.update",),
    "compute.regionInstanceGroupManagers.setInstanceTemplate": (
        "compute.instanceGroupManagers.update",
    ),
    "compute.networks.get": ("compute.networks.get",),
    "compute.projects.get": ("compute.projects.get",),
    "compute.regions.get": ("compute.regions.get",),
    "compute.regionOperations.wait": ("compute.regionOperations.get",),
    "compute.zoneOperations.wait": ("compute.zoneOperations.get",),
    "cloudresourcemanager.projects.get": ("resourcemanager.projects.get",),
    "cloudresourcemanager.projects.getIamPolicy": ("resourcemanager.projects.getIamPolicy",),
    "cloudresourcemanager.projects.testIamPermissions": (),  # to which everybody has a right
    "iam.projects.serviceAccounts.testIamPermissions": (),
    "storage.buckets.testIamPermissions": (),
    "cloudresourcemanager.projects.setIamPolicy": ("resourcemanager.projects.setIamPolicy",),
    "iam.projects.roles.create": ("iam.roles.create",),
    "iam.projects.roles.get": ("iam.roles.get",),
    "iam.projects.roles.patch": ("iam.roles.update",),
    "iam.projects.serviceAccounts.create": ("iam.serviceAccounts.create",),
    "iam.projects.serviceAccounts.getIamPolicy": ("iam.serviceAccounts.getIamPolicy",),
    "iam.projects.serviceAccounts.setIamPolicy": ("iam.serviceAccounts.setIamPolicy",),
    "storage.buckets.getIamPolicy": ("storage.buckets.getIamPolicy",),
    "storage.buckets.insert": ("storage.buckets.create",),
    "storage.buckets.list": ("storage.buckets.list",),
    "storage.buckets.patch": ("storage.buckets.update",),
    "storage.buckets.setIamPolicy": ("storage.buckets.setIamPolicy",),
}
KINDS = {"instance": "Instance", "instanceTemplate": "InstanceTemplate"}
# What a bucket's policy can give, and what it allows on objects.
OBJECT_ROLES = {
    "roles/storage.objectViewer": {"storage.objects.get", "storage.objects.list"},
    "roles/storage.objectUser": {
        f"storage.objects.{verb}" for verb in ("create", "get", "list", "delete")
    },
}


class Iam:
    """The policies of one project."""

    def __init__(self) -> None:
        self.accounts: dict[str, dict[str, Any]] = {}  # policies, by address
        self.roles: dict[str, dict[str, Any]] = {}
        self.policy: dict[str, Any] = {"etag": "1", "version": 1, "bindings": []}
        self.slow = 0  # times that a new account isn't known yet

    def serviceAccounts_create(self, call: Call) -> Any:
        address = f"{call.body['accountId']}@{PROJECT}.iam.gserviceaccount.com"
        if address in self.accounts:
            raise ApiError(409, "alreadyExists", f"Service account {address} already exists")
        self.accounts[address] = {"etag": "1"}
        return {"email": address, "projectId": PROJECT}

    def roles_create(self, call: Call) -> Any:
        name = call.body["roleId"]
        if name in self.roles:
            raise ApiError(409, "alreadyExists", f"A role named {name} already exists")
        self.roles[name] = call.body["role"]
        return self.roles[name]

    def roles_get(self, call: Call) -> Any:
        return self.roles[call.where["rolesId"]]

    def roles_patch(self, call: Call) -> Any:
        self.roles[call.where["rolesId"]] |= call.body
        return call.body

    def serviceAccounts_getIamPolicy(self, call: Call) -> Any:
        return self.accounts[call.where["serviceAccountsId"]]

    def serviceAccounts_setIamPolicy(self, call: Call) -> Any:
        self.accounts[call.where["serviceAccountsId"]] = call.body["policy"]
        return call.body["policy"]

    def projects_get(self, call: Call) -> Any:
        return {"projectId": call.where["projectId"], "projectNumber": NUMBER}

    def projects_getIamPolicy(self, call: Call) -> Any:
        assert call
        return self.policy

    def projects_setIamPolicy(self, call: Call) -> Any:
        new = call.body["policy"]
        if new["etag"] != self.policy["etag"]:
            raise ApiError(409, "aborted", "There were concurrent policy changes.")
        if self.slow:
            self.slow -= 1
            member = new["bindings"][-1]["members"][0]
            raise ApiError(400, "badRequest", f"Service account {member} does not exist.")
        self.policy = {**new, "etag": str(int(new["etag"]) + 1)}
        return self.policy

    def granted(self, account: str, call: Call) -> set[str]:
        """Say what a service account may do, on what a call is about."""
        found: set[str] = set()
        for binding in self.policy["bindings"]:
            condition = binding.get("condition", {}).get("expression", "True")
            if f"serviceAccount:{account}" in binding["members"] and _holds(condition, call):
                role = self.roles.get(binding["role"].rpartition("/")[2], {})
                found |= set(role.get("includedPermissions", []))
        return found


def lent(policy: dict[str, Any], account: str, resource: str) -> set[str]:
    """Say what a bucket's own policy lets somebody do with it, or with an object in it.

    Listing is a right on the bucket itself, with any prefix.
    """
    kind = "Object" if "/objects/" in resource else "Bucket"
    there = _Resource(f"storage.googleapis.com/{kind}", resource)
    found: set[str] = set()
    for binding in policy.get("bindings", []):
        condition = binding.get("condition", {}).get("expression", "True")
        if f"serviceAccount:{account}" in binding["members"] and _true(condition, there):
            found |= OBJECT_ROLES.get(binding["role"], set())
    return found


class _Name(str):
    """The name of a resource, as conditions see it."""

    __slots__ = ()

    def extract(self, template: str) -> _Name:
        """Return what stands where the template has its braces."""
        before, _, _ = template.partition("{")
        return _Name(self.partition(before)[2].partition("/")[0]) if before in self else _Name()

    def startsWith(self, text: str) -> bool:
        return self.startswith(text)


class _Resource:
    def __init__(self, kind: str, name: str) -> None:
        self.type, self.name = kind, _Name(name)


def _holds(condition: str, call: Call) -> bool:
    return all(_true(condition, one) for one in _resources(call))


def _true(condition: str, resource: _Resource) -> bool:
    """Evaluate a condition, whose language is Python's but for two operators."""
    text = condition.replace("||", " or ").replace("&&", " and ")
    return bool(eval(text, {"resource": resource}))


def _resources(call: Call) -> Iterator[_Resource]:
    for what, kind in KINDS.items():
        if what in call.where:
            name = f"projects/{PROJECT}/x/{what}s/{call.where[what]}"
            yield _Resource(f"compute.googleapis.com/{kind}", name)
            return
    yield _Resource("", "")
