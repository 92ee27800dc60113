"""What a machine of Google Cloud does with nothing but its own identity: boot, stage 0, its end."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import pytest

from cml_runner import bootstrap, steps, wait
from cml_runner.boot import gcp, prepare, web
from cml_runner.clouds.gcp import Cloud, account
from cml_runner.errors import RunnerError
from cml_runner.model import Identifier, Task
from cml_runner.store import Store
from tests.boot.test_pythons import interpreter
from tests.clouds.conftest import until
from tests.clouds.gcp_rig import PROGRAM
from tests.lab.gcp import BUCKET, storage
from tests.lab.gcp.compute import REPAIR
from tests.lab.gcp.front import LOST

if TYPE_CHECKING:
    from pathlib import Path

    from cml_runner.clouds import Plan
    from tests.clouds.gcp_rig import GcpRig

WHEEL = f"programs/{PROGRAM.sha256}.whl"
GROUPS = "compute.regionInstanceGroupManagers"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cml_runner.wait.PAUSES", (0.01,))


def launched(rig: GcpRig, count: int = 1) -> tuple[Plan, list[str]]:
    plan = rig.launch(count)
    return plan, rig.running(plan)


def identifier(plan: Plan) -> Identifier:
    found: Identifier = plan.bucket.task.id  # type: ignore[attr-defined]
    return found


def renewed(rig: GcpRig, plan: Plan, old: str) -> None:
    """Wait for the machine in whose place of an old one; its group doesn't find out by itself."""
    until(lambda: rig.running(plan) not in ([], [old]), REPAIR - 2)
    one, other = rig.gcp.compute.instances.values()
    assert (one.name, one.status) == (other.name, "GONE")


# Objects


def test_machines_and_launchers_see_the_same_objects(
    gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, (machine,) = launched(gcp_rig)
    monkeypatch.setattr(storage, "PAGE", 3)  # so lists come in pages
    store = plan.bucket.store
    names = ["data/1/a b", "data/1/c&d", "data/2", "log-1", "log-10", "log-2", "status", "ümlaut"]
    with gcp_rig.machine(plan, machine) as own:
        for name in names:
            own.objects.write(name, name.encode())
        for prefix in ("", "log-1", "data", "data/", "data/1", "nothing", "settings"):
            assert own.objects.keys(prefix) == store.keys(prefix), prefix
        assert own.objects.keys("")[:-1] == sorted([*names, "settings.json"])[:-1]
        assert [own.objects.read(name) for name in names] == [name.encode() for name in names]
        own.objects.write("status", b"")
        assert (own.objects.read("status"), own.objects.read("absent")) == (b"", None)
        assert own.objects.claim("once", b"mine")
        assert not own.objects.claim("once", b"theirs")
        assert store.read("once") == b"mine"
        own.objects.remove(["once", "absent", *names])
        assert store.keys("") == ["settings.json"]
        assert own.leases.keys("") == [f"{identifier(plan)}.json"]


def test_a_machine_reads_programs_and_can_change_none(gcp_rig: GcpRig) -> None:
    plan, (machine,) = launched(gcp_rig)
    with gcp_rig.machine(plan, machine) as own:
        programs = gcp.Bucket(BUCKET, "programs")
        name = f"{PROGRAM.sha256}.whl"
        assert programs.keys("") == [name]
        assert programs.read(name) == b"wheel"
        for change in (
            lambda: programs.write(name, b"other"),
            lambda: programs.write("new", b""),
            lambda: programs.claim("new", b""),
            lambda: programs.remove([name]),
            lambda: gcp.Bucket(BUCKET, "elsewhere").write("new", b""),
        ):
            with pytest.raises(web.Refused) as caught:
                change()
            assert caught.value.denied
        own.objects.write("status-000.json", b"{}")
        own.objects.remove(["settings.json"])
        own.leases.write("other.json", b"{}")  # tasks of one project trust each other
    assert plan.bucket.programs.keys("") == [name]  # type: ignore[attr-defined]


def test_setting_up_again_takes_what_machines_may_not(gcp_rig: GcpRig) -> None:
    bucket = gcp_rig.gcp.storage.buckets[BUCKET]
    wanted = bucket.policy["bindings"]
    ours, other = wanted[0]["members"], ["user:somebody"]
    bucket.policy["bindings"] = [{"role": account.WRITER, "members": [*ours, *other]}]
    bucket.settings["lifecycle"] = {}
    gcp_rig.cloud.setup()
    assert bucket.policy["bindings"] == [{"role": account.WRITER, "members": other}, *wanted]
    assert "programs/" in str(bucket.settings["lifecycle"])


# The program


def test_launches_put_the_program_once_until_it_is_old(gcp_rig: GcpRig) -> None:
    objects = gcp_rig.gcp.storage.buckets[BUCKET].objects
    launched(gcp_rig)
    first = objects[WHEEL].generation
    launched(gcp_rig)
    assert objects[WHEEL].generation == first
    objects[WHEEL].modified = datetime(2026, 1, 1, tzinfo=timezone.utc)
    plan, _ = launched(gcp_rig)
    assert objects[WHEEL].generation > first
    steps.delete(plan.resources)
    assert objects[WHEEL].content == b"wheel"  # others may need it


# Ends


def test_a_machine_that_is_to_be_replaced_asks_for_it(gcp_rig: GcpRig) -> None:
    plan, (machine,) = launched(gcp_rig)
    with gcp_rig.machine(plan, machine) as own:
        assert own.name() == machine
        own.replace()
    renewed(gcp_rig, plan, machine)


def test_one_that_its_group_has_lost_just_goes(gcp_rig: GcpRig) -> None:
    plan, (machine,) = launched(gcp_rig)
    with gcp_rig.machine(plan, machine) as own:
        (group,) = gcp_rig.gcp.compute.groups.values()
        group.members.clear()
        group.size = 0
        own.replace()
    assert gcp_rig.gcp.compute.instances[machine].status == "GONE"


@pytest.mark.parametrize(
    ("action", "status", "reason"),
    [
        (f"{GROUPS}.recreateInstances", 429, "rateLimitExceeded"),
        (f"{GROUPS}.recreateInstances", 403, "forbidden"),
        (f"{GROUPS}.recreateInstances", 500, "backendError"),
        (f"{GROUPS}.recreateInstances", 0, LOST),
        ("metadata", 503, "unavailable"),
        ("metadata", 0, "nobody answers"),
        ("metadata.token", 429, "too many"),
        ("metadata.token", 0, "nobody answers"),
    ],
)
def test_the_end_is_tried_until_it_works(
    gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch, action: str, status: int, reason: str
) -> None:
    plan, (machine,) = launched(gcp_rig)
    fault = gcp_rig.gcp.fail(action, status, reason, times=3)
    monkeypatch.setenv("SERVICE_RESULT", "exit-code")
    monkeypatch.setenv("EXIT_STATUS", str(prepare.INTERRUPTED))
    with gcp_rig.on(machine):
        assert prepare.main(["end", gcp_rig.url(plan)]) == 0
    assert fault.times == 0
    renewed(gcp_rig, plan, machine)
    asked = [one for one in gcp_rig.gcp.app.calls if one.action == f"{GROUPS}.recreateInstances"]
    assert len(asked) == (4 if "recreate" in action else 1)


def test_a_dismissal_whose_answer_is_lost_counts_once(gcp_rig: GcpRig) -> None:
    plan, (machine, *others) = launched(gcp_rig, 3)
    gcp_rig.gcp.fail(f"{GROUPS}.deleteInstances", 0, LOST)
    with gcp_rig.machine(plan, machine) as own:
        wait.insist(own.dismiss)
        own.dismiss()  # it is about to be deleted, or it is already
    until(lambda: gcp_rig.running(plan) == others, 10)
    (group,) = gcp_rig.gcp.compute.groups.values()
    assert group.size == 2


@pytest.mark.parametrize(
    "action",
    [
        "metadata",
        "metadata.token",
        "storage.objects.get",
        "storage.objects.list",
        "storage.objects.delete",
        f"{GROUPS}.abandonInstances",
        f"{GROUPS}.delete",
        "compute.instanceTemplates.list",
        "compute.instances.delete",
    ],
)
def test_finishing_goes_on_until_it_is_done(gcp_rig: GcpRig, action: str) -> None:
    plan, (machine,) = launched(gcp_rig)
    plan.bucket.store.write("status-000.json", b"{}")
    fault = gcp_rig.gcp.fail(action, 500, "backendError", times=3)
    with gcp_rig.machine(plan, machine) as own:
        wait.insist(own.finish)
    assert fault.times == 0
    until(lambda: gcp_rig.gcp.left() == [], 10)
    assert gcp_rig.cloud.tasks() == []
    assert plan.bucket.store.keys("") == ["status-000.json"]


def test_who_may_not_clear_up_goes_all_the_same(gcp_rig: GcpRig) -> None:
    plan, (machine,) = launched(gcp_rig)
    gcp_rig.gcp.storage.buckets[BUCKET].policy["bindings"] = []
    with gcp_rig.machine(plan, machine) as own:
        own.finish()
    until(lambda: not gcp_rig.gcp.compute.alive(), 10)
    assert not gcp_rig.gcp.compute.groups


def test_who_is_another_tasks_ends_nothing(gcp_rig: GcpRig) -> None:
    plan, (machine,) = launched(gcp_rig)
    other, _ = launched(gcp_rig)
    with gcp_rig.machine(other, machine) as own:
        for verb in (own.check, own.replace, own.dismiss, own.finish):
            with pytest.raises(RunnerError, match=f"{identifier(other)}.*{identifier(plan)}"):
                verb()
    assert len(gcp_rig.cloud.tasks()) == 2
    assert len(gcp_rig.gcp.compute.alive()) == 2


@pytest.mark.parametrize("last", [False, True])
def test_who_can_not_know_whose_it_is_says_so_and_goes_on_looking(
    gcp_rig: GcpRig, caplog: pytest.LogCaptureFixture, last: bool
) -> None:
    plan, (machine,) = launched(gcp_rig)
    one = gcp_rig.gcp.compute.instances[machine]
    own = one.metadata.pop(gcp.LABEL)
    with gcp_rig.on(machine), ThreadPoolExecutor(1) as pool:
        url = plan.bucket.store.url
        leaving = pool.submit(Cloud("us-west").leave, identifier(plan), url, last=last)
        until(lambda: "its cml-runner-id is missing" in caplog.text)
        assert not leaving.done()
        assert one.status == "RUNNING"
        one.metadata[gcp.LABEL] = own
        leaving.result(10)
    until(lambda: not gcp_rig.gcp.compute.alive(), 10)


def test_where_no_metadata_server_is_nothing_is_known(
    gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gcp_rig
    monkeypatch.setenv(gcp.VARIABLE, "127.0.0.1:9")
    with pytest.raises(RunnerError, match="doesn't say which machine this is"):
        Cloud.machine()
    with pytest.raises(RunnerError, match="no token"):
        gcp.Bucket(BUCKET, "tasks").read("x")


def test_what_the_metadata_server_leaves_out_is_not_guessed(gcp_rig: GcpRig) -> None:
    plan, (machine,) = launched(gcp_rig)
    with gcp_rig.machine(plan, machine) as own:
        gcp_rig.gcp.fail("metadata", 404, "not found", times=2)
        with pytest.raises(RunnerError, match="instance/id"):
            own.name()
        with pytest.raises(RunnerError, match="missing"):
            own.finish()
    assert gcp_rig.gcp.left()


# Stage 0: no more than the standard library of an old Python


OURS = f"{sys.version_info.major}.{sys.version_info.minor}"
STAGES = [OURS, "3.9"]  # and the oldest that images have


class StageZero:
    """What start scripts begin with, as a program on a machine."""

    def __init__(self, rig: GcpRig, plan: Plan, directory: Path, python: str) -> None:
        self.rig, self.plan, self.directory, self.python = rig, plan, directory, python

    def __call__(self, machine: str, code: str) -> str:
        """Run some code after it, on a machine; return what comes of it."""
        text = bootstrap.first("gcp").removesuffix("main(*sys.argv[1:])")
        path = self.directory / "first.py"
        path.write_text(f"{text}\nPAUSES[:] = 9 * [0.01]\nurl = sys.argv[1]\nprint(repr({code}))\n")
        with self.rig.on(machine):
            done = subprocess.run(
                [self.python, str(path), self.rig.url(self.plan)],
                env={**os.environ, "PYTHONWARNINGS": "error"},
                capture_output=True,
                text=True,
                check=True,
            )
        return str(ast.literal_eval(done.stdout.splitlines()[-1]))


@pytest.fixture(params=STAGES)
def stage(gcp_rig: GcpRig, tmp_path: Path, request: pytest.FixtureRequest) -> StageZero:
    plan, _ = launched(gcp_rig)
    return StageZero(gcp_rig, plan, tmp_path, interpreter(request.param))


def test_stage_0_waits_for_new_rights(gcp_rig: GcpRig, stage: StageZero) -> None:
    (machine,) = gcp_rig.running(stage.plan)
    place = stage.directory / "wheel"
    faults = [
        gcp_rig.gcp.fail("storage.objects.get", 403, "AccessDenied", times=2),  # new rights
        gcp_rig.gcp.fail("metadata.token", 503, "unavailable"),
    ]
    assert stage(machine, f"fetch(url, {PROGRAM.sha256!r}, {str(place)!r})") == ""
    assert place.read_bytes() == b"wheel"
    assert [one.times for one in faults] == [0, 0]


def test_stage_0_gives_up_twice(gcp_rig: GcpRig, stage: StageZero) -> None:
    (machine,) = gcp_rig.running(stage.plan)
    fault = gcp_rig.gcp.fail(f"{GROUPS}.recreateInstances", 429, "rateLimitExceeded", times=3)
    stage(machine, f"give_up(url, {PROGRAM.sha256!r}, 'no such luck')")
    assert fault.times == 0
    store = stage.plan.bucket.store
    status = json.loads(store.read("status-000.json") or b"")
    assert (status["state"], status["reason"]) == ("failed", "no such luck")
    assert status["program"] == PROGRAM.sha256[:12]
    renewed(gcp_rig, stage.plan, machine)
    (other,) = gcp_rig.running(stage.plan)
    gcp_rig.gcp.fail(f"{GROUPS}.deleteInstances", 503, "backendError")
    stage(other, f"give_up(url, {PROGRAM.sha256!r}, 'no such luck')")
    until(lambda: not gcp_rig.gcp.compute.alive(), 10)
    assert store.log(0).count("no such luck") == 2
    steps.delete(Cloud("us-west").plan(Task(id=identifier(stage.plan))).resources)  # as gc does
    assert gcp_rig.gcp.left() == []


def test_stores_know_what_stage_0_does(gcp_rig: GcpRig, stage: StageZero) -> None:
    (machine,) = gcp_rig.running(stage.plan)
    assert stage(machine, "put(url, 'a b', b'1', True)") == "0"
    assert stage(machine, "put(url, 'a b', b'2', True)") == "412"
    assert stage(machine, "ask(url, urlsplit(url).path[1:] + '/a b').decode()") == "1"
    assert Store(stage.plan.bucket.store.url, stage.plan.bucket.store._credentials).keys("a") == [
        "a b"
    ]
