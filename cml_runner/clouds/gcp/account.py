"""What all tasks of a project share, and what permissions they need.

The pieces are made once and never deleted by us; making them again changes nothing:

    service account cml-runner       what machines are; may use our bucket and end our groups
    role cml_runner_machine          that it has in the project
    firewall rule cml-runner         lets nothing in, whatever other rules allow
    firewall rule cml-runner-iap     lets Google's proxy in to a machine, while it has that tag
    bucket cml-runner-PROJECT        private, forgets tasks after 30 days and programs after 60;
                                     machines read all of it and write what belongs to tasks

The bucket is made last, so that its existence stands for all of them.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cml_runner import wait
from cml_runner.boot.objects import PROGRAMS
from cml_runner.errors import AlreadyExists, CredentialsError, NotFound, NotReady, RunnerError
from cml_runner.leases import LEASES, TASKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from cml_runner.clouds.gcp.session import Session

log = logging.getLogger(__name__)

ACCOUNT = NETWORK_TAG = FIREWALL = "cml-runner"
IAP = "cml-runner-iap"  # firewall rule, and the tag of machines for which it holds
PROXY = "35.235.240.0/20"  # https://cloud.google.com/iap/docs/using-tcp-forwarding
ROLE, LAUNCHER = "cml_runner_machine", "cml_runner_launcher"
OURS = "cml-"  # all names of runners' groups, templates and machines begin so
KEPT = 30  # days
PROGRAMS_KEPT = 60  # days; a launch puts its program again at half of that
READER, WRITER = "roles/storage.objectViewer", "roles/storage.objectUser"
NETWORK = "default"
PRIORITY = 900  # of a rule; the default network's own have 65534, most others 1000
IAM = "https://iam.googleapis.com/v1"
PROJECTS = "https://cloudresourcemanager.googleapis.com/v1/projects"
STORAGE = "https://storage.googleapis.com/storage/v1"
VISIBLE = 60  # seconds until a new service account is known everywhere
MACHINE_PERMISSIONS = (
    "compute.globalOperations.get",
    "compute.instanceGroupManagers.delete",
    "compute.instanceGroupManagers.get",
    "compute.instanceGroupManagers.update",
    "compute.instanceGroups.delete",
    "compute.instanceTemplates.delete",
    "compute.instanceTemplates.list",
    "compute.instances.delete",
    "compute.regionOperations.get",
    "compute.zoneOperations.get",
)
LAUNCHER_PERMISSIONS = (
    "compute.acceleratorTypes.list",  # with GPUs that are attached
    "compute.disks.create",
    "compute.disks.setLabels",
    "compute.firewalls.create",  # --cloud-ssh-private
    "compute.firewalls.get",
    "compute.globalOperations.get",
    "compute.globalOperations.list",
    "compute.images.get",  # images that are no families
    "compute.images.getFromFamily",
    "compute.images.useReadOnly",
    "compute.instanceGroupManagers.create",
    "compute.instanceGroupManagers.delete",
    "compute.instanceGroupManagers.get",
    "compute.instanceGroupManagers.update",
    "compute.instanceGroups.create",
    "compute.instanceGroups.delete",
    "compute.instanceTemplates.create",
    "compute.instanceTemplates.delete",
    "compute.instanceTemplates.list",
    "compute.instanceTemplates.useReadOnly",
    "compute.instances.create",
    "compute.instances.getSerialPortOutput",  # logs
    "compute.instances.list",
    "compute.instances.setLabels",
    "compute.instances.setMetadata",
    "compute.instances.setServiceAccount",
    "compute.instances.setTags",
    "compute.instances.simulateMaintenanceEvent",  # interrupt --real
    "compute.machineTypes.list",
    "compute.networks.updatePolicy",  # --cloud-ssh-private
    "compute.regionOperations.get",
    "compute.subnetworks.use",
    "compute.subnetworks.useExternalIp",
    "compute.zoneOperations.get",
    "iap.tunnelInstances.accessViaIAP",  # ssh
    "storage.buckets.list",
    "storage.objects.create",
    "storage.objects.delete",
    "storage.objects.get",
    "storage.objects.list",
)
DOCTOR_PERMISSIONS = (  # to look at what stands against a launch; none of them changes anything
    "compute.networks.get",
    "compute.projects.get",
    "compute.regions.get",
)


def bucket(project: str) -> str:
    """Name the bucket."""
    return f"cml-runner-{project.replace(':', '-').replace('.', '-')}"


def address(project: str) -> str:
    """Name the machines' service account."""
    domain, _, name = project.rpartition(":")
    of = f"{name}.{domain}" if domain else name
    return f"{ACCOUNT}@{of}.iam.gserviceaccount.com"


def ssh(address: str) -> str:
    """Name the rule that lets one address in, and the tag of machines for which it holds."""
    return f"{FIREWALL}-ssh-{address.replace('.', '-').replace(':', '-')}".rstrip("-")


def launcher_role(*, doctor: bool = False) -> dict[str, Any]:
    """Write the least that a launcher must be allowed, once the project is set up."""
    more = DOCTOR_PERMISSIONS if doctor else ()
    return {
        "title": "Launcher of cml-runner",
        "description": "Besides, roles/iam.serviceAccountUser on the service account cml-runner",
        "stage": "GA",
        "includedPermissions": [*LAUNCHER_PERMISSIONS, *more],
    }


def machine_role() -> dict[str, Any]:
    """Write what a machine may do; the same for all, so tasks of one project trust each other."""
    return {
        "title": "Machine of cml-runner",
        "description": "What a machine needs to end itself and its group",
        "stage": "GA",
        "includedPermissions": list(MACHINE_PERMISSIONS),
    }


def condition() -> dict[str, str]:
    """Say on what a machine may use its role; groups can't be named in conditions.

    https://cloud.google.com/iam/docs/conditions-resource-attributes
    """
    kinds = {"Instance": "instances", "InstanceTemplate": "instanceTemplates"}
    parts = [
        f'(resource.type != "compute.googleapis.com/{kind}" ||'
        f' resource.name.extract("/{place}/{{name}}").startsWith("{OURS}"))'
        for kind, place in kinds.items()
    ]
    return {"title": "cml-runner", "expression": " && ".join(parts)}


def writing(bucket: str) -> dict[str, str]:
    """Say what of the bucket machines may write: what belongs to tasks, but none of the programs.

    A list is asked of the bucket itself, so it is the reader's role that allows it.
    https://cloud.google.com/iam/docs/conditions-resource-attributes#resource-name
    """
    parts = [
        f'resource.name.startsWith("projects/_/buckets/{bucket}/objects/{part}/")'
        for part in (TASKS, LEASES)
    ]
    return {"title": "cml-runner", "expression": " || ".join(parts)}


class Shared:
    """The shared pieces of one project."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return bucket(self._session.project)

    def has_bucket(self) -> bool:
        """Say if it is there. It is looked for among our own: its name can be guessed."""
        found = self._session.rest(
            "GET", f"{STORAGE}/b", project=self._session.project, prefix=self.bucket
        )
        return any(one["name"] == self.bucket for one in found.get("items", []))

    def has_firewall(self, name: str = FIREWALL) -> bool:
        """Say if a rule is there; ours lets nothing in."""
        try:
            self._session.call("Firewalls", "get", firewall=name)
        except NotFound:
            return False
        return True

    def open_ssh(self, address: str) -> None:
        """Let one address in, to port 22 of machines that have this rule's name as a tag."""
        length = 128 if ":" in address else 32
        rule = {
            **self._rule(ssh(address), f"port 22 from {address}"),
            "priority": PRIORITY - 1,
            "source_ranges": [f"{address}/{length}"],
            "allowed": [{"I_p_protocol": "tcp", "ports": ["22"]}],
        }
        with suppress(AlreadyExists):
            self._session.change("Firewalls", "insert", firewall_resource=rule)

    def setup(self) -> list[str]:
        """Make what is missing; say what is new.

        Raises CredentialsError if we may not, with all that there should be.
        """
        new: list[str] = []
        steps: list[tuple[str, Callable[[], bool]]] = [
            (f"service account {ACCOUNT}", self._account),
            (f"role {ROLE}", self._role),
            ("what the service account may do", self._grant),
            ("what Google's own agent may do with it", self._lend),
            (f"firewall rule {FIREWALL}", self._firewall),
            (f"firewall rule {IAP}", self._proxied),
            (f"bucket {self.bucket}", self._bucket),
        ]
        for label, make in steps:
            try:
                if make():
                    log.info("made %s", label)
                    new.append(label)
            except CredentialsError as error:
                msg = (
                    f"the project {self._session.project} isn't set up: {label} is missing, and"
                    f" we may not make it: {error}\nAsk somebody who may to run:"
                    " cml-runner setup gcp"
                )
                raise CredentialsError(msg) from error
        return new

    def _account(self) -> bool:
        body = {"accountId": ACCOUNT, "serviceAccount": {"displayName": "Machines of cml-runner"}}
        return self._make(f"{IAM}/projects/{self._session.project}/serviceAccounts", body)

    def _role(self) -> bool:
        url = f"{IAM}/projects/{self._session.project}/roles"
        if self._make(url, {"roleId": ROLE, "role": machine_role()}):
            return True
        found = self._session.rest("GET", f"{url}/{ROLE}")
        if sorted(found.get("includedPermissions", [])) != sorted(MACHINE_PERMISSIONS):
            self._session.rest("PATCH", f"{url}/{ROLE}", machine_role())
        return False

    def _grant(self) -> bool:
        project = self._session.project
        binding = {
            "role": f"projects/{project}/roles/{ROLE}",
            "members": [f"serviceAccount:{address(project)}"],
            "condition": condition(),
        }
        return self._bind(f"{PROJECTS}/{project}", binding)

    def _lend(self) -> bool:
        """Let the agent which makes a group's machines give them this account."""
        project = self._session.project
        number = self._session.rest("GET", f"{PROJECTS}/{project}")["projectNumber"]
        binding = {
            "role": "roles/iam.serviceAccountUser",
            "members": [f"serviceAccount:{number}@cloudservices.gserviceaccount.com"],
        }
        return self._bind(f"{IAM}/projects/{project}/serviceAccounts/{address(project)}", binding)

    def _bind(self, url: str, binding: dict[str, Any]) -> bool:
        """Add to a policy, unless it is there; once more if somebody else changes it meanwhile."""
        found: list[bool] = []

        def tried() -> bool:
            policy = self._policy(url)
            there = any(_covers(one, binding) for one in policy.get("bindings", []))
            if there or self._put(url, policy, binding):
                found.append(not there)
            return bool(found)

        try:
            wait.until(tried, "the new service account", VISIBLE, every=2)
        except NotReady as error:
            raise RunnerError(str(error)) from error
        return found[0]

    def _policy(self, url: str) -> dict[str, Any]:
        if url.startswith(PROJECTS):
            options = {"options": {"requestedPolicyVersion": 3}}
            return self._session.rest("POST", f"{url}:getIamPolicy", options)
        query = {"options.requestedPolicyVersion": "3"}
        return self._session.rest("POST", f"{url}:getIamPolicy", **query)

    def _put(self, url: str, policy: dict[str, Any], binding: dict[str, Any]) -> bool:
        """Write a policy with one binding more; False if that may do a moment later."""
        bindings = [*policy.get("bindings", []), binding]
        new = {"policy": {**policy, "bindings": bindings, "version": 3}}
        try:
            self._session.rest("POST", f"{url}:setIamPolicy", new)
        except (NotFound, AlreadyExists):
            return False
        except RunnerError as error:  # a new account isn't known everywhere at once
            if "does not exist" in str(error):
                return False
            raise
        return True

    def _firewall(self) -> bool:
        return self._insert(
            {
                **self._rule(FIREWALL, "nothing comes in"),
                "priority": PRIORITY,
                "source_ranges": ["0.0.0.0/0"],
                "denied": [{"I_p_protocol": "all"}],
            }
        )

    def _proxied(self) -> bool:
        return self._insert(
            {
                **self._rule(IAP, "port 22 from Google's proxy"),
                "priority": PRIORITY - 1,
                "source_ranges": [PROXY],
                "allowed": [{"I_p_protocol": "tcp", "ports": ["22"]}],
            }
        )

    def _insert(self, rule: dict[str, Any]) -> bool:
        if self.has_firewall(rule["name"]):
            return False
        try:
            self._session.change("Firewalls", "insert", firewall_resource=rule)
        except AlreadyExists:
            return False
        return True

    def _rule(self, name: str, what: str) -> dict[str, Any]:
        """Begin a rule for machines that have its name as a tag."""
        return {
            "name": name,
            "description": f"machines of cml-runner: {what}",
            "network": f"projects/{self._session.project}/global/networks/{NETWORK}",
            "direction": "INGRESS",
            "target_tags": [name],
        }

    def _bucket(self) -> bool:
        settings = {
            "iamConfiguration": {
                "uniformBucketLevelAccess": {"enabled": True},
                "publicAccessPrevention": "enforced",
            },
            "lifecycle": {
                "rule": [
                    *(
                        {
                            "action": {"type": "Delete"},
                            "condition": {"age": days, "matchesPrefix": [f"{part}/"]},
                        }
                        for part, days in ((TASKS, KEPT), (PROGRAMS, PROGRAMS_KEPT))
                    ),
                    {
                        "action": {"type": "AbortIncompleteMultipartUpload"},
                        "condition": {"age": 1},
                    },
                ]
            },
            "softDeletePolicy": {"retentionDurationSeconds": "0"},  # settings are secret
        }
        new = not self.has_bucket()
        if new:
            body = {"name": self.bucket, "location": self._session.region, **settings}
            self._session.rest("POST", f"{STORAGE}/b", body, project=self._session.project)
        else:
            self._session.rest("PATCH", f"{STORAGE}/b/{self.bucket}", settings)
        self._open()
        return new

    def _open(self) -> None:
        """Let machines read objects, and write some; take from them what is more than that."""
        url = f"{STORAGE}/b/{self.bucket}/iam"
        member = f"serviceAccount:{address(self._session.project)}"
        wanted: list[dict[str, Any]] = [
            {"role": READER, "members": [member]},
            {"role": WRITER, "members": [member], "condition": writing(self.bucket)},
        ]
        policy = self._session.rest("GET", url, optionsRequestedPolicyVersion="3")
        old = policy.get("bindings", [])
        everything = {"role": WRITER, "members": [member]}
        new = [_without(one, member) if _covers(one, everything) else one for one in old]
        new = [one for one in new if one.get("members")]
        new += [one for one in wanted if not any(_covers(there, one) for there in new)]
        if new != old:
            self._session.rest("PUT", url, {**policy, "bindings": new, "version": 3})

    def _make(self, url: str, body: Any) -> bool:
        try:
            self._session.rest("POST", url, body)
        except AlreadyExists:
            return False
        return True


def _covers(one: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Say if a binding of a policy grants what is wanted; IAM joins those of several members."""
    conditions = [found.get("condition", {}).get("expression") for found in (one, wanted)]
    alike = one["role"] == wanted["role"] and conditions[0] == conditions[1]
    return alike and {*wanted["members"]} <= {*one.get("members", ())}


def _without(binding: dict[str, Any], member: str) -> dict[str, Any]:
    return {**binding, "members": [one for one in binding["members"] if one != member]}
