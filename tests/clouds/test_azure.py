"""What is Azure's own: its errors, its rights, what a machine of it is like."""

from __future__ import annotations

import base64
import json
import re
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from cml_runner import boot, inventory, steps, wait
from cml_runner.boot import web
from cml_runner.boot.azure import Login
from cml_runner.boot.azure import Machine as Own
from cml_runner.boot.first_azure import MANAGER, STORAGE, VARIABLE
from cml_runner.clouds.azure import Cloud, account, arm, session
from cml_runner.clouds.azure.account import Place
from cml_runner.errors import (
    AlreadyExists,
    CleanupFailed,
    ConfigurationError,
    CredentialsError,
    MissingDependency,
    NoCapacity,
    NotFound,
    NotReady,
    RunnerError,
)
from cml_runner.model import Machine, Program, Task
from cml_runner.wait import until
from tests.clouds.azure_rig import PROGRAM
from tests.lab.azure import models
from tests.lab.azure.front import LOST
from tests.lab.azure.manager import STATUS, SUBSCRIPTION

if TYPE_CHECKING:
    from cml_runner.clouds import Plan
    from tests.clouds.azure_rig import AzureRig
    from tests.lab.azure.wire import Call

SOON = datetime.now(timezone.utc) + timedelta(hours=1)
PLACE = Place(SUBSCRIPTION, "westus2")
SCALE_SETS = "Microsoft.Compute/virtualMachineScaleSets"


def task(rig: AzureRig, **wanted: Any) -> Task:
    own = rig.task(tags={"name": "train", "team": "vision"})
    return replace(own, expires=SOON, machine=Machine(**{"spot": True, "disk": 40, **wanted}))


def launch(rig: AzureRig, wanted: Task | None = None) -> Plan:
    """Do as `cml-runner launch` does."""
    plan = Cloud("us-west").plan(wanted or task(rig))
    steps.create(plan.resources, claim=plan.bucket)
    try:
        plan.group.resize((wanted or plan.bucket.task).count)  # type: ignore[attr-defined]
        plan.group.expire(SOON)
    except BaseException:
        steps.delete(plan.resources)
        raise
    return plan


def scale_set(rig: AzureRig, wanted: Task) -> dict[str, Any]:
    path = PLACE.id("Compute/virtualMachineScaleSets", str(wanted.id)).lower()
    found: dict[str, Any] = rig.azure.manager.resources[path]
    return found


def setting(rig: AzureRig, plan: Plan) -> dict[str, Any]:
    path = plan.group.setting.lower()  # type: ignore[attr-defined]
    found: dict[str, Any] = rig.azure.manager.resources[path]
    return found


def url(script: str) -> str:
    """Find where the task is in a machine's start script."""
    found = re.search(r"'(az://\S+)'", script)
    assert found
    return found[1]


def market(rig: AzureRig) -> list[tuple[str, str, bool]]:
    lives = [one for one in rig.azure.fleet.lives.values() if not one.ended]
    return [(one.instance.zone, one.instance.type, one.instance.spot) for one in lives]


def kinds(plan: Plan) -> set[str]:
    return {one.kind for one in plan.group.events()}


# What a machine is like


def test_a_machine_is_closed_and_tagged(azure_rig: AzureRig) -> None:
    wanted = task(azure_rig)
    launch(azure_rig, wanted)
    found = scale_set(azure_rig, wanted)
    assert found["zones"] == ["1", "2", "3"]
    assert found["identity"]["userAssignedIdentities"] == {PLACE.identity: {}}
    own = {"name": "train", "team": "vision", "cml-runner-id": str(wanted.id)}
    assert found["tags"].items() >= own.items()
    profile = found["properties"]["virtualMachineProfile"]
    assert (profile["priority"], profile["evictionPolicy"]) == ("Spot", "Delete")
    assert profile["billingProfile"] == {"maxPrice": -1}
    system = profile["osProfile"]
    assert system["linuxConfiguration"]["disablePasswordAuthentication"] is True
    disk = profile["storageProfile"]["osDisk"]
    assert (disk["diskSizeGB"], disk["deleteOption"]) == (40, "Delete")
    (interface,) = profile["networkProfile"]["networkInterfaceConfigurations"]
    assert interface["properties"]["deleteOption"] == "Delete"
    (address,) = interface["properties"]["ipConfigurations"]
    public = address["properties"]["publicIPAddressConfiguration"]
    assert public["properties"]["deleteOption"] == "Delete"
    assert address["properties"]["subnet"]["id"] == PLACE.subnet
    script = base64.b64decode(system["customData"]).decode()
    assert f"az://cml-runner/tasks/{wanted.id}?account_name={PLACE.storage}" in script
    assert f"#azure/westus2/{wanted.id}" in script


def test_tags_differ_in_more_than_case(azure_rig: AzureRig) -> None:
    wanted = replace(task(azure_rig), tags={"Team": "a", "team": "b" * 300, "name": "x"})
    launch(azure_rig, wanted)
    tags = scale_set(azure_rig, wanted)["tags"]
    assert tags["team"] == "b" * 256
    assert "Team" not in tags


def test_nothing_comes_in(azure_rig: AzureRig) -> None:
    resources = azure_rig.azure.manager.resources
    guard = resources[PLACE.id("Network/networkSecurityGroups").lower()]
    (rule,) = guard["properties"]["securityRules"]
    assert rule["properties"].items() >= {"direction": "Inbound", "access": "Deny"}.items()
    network = resources[PLACE.id("Network/virtualNetworks").lower()]
    (subnet,) = network["properties"]["subnets"]
    assert subnet["properties"]["networkSecurityGroup"]["id"] == guard["id"]
    storage = resources[PLACE.id("Storage/storageAccounts", PLACE.storage).lower()]["properties"]
    assert storage["allowSharedKeyAccess"] is storage["allowBlobPublicAccess"] is False


def test_a_mixture_of_sizes(azure_rig: AzureRig) -> None:
    wanted = task(azure_rig)
    launch(azure_rig, wanted)
    found = scale_set(azure_rig, wanted)
    assert found["sku"] == {"name": "Mix", "capacity": 1}
    profile = found["properties"]["skuProfile"]
    assert [one["name"] for one in profile["vmSizes"]] == [
        "Standard_D8as_v5",
        "Standard_D8s_v5",
        "Standard_D8s_v4",
    ]
    assert profile["allocationStrategy"] == "CapacityOptimized"


def test_the_users_own_choices(azure_rig: AzureRig) -> None:
    identities = azure_rig.azure.manager.resources
    own = PLACE.id("ManagedIdentity/userAssignedIdentities", f"own-{'x' * 120}")
    identities[own.lower()] = {"id": own, "properties": {"principalId": "x"}}
    wanted = task(
        azure_rig,
        types=("Standard_E8s_v5",),
        permissions=f"{own}, {PLACE.identity}",
        spot_price=0.25,
        image="nvidia:sold:dear:1.0#plan",
    )
    launch(azure_rig, wanted)
    found = scale_set(azure_rig, wanted)
    assert list(found["identity"]["userAssignedIdentities"]) == [own, PLACE.identity]
    assert found["sku"]["name"] == "Standard_E8s_v5"
    assert found["plan"] == {"publisher": "nvidia", "product": "sold", "name": "dear"}
    profile = found["properties"]["virtualMachineProfile"]
    assert profile["billingProfile"] == {"maxPrice": 0.25}
    script = base64.b64decode(profile["osProfile"]["customData"]).decode()
    assert f"msi_resource_id={quote(own, safe='')}" in script
    (life,) = azure_rig.azure.fleet.lives.values()
    with azure_rig.on(life.instance.id), pytest.raises(RunnerError, match=f"client '{own}'"):
        boot.machine(url(script)).objects.read("settings.json")


def test_a_key_is_the_users(azure_rig: AzureRig) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    made = rsa.generate_private_key(65537, 2048)
    kind, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key = made.private_bytes(serialization.Encoding.PEM, kind, none).decode()
    public = made.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    keys = []
    for wanted in (task(azure_rig, ssh_key=key), task(azure_rig), task(azure_rig)):
        launch(azure_rig, wanted)
        system = scale_set(azure_rig, wanted)["properties"]["virtualMachineProfile"]["osProfile"]
        (one,) = system["linuxConfiguration"]["ssh"]["publicKeys"]
        keys.append(one["keyData"])
    assert keys[0] == public.decode()
    assert len(set(keys)) == 3  # those of nobody
    assert key not in repr(azure_rig.azure.app.calls)


def test_autoscale_holds_the_size_until_the_deadline(azure_rig: AzureRig) -> None:
    plan = launch(azure_rig, replace(task(azure_rig), count=2))
    run, over = setting(azure_rig, plan)["properties"]["profiles"]
    assert run["capacity"] == {"minimum": "2", "maximum": "2", "default": "2"}
    assert arm.moment(run["fixedDate"]["end"]) - SOON < (timedelta(seconds=1))
    assert over["capacity"] == {"minimum": "0", "maximum": "0", "default": "0"}
    assert "fixedDate" not in over


def test_the_script_is_valid(azure_rig: AzureRig) -> None:
    import subprocess

    plan = launch(azure_rig)
    (life,) = azure_rig.azure.fleet.lives.values()
    script = life.instance.user_data
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    assert PROGRAM.sha256 in script
    machine, identity = Own(url(script)), quote(PLACE.identity, safe="")
    assert machine.task == plan.group.name  # type: ignore[attr-defined]
    assert url(script).startswith(f"{plan.bucket.store.url}&msi_resource_id={identity}#")


def test_the_program_is_put_once(azure_rig: AzureRig) -> None:
    for _ in range(2):
        launch(azure_rig)
    assert azure_rig.azure.programs() == {f"{PROGRAM.sha256}.whl": PROGRAM.wheel}
    written = [one for one in azure_rig.azure.app.calls if one.action == f"{account.BLOBS}/write"]
    assert len([one for one in written if PROGRAM.sha256 in one.path]) == 1


# What can't be had


def test_every_mistake_is_told_before_anything_is_sent(azure_rig: AzureRig) -> None:
    wanted = replace(
        task(
            azure_rig,
            types=("huge", "Standard_B2s"),
            ssh_key="no key",
            permissions="me",
            options={"aws-subnet": "x"},
        ),
        tags={"a/b": "x"},
        program=Program(index="https://me:secret@x/"),
    )
    before = len(azure_rig.azure.app.calls)
    with pytest.raises(ConfigurationError) as caught:
        azure_rig.cloud.plan(wanted)
    told = "\n".join(caught.value.mistakes)
    for part in (
        *("huge", "B sizes", "--cloud-ssh-private", "aws-subnet", "a/b", "credentials"),
        "--cloud-permission-set me",
    ):
        assert part in told
    assert len(azure_rig.azure.app.calls) == before


def test_what_isnt_there_is_found_out_before_anything_is_made(azure_rig: AzureRig) -> None:
    azure_rig.azure.manager.missing = {"Standard_NC4as_T4_v3"}
    before = len(azure_rig.azure.app.calls)
    with pytest.raises(NoCapacity, match="westus2 has no spot Standard_NC4as_T4_v3"):
        launch(azure_rig, task(azure_rig, types=("m+t4",)))
    assert azure_rig.azure.left() == []
    assert {one.action for one in azure_rig.azure.app.calls[before:]} == {
        "Microsoft.Compute/skus/read"
    }


def test_who_may_not_look_launches_wherever_there_is_room(azure_rig: AzureRig) -> None:
    azure_rig.azure.fail("Microsoft.Compute/skus/read", "AuthorizationFailed", status=403)
    wanted = task(azure_rig)
    launch(azure_rig, wanted)
    assert "zones" not in scale_set(azure_rig, wanted)
    assert len(market(azure_rig)) == 1


def test_only_in_zones_that_have_it(azure_rig: AzureRig) -> None:
    wanted = task(azure_rig, types=("m+t4",))
    launch(azure_rig, wanted)
    found = scale_set(azure_rig, wanted)
    assert found["zones"] == ["2"]
    disk = found["properties"]["virtualMachineProfile"]["storageProfile"]["osDisk"]
    assert disk["diskSizeGB"] == 128  # the image with drivers needs it


def test_an_image_that_isnt_there(azure_rig: AzureRig) -> None:
    with pytest.raises(RunnerError, match="PlatformImageNotFound"):
        launch(azure_rig, task(azure_rig, image="nobody:no:thing:latest"))
    assert azure_rig.azure.left() == []


# Capacity


GPUS = ("Standard_NC24ads_A100_v4", "Standard_NC40ads_H100_v5")


@pytest.mark.parametrize("code", ["SkuNotAvailable", "AllocationFailed"])
def test_one_size_after_the_other_where_they_cant_be_mixed(
    azure_rig: AzureRig, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    azure_rig.azure.fleet.hinder = lambda _zone, size, _spot: code if size == GPUS[0] else ""
    wanted = task(azure_rig, types=GPUS)
    launch(azure_rig, wanted)
    assert [size for _, size, _ in market(azure_rig)] == [GPUS[1]]  # nothing failed is left
    assert scale_set(azure_rig, wanted)["sku"] == {
        "name": GPUS[1],
        "tier": "Standard",
        "capacity": 1,
    }
    assert f"{GPUS[0]}: " in caplog.text


def test_every_attempt_is_told(azure_rig: AzureRig) -> None:
    azure_rig.azure.fleet.hinder = lambda *_: "SkuNotAvailable"
    with pytest.raises(NoCapacity) as caught:
        launch(azure_rig, task(azure_rig, types=GPUS))
    assert all(one in str(caught.value) for one in GPUS)
    assert azure_rig.azure.left() == []


def test_a_quota_that_is_used_up(azure_rig: AzureRig) -> None:
    azure_rig.azure.fleet.hinder = lambda *_: "OperationNotAllowed"
    with pytest.raises(NoCapacity, match="Cores quota"):
        launch(azure_rig)
    assert azure_rig.azure.left() == []


def test_a_failed_allocation_is_an_event_at_once(azure_rig: AzureRig) -> None:
    azure_rig.azure.fleet.hinder = lambda *_: "AllocationFailed"
    plan = launch(azure_rig)
    assert "capacity" in kinds(plan)
    steps.delete(plan.resources)
    assert azure_rig.azure.left() == []


def test_what_hinders_the_group_later_is_told(
    azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cml_runner.clouds.azure import group

    monkeypatch.setattr(group, "FRESH", 0)
    plan = launch(azure_rig)
    (name,) = azure_rig.azure.fleet.lives
    azure_rig.azure.fleet.hinder = lambda *_: "OperationNotAllowed"
    azure_rig.azure.fleet.evict(name, after=0)
    until(lambda: {"quota", "interruption"} <= kinds(plan), "the events", 10, 0.05)


def test_what_became_of_an_older_task_of_this_name_is_no_event(azure_rig: AzureRig) -> None:
    wanted = task(azure_rig)
    path = Cloud("us-west").plan(wanted).group.path  # type: ignore[attr-defined]
    error = {"error": {"code": "AllocationFailed", "message": "no room"}}
    azure_rig.azure.manager.write_down(path, f"{SCALE_SETS}/write", "Failed", error)
    old = azure_rig.azure.manager.log[-1]
    old["eventTimestamp"] = f"{datetime.now(timezone.utc) - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
    plan = launch(azure_rig, wanted)
    assert kinds(plan) == {"info"}
    seen_by_others = Cloud("us-west").plan(Task(id=wanted.id))
    assert "capacity" in kinds(seen_by_others)


def test_a_machine_that_powered_itself_off_is_an_error(azure_rig: AzureRig) -> None:
    plan = launch(azure_rig)
    (name,) = azure_rig.azure.fleet.lives
    azure_rig.azure.fleet.powered_off(name)
    assert "error" in kinds(plan)
    assert [one.status for one in plan.group.instances()] == ["stopping"]


def test_fifty_machines_cost_no_more_calls_than_one(azure_rig: AzureRig) -> None:
    launch(azure_rig)  # from now on the program is there

    def calls(count: int) -> list[str]:
        before = len(azure_rig.azure.app.calls)
        launch(azure_rig, replace(task(azure_rig), count=count))
        return sorted(one.action for one in azure_rig.azure.app.calls[before:])

    assert calls(1) == calls(50)


def test_a_launch_makes_few_calls_in_a_row(azure_rig: AzureRig) -> None:
    launch(azure_rig)  # from now on the program is there
    plan = Cloud("us-west").plan(task(azure_rig))
    before = len(azure_rig.azure.app.calls)
    azure_rig.azure.app.latency = 0.1
    steps.create(plan.resources, claim=plan.bucket)
    plan.group.resize(1)
    plan.group.expire(SOON)
    calls = [one for one in azure_rig.azure.app.calls[before:] if "operations" not in one.path]
    assert _longest(calls) <= 8


def _longest(calls: list[Any]) -> int:
    """The length of the longest chain in which each began after the one before had ended."""
    depths: list[tuple[float, int]] = []
    for one in sorted(calls, key=lambda one: float(one.began)):
        depth = 1 + max((depth for ended, depth in depths if ended <= one.began), default=0)
        depths.append((one.ended, depth))
    return max(depth for _, depth in depths)


# Faults


def test_throttling_is_waited_for(azure_rig: AzureRig) -> None:
    for action in (f"{SCALE_SETS}/write", "Microsoft.Insights/autoscalesettings/write"):
        azure_rig.azure.fail(action, "TooManyRequests", times=2, status=429)
    launch(azure_rig)
    assert len(market(azure_rig)) == 1


@pytest.mark.parametrize(
    ("action", "method"),
    [
        (f"{SCALE_SETS}/write", "PUT"),
        (f"{SCALE_SETS}/write", "PATCH"),
        ("Microsoft.Insights/autoscalesettings/write", "PUT"),
    ],
)
def test_an_answer_that_is_lost_launches_nothing_twice(
    azure_rig: AzureRig, action: str, method: str
) -> None:
    fault = azure_rig.azure.fail(action, LOST, method=method)
    plan = launch(azure_rig)
    assert fault.times == 0
    assert len(market(azure_rig)) == 1
    assert "fixedDate" in setting(azure_rig, plan)["properties"]["profiles"][0]
    steps.delete(plan.resources)
    assert azure_rig.azure.left() == []


def test_an_operation_that_ends_badly(azure_rig: AzureRig) -> None:
    azure_rig.azure.fail(f"{SCALE_SETS}/write", "InternalExecutionError", later=True)
    with pytest.raises(RunnerError, match="InternalExecutionError"):
        launch(azure_rig)
    assert azure_rig.azure.left() == []
    assert azure_rig.cloud.tasks() == []


def test_an_answer_that_the_sdk_doesnt_understand(
    azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STATUS, "Microsoft.Storage/storageAccounts/managementPolicies", 206)
    with pytest.raises(RunnerError, match=r"management_policies.*invalid status"):
        azure_rig.cloud.setup()


def test_an_operation_that_cant_be_looked_at(azure_rig: AzureRig) -> None:
    fault = azure_rig.azure.fail(
        "Microsoft.Resources/subscriptions/read", "AuthorizationFailed", status=403
    )
    with pytest.raises(CredentialsError, match="AuthorizationFailed"):
        launch(azure_rig)
    assert fault.times == 0
    assert azure_rig.azure.left() == []


def test_an_operation_can_be_begun_and_looked_at_later(azure_rig: AzureRig) -> None:
    azure_rig.azure.manager.duration = 0.2
    plan = launch(azure_rig)
    group: Any = plan.group
    assert group.session.state(group.operation, "start")[0] == "InProgress"
    group.session.finish(group.operation, "start")
    assert group.session.state(group.operation, "start")[0] == "Succeeded"
    before = len(azure_rig.azure.app.calls)
    assert group.session.state(group.operation, "start")[0] == "Succeeded"  # asks nobody again
    assert len(azure_rig.azure.app.calls) == before
    azure_rig.azure.manager.duration = 60
    with pytest.raises(NotReady, match="gave up after 0 s waiting for Azure to end"):
        group.session.finish(
            group.session.begin(
                *("compute", "virtual_machine_scale_sets", "begin_delete"),
                *(PLACE.group, group.name),
                force_deletion=True,
            ),
            "end",
            longest=0,
        )
    azure_rig.azure.manager.duration = 0


def test_first_calls_may_be_made_at_once(azure_rig: AzureRig) -> None:
    from concurrent.futures import ThreadPoolExecutor

    own = session.Session()
    calls = [
        ("compute", "virtual_machines", "list"),
        ("network", "network_interfaces", "list"),
        ("network", "public_ip_addresses", "list"),
    ] * 3
    with ThreadPoolExecutor(len(calls)) as pool:
        query = {"filter": "'virtualMachineScaleSet/id' eq 'x'"}
        found = [
            pool.submit(own.pages, *one, PLACE.group, **(query if one[0] == "compute" else {}))
            for one in calls
        ]
    assert [one.result() for one in found] == [[]] * len(calls)


def test_operations_that_take_their_time(azure_rig: AzureRig) -> None:
    azure_rig.azure.manager.duration = 0.2
    plan = launch(azure_rig)
    until(plan.group.instances, "the machine", 5, 0.02)
    plan.group.events()
    steps.delete(plan.resources)
    assert azure_rig.azure.left() == []


def test_an_older_one_that_is_about_to_vanish(azure_rig: AzureRig) -> None:
    wanted = task(azure_rig)
    plan = launch(azure_rig, wanted)
    (name,) = azure_rig.azure.fleet.lives
    azure_rig.azure.manager.duration = 0.5
    azure_rig.leave(plan, name)
    azure_rig.azure.manager.duration = 0
    assert azure_rig.azure.left()
    assert launch(azure_rig, wanted).group.instances()


def test_expired_credentials_in_the_middle(azure_rig: AzureRig) -> None:
    principal = azure_rig.azure.logins.principal(azure_rig.azure.admin["client"])

    def expire(*_: object) -> str:
        principal.expired = True
        return "SkuNotAvailable"

    azure_rig.azure.fleet.hinder = expire
    with pytest.raises(CleanupFailed, match="xpired"):
        launch(azure_rig)
    azure_rig.azure.fleet.hinder = lambda *_: ""
    principal.expired = False
    (lease,) = azure_rig.cloud.tasks()
    steps.delete(azure_rig.cloud.plan(Task(id=lease.id)).resources)
    assert azure_rig.azure.left() == []


def test_of_two_launches_of_one_name_one_wins(azure_rig: AzureRig) -> None:
    wanted = task(azure_rig)
    launch(azure_rig, wanted)
    plan = Cloud("us-west").plan(wanted)
    with pytest.raises(AlreadyExists):
        steps.create(plan.resources, claim=plan.bucket)
    assert len(market(azure_rig)) == 1


def test_records_of_an_older_task_of_this_name_go(azure_rig: AzureRig) -> None:
    wanted = task(azure_rig)
    store = azure_rig.cloud.plan(wanted).bucket.store
    for key in ("status-000.json", "settings.json", "gone-machine"):
        store.write(key, b"old")
    launch(azure_rig, wanted)
    assert store.keys("") == ["settings.json"]
    assert store.read("settings.json") == b"{}"


NESTED = json.dumps({"error": {"code": "AllocationFailed", "message": "no room"}})


@pytest.mark.parametrize(
    ("status", "error", "kind", "said"),
    [
        (409, {"code": "SkuNotAvailable", "message": "gone"}, NoCapacity, r"gone \(SkuNot"),
        (409, {"code": "Conflict", "message": NESTED}, NoCapacity, r"no room \(Allocation"),
        (
            409,
            {
                "code": "DeploymentFailed",
                "message": "see inside",
                "details": [{"code": "ZonalAllocationFailed", "message": "full"}],
            },
            NoCapacity,
            r"full \(Zonal",
        ),
        (
            409,
            {"code": "OperationNotAllowed", "message": "exceeding approved LowPriorityCores quota"},
            NoCapacity,
            "quota",
        ),
        (
            409,
            {"code": "OperationNotAllowed", "message": "not while it runs"},
            RunnerError,
            "not w",
        ),
        (409, {"code": "Conflict", "message": "x is being deleted."}, AlreadyExists, "deleted"),
        (412, {"code": "PreconditionFailed", "message": "there"}, AlreadyExists, "there"),
        (404, {"code": "ResourceGroupNotFound", "message": "no"}, NotFound, "no"),
        (401, {"code": "ExpiredAuthenticationToken", "message": "x"}, CredentialsError, "az login"),
        (401, {}, CredentialsError, "AZURE_CLIENT_ID"),
        (403, {"code": "AuthorizationFailed", "message": "x"}, CredentialsError, "permissions az"),
        (403, {"code": "ReadOnlyDisabledSubscription", "message": "x"}, CredentialsError, "Disab"),
        (500, {"code": "InternalServerError", "message": "oops"}, RunnerError, "oops"),
    ],
)
def test_what_azures_errors_mean(
    status: int, error: dict[str, Any], kind: type[RunnerError], said: str
) -> None:
    found = arm.failure(status, {"error": error}, "PUT /x")
    assert type(found) is kind
    assert re.search(said, str(found))


# Credentials


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Have no credentials, on a machine that isn't one of Azure."""
    monkeypatch.setattr(session, "_on_azure", lambda: False)
    return monkeypatch


def test_no_credentials_at_all(nobody: pytest.MonkeyPatch) -> None:
    nobody.setenv("AZURE_SUBSCRIPTION_ID", SUBSCRIPTION)
    with pytest.raises(CredentialsError, match="AZURE_CLIENT_ID"):
        Cloud("us-west").tasks()


def test_which_credentials(nobody: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from azure import identity

    nobody.setenv("AZURE_CLIENT_ID", "client")
    nobody.setenv("AZURE_TENANT_ID", "tenant")
    cases: list[tuple[dict[str, str], type]] = [
        ({"AZURE_CLIENT_SECRET": "x"}, identity.EnvironmentCredential),
        ({"AZURE_FEDERATED_TOKEN_FILE": "/x"}, identity.WorkloadIdentityCredential),
        (dict.fromkeys(session.GITHUB, "x"), identity.ClientAssertionCredential),
    ]
    for variables, kind in cases:
        with nobody.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert isinstance(session._credential(), kind)
    (tmp_path / "az").write_text("#!/bin/sh\n")
    (tmp_path / "az").chmod(0o755)
    profile = {"subscriptions": [{"id": "a"}, {"id": "b", "isDefault": True}]}
    (tmp_path / "azureProfile.json").write_text(json.dumps(profile), encoding="utf-8-sig")
    nobody.setenv("AZURE_CONFIG_DIR", str(tmp_path))
    nobody.setenv("PATH", str(tmp_path))
    assert isinstance(session._credential(), identity.AzureCliCredential)
    assert session.Session().subscription == "b"
    nobody.delenv("AZURE_CONFIG_DIR")
    nobody.setattr(session, "_on_azure", lambda: True)
    assert isinstance(session._credential(), identity.ManagedIdentityCredential)


def test_the_only_subscription(azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_SUBSCRIPTION_ID")
    assert Cloud("us-west").tasks() == []
    azure_rig.azure.manager.subscriptions.append("another")
    with pytest.raises(CredentialsError, match=f"AZURE_SUBSCRIPTION_ID: {SUBSCRIPTION}, another"):
        Cloud("us-west").tasks()


def test_without_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("azure", "azure.core", "azure.identity"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("AZURE_SUBSCRIPTION_ID", SUBSCRIPTION)
    with pytest.raises(MissingDependency, match=r"pip install .*\[azure\]'"):
        Cloud("us-west").tasks()
    assert Cloud("us-west").permissions()  # takes nothing


# Rights


def least(rig: AzureRig, monkeypatch: pytest.MonkeyPatch, without: str = "") -> None:
    """Be somebody who may do what our own role says, less one thing."""
    role = json.loads(json.dumps(Cloud("us-west").permissions()))
    for key in ("Actions", "DataActions"):
        role[key] = [one for one in role[key] if one != without]
    for name, value in rig.azure.environment(rig.azure.add_user(role)).items():
        monkeypatch.setenv(name, value)


def needed() -> set[str]:
    role = Cloud("us-west").permissions()
    return {*role["Actions"], *role["DataActions"]}


ONLY_AT_TIMES = {
    "Microsoft.Compute/virtualMachines/delete",  # what a failed allocation left behind
    "Microsoft.Compute/virtualMachines/read",  # while waiting
    "Microsoft.Compute/virtualMachines/retrieveBootDiagnosticsData/action",  # on trouble
    "Microsoft.Compute/virtualMachines/simulateEviction/action",  # evict()
    "Microsoft.Insights/autoscalesettings/read",  # resize() of what somebody else launched
    "Microsoft.Insights/eventtypes/values/read",
    "Microsoft.Network/networkInterfaces/read",
    "Microsoft.Network/publicIPAddresses/read",
    "Microsoft.Resources/tags/write",  # interrupt
}


def test_the_least_role_suffices(azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch) -> None:
    least(azure_rig, monkeypatch)
    before = len(azure_rig.azure.app.calls)
    azure_rig.azure.fleet.hinder = lambda _zone, size, _spot: (
        "AllocationFailed" if size == GPUS[0] else ""
    )
    plan = launch(azure_rig, task(azure_rig, types=GPUS))
    (lease,) = Cloud("us-west").tasks()
    until(lambda: azure_rig.running(plan), "the machine", 5, 0.02)
    assert plan.group.events()
    plan.group.interrupt("", 100)
    plan.group.evict("")
    assert plan.group.console() == ""
    plan.group.expire(None)
    steps.delete(Cloud("us-west").plan(Task(id=lease.id)).resources)
    assert azure_rig.azure.left() == []
    refused = {one.action for one in azure_rig.azure.app.calls[before:] if "Failed" in one.error}
    assert refused == {"Microsoft.Compute/skus/read"}  # the only one outside the resource group
    used = {one.action for one in azure_rig.azure.app.calls[before:]}
    linked = {one for one in needed() if one.endswith(("join/action", "assign/action"))}
    assert needed() <= used | linked


def test_each_right_is_needed_and_named_when_it_is_missing(
    azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for action in sorted(
        needed() - ONLY_AT_TIMES - {f"{SCALE_SETS}/read", f"{account.BLOBS}/read"}
    ):
        with monkeypatch.context() as patch:
            least(azure_rig, patch, without=action)
            with pytest.raises((CredentialsError, CleanupFailed)) as caught:
                steps.delete(launch(azure_rig).resources)
            said = "blob" if "blobs" in action else action
            assert said in str(caught.value) or "AuthorizationPermission" in str(caught.value)
        for lease in azure_rig.cloud.tasks():
            steps.delete(azure_rig.cloud.plan(Task(id=lease.id)).resources)
        assert azure_rig.azure.left() == [], action


def test_a_machine_may_only_touch_what_is_ours(azure_rig: AzureRig) -> None:
    plan = launch(azure_rig)
    (name,) = azure_rig.running(plan) or list(azure_rig.azure.fleet.lives)
    programs = f"{azure_rig.azure.url}/{PLACE.storage}/{account.PROGRAMS}"
    program = f"{programs}/{PROGRAM.sha256}.whl"
    version = {"x-ms-version": "2023-11-03"}
    with azure_rig.on(name):
        login = Login(azure_rig.url(plan))
        for method, path in (
            ("GET", f"{PLACE.id('Compute/virtualMachineScaleSets', 'x')}"),
            ("PUT", PLACE.id("Compute/virtualMachines", "x")),
            ("POST", f"{PLACE.id('Compute/virtualMachines', name)}/deallocate"),
            ("DELETE", f"/subscriptions/{SUBSCRIPTION}/resourceGroups/theirs"),
            ("DELETE", PLACE.identity),
        ):
            where = f"{azure_rig.azure.url}{path}?api-version=2021-04-01"
            body = b"{}" if method == "PUT" else None
            with pytest.raises(web.Refused) as caught:
                login.ask(MANAGER, method, where, None, body)
            assert caught.value.denied
        assert login.ask(STORAGE, "GET", program, version).content == PROGRAM.wheel
        for method, content in (("PUT", b"mine"), ("DELETE", None)):
            headers = {**version, "x-ms-blob-type": "BlockBlob"}
            with pytest.raises(web.Refused) as caught:
                login.ask(STORAGE, method, program, headers, content)
            assert caught.value.denied
    assert azure_rig.azure.programs() == {f"{PROGRAM.sha256}.whl": PROGRAM.wheel}


def test_a_subscription_that_nobody_has_set_up(
    azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = Cloud("us-east")
    with monkeypatch.context() as patch:
        user = azure_rig.azure.add_user(account.launcher_role("eastus"))
        for name, value in azure_rig.azure.environment(user).items():
            patch.setenv(name, value)
        account_url = f"{azure_rig.azure.url}/{Place(SUBSCRIPTION, 'eastus').storage}"
        patch.setenv("AZURE_STORAGE_ENDPOINT", account_url)
        plan = cloud.plan(task(azure_rig))
        said = "cml-runner setup azure --cloud-region eastus"
        with pytest.raises(CredentialsError, match=said):
            steps.create(plan.resources, claim=plan.bucket)
    assert azure_rig.azure.left("eastus") == []


def test_a_launch_completes_a_setup_that_was_interrupted(
    azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, cloud = Place(SUBSCRIPTION, "eastus"), Cloud("us-east")

    def watch(call: Call) -> None:
        if call.method == "PUT" and call.name == account.PROGRAMS:
            azure_rig.azure.fail(call.action, "Conflict")

    azure_rig.azure.app.watch = watch
    with pytest.raises(RunnerError, match="Conflict"):
        cloud.setup()
    azure_rig.azure.app.watch = lambda _: None
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{azure_rig.azure.url}/{place.storage}")
    plan = cloud.plan(task(azure_rig))
    steps.create(plan.resources, claim=plan.bucket)
    assert azure_rig.azure.programs("eastus") == {f"{PROGRAM.sha256}.whl": PROGRAM.wheel}
    assert cloud.setup() == []


def test_both_containers_are_looked_at(azure_rig: AzureRig) -> None:
    found = {one.what: one for one in azure_rig.cloud.checks(task(azure_rig))}
    names = [f"container {name} of {PLACE.storage}" for name in (account.NAME, account.PROGRAMS)]
    assert [found[name].state for name in names] == ["ok", "ok"]
    azure_rig.azure.blobs.clear()
    found = {one.what: one for one in azure_rig.cloud.checks(task(azure_rig))}
    assert all("cml-runner setup azure" in found[name].hint for name in names)


def test_a_role_that_is_not_known_everywhere_yet(azure_rig: AzureRig) -> None:
    pauses: list[float] = []
    action = "Microsoft.Authorization/roleAssignments/write"
    azure_rig.azure.fail(action, "RoleDefinitionDoesNotExist", times=2, status=400)
    place = Place(SUBSCRIPTION, "eastus")
    new = account.Shared(session.Session(), place, sleep=pauses.append).setup()
    assert "role of machines" in new
    assert len(pauses) == 2
    assert azure_rig.cloud.setup() == []


def test_setting_up_twice_changes_nothing(azure_rig: AzureRig) -> None:
    assert azure_rig.cloud.setup() == []


def test_a_provider_that_is_not_registered(azure_rig: AzureRig) -> None:
    azure_rig.azure.manager.registered.discard("Microsoft.Compute")
    with pytest.raises(CredentialsError, match="az provider register --namespace"):
        launch(azure_rig)
    assert azure_rig.cloud.setup() == ["resource providers"]
    assert launch(azure_rig).group.instances()


# Ends


def test_a_machine_without_settings_ends_its_group(azure_rig: AzureRig) -> None:
    from cml_runner import supervise

    plan = launch(azure_rig)
    plan.bucket.store.delete("settings.json")
    (name,) = azure_rig.azure.fleet.lives
    script = azure_rig.azure.fleet.lives[name].instance.user_data
    with azure_rig.on(name), pytest.raises(NotFound, match="this task is over"):
        supervise.run(url(script))
    until(lambda: azure_rig.azure.left() == [], "all to go", 10, 0.05)
    assert azure_rig.cloud.tasks() == []


def test_a_machine_whose_container_is_gone_ends_its_group(azure_rig: AzureRig) -> None:
    plan = launch(azure_rig)
    azure_rig.azure.blobs.clear()
    (name,) = azure_rig.azure.fleet.lives
    azure_rig.leave(plan, name)
    until(lambda: azure_rig.azure.left() == [], "all to go", 10, 0.05)


def test_leaving_goes_on_until_it_is_done(
    azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cml_runner.wait.PAUSES", (0.01,))
    plan = launch(azure_rig)
    for action in (f"{SCALE_SETS}/delete", "Microsoft.Insights/autoscalesettings/delete"):
        azure_rig.azure.fail(action, "InternalServerError", times=2, status=500)
    (name,) = azure_rig.azure.fleet.lives
    azure_rig.leave(plan, name)
    until(lambda: azure_rig.azure.left() == [], "all to go", 30, 0.05)


def test_who_leaves_lowers_only_what_there_must_be_at_least(azure_rig: AzureRig) -> None:
    """By the upper bound, Azure would end machines of its own choice."""
    plan = launch(azure_rig, replace(task(azure_rig), count=3))
    until(lambda: len(azure_rig.running(plan)) == 3, "the machines", 5, 0.02)
    first, second, third = azure_rig.running(plan)
    for name in (first, second):
        azure_rig.leave(plan, name)
    run, _ = setting(azure_rig, plan)["properties"]["profiles"]
    assert run["capacity"] == {"minimum": "1", "maximum": "3", "default": "1"}
    assert [one.id for one in plan.group.instances()] == [third]


def test_two_that_leave_at_once_are_both_counted(azure_rig: AzureRig) -> None:
    """One of them writes what it read before the other's mark was there."""
    plan = launch(azure_rig, replace(task(azure_rig), count=3))
    first, second, _ = azure_rig.azure.fleet.lives
    seen: list[Any] = []
    store = plan.bucket.store

    def watch(call: Any) -> None:
        if call.method == "PUT" and "autoscalesettings" in call.path and not seen:
            seen.append(call)
            store.write(f"gone-{second}", b"")

    azure_rig.azure.app.watch = watch
    azure_rig.leave(plan, first)
    run, _ = setting(azure_rig, plan)["properties"]["profiles"]
    assert run["capacity"]["minimum"] == "1"


def test_a_machine_that_may_be_anothers_goes_on_looking(
    azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan, other = launch(azure_rig), launch(azure_rig)
    name = next(iter(azure_rig.azure.fleet.lives))

    def give_up(_: float) -> None:
        raise InterruptedError

    monkeypatch.setattr(wait, "insist", partial(wait.insist, sleep=give_up))
    identifier = other.bucket.task.id  # type: ignore[attr-defined]
    with azure_rig.on(name), pytest.raises(InterruptedError):
        Cloud("westus2").leave(identifier, other.bucket.store.url, last=True)
    own = plan.group.name  # type: ignore[attr-defined]
    assert f"this machine isn't one of {identifier}" in caplog.text
    assert f"vmScaleSetName: {own}" in caplog.text
    assert len(azure_rig.cloud.tasks()) == 2
    assert len(market(azure_rig)) == 2


def test_without_its_metadata_service_a_machine_goes_on_looking(
    azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = launch(azure_rig)
    (name,) = azure_rig.azure.fleet.lives
    trouble = azure_rig.azure.trouble("/metadata/instance", times=99)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            trouble.times = 0

    monkeypatch.setattr(wait, "insist", partial(wait.insist, sleep=sleep))
    azure_rig.leave(plan, name)
    assert len(pauses) == 3
    assert caplog.text.count("can't leave yet") == 3
    until(lambda: azure_rig.azure.left() == [], "all to go", 10, 0.05)


def test_elsewhere_there_is_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "http://127.0.0.1:9")
    with pytest.raises(RunnerError, match="refused"):
        Cloud.machine()


def test_an_eviction_is_noticed(azure_rig: AzureRig) -> None:
    plan = launch(azure_rig)
    (name,) = azure_rig.azure.fleet.lives
    assert azure_rig.notice(plan, name) is None
    azure_rig.azure.fleet.evict(name, after=30)
    notice = azure_rig.notice(plan, name)
    assert notice
    assert notice.deadline
    assert notice.deadline - datetime.now(timezone.utc) < timedelta(seconds=31)


def test_before_it_can_speak_a_machine_has_its_console(azure_rig: AzureRig) -> None:
    wanted = task(azure_rig)
    launch(azure_rig, wanted)
    (life,) = azure_rig.azure.fleet.lives.values()
    life.console = "Booting\nStill booting\n"
    found = inventory.find(str(wanted.id), "azure", "us-west")
    assert list(inventory.logs(found, follow=False)) == [(0, "Booting\nStill booting\n")]


# The far side


def test_a_request_that_azure_does_not_know_is_refused(azure_rig: AzureRig) -> None:
    own = session.Session()
    body = {"location": "westus2", "properties": {"orchestrationMod": "Flexible"}}
    with pytest.raises(RunnerError, match=r"orchestrationMod: unknown"):
        own.call(
            "compute",
            "virtual_machine_scale_sets",
            "begin_create_or_update",
            PLACE.group,
            "x",
            body,
        )
    assert azure_rig.azure.left() == []


IN_REGION = {"location": "westus2"}
SETTING = "Microsoft.Insights/autoscalesettings"


@pytest.mark.parametrize(
    ("kind", "body", "wrong"),
    [
        (SCALE_SETS, {}, ".location: missing"),
        (SCALE_SETS, {**IN_REGION, "zones": "1"}, ".zones: '1' is no list"),
        (SCALE_SETS, {**IN_REGION, "sku": {"capacity": True}}, ".sku.capacity: True is no int"),
        (
            SCALE_SETS,
            {**IN_REGION, "properties": {"timeCreated": "now"}},
            ".properties.timeCreated: can't be sent, only read",
        ),
        (
            SCALE_SETS,
            {**IN_REGION, "properties": {"orchestrationMode": "Loose"}},
            ".properties.orchestrationMode: 'Loose' is no OrchestrationMode",
        ),
        (SETTING, IN_REGION, ".properties: missing"),
        (SETTING, {**IN_REGION, "properties": {}}, ".properties.profiles: missing"),
        (SETTING, {**IN_REGION, "properties": {"profiles": [{}]}}, "profiles[].capacity: missing"),
        ("Microsoft.Compute/disks", {}, "nobody knows what PUT Microsoft.Compute/disks takes"),
    ],
)
def test_what_the_vendors_models_refuse(kind: str, body: Any, wrong: str) -> None:
    assert any(one.endswith(wrong) for one in models.problems("PUT", kind, body))


def test_an_answer_that_azure_would_not_give_is_a_bug_of_the_fake(azure_rig: AzureRig) -> None:
    azure_rig.azure.manager.resources[PLACE.scope.lower()]["tag"] = {}
    session.Session().call("resource", "resource_groups", "get", PLACE.group)
    kind = "Microsoft.Resources/subscriptions/resourceGroups"
    assert azure_rig.azure.app.bugs == [f"GET {kind} answers .tag: unknown"]
    azure_rig.azure.app.bugs.clear()


def test_machines_and_launchers_speak_in_one_version(azure_rig: AzureRig) -> None:
    """Of what both of them write: so the same models are right for both."""
    seen: set[str] = set()

    def watch(call: Call) -> None:
        if call.kind == SETTING and call.method == "PUT":
            seen.add(call.query["api-version"])

    azure_rig.azure.app.watch = watch
    plan = launch(azure_rig, replace(task(azure_rig), count=2))
    written = len([one for one in azure_rig.azure.app.calls if one.action == f"{SETTING}/write"])
    azure_rig.leave(plan, next(iter(azure_rig.azure.fleet.lives)))
    calls = [one for one in azure_rig.azure.app.calls if one.action == f"{SETTING}/write"]
    assert len(calls) > written
    assert len(seen) == 1
