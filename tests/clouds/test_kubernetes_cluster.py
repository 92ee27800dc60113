"""What is special about Kubernetes, on a real control plane."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError

import pytest

from cml_runner.clouds.kubernetes import RULES, Cloud, pod, secret
from cml_runner.clouds.kubernetes.job import Job
from cml_runner.errors import CredentialsError, NotFound
from cml_runner.model import Machine, Task
from cml_runner.store import SETTINGS
from cml_runner.wait import until

if TYPE_CHECKING:
    from tests.clouds.kubernetes_rig import KubernetesRig

pytestmark = pytest.mark.lab

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "big": {"types": ("xl",), "disk": 100},
    "gpu": {"types": ("l+t4",)},
    "spot": {"types": ("m",), "spot": True},
    "spot or not": {"types": ("m",), "spot": True, "spot_fallback": True},
    "gpu and spot": {"types": ("m+a100",), "spot": True},
    "docker": {"docker": True},
    "account": {"permissions": "trainer"},
    "chosen": {
        "options": {
            "kubernetes-node-selector": "a=b,c.d/e=f",
            "kubernetes-toleration": "gpu=yes:NoSchedule,other",
            "kubernetes-image-pull-secret": "one,two",
        }
    },
}


def job(rig: KubernetesRig, task: Task) -> Job:
    found = rig.cloud.plan(task).bucket
    assert isinstance(found, Job)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 50])
def test_a_strict_server_takes_every_manifest(
    kubernetes_rig: KubernetesRig, variant: str, count: int
) -> None:
    machine = replace(kubernetes_rig.task().machine, **VARIANTS[variant])
    found = job(kubernetes_rig, replace(kubernetes_rig.task(), machine=machine, count=count))
    answer = kubernetes_rig.ask("POST", "jobs?dryRun=All&fieldValidation=Strict", found.manifest)
    sent = (found.manifest or {})["spec"]
    assert answer["spec"]["podFailurePolicy"]["rules"][0]["action"] == "Ignore"
    assert {name: answer["spec"][name] for name in sent if name not in _DEFAULTED} == {
        name: value for name, value in sent.items() if name not in _DEFAULTED
    }


def test_a_strict_server_takes_what_docker_needs(kubernetes_rig: KubernetesRig) -> None:
    told = {"proxies": {"HTTPS_PROXY": "http://me:secret@proxy"}, "authorities": "a certificate"}
    machine = replace(kubernetes_rig.task().machine, docker=True)
    task = replace(kubernetes_rig.task(json.dumps(told)), machine=machine)
    found = job(kubernetes_rig, task)
    strict = "dryRun=All&fieldValidation=Strict"
    assert kubernetes_rig.ask("POST", f"jobs?{strict}", found.manifest)["spec"]
    body = {"metadata": {"name": "x"}, **secret.settings(found).content()}
    kept = kubernetes_rig.ask("POST", f"secrets?{strict}", body)["data"]
    assert sorted(kept) == ["HTTPS_PROXY", "authorities.pem", "settings.json"]


def test_a_server_takes_as_much_as_we_say(kubernetes_rig: KubernetesRig) -> None:
    def answer(size: int) -> Any:
        program = replace(kubernetes_rig.task().program, wheel=bytes(size - len("a script")))
        found = Job(job_.session, replace(job_.task, program=program), None)
        body = {"metadata": {"name": "x"}, **secret.script(found, lambda: "a script").content()}
        return kubernetes_rig.ask("POST", "configmaps?dryRun=All&fieldValidation=Strict", body)

    job_ = job(kubernetes_rig, kubernetes_rig.task())
    assert answer(secret.LARGEST)["binaryData"]
    with pytest.raises(HTTPError) as caught:
        answer(secret.LARGEST + 1)
    with caught.value as error:
        assert "Too long" in error.read().decode()


_DEFAULTED = ("template", "podFailurePolicy")  # to which a server adds


def test_a_strict_server_takes_all_that_keeps_data(kubernetes_rig: KubernetesRig) -> None:
    options = {"kubernetes-storage-class": "fast"}
    machine = replace(kubernetes_rig.task().machine, disk=3, options=options)
    task = replace(kubernetes_rig.task(), machine=machine, count=2, keeps=True)
    strict = "dryRun=All&fieldValidation=Strict"
    answer = kubernetes_rig.ask("POST", f"jobs?{strict}", job(kubernetes_rig, task).manifest)
    assert "ttlSecondsAfterFinished" not in answer["spec"]
    claim = {"metadata": {"name": str(task.id)}, **pod.claim(task)}
    answer = {**answer, "metadata": {**answer["metadata"], "uid": "42"}}
    for kind, body in (("persistentvolumeclaims", claim), ("pods", pod.mover(answer))):
        assert kubernetes_rig.ask("POST", f"{kind}?{strict}", body)["spec"]


def test_data_move_through_a_pod_that_is_there_no_longer_than_they_do(
    kubernetes_rig: KubernetesRig,
) -> None:
    plan = kubernetes_rig.launch(0, replace(kubernetes_rig.task(), keeps=True))
    bucket, large = plan.bucket.store, bytes(range(256)) * 40_000
    blobs = [f"data/push/b/00000001/{number}" for number in range(5)]
    for key in blobs:
        bucket.write(key, large)
    assert bucket.claim("data/push/h/00000001-00000001", b"head")
    assert len(_all(kubernetes_rig, "pods")) == 1
    again = job(kubernetes_rig, Task(id=kubernetes_rig.cloud.tasks()[0].id)).store
    assert again.keys("data/push/h/") == ["data/push/h/00000001-00000001"]
    assert not again.claim("data/push/h/00000001-00000001", b"another")
    again.expect([*blobs, "data/push/b/00000001/gone"])
    assert all(bytes(again.view(key) or b"") == large for key in blobs)
    assert bytes(again.view(blobs[0], 3, 5) or b"") == bytes([3, 4])
    assert again.view("data/push/b/00000001/gone") is None
    again.close()
    plan.group.resize(0)
    until(lambda: not _all(kubernetes_rig, "pods"), "the end of who moved them", 20, 0.1)
    for resource in reversed(plan.resources):
        resource.delete()
    until(lambda: not _all(kubernetes_rig, "persistentvolumeclaims"), "no claim", 30, 0.1)


def test_a_job_owns_all_that_belongs_to_it(kubernetes_rig: KubernetesRig) -> None:
    plan = kubernetes_rig.launch(1)
    found = job(kubernetes_rig, Task(id=kubernetes_rig.cloud.tasks()[0].id))
    uid = found.uid()
    for kind in ("secrets", "configmaps"):
        (one,) = (o for o in kubernetes_rig.ask("GET", kind)["items"] if _ours(o))
        assert [owner["uid"] for owner in one["metadata"]["ownerReferences"]] == [uid]
    kubernetes_rig.ask("DELETE", f"jobs/{found.name}?propagationPolicy=Background")  # as kubectl
    for kind in ("secrets", "configmaps", "pods"):
        until(lambda kind=kind: not _all(kubernetes_rig, kind), kind, 30, 0.1)  # type: ignore[misc]
    for resource in reversed(plan.resources):
        resource.delete()


def test_fifty_machines_are_one_job(kubernetes_rig: KubernetesRig) -> None:
    plan = kubernetes_rig.launch(0, replace(kubernetes_rig.task(), count=50))
    plan.group.resize(50)
    until(lambda: len(_all(kubernetes_rig, "pods")) == 50, "fifty pods", 60, 0.2)
    assert len(_all(kubernetes_rig, "jobs")) == 1
    assert len(plan.group.instances()) == 50


def test_stopped_and_started(kubernetes_rig: KubernetesRig) -> None:
    plan = kubernetes_rig.launch(2)
    before = set(kubernetes_rig.running(plan))
    plan.group.resize(0)
    until(lambda: not plan.group.instances(), "no pods", 30, 0.1)
    assert plan.bucket.store.read(SETTINGS)
    plan.group.resize(2)
    until(lambda: len(kubernetes_rig.running(plan)) == 2, "the pods", 30, 0.1)
    assert before.isdisjoint(kubernetes_rig.running(plan))


def test_an_answer_that_is_lost_makes_nothing_twice(kubernetes_rig: KubernetesRig) -> None:
    one = job(kubernetes_rig, kubernetes_rig.task())
    send = one.session._send  # the wire; what comes over it is thrown away once
    sent = []

    def lossy(method: str, path: str, body: Any) -> tuple[int, bytes]:
        answer = send(method, path, body)
        sent.append(method)
        if sent == ["POST"]:
            raise OSError
        return answer

    one.session._send = lossy  # type: ignore[method-assign]
    assert one.create()
    assert len(one.ours) == 1
    assert one.ours == [kubernetes_rig.ask("GET", f"jobs/{one.name}")["metadata"]["uid"]]


def test_a_job_that_is_over_is_in_nobodys_way(kubernetes_rig: KubernetesRig) -> None:
    kubernetes_rig.cloud.kept = 600
    task = kubernetes_rig.task()
    plan = kubernetes_rig.launch(1, task)
    (pod,) = kubernetes_rig.running(plan)
    again = kubernetes_rig.cloud.plan(task)
    assert not again.bucket.create()  # not while it lives
    kubernetes_rig.leave(plan, pod)
    until(lambda: not kubernetes_rig.cloud.tasks(), "its end", 30, 0.1)
    kubernetes_rig.launch(1, task)


def test_somebody_elses_things_are_not_adopted(kubernetes_rig: KubernetesRig) -> None:
    task = kubernetes_rig.task()
    metadata = {"name": str(task.id)}
    kubernetes_rig.ask("POST", "secrets", {"metadata": metadata, "stringData": {"x": "y"}})
    plan = kubernetes_rig.cloud.plan(task)
    for resource in plan.resources:
        assert resource.create()
    assert plan.bucket.store.read(SETTINGS) == task.settings.encode()


def test_each_missing_right_is_named(kubernetes_rig: KubernetesRig) -> None:
    assert kubernetes_rig.cloud.setup() == []
    role = {**kubernetes_rig.cloud.permissions(), "rules": []}
    path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{kubernetes_rig.namespace}/roles"
    kubernetes_rig.country.cluster.kubectl("PUT", f"{path}/cml-runner", role)
    with pytest.raises(CredentialsError) as caught:
        kubernetes_rig.cloud.setup()
    for _, resource, verbs in RULES:
        for verb in verbs:
            assert f"{verb} {resource}" in str(caught.value)


def test_the_namespace_is_somebody_elses(kubernetes_rig: KubernetesRig) -> None:
    machine = Machine(types=("s",), options={"kubernetes-namespace": "kube-system"})
    plan = Cloud("us-west").plan(replace(kubernetes_rig.task(), machine=machine))
    with pytest.raises(CredentialsError, match="not allowed to"):
        plan.bucket.create()


def test_nobody_writes_but_pods(kubernetes_rig: KubernetesRig) -> None:
    plan = kubernetes_rig.launch(0)
    for key in ("status-000.json", "left-000", "interrupted-x.json"):
        with pytest.raises(Exception, match="only a task's pods say what they do"):
            plan.bucket.store.write(key, b"{}")
        assert plan.bucket.store.read(key) is None


def test_resizing_what_is_gone(kubernetes_rig: KubernetesRig) -> None:
    plan = kubernetes_rig.cloud.plan(kubernetes_rig.task())
    with pytest.raises(NotFound):
        plan.group.resize(1)
    with pytest.raises(NotFound):
        plan.group.expire(None)
    assert plan.group.instances() == []
    assert plan.group.console() == ""


def _all(rig: KubernetesRig, kind: str) -> list[Any]:
    return [one for one in rig.ask("GET", kind)["items"] if _ours(one)]


def _ours(one: Any) -> bool:
    return str(one["metadata"]["name"]).startswith("cml-")
