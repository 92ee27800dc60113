"""What only the embedded cloud does, and the accidents that can happen to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import msgspec
import psutil
import pytest

from cml_runner import store
from cml_runner.clouds import local
from cml_runner.clouds.local import files, records
from cml_runner.clouds.local.processes import VARIABLE
from cml_runner.errors import (
    ConfigurationError,
    CredentialsError,
    NoCapacity,
    NotFound,
    RunnerError,
)
from cml_runner.model import Identifier, Machine, Task
from tests.clouds.conftest import directory, messages, until

if TYPE_CHECKING:
    from pathlib import Path

    from cml_runner.clouds import Plan
    from tests.clouds.conftest import LocalRig

SECRET = "ghp_" + "s3cr3t"
DEAF = 'trap "" TERM INT HUP; touch "$LOCAL_CLOUD_MACHINE/up"; while :; do sleep 600; done'


def now() -> datetime:
    return datetime.now(timezone.utc)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def kill_keeper(rig: LocalRig, plan: Plan) -> None:
    keeper = rig.keeper(plan)
    assert keeper
    keeper.kill()
    until(lambda: gone(keeper))


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )


# The keeper


def test_a_killed_keeper_comes_back_and_adopts_its_machines(local_rig: LocalRig) -> None:
    plan = local_rig.launch(2)
    leaders = {name: local_rig.leader(plan, name) for name in local_rig.running(plan)}
    kill_keeper(local_rig, plan)
    assert [lease.id.name for lease in local_rig.cloud.tasks()] == ["some-task"]
    keeper = local_rig.keeper(plan)
    assert keeper
    assert all(leader.is_running() for leader in leaders.values())
    assert set(local_rig.running(plan)) == set(leaders)
    until(lambda: keeper.status() == psutil.STATUS_SLEEPING)
    leaders["0.1"].kill()
    local_rig.up(plan, "0.2")  # though nobody asked
    assert local_rig.running(plan) == ["0.2", "1.1"]
    assert local_rig.leader(plan, "1.1") == leaders["1.1"]


def test_a_machine_that_died_while_there_was_no_keeper_is_created_again(
    local_rig: LocalRig,
) -> None:
    plan = local_rig.launch(1)
    kill_keeper(local_rig, plan)
    leader = local_rig.leader(plan, "0.1")
    leader.kill()
    until(lambda: gone(leader))
    until(lambda: local_rig.running(plan) == ["0.2"])


def test_notices_hold_for_adopted_machines(local_rig: LocalRig) -> None:
    local_rig.runs(DEAF)
    plan = local_rig.launch(1)
    local_rig.up(plan, "0.1")
    kill_keeper(local_rig, plan)
    plan.group.interrupt("", 1)
    local_rig.up(plan, "0.2")


def test_a_task_that_was_without_keeper_at_its_deadline_ends_when_somebody_looks(
    local_rig: LocalRig,
) -> None:
    plan = local_rig.launch(1)
    plan.group.expire(now() + timedelta(seconds=0.3))
    kill_keeper(local_rig, plan)
    until(lambda: not local_rig.cloud.tasks())
    until(lambda: not local_rig.processes())


def test_a_machine_which_leaves_wakes_a_killed_keeper(local_rig: LocalRig) -> None:
    plan = local_rig.launch(1)
    kill_keeper(local_rig, plan)
    local_rig.leave(plan, "0.1")
    until(lambda: not (directory(plan) / "lease.json").exists())
    until(lambda: not local_rig.processes())


def test_there_is_one_keeper_only(local_rig: LocalRig) -> None:
    plan = local_rig.launch(1)
    keeper = local_rig.keeper(plan)
    subprocess.run(
        [sys.executable, "-m", "cml_runner.clouds.local", str(directory(plan))],
        stderr=subprocess.PIPE,  # closed by the second one's end
        check=True,
    )
    assert local_rig.keeper(plan) == keeper
    assert keepers(local_rig) == [keeper]


def keepers(rig: LocalRig) -> list[psutil.Process]:
    found = []
    for one in rig.processes():
        with suppress(psutil.NoSuchProcess):  # who came second goes at once
            found += [one] if "cml_runner.clouds.local" in one.cmdline() else []
    return found


def test_many_who_find_no_keeper_start_one(local_rig: LocalRig) -> None:
    plan = local_rig.launch(1)
    kill_keeper(local_rig, plan)
    code = "import sys; from cml_runner.clouds.local import Cloud; Cloud(sys.argv[1]).tasks()"
    command = [sys.executable, "-c", code, str(directory(plan).parent)]
    callers = [subprocess.Popen(command) for _ in range(4)]
    assert [caller.wait(30) for caller in callers] == [0] * 4
    until(lambda: keepers(local_rig) == [local_rig.keeper(plan)])
    assert local_rig.running(plan) == ["0.1"]


def test_ending_the_keeper_ends_the_task(local_rig: LocalRig) -> None:
    plan = local_rig.launch(1)
    machine = local_rig.up(plan, "0.1")
    keeper = local_rig.keeper(plan)
    assert keeper
    keeper.terminate()
    until(lambda: not local_rig.processes())
    assert local_rig.cloud.tasks() == []
    assert not machine.exists()
    assert "the keeper was told to end" in messages(plan, "info")


def test_the_keeper_survives_its_own_errors(local_rig: LocalRig) -> None:
    plan = local_rig.launch(0)
    machines = directory(plan) / "machines"
    machines.write_text("in the way")
    plan.group.resize(1)
    until(lambda: messages(plan, "error"))
    assert "can't be started" in messages(plan, "error")[0]
    keeper = local_rig.keeper(plan)
    machines.unlink()
    until(lambda: local_rig.running(plan))
    assert local_rig.keeper(plan) == keeper


def test_a_keeper_whose_directory_is_gone_ends_its_machines(local_rig: LocalRig) -> None:
    plan = local_rig.launch(1)
    keeper = local_rig.keeper(plan)
    assert keeper
    local_rig.up(plan, "0.1")
    directory(plan).rename(local_rig.home / "elsewhere")
    keeper.send_signal(1)
    until(lambda: not local_rig.processes())


def test_deletion_works_without_the_keeper(local_rig: LocalRig) -> None:
    local_rig.cloud.grace = 0.2
    local_rig.runs(DEAF)
    plan = local_rig.launch(2)
    kill_keeper(local_rig, plan)
    plan.group.delete()
    assert local_rig.processes() == []
    assert not (directory(plan) / "machines").exists()


def test_deletion_works_when_the_keeper_does_not_obey(local_rig: LocalRig) -> None:
    local_rig.cloud.grace = 0.2
    plan = local_rig.launch(2)
    keeper = local_rig.keeper(plan)
    assert keeper
    keeper.suspend()
    plan.group.delete()
    assert gone(keeper)
    assert local_rig.processes() == []


def test_a_keeper_that_can_not_be_started_leaves_no_group(
    local_rig: LocalRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = local_rig.cloud.plan(local_rig.task())
    plan.bucket.create()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunnerError, match="keeper"):
        plan.group.create()
    assert not (directory(plan) / "group.json").exists()


def test_a_group_needs_a_bucket(local_rig: LocalRig) -> None:
    plan = local_rig.cloud.plan(local_rig.task())
    with pytest.raises(NotFound):
        plan.group.create()
    with pytest.raises(NotFound):
        plan.group.resize(1)
    with pytest.raises(NotFound):
        plan.group.expire(None)


# Machines


def test_what_ignores_signals_dies_at_the_deadline(local_rig: LocalRig) -> None:
    local_rig.cloud.grace = 0.5
    local_rig.runs(DEAF)
    plan = local_rig.launch(2)
    for name in ("0.1", "1.1"):
        local_rig.up(plan, name)
    plan.group.expire(now() + timedelta(seconds=0.5))
    until(lambda: not local_rig.processes())
    assert local_rig.cloud.tasks() == []
    assert "the deadline has come" in messages(plan, "info")


def test_machines_are_asked_before_they_are_ended(local_rig: LocalRig) -> None:
    plan = local_rig.launch(2)
    first, second = (local_rig.up(plan, name) for name in ("0.1", "1.1"))
    plan.group.resize(1)
    until((second / "ended").exists)
    assert (second / "asked").exists()
    assert not (first / "asked").exists()
    assert local_rig.running(plan) == ["0.1"]
    assert "machine 1.1 was ended" in messages(plan, "info")


@pytest.mark.parametrize("wrapper", ["setsid", "env -i setsid", "nohup"])
def test_daemons_die_with_their_machine(local_rig: LocalRig, wrapper: str) -> None:
    daemon = f"{wrapper} /bin/sh -c 'trap \"\" TERM HUP; while :; do sleep 600; done' & echo $!"
    local_rig.runs(f'({daemon}) > "$LOCAL_CLOUD_MACHINE/daemon" 2> /dev/null\n{DEAF}')
    if "-i" in wrapper:  # without a mark, only its parent tells whose it is
        local_rig.runs(f'{daemon} > "$LOCAL_CLOUD_MACHINE/daemon" 2> /dev/null\n{DEAF}')
    plan = local_rig.launch(1)
    text = until((local_rig.up(plan, "0.1") / "daemon").read_text)
    daemons = [psutil.Process(int(text))]
    daemons += daemons[0].children()
    plan.group.interrupt("0.1", 0)
    until(lambda: all(map(gone, daemons)))
    until(lambda: local_rig.running(plan) == ["0.2"])


def test_what_a_dead_machine_leaves_running_dies_too(local_rig: LocalRig) -> None:
    program = 'setsid sleep 600 & echo $! > "$LOCAL_CLOUD_MACHINE/daemon"; sleep 600'
    local_rig.runs(program)
    plan = local_rig.launch(1)
    path = directory(plan) / "machines" / "0.1" / "daemon"
    until(lambda: path.exists() and path.read_text())
    daemon = psutil.Process(int(path.read_text()))
    local_rig.die(plan, "0.1")
    until(lambda: gone(daemon))


def test_a_machine_that_leaves_and_stays_is_ended(local_rig: LocalRig) -> None:
    local_rig.cloud.grace = 0.2
    local_rig.runs(DEAF)
    plan = local_rig.launch(1)
    with local_rig.monkeypatch.context() as patch:
        patch.setenv(VARIABLE, str(local_rig.up(plan, "0.1")))
        local_rig.cloud.leave(Identifier.parse(directory(plan).name), "", last=True)
    until(lambda: not local_rig.processes())
    assert "machine 0.1 has left" in messages(plan, "info")


def test_only_a_machine_of_the_task_can_leave_it(local_rig: LocalRig) -> None:
    plan, other = local_rig.launch(1), Identifier.new("other")
    local_rig.cloud.leave(Identifier.parse(directory(plan).name), "", last=True)
    with local_rig.monkeypatch.context() as patch:
        patch.setenv(VARIABLE, str(local_rig.up(plan, "0.1")))
        local_rig.cloud.leave(other, "", last=True)
    assert not list(directory(plan).rglob("left"))


def test_machines_that_die_at_once_come_back_more_and_more_slowly(local_rig: LocalRig) -> None:
    local_rig.runs('echo starting; echo "no such thing" >&2; exit 3')
    plan = local_rig.cloud.plan(local_rig.task())
    for resource in plan.resources:
        resource.create()
    plan.group.resize(1)
    until(lambda: len(messages(plan, "error")) >= 3)
    expected = "machine 0.1 ended with exit code 3: starting: no such thing"
    assert messages(plan, "error")[0] == expected
    births = [event.at for event in plan.group.events() if event.message.endswith("started")]
    assert births[1] - births[0] > timedelta(seconds=0.9)
    assert births[2] - births[1] > timedelta(seconds=1.9)


def test_an_interrupted_machine_keeps_its_rank_and_says_so(local_rig: LocalRig) -> None:
    plan = local_rig.launch(2)
    plan.group.interrupt("1.1", 0)
    until(lambda: local_rig.running(plan) == ["0.1", "1.2"])
    assert messages(plan, "interruption") == ["machine 1.1 was taken away"]
    assert messages(plan, "error") == []
    local_rig.monkeypatch.setenv(VARIABLE, str(local_rig.up(plan, "1.2")))
    assert local.Cloud.rank() == 1


def test_elsewhere_there_is_neither_rank_nor_notice() -> None:
    assert local.Cloud.rank() == 0
    assert local.Cloud.notice() is None


def test_a_machine_without_metadata_can_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "machines" / "3.1"))
    with pytest.raises(FileNotFoundError):
        local.Cloud.notice()


def test_fifty_machines(local_rig: LocalRig) -> None:
    local_rig.runs("exec sleep 600")
    before = time.monotonic()
    plan = local_rig.launch(50)
    assert len(set(local_rig.running(plan))) == 50
    assert time.monotonic() - before < 20
    plan.group.delete()
    assert local_rig.processes() == []


# The claim


def test_of_many_claims_one_wins(local_rig: LocalRig) -> None:
    names = [str(Identifier.new("wanted")) for _ in range(20)]
    start = local_rig.home / "start"
    start.parent.mkdir(exist_ok=True)
    code = """
import os, sys, time
from cml_runner.clouds.local import Cloud
from cml_runner.model import Identifier, Task
start, *names = sys.argv[1:]
print("ready", flush=True)
while not os.path.exists(start):
    time.sleep(0.001)
for name in names:
    task = Task(id=Identifier.parse(name), settings=str(os.getpid()))
    print(name, Cloud("us-west").plan(task).bucket.create())
print("done", flush=True)
sys.stdin.read()
"""
    claimants = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(start), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    try:
        for one in claimants:
            assert one.stdout
            assert one.stdout.readline() == "ready\n"
        start.touch()
        # All live until the last one is done: the claim of a launcher that died may be taken.
        outputs = ["".join(iter(one.stdout.readline, "done\n")) for one in claimants if one.stdout]
    finally:
        for one in claimants:
            one.kill()
            one.communicate()
    for name in names:
        winners = [
            one.pid
            for one, output in zip(claimants, outputs, strict=True)
            if f"{name} True" in output
        ]
        settings = local_rig.cloud.region / name / "bucket" / "settings.json"
        assert [str(pid) for pid in winners] == [settings.read_text()]


def test_a_launch_that_died_halfway_has_expired(local_rig: LocalRig) -> None:
    code = """
import sys
from contextlib import suppress
from cml_runner.clouds.local import Cloud
from cml_runner.model import Identifier, Task
assert Cloud("us-west").plan(Task(id=Identifier.new("half"), settings="secret")).bucket.create()
(lease,) = Cloud("us-west").tasks()
print((lease.expires - lease.created).total_seconds())
"""
    assert float(python(code).stdout) == 3600
    (lease,) = local_rig.cloud.tasks()
    assert lease.expires == lease.created
    plan = local_rig.cloud.plan(Task(id=lease.id, settings="mine", tags={"a": "b"}))
    assert plan.bucket.create()  # in its place
    assert not plan.bucket.create()
    (lease,) = local_rig.cloud.tasks()
    assert lease.expires == lease.created + timedelta(hours=1)
    assert lease.tags == {"a": "b"}
    assert plan.bucket.store.read(store.SETTINGS) == b"mine"


def test_a_task_which_was_launched_needs_its_launcher_no_more(local_rig: LocalRig) -> None:
    at = now() + timedelta(days=5)
    code = f"""
from datetime import datetime
from cml_runner.clouds.local import Cloud
from cml_runner.model import Identifier, Task
cloud = Cloud("us-west")
cloud.command, cloud.grace = ("/bin/sleep",), 1
plan = cloud.plan(Task(id=Identifier.new("whole")))
for resource in plan.resources:
    resource.create()
plan.group.expire(datetime.fromisoformat("{at.isoformat()}"))
"""
    python(code)
    assert [lease.expires for lease in local_rig.cloud.tasks()] == [at]


def test_a_damaged_lease_is_listed_as_expired(local_rig: LocalRig) -> None:
    plan = local_rig.cloud.plan(local_rig.task())
    plan.bucket.create()
    (directory(plan) / "lease.json").write_bytes(b"")
    (lease,) = local_rig.cloud.tasks()
    assert lease.expires == lease.created


def test_a_damaged_group_ends(local_rig: LocalRig) -> None:
    plan = local_rig.launch(1)
    (directory(plan) / "group.json").write_bytes(b"{")
    until(lambda: not plan.group.instances() and not local_rig.processes())


# What stays


def finish(rig: LocalRig) -> Plan:
    plan = rig.launch(1)
    for name in ("log-000-000000.txt", "status-000.json", "interrupted-0.json"):
        plan.bucket.store.write(name, b"{}")
    rig.leave(plan, "0.1")
    until(lambda: not rig.processes())
    return plan


def test_a_finished_task_leaves_its_record(local_rig: LocalRig) -> None:
    place = directory(plan := finish(local_rig))
    left = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert left == {"bucket/log-000-000000.txt", "bucket/status-000.json", "bucket/events.jsonl"}
    assert messages(plan, "info") == ["machine 0.1 started", "machine 0.1 has left"]


def test_a_new_task_replaces_the_record(local_rig: LocalRig) -> None:
    old = finish(local_rig)
    new = local_rig.cloud.plan(Task(id=Identifier.parse(directory(old).name)))
    assert new.bucket.create()
    assert new.bucket.store.keys("") == [store.SETTINGS]
    assert new.group.events() == []


def test_a_record_can_be_deleted(local_rig: LocalRig) -> None:
    plan = finish(local_rig)
    plan.bucket.delete()
    assert not directory(plan).exists()


def test_old_records_are_pruned(local_rig: LocalRig) -> None:
    old, recent = directory(finish(local_rig)), directory(finish(local_rig))
    stranger = old.parent / "a-b-c"
    stranger.mkdir()
    for path in (old, stranger):
        week = time.time() - 7.1 * 24 * 3600
        os.utime(path, (week, week))
    local_rig.cloud.plan(local_rig.task()).bucket.create()
    assert not old.exists()
    assert recent.exists()
    assert stranger.exists()


def test_deletion_copes_with_write_protection(local_rig: LocalRig) -> None:
    plan = local_rig.launch(1)
    machine = local_rig.up(plan, "0.1")
    (machine / "cache" / "inner").mkdir(parents=True)
    (machine / "cache" / "inner" / "file").touch()
    (machine / "outside").symlink_to(local_rig.home.parent)
    mode = local_rig.home.parent.stat().st_mode
    for path in (machine / "cache" / "inner", machine / "cache"):
        path.chmod(0o500)
    plan.bucket.delete()
    assert not directory(plan).exists()
    assert local_rig.home.parent.stat().st_mode == mode


# Secrets


def test_machines_get_a_clean_environment(local_rig: LocalRig) -> None:
    local_rig.monkeypatch.setenv("REPO_TOKEN", SECRET)
    local_rig.monkeypatch.setenv("LC_TIME", "C")
    local_rig.monkeypatch.setenv("HTTPS_PROXY", "proxy:3128")
    local_rig.runs('env > "$LOCAL_CLOUD_MACHINE/env"; touch "$LOCAL_CLOUD_MACHINE/up"; sleep 600')
    plan = local_rig.launch(1)
    machine = local_rig.up(plan, "0.1")
    seen = dict(line.split("=", 1) for line in (machine / "env").read_text().splitlines())
    assert seen["LOCAL_CLOUD_MACHINE"] == str(machine)
    assert (seen["LC_TIME"], seen["HTTPS_PROXY"]) == ("C", "proxy:3128")
    assert seen["CML_RUNNER_HOME"] == str(local_rig.home)
    assert local_rig.traces(SECRET) == []


def test_nobody_else_may_look(local_rig: LocalRig) -> None:
    before = os.umask(0)
    try:
        plan = local_rig.launch(1, local_rig.task(settings=SECRET))
        local_rig.up(plan, "0.1")
    finally:
        os.umask(before)
    place = directory(plan)
    assert (place / "bucket" / "settings.json").stat().st_mode & 0o777 == 0o600
    closed = [local_rig.home, local_rig.home / "local", place.parent, place]
    closed += [place / "bucket", place / "machines", place / "machines" / "0.1"]
    assert {path.stat().st_mode & 0o777 for path in closed} == {0o700}


def test_the_settings_have_the_name_that_the_machine_looks_for() -> None:
    assert records.SETTINGS == store.SETTINGS


# Regions, descriptions and errors


def test_a_region_may_be_a_directory(local_rig: LocalRig, tmp_path: Path) -> None:
    region = tmp_path / "my cloud"
    cloud = local.Cloud(str(region))
    plan = cloud.plan(local_rig.task(settings=SECRET))
    assert plan.bucket.create()
    assert directory(plan).parent == region
    assert plan.bucket.store.read(store.SETTINGS) == SECRET.encode()
    assert len(cloud.tasks()) == 1
    assert local_rig.cloud.tasks() == []


def test_an_unknown_region_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(ConfigurationError, match=r"mars.*us-east.*eu-west.*absolute path"):
        local.Cloud("mars")


def test_all_mistakes_are_told_at_once(local_rig: LocalRig) -> None:
    machine = Machine(
        types=("m", "t2.micro", "s", "n1"),
        gpu="v100",
        image="windows",
        permissions="arn",
        ssh_key=SECRET,
        options={"aws-subnet": "x"},
    )
    with pytest.raises(ConfigurationError) as caught:
        local_rig.cloud.plan(Task(id=Identifier.new(), machine=machine))
    expected = ("t2.micro", "n1", "gpu v100", "image windows", "permission", "ssh", "aws-subnet")
    assert len(caught.value.mistakes) == len(expected)
    for mistake, word in zip(caught.value.mistakes, expected, strict=True):
        assert word in mistake
    assert SECRET not in str(caught.value)


def test_what_makes_sense_is_taken(local_rig: LocalRig) -> None:
    machine = Machine(types=("xl", "s"), gpu="nogpu", image="ubuntu", spot=True, disk=9)
    plan = local_rig.cloud.plan(Task(id=Identifier.new(), machine=machine))
    assert plan.arch in ("x64", "arm64")


@pytest.mark.parametrize(("machine", "arch"), [("x86_64", "x64"), ("aarch64", "arm64")])
def test_the_architecture_is_ours(
    local_rig: LocalRig, monkeypatch: pytest.MonkeyPatch, machine: str, arch: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert local_rig.cloud.plan(local_rig.task()).arch == arch


def test_a_region_that_can_not_be_made_is_an_error_for_people(
    local_rig: LocalRig, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    bucket = local.Cloud(str(tmp_path / "file" / "region")).plan(local_rig.task()).bucket
    with pytest.raises(RunnerError, match="file"):
        bucket.create()


@pytest.mark.parametrize(
    ("error", "kind"),
    [(28, NoCapacity), (11, NoCapacity), (13, CredentialsError), (5, RunnerError)],
)
def test_what_the_system_refuses_is_translated(error: int, kind: type[RunnerError]) -> None:
    with pytest.raises(RunnerError, match="/x/y") as caught, files.translated():
        raise OSError(error, os.strerror(error), "/x/y")
    assert type(caught.value) is kind


def test_events_that_are_being_written_are_not_read(local_rig: LocalRig) -> None:
    plan = local_rig.launch(1)
    path = directory(plan) / "bucket" / "events.jsonl"
    path.write_bytes(path.read_bytes() + b'{"at": "20')
    assert messages(plan, "info") == ["machine 0.1 started"]
    assert msgspec.json.decode(path.read_bytes().splitlines()[0])["kind"] == "info"
