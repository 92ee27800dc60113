"""What is Google Cloud's own: its errors, its rights, what a machine of it is like."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner import inventory, steps, supervise
from cml_runner.clouds.gcp import Cloud, account, happenings, session
from cml_runner.errors import (
    AlreadyExists,
    CleanupFailed,
    ConfigurationError,
    CredentialsError,
    MissingDependency,
    NoCapacity,
    NotFound,
    RunnerError,
)
from cml_runner.model import Happening, Machine, Program, Task
from cml_runner.wait import until
from tests.lab.gcp import BUCKET
from tests.lab.gcp.compute import PROJECT
from tests.lab.gcp.front import LOST
from tests.lab.gcp.storage import Bucket

if TYPE_CHECKING:
    from cml_runner.clouds import Plan
    from tests.clouds.gcp_rig import GcpRig
    from tests.conftest import Cli

SOON = (datetime.now(timezone.utc) + timedelta(hours=1)).replace(microsecond=0)
EXHAUSTED, QUOTA = "ZONE_RESOURCE_POOL_EXHAUSTED", "QUOTA_EXCEEDED"
OURS = f"cml-runner@{PROJECT}.iam.gserviceaccount.com"


def task(rig: GcpRig, **machine: Any) -> Task:
    own = rig.task(tags={"name": "Train it", "team": "vision"})
    return replace(own, expires=SOON, machine=Machine(**{"spot": True, "disk": 20, **machine}))


def launch(rig: GcpRig, wanted: Task | None = None) -> Plan:
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


def running(rig: GcpRig, plan: Plan, count: int = 1) -> list[str]:
    until(lambda: len(rig.running(plan)) == count, "the machines", 10, 0.02)
    return rig.running(plan)


def template(rig: GcpRig, wanted: Task) -> dict[str, Any]:
    found: dict[str, Any] = rig.gcp.compute.templates[str(wanted.id)]["properties"]
    return found


def kinds(plan: Plan) -> set[str]:
    return {one.kind for one in plan.group.events()}


def actions(rig: GcpRig) -> list[str]:
    return [one.action.removeprefix("compute.") for one in rig.gcp.app.calls]


# What a machine is like


def test_a_spot_machine_is_closed_has_an_end_and_is_ours(gcp_rig: GcpRig) -> None:
    wanted = task(gcp_rig)
    launch(gcp_rig, wanted)
    data = template(gcp_rig, wanted)
    assert data["scheduling"] == {
        "provisioningModel": "SPOT",
        "instanceTerminationAction": "DELETE",
        "automaticRestart": False,
        "onHostMaintenance": "TERMINATE",
        "preemptionNoticeDuration": {"seconds": "120"},
        "terminationTime": f"{SOON:%Y-%m-%dT%H:%M:%S}.000Z",
    }
    assert data["tags"] == {"items": ["cml-runner"]}
    assert data["serviceAccounts"] == [
        {"email": OURS, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}
    ]
    (disk,) = data["disks"]
    assert (disk["boot"], disk["autoDelete"]) == (True, True)
    assert disk["initializeParams"]["diskSizeGb"] == "20"
    assert disk["initializeParams"]["diskType"] == "pd-balanced"
    image = "projects/ubuntu-os-cloud/global/images/ubuntu-2404-noble-amd64-v20261101"
    assert disk["initializeParams"]["sourceImage"] == image
    # What fits Google's alphabet becomes a label; all of it is in the lease.
    assert data["labels"] == {"team": "vision", "cml-runner-id": str(wanted.id)}
    (lease,) = gcp_rig.cloud.tasks()
    assert (lease.tags, lease.expires) == (wanted.tags, SOON)
    items = {one["key"]: one["value"] for one in data["metadata"]["items"]}
    url = f"gs://{BUCKET}/tasks/us-west1/{wanted.id}#gcp/us-west1/{wanted.id}"
    assert url in items["user-data"]
    assert items["block-project-ssh-keys"] == "TRUE"


def test_on_demand_there_is_an_end_too(gcp_rig: GcpRig) -> None:
    wanted = task(gcp_rig, spot=False)
    launch(gcp_rig, wanted)
    assert template(gcp_rig, wanted)["scheduling"] == {
        "provisioningModel": "STANDARD",
        "instanceTerminationAction": "DELETE",
        "terminationTime": f"{SOON:%Y-%m-%dT%H:%M:%S}.000Z",
    }
    plain = replace(task(gcp_rig, spot=False), expires=None)
    launch(gcp_rig, plain)  # and expires: its end is moved
    assert template(gcp_rig, plain)["scheduling"] == {"provisioningModel": "STANDARD"}


def test_nothing_comes_in(gcp_rig: GcpRig) -> None:
    rule = gcp_rig.gcp.compute.firewalls["cml-runner"]
    assert rule["denied"] == [{"IPProtocol": "all"}]
    assert (rule["direction"], rule["sourceRanges"]) == ("INGRESS", ["0.0.0.0/0"])
    assert rule["targetTags"] == ["cml-runner"]
    assert rule["priority"] < 1000


def test_the_group_chooses_among_types_and_zones_and_is_never_balanced(gcp_rig: GcpRig) -> None:
    launch(gcp_rig)
    (group,) = gcp_rig.gcp.compute.groups.values()
    assert group.zones == ["us-west1-a", "us-west1-b", "us-west1-c"]
    assert group.choices == ["n2-standard-8", "n2d-standard-8", "e2-standard-8"]
    assert group.body["distributionPolicy"]["targetShape"] == "ANY"
    assert group.body["updatePolicy"] == {
        "type": "OPPORTUNISTIC",
        "instanceRedistributionType": "NONE",
    }
    assert group.body["instanceLifecyclePolicy"]["defaultActionOnFailure"] == "REPAIR"


def test_a_zone_of_ones_own_choice(gcp_rig: GcpRig) -> None:
    plan = Cloud("us-west1-c").plan(task(gcp_rig))
    steps.create(plan.resources, claim=plan.bucket)
    (group,) = gcp_rig.gcp.compute.groups.values()
    assert group.zones == ["us-west1-c"]


def test_attached_gpus(gcp_rig: GcpRig) -> None:
    compute = gcp_rig.gcp.compute
    compute.missing = {("nvidia-tesla-t4", "us-west1-a"), ("n1-standard-4", "us-west1-c")}
    wanted = task(gcp_rig, types=("m+t4",), spot=False)
    launch(gcp_rig, wanted)
    data = template(gcp_rig, wanted)
    gpu = {"acceleratorType": "nvidia-tesla-t4", "acceleratorCount": 1}
    assert (data["machineType"], data["guestAccelerators"]) == ("n1-standard-4", [gpu])
    assert data["scheduling"]["onHostMaintenance"] == "TERMINATE"
    (group,) = compute.groups.values()
    assert group.zones == ["us-west1-b"]  # the only one that has both


def test_the_users_own_choices(gcp_rig: GcpRig) -> None:
    gcp_rig.gcp.compute.images[PROJECT, "golden"] = {"family": "mine", "diskSizeGb": "50"}
    for image in (f"me@{PROJECT}/golden", f"me@{PROJECT}/mine"):
        wanted = task(gcp_rig, permissions="trainer,scopes=storage-rw", image=image)
        launch(gcp_rig, wanted)
        data = template(gcp_rig, wanted)
        assert data["serviceAccounts"] == [
            {
                "email": f"trainer@{PROJECT}.iam.gserviceaccount.com",
                "scopes": ["https://www.googleapis.com/auth/devstorage.read_write"],
            }
        ]
        disk = data["disks"][0]["initializeParams"]
        assert disk["sourceImage"].endswith("/golden")
        assert disk["diskSizeGb"] == "50"


@pytest.mark.parametrize("address", ["203.0.113.7", "2001:db8::7"])
def test_a_key_opens_one_port_for_one_address(
    gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    import requests

    class Answer:
        text = f"{address}\n"

        def raise_for_status(self) -> None: ...

    monkeypatch.setattr(requests, "get", lambda *_, **__: Answer())
    key = gcp_rig.gcp.admin["private_key"]
    wanted = task(gcp_rig, ssh_key=key, image="me@ubuntu-os-cloud/ubuntu-2404-lts-amd64")
    launch(gcp_rig, wanted)
    launch(gcp_rig, replace(wanted, id=gcp_rig.task().id))  # the rule is there already
    data = template(gcp_rig, wanted)
    items = {one["key"]: one["value"] for one in data["metadata"]["items"]}
    assert items["ssh-keys"].startswith("me:ssh-rsa ")
    assert items["enable-oslogin"] == "FALSE"
    _, name = data["tags"]["items"]
    rule = gcp_rig.gcp.compute.firewalls[name]
    assert (rule["targetTags"], rule["allowed"]) == (
        [name],
        [{"IPProtocol": "tcp", "ports": ["22"]}],
    )
    assert rule["sourceRanges"] == [f"{address}/{128 if ':' in address else 32}"]
    assert rule["priority"] < gcp_rig.gcp.compute.firewalls["cml-runner"]["priority"]
    assert key not in repr(gcp_rig.gcp.compute.templates)


# What can't be had


def test_every_mistake_is_told_before_anything_is_sent(gcp_rig: GcpRig) -> None:
    wanted = replace(
        task(
            gcp_rig, types=("huge",), spot_price=0.5, ssh_key="no key", options={"aws-subnet": "x"}
        ),
        program=Program(index="https://me:secret@x/"),
        expires=datetime.now(timezone.utc) + timedelta(days=200),
    )
    before = len(gcp_rig.gcp.app.calls)
    with pytest.raises(ConfigurationError) as caught:
        gcp_rig.cloud.plan(wanted)
    told = "\n".join(caught.value.mistakes)
    assert "--cloud-ssh-private: no private key" in told
    for part in ("huge", "aws-subnet", "credentials", "--cloud-spot-price", "--max-lifetime"):
        assert part in told
    assert len(gcp_rig.gcp.app.calls) == before


@pytest.mark.parametrize(
    ("machine", "error"),
    [
        ({"types": ("m9-standard-8",)}, NoCapacity),
        ({"types": ("n1-standard-4+nvidia-tesla-k80*1",)}, NoCapacity),
        ({"image": "me@somebody/nothing"}, NotFound),
        ({"image": "me@ubuntu-os-cloud/ubuntu-2404-lts-arm64"}, ConfigurationError),
    ],
)
def test_what_isnt_there_is_found_out_before_anything_is_made(
    gcp_rig: GcpRig, machine: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        launch(gcp_rig, task(gcp_rig, **machine))
    assert gcp_rig.gcp.left() == []
    assert gcp_rig.cloud.tasks() == []
    assert "storage.objects.create" not in actions(gcp_rig)


# Capacity


def test_zone_after_zone_until_one_has_a_machine(gcp_rig: GcpRig) -> None:
    gcp_rig.gcp.compute.hinder = lambda zone, type_, _: (
        "" if (zone, type_) == ("us-west1-c", "e2-standard-8") else EXHAUSTED
    )
    plan = launch(gcp_rig)
    running(gcp_rig, plan)
    (one,) = gcp_rig.gcp.compute.instances.values()
    assert (one.zone, one.type, one.spot) == ("us-west1-c", "e2-standard-8", True)


def test_a_zone_without_capacity_is_no_reason_to_give_up(gcp_rig: GcpRig) -> None:
    gcp_rig.gcp.compute.hinder = lambda zone, *_: EXHAUSTED if zone != "us-west1-c" else ""
    plan = launch(gcp_rig)
    running(gcp_rig, plan)
    assert kinds(plan) == {"info"}
    told = " ".join(one.message for one in plan.group.events())
    assert "us-west1-b: The zone 'us-west1-b' does not have enough resources" in told


@pytest.mark.parametrize(("code", "kind"), [(EXHAUSTED, "capacity"), (QUOTA, "quota")])
def test_what_hinders_all_zones_is_told(gcp_rig: GcpRig, code: str, kind: str) -> None:
    gcp_rig.gcp.compute.hinder = lambda *_: code
    plan = launch(gcp_rig)
    until(lambda: kind in kinds(plan), "the event", 10)


def test_what_the_agent_of_groups_may_not_do_is_told(gcp_rig: GcpRig) -> None:
    gcp_rig.gcp.compute.hinder = lambda *_: "PERMISSIONS_ERROR"
    plan = launch(gcp_rig)
    until(lambda: kinds(plan) == {"permission"}, "the event", 10)


def test_fifty_machines_cost_no_more_calls_than_one(gcp_rig: GcpRig) -> None:
    def calls(count: int) -> list[str]:
        before = len(gcp_rig.gcp.app.calls)
        launch(gcp_rig, replace(task(gcp_rig), count=count))
        return sorted(actions(gcp_rig)[before:])

    calls(1)  # puts the program there
    assert calls(1) == calls(50)


# What befalls machines


def seconds_left(rig: GcpRig, plan: Plan, machine: str) -> float:
    notice = rig.notice(plan, machine)
    assert notice
    assert notice.deadline
    return (notice.deadline - datetime.now(timezone.utc)).total_seconds()


def test_a_preemption_is_an_interruption(gcp_rig: GcpRig) -> None:
    plan = launch(gcp_rig)
    (machine,) = running(gcp_rig, plan)
    assert gcp_rig.notice(plan, machine) is None
    gcp_rig.gcp.compute.preempt(machine, 0.5)
    assert seconds_left(gcp_rig, plan, machine) == pytest.approx(120, abs=10)
    assert "interruption" in kinds(plan)
    until(lambda: gcp_rig.running(plan) not in ([], [machine]), "another one", 10)


def test_where_there_is_no_long_notice_it_is_short(gcp_rig: GcpRig) -> None:
    text = "Invalid value for field 'resource.properties.scheduling.preemptionNoticeDuration'"
    fault = gcp_rig.gcp.fail("compute.instanceTemplates.insert", 400, "invalid", text)
    wanted = task(gcp_rig)
    plan = launch(gcp_rig, wanted)
    assert not fault.times
    assert "preemptionNoticeDuration" not in template(gcp_rig, wanted)["scheduling"]
    (machine,) = running(gcp_rig, plan)
    gcp_rig.gcp.compute.preempt(machine, 20)
    assert seconds_left(gcp_rig, plan, machine) == pytest.approx(30, abs=10)


def test_a_template_that_is_wrong_is_not_tried_again(gcp_rig: GcpRig) -> None:
    text = "Invalid value for field 'resource.name'"
    fault = gcp_rig.gcp.fail("compute.instanceTemplates.insert", 400, "invalid", text, times=2)
    with pytest.raises(RunnerError, match=r"resource\.name"):
        launch(gcp_rig)
    assert fault.times == 1
    assert gcp_rig.gcp.left() == []


def test_a_machine_that_powers_itself_off_is_an_error_and_made_anew(gcp_rig: GcpRig) -> None:
    plan = launch(gcp_rig)
    (machine,) = running(gcp_rig, plan)
    gcp_rig.gcp.compute.powered_off(machine)
    assert "error" in kinds(plan)
    until(lambda: gcp_rig.running(plan) not in ([], [machine]), "another one", 10)
    old, new = gcp_rig.gcp.compute.instances.values()
    assert (old.name, old.id != new.id) == (new.name, True)


def test_what_was_interrupted_on_demand_is_no_error(gcp_rig: GcpRig) -> None:
    plan = launch(gcp_rig)
    (machine,) = running(gcp_rig, plan)
    plan.group.interrupt(machine, 0.1)
    until(lambda: gcp_rig.running(plan) not in ([], [machine]), "another one", 10)
    assert kinds(plan) == {"info", "interruption"}


def test_maintenance_is_no_deadline(gcp_rig: GcpRig) -> None:
    plan = launch(gcp_rig)
    (machine,) = running(gcp_rig, plan)
    gcp_rig.gcp.compute.instances[machine].maintenance = "TERMINATE_ON_HOST_MAINTENANCE"
    notice = gcp_rig.notice(plan, machine)
    assert notice
    assert notice.deadline is None


def test_a_notice_comes_at_once_while_it_is_waited_for(gcp_rig: GcpRig) -> None:
    plan = launch(gcp_rig)
    (machine,) = running(gcp_rig, plan)
    gcp_rig.notice(plan, machine)
    threading.Timer(0.3, gcp_rig.gcp.compute.preempt, (machine, 60)).start()
    assert gcp_rig.notice(plan, machine)  # the second question waits for news


def test_what_befell_an_older_task_of_this_name_is_not_told(gcp_rig: GcpRig) -> None:
    wanted = task(gcp_rig)
    plan = launch(gcp_rig, wanted)
    for _ in range(2):
        (machine,) = running(gcp_rig, plan)
        gcp_rig.gcp.compute.crash(machine)
    assert "error" in kinds(plan)
    steps.delete(plan.resources)
    again = launch(gcp_rig, wanted)
    running(gcp_rig, again)
    assert kinds(again) == {"info"}


def test_a_moved_end_holds_for_machines_that_come_later(gcp_rig: GcpRig) -> None:
    plan = launch(gcp_rig)
    (machine,) = running(gcp_rig, plan)
    later = SOON + timedelta(hours=2)
    plan.group.expire(later)
    assert gcp_rig.notice(plan, machine) is None  # it has some time yet
    gcp_rig.gcp.compute.crash(machine)
    until(lambda: gcp_rig.running(plan) not in ([], [machine]), "another one", 10)
    *_, new = gcp_rig.gcp.compute.instances.values()
    assert new.end == later
    plan.group.expire(None)
    steps.delete(Cloud("us-west").plan(Task(id=plan.bucket.task.id)).resources)  # type: ignore[attr-defined]
    assert gcp_rig.gcp.left() == []


# Faults


def test_what_passes_is_waited_for(gcp_rig: GcpRig) -> None:
    gcp_rig.gcp.fail("compute.instanceTemplates.insert", 503, "backendError", times=2)
    gcp_rig.gcp.fail("compute.regionInstanceGroupManagers.insert", 403, "rateLimitExceeded")
    gcp_rig.gcp.fail("compute.regionOperations.wait", 502, "badGateway")
    running(gcp_rig, launch(gcp_rig))


@pytest.mark.parametrize(
    "action",
    ["instanceTemplates.insert", "regionInstanceGroupManagers.insert", "regionOperations.wait"],
)
def test_an_answer_that_is_lost_makes_nothing_twice(gcp_rig: GcpRig, action: str) -> None:
    gcp_rig.gcp.fail(f"compute.{action}", 0, LOST)
    plan = launch(gcp_rig)
    running(gcp_rig, plan)
    assert len(gcp_rig.gcp.compute.templates) == len(gcp_rig.gcp.compute.groups) == 1
    assert actions(gcp_rig).count(action) > 1
    steps.delete(plan.resources)
    assert gcp_rig.gcp.left() == []


@pytest.mark.parametrize(
    "action", ["instanceTemplates.insert", "regionInstanceGroupManagers.insert"]
)
@pytest.mark.parametrize(("code", "error"), [(QUOTA, NoCapacity), ("INTERNAL_ERROR", RunnerError)])
def test_an_operation_that_ends_in_an_error(
    gcp_rig: GcpRig, action: str, code: str, error: type[RunnerError]
) -> None:
    gcp_rig.gcp.compute.spoil = lambda kind: code if kind == action else ""
    with pytest.raises(error, match=code):
        launch(gcp_rig)
    assert gcp_rig.gcp.left() == []
    assert gcp_rig.cloud.tasks() == []


def test_expired_credentials_in_the_middle(gcp_rig: GcpRig) -> None:
    principal = gcp_rig.gcp.app.principals[gcp_rig.gcp.admin["client_email"]]

    def expire(action: str) -> None:
        principal.expired = principal.expired or action == "compute.globalOperations.wait"

    gcp_rig.gcp.app.watch = expire
    with pytest.raises(CleanupFailed, match="refuses our credentials") as caught:
        launch(gcp_rig)
    assert isinstance(caught.value.__context__, CredentialsError)
    gcp_rig.gcp.app.watch, principal.expired = (lambda _: None), False
    (lease,) = gcp_rig.cloud.tasks()
    steps.delete(gcp_rig.cloud.plan(Task(id=lease.id)).resources)
    assert gcp_rig.gcp.left() == []


def test_an_api_that_is_off_is_told_with_what_enables_it(gcp_rig: GcpRig) -> None:
    gcp_rig.gcp.app.off.add("compute.googleapis.com")
    with pytest.raises(CredentialsError, match=r"gcloud services enable compute\.googleapis"):
        launch(gcp_rig)


def test_the_same_in_what_a_group_could_not_do() -> None:
    text = "Compute Engine API has not been used in project 1 before or it is disabled."
    assert session.kind("accessNotConfigured", text) == "permission"
    assert "gcloud services enable compute.googleapis.com" in session.told("", text)


def test_no_credentials_at_all(gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gcp_rig
    monkeypatch.delenv(session.DATA)
    monkeypatch.setattr(session, "PRODUCT", Path("/nowhere"))
    with pytest.raises(CredentialsError, match="GOOGLE_APPLICATION_CREDENTIALS"):
        Cloud("us-west").tasks()


@pytest.mark.parametrize("text", ["nonsense", "{}", '{"type": "service_account"}'])
def test_credentials_that_are_none(
    gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    assert gcp_rig
    monkeypatch.setenv(session.DATA, text)
    with pytest.raises(CredentialsError, match=session.DATA):
        Cloud("us-west").tasks()


def test_credentials_in_a_file(
    gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    path = tmp_path / "key.json"
    path.write_text(gcp_rig.gcp.login()[session.DATA])
    monkeypatch.delenv(session.DATA)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    running(gcp_rig, launch(gcp_rig))


@pytest.mark.parametrize("in_a_file", [False, True])
def test_workload_identity_federation(
    gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_a_file: bool
) -> None:
    account = gcp_rig.gcp.add_user(gcp_rig.cloud.permissions())["client_email"]
    content = json.dumps(gcp_rig.gcp.federation(account, tmp_path))
    monkeypatch.delenv(session.DATA)
    if in_a_file:
        (tmp_path / "credentials.json").write_text(content)
        path = str(tmp_path / "credentials.json")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", path)
    else:
        monkeypatch.setenv(session.DATA, content)
        with pytest.raises(CredentialsError, match="GOOGLE_CLOUD_PROJECT"):
            Cloud("us-west").tasks()
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", PROJECT)
    running(gcp_rig, launch(gcp_rig))
    assert gcp_rig.gcp.app.calls[-1].who == account
    (tmp_path / "token").write_text("of somebody else")
    with pytest.raises(CredentialsError, match="rejected"):
        Cloud("us-west").tasks()


def test_on_a_machine_of_google(gcp_rig: GcpRig, cli: Cli) -> None:
    """The metadata server logs in who runs there, and says in which project."""
    plan = launch(gcp_rig)
    (machine,) = running(gcp_rig, plan)
    host = gcp_rig.gcp.serve(gcp_rig.gcp.metadata(machine))
    environment = {**gcp_rig.gcp.environment(), "GCE_METADATA_HOST": host, "GCE_METADATA_IP": host}
    environment |= {session.DATA: "", "NO_GCE_CHECK": ""}
    done = cli.run("list", "--cloud", "gcp", environment=environment)
    assert str(plan.bucket.task.id) in done.out  # type: ignore[attr-defined]


def test_which_project(gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gcp_rig
    monkeypatch.setenv("GCP_PROJECT", "other")
    assert Cloud("us-west")._session.project == "other"
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "another")
    assert Cloud("us-west")._session.project == "another"


def test_without_the_sdk(gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gcp_rig
    for name in [one for one in sys.modules if one.split(".")[0] == "google"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"pip install .*\[gcp\]'"):
        Cloud("us-west").tasks()
    assert Cloud("us-west").permissions()  # takes nothing


def test_a_bucket_that_is_somebody_elses_gets_nothing(gcp_rig: GcpRig) -> None:
    theirs = gcp_rig.gcp.storage.buckets[BUCKET] = Bucket("somebody", {"name": BUCKET})
    with pytest.raises(AlreadyExists):
        launch(gcp_rig)
    assert theirs.objects == {}
    assert gcp_rig.gcp.left() == []


def test_of_two_launches_of_one_name_one_wins(gcp_rig: GcpRig) -> None:
    wanted = task(gcp_rig)
    running(gcp_rig, launch(gcp_rig, wanted))
    plan = Cloud("us-west").plan(wanted)
    with pytest.raises(AlreadyExists):
        steps.create(plan.resources, claim=plan.bucket)
    assert len(gcp_rig.gcp.compute.alive()) == 1


def test_records_of_an_older_task_of_this_name_go(gcp_rig: GcpRig) -> None:
    wanted = task(gcp_rig)
    store = gcp_rig.cloud.plan(wanted).bucket.store
    store.write("status-000.json", b"{}")
    store.write("settings.json", b"old")
    launch(gcp_rig, wanted)
    assert store.keys("") == ["settings.json"]
    assert store.read("settings.json") == b"{}"


# Rights


def least(rig: GcpRig, monkeypatch: pytest.MonkeyPatch, without: str = "") -> None:
    """Be somebody who may do what our own role says, less one thing."""
    role = dict(Cloud("us-west").permissions())
    role["includedPermissions"] = [one for one in role["includedPermissions"] if one != without]
    monkeypatch.setenv(session.DATA, rig.gcp.login(rig.gcp.add_user(role))[session.DATA])


ONLY_AT_TIMES = {
    "compute.acceleratorTypes.list",  # GPUs that are attached
    "compute.firewalls.create",  # --cloud-ssh-private
    "compute.networks.updatePolicy",
    "compute.images.get",  # images of one's own project
    "compute.images.getFromFamily",
    "compute.images.useReadOnly",
    "compute.globalOperations.list",  # while waiting
    "compute.instanceGroupManagers.get",
    "compute.instances.getSerialPortOutput",
    "compute.instances.list",
    "compute.zoneOperations.get",  # interrupt()
    "compute.instances.simulateMaintenanceEvent",  # evict()
    "iap.tunnelInstances.accessViaIAP",  # shell(), which Google's proxy asks for
    "storage.objects.get",  # list
}


def test_the_least_role_suffices(gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch) -> None:
    least(gcp_rig, monkeypatch)
    plan = launch(gcp_rig)
    (lease,) = Cloud("us-west").tasks()
    (machine,) = running(gcp_rig, plan)
    gcp_rig.gcp.compute.instances[machine].console = "Booting"
    assert plan.group.events()
    assert plan.group.console() == "Booting"
    plan.group.interrupt("", 100)
    plan.group.expire(None)
    steps.delete(Cloud("us-west").plan(Task(id=lease.id)).resources)
    assert gcp_rig.gcp.left() == []
    assert [one for one in gcp_rig.gcp.app.calls if "Required" in one.error] == []


def test_each_right_is_needed_and_named_when_it_is_missing(
    gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for right in sorted(set(account.LAUNCHER_PERMISSIONS) - ONLY_AT_TIMES):
        with monkeypatch.context() as patch:
            least(gcp_rig, patch, without=right)
            with pytest.raises(RunnerError) as caught:
                steps.delete(launch(gcp_rig).resources)
            assert isinstance(caught.value, CredentialsError | CleanupFailed), right
            named = "no access to gs://" if right.startswith("storage.objects") else right
            assert named in str(caught.value), right
        for lease in gcp_rig.cloud.tasks():
            steps.delete(gcp_rig.cloud.plan(Task(id=lease.id)).resources)
        assert gcp_rig.gcp.left() == [], right


def test_who_may_not_use_the_service_account(gcp_rig: GcpRig) -> None:
    gcp_rig.gcp.app.principals[gcp_rig.gcp.admin["client_email"]].acts_as = False
    with pytest.raises(CredentialsError, match=r"iam\.serviceAccountUser"):
        launch(gcp_rig)
    assert gcp_rig.gcp.left() == []


def test_a_machine_may_only_touch_what_is_ours(gcp_rig: GcpRig) -> None:
    from google.oauth2.credentials import Credentials

    own = session.Session("us-west1")
    vars(own)["_login"] = Credentials(token=gcp_rig.gcp.token(OURS)), PROJECT
    for service, method, fields in (
        ("Instances", "aggregated_list", {"filter": "labels.x = y"}),
        ("Instances", "delete_unary", {"instance": "theirs", "zone": "us-west1-a"}),
        ("InstanceTemplates", "delete_unary", {"instance_template": "theirs"}),
        ("Firewalls", "get", {"firewall": "cml-runner"}),
    ):
        with pytest.raises(CredentialsError):
            own.call(service, method, **fields)
    with pytest.raises(NotFound):  # it may, if it is there
        own.call("InstanceTemplates", "delete_unary", instance_template="cml-gone")


def test_a_project_that_nobody_has_set_up(gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch) -> None:
    gcp_rig.gcp.storage.buckets.clear()
    gcp_rig.gcp.iam.accounts.clear()
    with monkeypatch.context() as patch:
        least(gcp_rig, patch)
        with pytest.raises(CredentialsError, match="cml-runner setup gcp"):
            launch(gcp_rig)
    assert gcp_rig.gcp.left() == []
    running(gcp_rig, launch(gcp_rig))  # by whoever may


def test_where_nobody_has_set_anything_up_nothing_is_there(gcp_rig: GcpRig) -> None:
    gcp_rig.gcp.storage.buckets.clear()
    assert gcp_rig.cloud.tasks() == []
    steps.delete(gcp_rig.cloud.plan(Task(id=gcp_rig.task().id)).resources)


def test_setting_up_twice_changes_nothing(gcp_rig: GcpRig) -> None:
    policy = gcp_rig.gcp.iam.policy
    policy["bindings"][0]["members"].insert(0, "user:somebody")  # as IAM joins them
    objects = gcp_rig.gcp.storage.buckets[BUCKET].policy
    assert gcp_rig.cloud.setup() == []
    assert gcp_rig.gcp.iam.policy is policy
    assert gcp_rig.gcp.storage.buckets[BUCKET].policy is objects
    settings = gcp_rig.gcp.storage.buckets[BUCKET].settings
    assert settings["iamConfiguration"] == {
        "uniformBucketLevelAccess": {"enabled": True},
        "publicAccessPrevention": "enforced",
    }
    tasks, programs, _ = settings["lifecycle"]["rule"]
    assert tasks["condition"] == {"age": 30, "matchesPrefix": ["tasks/"]}
    assert programs["condition"] == {"age": 60, "matchesPrefix": ["programs/"]}
    agent = gcp_rig.gcp.iam.accounts[OURS]["bindings"]
    assert agent[0]["members"] == ["serviceAccount:123456789012@cloudservices.gserviceaccount.com"]


def test_a_new_service_account_is_waited_for(
    gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    gcp_rig.gcp.iam.policy["bindings"].clear()
    gcp_rig.gcp.iam.slow = 3
    assert gcp_rig.cloud.setup() == ["what the service account may do"]


def test_roles_that_have_changed_are_renewed(gcp_rig: GcpRig) -> None:
    gcp_rig.gcp.iam.roles[account.ROLE]["includedPermissions"] = []
    assert gcp_rig.cloud.setup() == []
    role = gcp_rig.gcp.iam.roles[account.ROLE]
    assert role["includedPermissions"] == list(account.MACHINE_PERMISSIONS)


# Ends


def test_a_machine_without_settings_ends_its_group(gcp_rig: GcpRig) -> None:
    plan = launch(gcp_rig)
    plan.bucket.store.delete("settings.json")
    (machine,) = running(gcp_rig, plan)
    with gcp_rig.on(machine), pytest.raises(NotFound, match="this task is over"):
        supervise.run(gcp_rig.url(plan))
    until(lambda: gcp_rig.gcp.left() == [], "all to go", 10)
    assert gcp_rig.cloud.tasks() == []


def test_before_it_can_speak_a_machine_has_its_console(gcp_rig: GcpRig) -> None:
    wanted = task(gcp_rig)
    plan = launch(gcp_rig, wanted)
    (machine,) = running(gcp_rig, plan)
    gcp_rig.gcp.compute.instances[machine].console = "Booting\nStill booting\n"
    found = inventory.find(str(wanted.id), "gcp", "us-west1")
    assert list(inventory.logs(found, follow=False)) == [(0, "Booting\nStill booting\n")]


@pytest.mark.parametrize(
    "action",
    [
        "regionInstanceGroupManagers.abandonInstances",
        "regionInstanceGroupManagers.delete",
        "instanceTemplates.delete",
        "instances.delete",
        "regionOperations.wait",
        "regionInstanceGroupManagers.listManagedInstances",
    ],
)
def test_leaving_goes_on_until_it_is_done(
    gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    monkeypatch.setattr("cml_runner.wait.PAUSES", (0.01,))
    plan = launch(gcp_rig)
    (machine,) = running(gcp_rig, plan)
    gcp_rig.gcp.fail(f"compute.{action}", 500, "backendError", times=3)
    gcp_rig.leave(plan, machine)
    until(lambda: gcp_rig.gcp.left() == [], "all to go", 10)
    assert gcp_rig.cloud.tasks() == []


def test_who_leaves_last_while_others_are_still_going(gcp_rig: GcpRig) -> None:
    plan = launch(gcp_rig, replace(task(gcp_rig), count=3))
    machines = running(gcp_rig, plan, 3)
    for one in machines:
        gcp_rig.leave(plan, one)
    until(lambda: gcp_rig.gcp.left() == [], "all to go", 10)


def test_a_group_whose_deletion_has_begun_is_waited_for(gcp_rig: GcpRig) -> None:
    plan = launch(gcp_rig)
    running(gcp_rig, plan)
    (group,) = gcp_rig.gcp.compute.groups.values()
    group.deleting, group.size = True, 0
    steps.delete(plan.resources)
    assert gcp_rig.gcp.left() == []


# The far side


def test_events_are_typed_whatever_they_are_about() -> None:
    class Error:
        def __init__(self, code: str, zone: str) -> None:
            link = f"https://x/projects/p/zones/{zone}/instances/n"
            self.timestamp = SOON.isoformat()
            self.error = type("E", (), {"code": code, "message": f"{code} in {zone}"})
            self.instance_action_details = type("D", (), {"instance": link})

    def read(*errors: Error) -> list[Happening]:
        return happenings.of_group(errors, ("a", "b"))

    assert [one.kind for one in read(Error(EXHAUSTED, "a"))] == ["info"]
    both = read(Error(EXHAUSTED, "a"), Error(EXHAUSTED, "b"))
    assert [one.kind for one in both] == ["info", "capacity"]
    often = read(*[Error(EXHAUSTED, "a")] * happenings.CHANCES)
    assert often[-1].kind == "capacity"
    assert [one.kind for one in read(Error("INVALID_USAGE", "a"))] == ["error"]


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [
        ("2026-11-01T10:00:00.123-08:00", 123000),
        ("2026-11-01T18:00:00Z", 0),
        ("2026-11-01T18:00:00.123456789Z", 123456),
        ("2026-11-01T18:00:00.1Z", 100000),
    ],
)
def test_times_are_understood_however_exact_they_are(text: str, microseconds: int) -> None:
    found = happenings._time(text)
    assert found == datetime(2026, 11, 1, 18, 0, 0, microseconds, timezone.utc)


def test_the_fake_refuses_what_isnt_described(gcp_rig: GcpRig) -> None:
    own = gcp_rig.cloud._session
    url = f"https://compute.googleapis.com/compute/v1/projects/{PROJECT}/global/instanceTemplates"
    bodies: list[Any] = [{"name": "x", "colour": "red"}, {"name": 7}, {"properties": {"disks": {}}}]
    for body in bodies:
        with pytest.raises(RunnerError, match="instanceTemplates"):
            own.rest("POST", url, body)
    with pytest.raises(RunnerError, match="what are"):
        own.rest("GET", url, colour="red")
