"""What is special about Kubernetes, as far as no cluster is needed to see it."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner import program
from cml_runner.boot import failing, prepare
from cml_runner.clouds.kubernetes import Cloud, job, machine, pod, secret, words
from cml_runner.clouds.kubernetes.session import Session
from cml_runner.errors import ConfigurationError
from cml_runner.model import Identifier, Machine, Program, Status, Task

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NOW = datetime(2026, 11, 25, tzinfo=timezone.utc)
SECRET = "not-a-real-t0ken"
PROGRAM = Program(
    wheel=b"wheel",
    sha256=hashlib.sha256(b"wheel").hexdigest(),
    index="https://index.example/simple/",
)


def task(count: int = 1, permissions: str = "", **machine: Any) -> Task:
    wanted = Machine(**{"types": ("2-4000",), "permissions": permissions, **machine})
    return Task(
        id=Identifier.fixed("some task"),
        settings=SECRET,
        machine=wanted,
        program=PROGRAM,
        count=count,
        tags={"owner": "we"},
    )


def manifest(wanted: Task, nodes: Mapping[str, str] | None = None) -> Any:
    understood = pod.understood(wanted, nodes or {})
    return pod.job(wanted, understood, "us-west", kept=3600, grace=60)


def template(wanted: Task, nodes: Mapping[str, str] | None = None) -> Any:
    return manifest(wanted, nodes)["spec"]["template"]["spec"]


def test_a_job_is_suspended_numbers_its_pods_and_goes_after_its_end() -> None:
    spec = manifest(task(count=3))["spec"]
    assert spec["suspend"] is True
    assert spec["completionMode"] == "Indexed"
    assert (spec["completions"], spec["parallelism"]) == (3, 3)
    assert spec["ttlSecondsAfterFinished"] == 3600


def test_disruptions_are_ignored_and_failures_never_tried_again() -> None:
    spec = manifest(task())["spec"]
    disrupted, interrupted, failed = spec["podFailurePolicy"]["rules"]
    assert disrupted["action"] == interrupted["action"] == "Ignore"
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert interrupted["onExitCodes"]["values"] == [prepare.INTERRUPTED]
    assert failed["action"] == "FailIndex"
    assert failed["onExitCodes"]["operator"] == "NotIn"
    assert failed["onExitCodes"]["values"] == [137, 143]
    assert spec["podReplacementPolicy"] == "Failed"


def test_a_pod_asks_for_what_it_may_use() -> None:
    found = template(task(types=("8-64000+v100*2",), disk=50))["containers"][0]["resources"]
    amounts = {"cpu": "8", "memory": "64000M", "nvidia.com/gpu": "2"}
    assert found == {
        "requests": {**amounts, "ephemeral-storage": "50G"},
        "limits": amounts,
    }


def test_a_pod_has_no_access_to_the_cluster() -> None:
    found = template(task())
    assert found["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in found
    assert "initContainers" not in found
    assert "privileged" not in json.dumps(found)


def test_unless_it_is_asked_for() -> None:
    found = template(task(permissions="trainer"))
    assert found["automountServiceAccountToken"] is True
    assert found["serviceAccountName"] == "trainer"


def test_an_engine_for_containers_is_there_on_request() -> None:
    found = template(task(docker=True))
    (engine,) = found["initContainers"]
    assert engine["restartPolicy"] == "Always"  # it runs beside the others, and ends after them
    assert engine["securityContext"] == {"privileged": True}
    shared = [one for one in found["containers"][0]["volumeMounts"] if one["name"] == "work"]
    assert engine["volumeMounts"] == shared != []
    variables = {one["name"]: one.get("value") for one in found["containers"][0]["env"]}
    assert variables["DOCKER_HOST"] == "tcp://127.0.0.1:2375"
    assert "securityContext" not in found["containers"][0]


def test_docker_pulls_through_our_proxies_from_whom_we_trust() -> None:
    told = {"proxies": {"HTTPS_PROXY": f"http://me:{SECRET}@proxy"}, "authorities": "a certificate"}
    wanted = replace(task(docker=True), settings=json.dumps(told))
    found = template(wanted)
    (engine,) = found["initContainers"]
    variables = {one["name"]: one for one in engine["env"]}
    proxy = variables["HTTPS_PROXY"]["valueFrom"]["secretKeyRef"]
    mounts = {one["name"]: one for one in engine["volumeMounts"]}
    assert variables["SSL_CERT_DIR"]["value"] == mounts["trusted"]["mountPath"]
    volume = next(one for one in found["volumes"] if one["name"] == "trusted")["secret"]
    content = secret.settings(job.Job(Session("team"), wanted, None)).content()["stringData"]
    assert proxy["name"] == volume["secretName"] == str(wanted.id)
    assert content[proxy["key"]] == f"http://me:{SECRET}@proxy"
    assert content[volume["items"][0]["key"]] == "a certificate"
    assert SECRET not in json.dumps(manifest(wanted))
    alone = template(replace(wanted, machine=replace(wanted.machine, docker=False)))
    assert "trusted" not in [one["name"] for one in alone["volumes"]]


def test_the_users_own_choices() -> None:
    options = {
        "kubernetes-namespace": "team",
        "kubernetes-node-selector": "a=b,c.d/e=f",
        "kubernetes-toleration": "gpu=yes:NoSchedule",
        "kubernetes-image-pull-secret": "one,two",
    }
    found = template(task(options=options, image="me/mine:1"), {"zone": "z"})
    assert found["nodeSelector"] == {"zone": "z", "a": "b", "c.d/e": "f"}
    assert found["tolerations"] == [
        {"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}
    ]
    assert found["imagePullSecrets"] == [{"name": "one"}, {"name": "two"}]
    assert found["containers"][0]["image"] == "me/mine:1"
    assert "affinity" not in found


def test_spot_is_a_must_or_a_wish() -> None:
    must = template(task(spot=True))["affinity"]["nodeAffinity"]
    wish = template(task(spot=True, spot_fallback=True))["affinity"]["nodeAffinity"]
    assert list(must) == ["requiredDuringSchedulingIgnoredDuringExecution"]
    assert list(wish) == ["preferredDuringSchedulingIgnoredDuringExecution"]
    assert "affinity" not in template(task())


def test_tags_are_labels_of_job_and_pods() -> None:
    found = manifest(task())
    assert found["metadata"]["labels"]["owner"] == "we"
    assert found["spec"]["template"]["metadata"]["labels"]["owner"] == "we"
    assert json.loads(found["metadata"]["annotations"]["cml-runner/tags"]) == {"owner": "we"}


def test_the_secret_is_not_in_the_manifest() -> None:
    assert SECRET not in json.dumps(manifest(task()))


def test_every_mistake_is_told_before_anything_is_sent() -> None:
    wrong = task(
        types=("huge",),
        image="Two Words",
        ssh_key="a key",
        spot=True,
        spot_price=0.5,
        options={"aws-subnet": "x", "kubernetes-node-selector": "y", "kubernetes-toleration": "="},
    )
    with pytest.raises(ConfigurationError) as caught:
        Cloud("us-west").plan(wrong)
    assert [one.partition(":")[0].partition(" ")[0] for one in caught.value.mistakes] == [
        "--cloud-aws-subnet",
        "--cloud-ssh-private",
        "--cloud-spot-price",
        "type",
        "image",
        "--cloud-kubernetes-node-selector",
        "--cloud-kubernetes-toleration",
    ]


def test_an_unknown_region() -> None:
    with pytest.raises(ConfigurationError, match="KEY=VALUE"):
        Cloud("mars")


def test_an_identifier_alone_will_do_to_delete() -> None:
    plan = Cloud("us-west").plan(Task(id=Identifier.fixed("some task")))
    assert [one.label for one in plan.resources] == ["job", "settings", "script", "pods"]


def test_the_role_names_each_verb() -> None:
    role = Cloud("us-west").permissions()
    assert role["kind"] == "Role"
    assert all("*" not in json.dumps(rule) for rule in role["rules"])


# Tasks that keep their data


def kept(data: str = "", **more: Any) -> Task:
    settings = json.dumps({"script": {"content": "true", "data": data}})
    return replace(task(**more), settings=settings, keeps=True)


def test_a_task_has_a_claim_which_all_of_its_pods_mount() -> None:
    wanted = kept(count=2, disk=7, options={"kubernetes-storage-class": "fast"})
    claim = pod.claim(wanted)["spec"]
    assert claim["accessModes"] == ["ReadWriteMany"]
    assert claim["resources"]["requests"]["storage"] == "7G"
    assert claim["storageClassName"] == "fast"
    assert pod.claim(kept())["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert "storageClassName" not in pod.claim(kept())["spec"]
    found = template(wanted)
    volumes = {one["name"]: one for one in found["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == str(wanted.id)
    mounts = {one["name"]: one["mountPath"] for one in found["containers"][0]["volumeMounts"]}
    assert mounts["data"] == pod.DATA


def test_its_job_stays_until_it_is_destroyed() -> None:
    assert "ttlSecondsAfterFinished" not in manifest(kept())["spec"]
    assert pod.keeps(manifest(kept()))
    assert not pod.keeps(manifest(task()))


def test_runners_and_tasks_with_a_bucket_have_no_claim() -> None:
    for wanted in (task(), kept(data="s3://ours/there")):
        assert "data" not in [one["name"] for one in template(wanted)["volumes"]]
        labels = [one.label for one in Cloud("us-west").plan(wanted).resources]
        assert labels == ["job", "settings", "script", "pods"]
    labels = [one.label for one in Cloud("us-west").plan(kept()).resources]
    assert labels == ["job", "settings", "script", "claim", "pods"]


def test_data_move_where_the_pods_would_be() -> None:
    wanted = kept(types=("4-1000+t4",), options={"kubernetes-node-selector": "zone=b"})
    whole = manifest(wanted)
    whole["metadata"]["uid"] = "42"
    found = pod.mover(whole)
    assert found["metadata"]["ownerReferences"][0]["uid"] == "42"
    assert pod.TASK not in found["metadata"]["labels"]
    own = whole["spec"]["template"]["spec"]
    for name in ("nodeSelector", "tolerations", "affinity", "securityContext"):
        assert found["spec"].get(name) == own.get(name)
    assert "nvidia.com/gpu" not in json.dumps(found["spec"]["containers"])
    assert SECRET not in json.dumps(found)
    assert found["spec"]["automountServiceAccountToken"] is False


def test_what_is_idle_ends() -> None:
    script = pod.IDLE.replace("sleep 300", "true").replace("/proc/[0-9]*", "/proc/[s]elf")
    assert subprocess.run(["sh", "-c", script], check=False, timeout=10).returncode == 0


@pytest.mark.parametrize(
    "address", ["name/path", "s3://", "s3:///path", "ftp://name/x", "s3://A b/"]
)
def test_a_bucket_has_an_address(address: str) -> None:
    with pytest.raises(ConfigurationError, match="s3://, gs:// or az://NAME/PATH"):
        Cloud("us-west").container(address, {})


def test_pods_and_launchers_name_a_bucket_alike() -> None:
    found = Cloud("us-west").container("s3://name/a b", {"region": "eu-west-1"})
    assert found.url == "s3://name/a%20b?region=eu-west-1"


def test_a_task_that_is_over_costs_no_more_than_its_data() -> None:
    notes = {job.EXPIRES: NOW.isoformat(), pod.LAUNCHED: "true", pod.KEEPS: "true"}
    found = {**found_job(**notes), "status": {}}
    assert (job.lease(found).keeps, job.lease(found).expires) == (True, NOW)
    found["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    assert (job.lease(found).keeps, job.lease(found).expires) == (True, None)


# The program, and the first script of a container


def test_the_program_is_beside_the_script_that_starts_it() -> None:
    one = job.Job(Session("team"), task(), None)
    content = secret.script(one, lambda: "a script").content()
    assert content["data"] == {"start": "a script"}
    assert content["binaryData"] == {f"{PROGRAM.sha256}.whl": base64.b64encode(b"wheel").decode()}
    mounts = {one["name"]: one for one in template(task())["containers"][0]["volumeMounts"]}
    assert mounts["start"]["readOnly"] is True
    place = f"{mounts['start']['mountPath']}/{PROGRAM.sha256}.whl"
    assert f"PYTHONPATH={place}\n" in Cloud("us-west").start(PROGRAM, "said:///run/x/bucket")


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        (replace(task(), program=replace(PROGRAM, wheel=bytes(1 << 20))), "the program"),
        (replace(task(), settings="x" * (1 << 20) + "x"), "the settings"),
    ],
)
def test_what_a_cluster_can_not_hold_is_refused(wanted: Task, what: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{what} .*1,048,576 at most"):
        Cloud("us-west").plan(wanted)


def test_our_own_program_fits() -> None:
    whole = replace(PROGRAM, wheel=program.wheel())
    assert Cloud("us-west").plan(replace(task(), program=whole))


def test_the_script_keeps_its_secrets_where_they_are() -> None:
    script = Cloud("us-west").start(PROGRAM, "said:///run/cml-runner/bucket?data=/x")
    assert SECRET not in script
    assert PROGRAM.sha256 in script
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=True).returncode == 0


# What a pod knows of itself


def test_a_pod_knows_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Cloud.rank() == 0
    monkeypatch.setenv(machine.INDEX, "7")
    assert Cloud.rank() == 7


def test_a_notice_is_what_the_hook_has_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(machine.HOME, str(tmp_path))
    monkeypatch.setenv(machine.GRACE, "60")
    assert Cloud.notice() is None
    hook = template(task())["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    command = [*hook[:-1], hook[-1].replace(str(machine.DIRECTORY), str(tmp_path))]
    subprocess.run(command, check=True)
    found = Cloud.notice()
    assert found
    assert found.deadline
    assert timedelta(0) < found.deadline - datetime.now(timezone.utc) <= timedelta(seconds=60)


def test_a_hook_that_is_still_writing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(machine.HOME, str(tmp_path))
    (tmp_path / machine.NOTICE).touch()
    assert Cloud.notice()


# What the cluster says


def event(reason: str, message: str, kind: str = "Pod", **more: Any) -> dict[str, Any]:
    return {
        "metadata": {"creationTimestamp": "2026-11-25T00:00:00Z"},
        "involvedObject": {"kind": kind, "name": "cml-x-0-abcde"},
        "reason": reason,
        "message": message,
        "type": "Warning",
        **more,
    }


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (event("FailedScheduling", "0/3 nodes are available: 3 Insufficient cpu."), "info"),
        (event("FailedCreate", 'pods "x" is forbidden: exceeded quota: q', "Job"), "quota"),
        (
            event("FailedCreate", "x is forbidden: failed quota: q: must specify limits", "Job"),
            "quota",
        ),
        (event("FailedCreate", 'serviceaccount "x" is forbidden', "Job"), "permission"),
        (event("FailedCreate", 'violates PodSecurity "restricted:latest"', "Job"), "permission"),
        (event("FailedCreate", "admission webhook x denied the request: no", "Job"), "permission"),
        (event("FailedCreate", "something else", "Job"), "error"),
        (event("SuccessfulCreate", "Created pod: x", "Job", type="Normal"), "info"),
        (event("Failed", 'Failed to pull image "x": not found'), "image"),
        (event("Failed", 'Failed to pull image "x": 401 Unauthorized'), "image"),
        (event("Failed", 'Failed to pull image "x": i/o timeout'), "info"),  # tried again
        (event("Failed", 'Failed to pull image "x": i/o timeout', count=4), "image"),
        (event("InspectFailed", "couldn't parse image name: invalid reference format"), "image"),
        (event("Failed", "Error: failed to create containerd task: exec: sh: not found"), "error"),
        (event("Evicted", "The node was low on resource: memory."), "interruption"),
        (event("TaintManagerEviction", "Marking for deletion Pod x"), "interruption"),
        (event("Preempted", "Preempted by y on node z"), "interruption"),
        (event("Killing", "Stopping container runner", type="Normal"), "interruption"),
        (event("Pulling", "Pulling image", type="Normal"), "info"),
    ],
)
def test_events_have_their_kind(found: dict[str, Any], kind: str) -> None:
    assert job.happening(found, set()).kind == kind


def test_a_pod_that_its_own_job_ends_is_no_interruption() -> None:
    found = event("Killing", "Stopping container runner", type="Normal")
    assert job.happening(found, {"cml-x-0-abcde"}).kind == "info"


def test_an_event_without_a_word() -> None:
    found = event("Odd", "")
    del found["message"]
    assert job.happening(found, set()).message == "Odd"


# How a pod ended


def pod_that(phase: str, code: int | None = None, **more: Any) -> dict[str, Any]:
    terminated = {} if code is None else {"terminated": {"exitCode": code, **more}}
    statuses = [{"name": "runner", "state": terminated}]
    return {
        "metadata": {"name": "cml-x-0-abcde"},
        "status": {"phase": phase, "containerStatuses": statuses},
    }


SAID = Status(state="busy", at=NOW, since=NOW, runner="cml-x")


@pytest.mark.parametrize(
    ("found", "said", "state"),
    [
        (pod_that("Running"), SAID, "busy"),
        (pod_that("Running"), None, ""),
        (pod_that("Succeeded", 0), SAID, "ended"),
        (pod_that("Failed", 75), SAID, "interrupted"),
        (pod_that("Failed", 137, reason="OOMKilled"), SAID, "interrupted"),
        (pod_that("Failed", 1, reason="Error"), SAID, "failed"),
        (pod_that("Failed", 1, reason="Error"), None, "failed"),
        (pod_that("Failed"), SAID, "failed"),
    ],
)
def test_who_ended_without_a_word_is_spoken_for(
    found: dict[str, Any], said: Status | None, state: str
) -> None:
    status = words.ended(found, said)
    assert (status.state if status else "") == state


def test_a_container_that_could_not_be_prepared_says_why() -> None:
    text = failing.Failure("no space left", PROGRAM.sha256).text
    status = words.ended(pod_that("Failed", 1, reason="Error", message=f"more\n{text}"), None)
    assert status
    assert (status.state, status.code, status.reason) == ("failed", 11, "no space left")


def test_a_last_word_stands() -> None:
    said = Status(state="failed", at=NOW, since=NOW, runner="x", reason="why", code=8)
    assert words.ended(pod_that("Failed", 8), said) == said


# How long it may be there


def found_job(**annotations: str) -> dict[str, Any]:
    name = str(Identifier.fixed("some task"))
    created = "2026-11-25T00:00:00Z"
    return {"metadata": {"name": name, "creationTimestamp": created, "annotations": annotations}}


def test_a_launch_that_was_never_finished_is_given_up_after_an_hour() -> None:
    expires = (NOW + timedelta(days=5)).isoformat()
    found = job.lease(found_job(**{job.EXPIRES: expires}))
    assert found.expires == NOW + job.LAUNCH
    found = job.lease(found_job(**{job.EXPIRES: expires, pod.LAUNCHED: "true"}))
    assert found.expires == NOW + timedelta(days=5)
    assert job.lease(found_job(**{job.EXPIRES: "", pod.LAUNCHED: "true"})).expires is None


def test_jobs_of_others_are_not_ours() -> None:
    found = found_job()
    found["metadata"]["name"] = "cml-but-not-ours"
    with pytest.raises(ConfigurationError):
        job.lease(found)
