"""What a machine of Azure does with nothing but its own Python."""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest

from cml_runner import boot, wait
from cml_runner.boot import first_azure, prepare
from cml_runner.boot.azure import TAG
from cml_runner.clouds.azure import virtual
from cml_runner.clouds.azure.account import Place
from cml_runner.errors import RunnerError
from cml_runner.model import Identifier, Program, Task
from cml_runner.wait import until
from tests.clouds import azure_rig as rigs
from tests.clouds.test_first import made
from tests.lab.azure.blobs import KIND
from tests.lab.azure.front import CUT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cml_runner.clouds import Plan
    from tests.clouds.azure_rig import AzureRig
    from tests.lab.azure.wire import Call

LONGEST = 6 * 1024  # bytes of a start script
DELETE = "Microsoft.Compute/virtualMachines/delete"
GROUP = "Microsoft.Compute/virtualMachineScaleSets"


@pytest.fixture
def azure_rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[AzureRig]:
    yield from rigs.rig(monkeypatch)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "PAUSES", (0.01,))


def launch(rig: AzureRig, count: int = 1, program: Program = rigs.PROGRAM) -> tuple[Plan, str]:
    """Have some machines; name one."""
    plan = rig.launch(count, replace(rig.task(), program=program))
    return plan, rig.running(plan)[0]


def ended(rig: AzureRig, machine: str) -> bool:
    return rig.azure.fleet.lives[machine].ended


def replaced(rig: AzureRig, machine: str) -> bool:
    """Say if a machine is gone, and another one there."""
    alive = [name for name, life in rig.azure.fleet.lives.items() if not life.ended]
    return bool(ended(rig, machine) and alive)


def nothing_is_paid_for(rig: AzureRig) -> None:
    def left() -> list[str]:
        return [one for one in rig.azure.left() if not one.startswith("object")]

    until(lambda: not left(), "all to go", 10, 0.02)


# Objects


def test_objects_are_those_of_the_launcher(azure_rig: AzureRig) -> None:
    plan, name = launch(azure_rig)
    store = plan.bucket.store
    with azure_rig.machine(plan, name) as machine:
        ours = machine.objects
        assert ours.read("settings.json") == store.read("settings.json") == b"{}"
        assert ours.read("a") is None
        ours.write("a-1", b"one")
        ours.write("a-1", b"two")
        assert store.read("a-1") == b"two"
        assert ours.claim("odd & name+%", b"first")
        assert not ours.claim("odd & name+%", b"second")
        assert not store.claim("odd & name+%", b"third")
        assert ours.read("odd & name+%") == b"first"
        ours.write("empty", b"")
        assert ours.read("empty") == b""
        for key in ("folder/a", "folder/b", "folder/deep/c"):
            store.write(key, b"x")
        for prefix in ("", "a", "a-1", "e", "folder", "folder/", "folder/d", "none", "none/"):
            assert ours.keys(prefix) == store.keys(prefix), prefix
        ours.remove(["a-1", "none", "odd & name+%"])
        ours.remove(["a-1"])
        assert store.keys("a") == store.keys("odd") == []
        assert machine.leases.keys("") == [f"{plan.group.name}.json"]  # type: ignore[attr-defined]


def test_lists_that_come_in_pages(azure_rig: AzureRig) -> None:
    azure_rig.azure.blobs.page = 2
    plan, name = launch(azure_rig)
    keys = [f"log-000-{number:06}.txt" for number in range(5)]
    for key in keys:
        plan.bucket.store.write(key, b"x")
    plan.bucket.store.write("data/x", b"x")
    with azure_rig.machine(plan, name) as machine:
        assert machine.objects.keys("log-") == keys
        assert machine.objects.keys("") == ["data/x", *keys, "settings.json"]


def test_a_container_that_is_gone_holds_nothing(azure_rig: AzureRig) -> None:
    plan, name = launch(azure_rig)
    azure_rig.azure.blobs.clear()
    with azure_rig.machine(plan, name) as machine:
        assert machine.objects.read("a") is None
        assert machine.objects.keys("") == machine.objects.keys("a") == []
        machine.objects.remove(["a"])
        for put in (machine.objects.write, machine.objects.claim):
            with pytest.raises(RunnerError, match="ContainerNotFound"):
                put("a", b"")
        machine.dismiss()
    assert ended(azure_rig, name)


@pytest.mark.parametrize("status", [403, 500])
def test_what_an_error_of_blobs_says(azure_rig: AzureRig, status: int) -> None:
    plan, name = launch(azure_rig)
    text = "No.\nRequestId:1\nTime:2"
    azure_rig.azure.fail(f"{KIND}/read", "NotNow", text, times=9, status=status)
    with azure_rig.machine(plan, name) as machine:
        for ask in (lambda: machine.objects.read("a"), lambda: machine.objects.keys("")):
            with pytest.raises(RunnerError) as caught:
                ask()
            assert str(caught.value).endswith(f": {status} NotNow: No.")


def test_a_token_that_has_expired(azure_rig: AzureRig) -> None:
    plan, name = launch(azure_rig)
    with azure_rig.machine(plan, name) as machine:
        assert machine.objects.read("settings.json")
        azure_rig.azure.fail(f"{KIND}/read", "InvalidAuthenticationInfo", status=401)
        assert machine.objects.read("settings.json")
        azure_rig.azure.fail(f"{KIND}/read", "InvalidAuthenticationInfo", times=2, status=401)
        with pytest.raises(RunnerError, match="401 InvalidAuthenticationInfo"):
            machine.objects.read("settings.json")


# Whose machine it is


@pytest.mark.parametrize("told", ["all", "identifier", "tag"])
def test_a_machine_knows_its_scale_set(azure_rig: AzureRig, told: str) -> None:
    """By what Azure documents for machines in Flexible mode, or by what is just likely."""
    plan, name = launch(azure_rig)
    life = azure_rig.azure.fleet.lives[name]
    azure_rig.azure.fleet.named = told == "all"
    if told == "identifier":
        del life.tags[TAG]
    with azure_rig.machine(plan, name) as machine:
        machine.check()
        assert machine.name() == life.instance.unique
        if told == "tag":
            life.owner, owner = "", life.owner
            machine.check()
            life.owner = owner
        machine.replace()
    until(lambda: replaced(azure_rig, name), "another one", 10, 0.02)


def test_a_machine_ends_nothing_of_anothers(azure_rig: AzureRig) -> None:
    (plan, name), (other, _) = launch(azure_rig), launch(azure_rig)
    azure_rig.azure.fleet.lives[name].tags.clear()
    with azure_rig.on(name):
        machine = boot.machine(azure_rig.url(other))
        for verb in (machine.check, machine.replace, machine.dismiss, machine.finish):
            with pytest.raises(RunnerError) as caught:
                verb()
            told = str(caught.value)
            assert f"isn't one of {other.group.name}" in told  # type: ignore[attr-defined]
            assert f"vmScaleSetName: {plan.group.name}" in told  # type: ignore[attr-defined]
            assert f"tag {TAG}: none" in told
    assert len(azure_rig.cloud.tasks()) == 2
    assert not any(one.ended for one in azure_rig.azure.fleet.lives.values())


# Ends


def end(monkeypatch: pytest.MonkeyPatch, url: str, code: int = prepare.INTERRUPTED) -> None:
    """Do what init does after the supervisor's end."""
    monkeypatch.setenv("SERVICE_RESULT", "exit-code")
    monkeypatch.setenv("EXIT_STATUS", str(code))
    assert prepare.main(["end", url]) == 0


@pytest.mark.parametrize(
    ("code", "status"), [("TooManyRequests", 429), ("AuthorizationFailed", 403), ("Oops", 500)]
)
def test_the_end_goes_on_until_it_has_worked(
    azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch, code: str, status: int
) -> None:
    plan, name = launch(azure_rig)
    fault = azure_rig.azure.fail(DELETE, code, times=3, status=status)
    with azure_rig.on(name):
        end(monkeypatch, azure_rig.url(plan))
    assert fault.times == 0
    until(lambda: replaced(azure_rig, name), "another one", 10, 0.02)
    assert len(azure_rig.cloud.tasks()) == 1


def test_the_end_goes_on_when_nobody_answers(
    azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, name = launch(azure_rig)
    fault = azure_rig.azure.fail(DELETE, CUT, times=3)
    with azure_rig.on(name):
        end(monkeypatch, azure_rig.url(plan))
    assert fault.times == 0
    until(lambda: replaced(azure_rig, name), "another one", 10, 0.02)


@pytest.mark.parametrize("status", [0, 404, 410, 429, 500])
@pytest.mark.parametrize("path", ["/metadata", "/metadata/identity"])
def test_the_end_waits_for_the_metadata_service(
    azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch, path: str, status: int
) -> None:
    plan, name = launch(azure_rig)
    trouble = azure_rig.azure.trouble(path, status, math.inf)
    timer = threading.Timer(0.3, setattr, (trouble, "times", 0))
    timer.start()
    with azure_rig.on(name):
        end(monkeypatch, azure_rig.url(plan))
    timer.join()
    until(lambda: replaced(azure_rig, name), "another one", 10, 0.02)


def test_the_end_of_all(azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call fails some times, and in between; what is done is done again without harm."""
    plan, name = launch(azure_rig)
    plan.bucket.store.write("log-000-000000.txt", b"words")
    for action in (
        *(f"{KIND}/read", f"{KIND}/delete", f"{GROUP}/delete"),
        "Microsoft.Insights/autoscalesettings/delete",
    ):
        for code, status in (("TooManyRequests", 429), (CUT, 0), ("Oops", 503)):
            azure_rig.azure.fail(action, code, times=2, status=status)
    with azure_rig.machine(plan, name) as machine:
        for _ in range(2):
            wait.insist(machine.finish)
    assert [one.times for one in azure_rig.azure.app.faults] == [0] * 12
    until(lambda: azure_rig.azure.left() == [], "all to go", 10, 0.02)
    assert azure_rig.cloud.tasks() == []
    assert plan.bucket.store.keys("") == ["log-000-000000.txt"]


def test_who_may_not_use_the_bucket_ends_its_group_all_the_same(azure_rig: AzureRig) -> None:
    plan, name = launch(azure_rig)
    azure_rig.azure.fail(
        f"{KIND}/delete", "AuthorizationPermissionMismatch", times=math.inf, status=403
    )
    with azure_rig.machine(plan, name) as machine:
        machine.finish()
    nothing_is_paid_for(azure_rig)


# Rights that are new


def test_settings_are_read_once_the_rights_are_known_everywhere(azure_rig: AzureRig) -> None:
    plan, name = launch(azure_rig)
    azure_rig.azure.spread = math.inf
    looks = 0

    def sleep(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            azure_rig.azure.spread = 0

    with azure_rig.machine(plan, name) as machine:
        assert prepare.read_settings(machine.objects, sleep) == {}
        assert looks == 3
        azure_rig.azure.spread = math.inf
        with pytest.raises(RunnerError, match=r"403 AuthorizationPermissionMismatch: "):
            machine.objects.write("a", b"")


# Stage 0


def program() -> Program:
    """Make one that only says that it was started; how it is started is tested for all clouds."""
    wheel = made()
    digest = hashlib.sha256(wheel).hexdigest()
    return Program(wheel=wheel, sha256=digest, index="https://index.example/simple/")


def start(rig: AzureRig, machine: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run what a start script has for Python."""
    script = rig.azure.fleet.lives[machine].instance.user_data
    line, _, rest = script.partition("python3 -u - ")[2].partition(" <<'END'\n")
    text = rest.partition("\nEND\n")[0]
    for old, new in (
        ("/opt/cml-runner/programs", str(place)),
        ("[1, 2, 5] + 60 * [10]", "20 * [0.1]"),
        ("time.sleep(10)", "time.sleep(0.1)"),
    ):
        assert old in text
        text = text.replace(old, new)
    with rig.on(machine):
        return subprocess.run(
            [sys.executable, "-u", "-", *shlex.split(line)],
            input=text,
            cwd=place,  # not where our own program would be found
            env=dict(os.environ),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


def test_stage_0_waits_for_rights_and_services(azure_rig: AzureRig, tmp_path: Path) -> None:
    _, name = launch(azure_rig, program=program())
    azure = azure_rig.azure
    for status in (0, 404, 410, 429, 500):  # 404: the service is being updated
        azure.trouble("/metadata/identity", status)
    azure.fail(f"{KIND}/read", CUT)
    azure.fail(f"{KIND}/read", "ServerBusy", status=503)
    azure.spread, reads = math.inf, 0

    def watch(call: Call) -> None:
        nonlocal reads
        reads += call.action == f"{KIND}/read"
        if reads == 5:
            azure.spread = 0

    azure.app.watch = watch
    done = start(azure_rig, name, tmp_path)
    assert done.returncode == 0, done
    assert "the metadata service says HTTP Error 404" in done.stdout
    assert "HTTP Error 403" in done.stdout
    assert not ended(azure_rig, name)


def test_stage_0_ends_its_machine_then_its_group(azure_rig: AzureRig, tmp_path: Path) -> None:
    """However often Azure refuses that."""
    wanted = program()
    plan, name = launch(azure_rig, program=wanted)
    plan.bucket.programs.write(f"{wanted.sha256}.whl", b"another")  # type: ignore[attr-defined]
    for action in (DELETE, f"{GROUP}/delete", "Microsoft.Insights/autoscalesettings/delete"):
        azure_rig.azure.fail(action, "TooManyRequests", times=3, status=429)
    azure_rig.azure.trouble("/metadata/instance", times=3)
    done = start(azure_rig, name, tmp_path)
    assert done.returncode == 78, done
    until(lambda: replaced(azure_rig, name), "another one", 10, 0.02)
    (second,) = (key for key, one in azure_rig.azure.fleet.lives.items() if not one.ended)
    assert start(azure_rig, second, tmp_path).returncode == 78
    nothing_is_paid_for(azure_rig)
    assert [one.times for one in azure_rig.azure.app.faults] == [0, 0, 0]
    assert plan.bucket.store.log(0).count("its SHA-256 is another") == 2


def test_stage_0_may_not_say_why(azure_rig: AzureRig, tmp_path: Path) -> None:
    """Rights don't come by themselves: so this is the end of the whole task."""
    _, name = launch(azure_rig, program=program())
    denied = "AuthorizationPermissionMismatch"
    for verb in ("read", "write"):
        azure_rig.azure.fail(f"{KIND}/{verb}", denied, times=math.inf, status=403)
    done = start(azure_rig, name, tmp_path)
    assert done.returncode == 78, done
    nothing_is_paid_for(azure_rig)


def test_a_start_script_is_short() -> None:
    place = Place("0" * 36, "australiasoutheast")
    wanted = Task(
        id=Identifier.new("x" * 200),
        program=replace(rigs.PROGRAM, index="https://index.company.example/api/simple/"),
        count=50,
        expires=datetime.now(timezone.utc) + timedelta(hours=1),
    )
    assert len(str(wanted.id)) == 50
    script = virtual.script(place, wanted, place.identity)
    assert len(script.encode()) <= LONGEST
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


def test_where_services_are(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "az://cml-runner/tasks/x?account_name=cmlabc#azure/westus2/x"
    assert first_azure.account(url) == "https://cmlabc.blob.core.windows.net"
    assert first_azure.manager() == "https://management.azure.com"
    monkeypatch.setenv("AZURE_RESOURCE_MANAGER_ENDPOINT", "http://127.0.0.1:1/")
    assert first_azure.manager() == "http://127.0.0.1:1"
