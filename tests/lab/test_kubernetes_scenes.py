"""A runner's life in the pods of a cluster: the real control plane, real pods, our real program."""

from __future__ import annotations

import base64
import json
import shutil
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from cml_runner.wait import until
from tests.lab.github import WorkflowJob
from tests.lab.images import OWN_PATH
from tests.lab.prepare import ROOT
from tests.worlds import OnGitHub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.lab.town import Country, Town

pytestmark = pytest.mark.lab

PATIENCE = 90  # seconds; a cluster lets ten go by before it replaces a pod
COLLECTED = 180  # seconds: the garbage collector of a young cluster takes its time
LONG = "echo first half\nsleep 8\necho second half"
SIZE = ("--cloud-type", "0.5-500", "--cloud-image", "lab.example/system:1")


@pytest.fixture
def forge() -> str:
    return "github"


@pytest.fixture
def town(country: Country, tmp_path: Path, forge: str) -> Iterator[Town]:
    with country.town(tmp_path, forge) as found:
        yield found


def launch(town: Town, *more: str, image: str = "system", checkout: Path = ROOT) -> dict[str, Any]:
    where = ("--cloud", "kubernetes", "--cloud-type", "0.5-500")
    what = ("--cloud-image", f"lab.example/{image}:1", "--labels", "x")
    limit = ("--wait-timeout", "110s")
    done = town.cli("launch", *where, *what, *limit, *more, checkout=checkout)
    assert done.returncode == 0, done.stderr + logs(town)
    assert town.world.environment["REPO_TOKEN"] not in done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def logs(town: Town) -> str:
    return "\n".join(
        f"{name}:\n{town.log(name)[-3000:]}"
        for name in (one["metadata"]["name"] for one in town.ask("GET", "pods")["items"])
    )


def wait(town: Town, condition: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
    try:
        until(condition, what, timeout, 0.1)
    except Exception as error:
        msg = f"{error}\n{logs(town)}"
        raise AssertionError(msg) from error


def changed(directory: Path, module: str, old: str, new: str) -> Path:
    """Make a checkout in which a module says something else."""
    unwanted = shutil.ignore_patterns("__pycache__")
    package = shutil.copytree(ROOT / "cml_runner", directory / "cml_runner", ignore=unwanted)
    text = (package / module).read_text()
    assert old in text
    (package / module).write_text(text.replace(old, new))
    return directory


def over(town: Town) -> None:
    """Wait until no pod runs, and look whether anything is left that a finished Job doesn't own."""
    wait(town, lambda: not town.pods(), "the end of all pods")
    wait(town, lambda: not town.world.runners(), "the end of all registrations")
    for kind in ("secrets", "configmaps"):
        for one in town.ask("GET", kind)["items"]:
            if one["metadata"]["name"].startswith("cml-"):
                assert one["metadata"]["ownerReferences"][0]["kind"] == "Job"


@pytest.mark.parametrize("forge", ["github", "gitlab"])
def test_evicted_in_the_middle_of_a_job(town: Town) -> None:
    world = town.world
    world.submit("train", LONG, "x")
    found = launch(town, "--cloud-spot", "--cloud-spot-fallback", "--idle-timeout", "5s")
    wait(town, lambda: "first half" in world.job("train").log, "the middle of the job")
    (first,) = town.pods()
    assert first["spec"]["automountServiceAccountToken"] is False
    assert town.traces(town.world.environment["REPO_TOKEN"]) == []
    done = town.cli("interrupt", found["id"], "--cloud", "kubernetes", "--after", "30s")
    assert done.returncode == 0, done.stderr
    wait(town, lambda: world.job("train").state == "succeeded", "its good end")
    assert world.job("train").attempt == 2
    assert [one["metadata"]["name"] for one in town.pods()] != [first["metadata"]["name"]]
    over(town)
    done = town.cli("logs", found["id"], "--cloud", "kubernetes")
    assert "idle for 5 s" in done.stdout, done.stderr
    done = town.cli("destroy", found["id"], "--cloud", "kubernetes")
    assert done.returncode == 0, done.stderr
    wait(town, lambda: not town.left(), "the end of all", COLLECTED)


def test_a_pod_that_is_killed_is_replaced_and_its_job_run_again(town: Town) -> None:
    world = town.world
    world.submit("train", LONG, "x")
    launch(town, "--cloud-spot", "--cloud-spot-fallback", "--idle-timeout", "5s")
    wait(town, lambda: "first half" in world.job("train").log, "the middle of the job")
    (first,) = town.pods()
    for process in town.country.cluster.processes(first["metadata"]["name"]):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    wait(town, lambda: world.job("train").state == "succeeded", "its good end", 120)
    assert world.job("train").attempt == 2
    over(town)


def test_evicted_while_other_jobs_of_the_run_go_on(town: Town) -> None:
    """GitHub takes no re-run before they are over, and the pod can't wait for that."""
    assert isinstance(town.world, OnGitHub)
    world, github = town.world, town.world.github
    mine = WorkflowJob("train", ("self-hosted", "x"), LONG)
    other = WorkflowJob("other", ("self-hosted", "elsewhere"), "true")
    github.add_run("acme/model", [mine, other])
    found = launch(town, "--cloud-spot", "--cloud-spot-fallback", "--idle-timeout", "5s")
    wait(town, lambda: "first half" in world.job("train").log, "the middle of the job")
    done = town.cli("interrupt", found["id"], "--cloud", "kubernetes", "--after", "10s")
    assert done.returncode == 0, done.stderr
    wait(town, lambda: world.job("train").state == "failed", "GitHub to find it lost")
    assert world.job("train").attempt == 1
    name = town.pods()[0]["metadata"]["name"]  # it is idle, and waits
    wait(town, lambda: "was interrupted: waiting" in town.log(name), "another pod")
    elsewhere = github.register(github.places["repos/acme/model"], "elsewhere", ["elsewhere"])
    elsewhere.job, elsewhere.seen = github.job("other"), time.monotonic()
    github.start(elsewhere.job)
    github.finish(elsewhere, "Succeeded")
    wait(town, lambda: world.job("train").state == "succeeded", "its good end")
    assert world.job("train").attempt == 2
    github.remove(elsewhere)
    over(town)


def test_one_job_in_an_image_that_brings_the_agent(town: Town) -> None:
    world = town.world
    found = launch(town, "--single", "--idle-timeout", "never", image="agent")
    world.submit("train", "id -u; env; sleep 1; ps -eo args; ls -R /run/cml-runner", "x")
    secret = world.environment["REPO_TOKEN"]
    assert secret not in json.dumps(town.ask("GET", "secrets"))
    wait(town, lambda: world.job("train").state == "succeeded", "the job")
    log = world.job("train").log
    assert {"1001", OWN_PATH} <= set(log.splitlines())
    assert secret not in log
    over(town)
    assert "actions-runner" not in town.cli("logs", found["id"], "--cloud", "kubernetes").stdout


def test_an_image_without_python(town: Town) -> None:
    world = town.world
    world.submit("train", "id -un", "x")
    launch(town, "--single", "--no-sudo", image="bare")
    wait(town, lambda: world.job("train").state == "succeeded", "the job")
    assert "runner" in world.job("train").log.splitlines()
    over(town)


def test_the_pod_runs_what_launched_it(town: Town, tmp_path: Path) -> None:
    """It was never released, and a package of our name on the index changes nothing."""
    asked = town.country.index.asked
    before, old, new = len(asked), "is ready for jobs", "is eager to have jobs"
    checkout = changed(tmp_path / "checkout", "supervise/__init__.py", old, new)
    found = launch(town, "--single", checkout=checkout)
    said = town.cli("logs", found["id"], "--cloud", "kubernetes").stdout
    assert new in said
    assert old not in said
    assert "/simple/uv/" in asked[before:]
    assert not [path for path in asked[before:] if "cml" in path]
    version = town.cli("--version", checkout=checkout).stdout
    shown = town.cli("show", found["id"], "--cloud", "kubernetes", "--output", "json").stdout
    assert f"({json.loads(shown)['machines'][0]['program']})" in version
    assert town.cli("--version").stdout != version


def test_an_image_that_brings_all_that_we_depend_on(town: Town) -> None:
    asked = town.country.index.asked
    before = len(asked)
    launch(town, "--idle-timeout", "2s", image="ready")
    assert asked[before:] == [], "is the lab prepared for another lock?"
    over(town)


@pytest.mark.parametrize("image", ["plain", "plain-agent"])
def test_whom_the_launcher_trusts_the_pod_trusts(town: Town, image: str) -> None:
    """Index and forge have certificates of a private authority; jobs trust it as well."""
    world = town.world
    launch(town, "--idle-timeout", "4s", image=image)
    world.submit("train", f"curl -sS {town.country.index.url}uv/", "x")
    wait(town, lambda: world.job("train").state == "succeeded", "the job")
    assert "href" in world.job("train").log
    over(town)


def test_an_index_that_is_away_for_a_moment(town: Town) -> None:
    index = town.country.index
    index.faults = 4
    launch(town, "--idle-timeout", "2s")
    assert not index.faults
    over(town)


@pytest.mark.parametrize("waits", [True, False])
def test_an_index_that_is_gone(town: Town, waits: bool) -> None:
    """The first pod is the last one, and tells why."""
    index = town.country.index
    index.away = True
    try:
        size = ("--cloud-type", "0.5-500", "--cloud-image", "lab.example/impatient:1")
        more = () if waits else ("--no-wait",)
        done = town.cli("launch", "--cloud", "kubernetes", *size, "--labels", "x", *more)
        if waits:
            assert done.returncode == 11, done.stderr + logs(town)
            assert "503" in done.stderr
            wait(town, lambda: not town.left(), "the end of all", COLLECTED)
            return
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        wait(town, lambda: town.ask("GET", "pods")["items"] and not town.pods(), "its end")
    finally:
        index.away = False
    said = town.cli("logs", found["id"], "--cloud", "kubernetes").stdout
    assert f"{index.url}uv/: 503" in said.splitlines()[-1]
    shown = town.cli("show", found["id"], "--cloud", "kubernetes", "--output", "json").stdout
    (machine,) = json.loads(shown)["machines"]
    assert machine["state"] == "failed"
    assert "503" in machine["reason"]
    assert len(town.ask("GET", "pods")["items"]) == 1


def test_several_runners_are_one_job(town: Town) -> None:
    found = launch(town, "--count", "3", "--idle-timeout", "4s", image="system")
    assert len(town.ask("GET", "jobs")["items"]) == 1
    assert len(found["names"]) == 3
    over(town)


def test_the_deadline_ends_it(town: Town) -> None:
    launch(town, "--idle-timeout", "never", "--max-lifetime", "25s")
    wait(town, lambda: not town.pods(), "the deadline", 60)


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--cloud-image", "images.lab.example/nothing:1"), 11, "nothing:1"),
        (("--cloud-type", "900-500", "--wait-timeout", "6s"), 11, "Insufficient cpu"),
        (("--cloud-permission-set", "nobody"), 3, 'serviceaccount "nobody" not found'),
    ],
)
def test_a_launch_that_fails_says_why_and_leaves_nothing(
    town: Town, more: tuple[str, ...], code: int, said: str
) -> None:
    start = time.monotonic()
    usual = () if "--cloud-image" in more else ("--cloud-image", "lab.example/system:1")
    size = () if "--cloud-type" in more else ("--cloud-type", "0.5-500")
    done = town.cli("launch", "--cloud", "kubernetes", "--labels", "x", *usual, *size, *more)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert time.monotonic() - start < 30
    wait(town, lambda: not town.left(), "the end of all", COLLECTED)


def test_a_quota_is_the_reason(town: Town) -> None:
    hard = {"requests.cpu": "2"}
    town.ask("POST", "resourcequotas", {"metadata": {"name": "q"}, "spec": {"hard": hard}})
    where = ("--cloud", "kubernetes", "--cloud-type", "4-500", "--cloud-image", "lab.example/x:1")
    done = town.cli("launch", *where)
    assert done.returncode == 6, done.stderr
    assert "exceeded quota" in done.stderr
    wait(town, lambda: not town.left(), "the end of all", COLLECTED)


@pytest.mark.parametrize(
    "verb", ["create jobs", "create secrets", "create configmaps", "patch jobs", "list pods"]
)
def test_whoever_may_not_do_something_hears_what(town: Town, verb: str) -> None:
    town.forbid(*verb.split())
    done = town.cli("launch", "--cloud", "kubernetes", *SIZE, "--labels", "x")
    assert done.returncode == 3, done.stderr
    assert verb.split()[1] in done.stderr
    assert "cml-runner permissions kubernetes" in done.stderr
    wait(town, lambda: not town.left(), "the end of all", COLLECTED)
    done = town.cli("setup", "kubernetes")
    assert done.returncode == 3
    assert verb in done.stderr


def test_the_namespace_is_deleted_under_us(town: Town) -> None:
    slow = ("--cloud-startup-script", base64.b64encode(b"sleep 600").decode())
    process = town.start("launch", "--cloud", "kubernetes", *SIZE, *slow)
    wait(town, lambda: town.ask("GET", "pods")["items"], "a pod", 30)
    town.country.cluster.kubectl("DELETE", f"/api/v1/namespaces/{town.name}")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4, err
    assert "gone" in err or "is being deleted" in err
    wait(town, lambda: not town.left(), "the end of all", COLLECTED)


def test_the_server_is_gone_for_a_while(town: Town) -> None:
    world, cluster = town.world, town.country.cluster
    world.submit("train", "sleep 12; echo done", "x")
    where = ("launch", "--cloud", "kubernetes", *SIZE, "--labels", "x", "--idle-timeout", "4s")
    process = town.start(*where)
    wait(town, town.pods, "a pod", 30)
    cluster.stop_server()
    time.sleep(20)
    cluster.start_server()
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    cluster.stop_server()
    time.sleep(20)
    cluster.start_server()
    wait(town, lambda: world.job("train").state == "succeeded", "the job")
    assert world.job("train").attempt == 1
    assert json.loads(out)["name"]
    over(town)
