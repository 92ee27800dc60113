"""What a task looks like to the cluster: the manifest of its Job. Nothing here is sent.

Fields: https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1/
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cml_runner.boot import prepare
from cml_runner.clouds.kubernetes import catalogue, machine
from cml_runner.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cml_runner.model import Machine, Program, Task

PREFIX = "cml-runner/"  # of our labels and annotations
TASK, REGION = f"{PREFIX}task", f"{PREFIX}region"
KEEPS, LAUNCHED = f"{PREFIX}keeps", f"{PREFIX}launched"
OVER = ("Complete", "Failed")
OURS = {"app.kubernetes.io/managed-by": "cml-runner"}
MOVES = f"{PREFIX}moves"  # label of a pod that moves a task's data
# The shell sees no process but itself: nobody has anything done here any more.
IDLE = "while sleep 300; do set -- /proc/[0-9]*; [ $# -gt 1 ] || exit 0; done"
CONTAINER = "runner"
GRACE = 60  # seconds that a pod has from the notice to its end
KILLED = (137, 143)  # exit codes of who was killed, for lack of memory say, or by a dying node
RETRIES = 3  # of a pod that was killed, or that its node didn't take
GROUP = 64500  # the volumes' group, so that an image's own user can read its settings
SETTINGS, SCRIPT, KEY = "/etc/cml-runner/settings", "/etc/cml-runner/start", "start"
DATA = "/var/lib/cml-runner-data"  # where a task's claim is mounted
DISK = 20  # GB of a claim, unless another size is asked for
DOCKER, DOCKER_IMAGE = "tcp://127.0.0.1:2375", "docker:dind"
AUTHORITIES, TRUSTED = "authorities.pem", "/etc/cml-runner/trusted"  # for Docker's engine
OPTIONS = tuple(
    f"kubernetes-{name}"
    for name in (
        *("namespace", "node-selector", "toleration", "image-pull-secret"),
        "storage-class",  # of a task's claim
    )
)


@dataclass(frozen=True)
class Wanted:
    """A machine's description, understood."""

    size: catalogue.Size
    image: str
    selector: Mapping[str, str]
    tolerations: list[dict[str, str]]
    affinity: dict[str, Any]


def understood(task: Task, nodes: Mapping[str, str]) -> Wanted:
    """Read what is asked for. Raises ConfigurationError with every mistake."""
    wanted, mistakes = task.machine, _mistakes(task)
    found: dict[str, Any] = {}
    size = catalogue.Size(1, 1)

    def read(name: str) -> Any:
        match name:
            case "size":
                return catalogue.size(wanted.types, wanted.gpu)
            case "image":
                return catalogue.image(wanted.image, size)
            case "selector":
                return catalogue.labels(_several(wanted, "node-selector"))
        return catalogue.tolerations(_several(wanted, "toleration"))

    for name in ("size", "image", "selector", "tolerations"):
        try:
            found[name] = read(name)
        except ConfigurationError as error:
            mistakes += error.mistakes
    if mistakes:
        raise ConfigurationError(*mistakes)
    size, chosen = found["size"], {**nodes, **found["selector"]}
    spot = ("preferred" if wanted.spot_fallback else "required") if wanted.spot else ""
    return Wanted(
        size=size,
        image=found["image"],
        selector=chosen,
        tolerations=found["tolerations"] + catalogue.accepted(size, spot=wanted.spot),
        affinity=catalogue.nodes(size, found["selector"], spot=spot),
    )


def job(task: Task, wanted: Wanted, region: str, *, kept: int, grace: int) -> dict[str, Any]:
    """Write the Job: suspended, since its pods need what belongs to it.

    A pod that is evicted, or says that it was, is replaced at once, as often as that happens; one
    that is killed, three times; one whose program fails, never.
    """
    labels = {**catalogue.fitting(task.tags), **OURS, TASK: str(task.id), REGION: region}
    ignored: list[dict[str, Any]] = [
        {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"onExitCodes": _codes("In", prepare.INTERRUPTED)},
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": str(task.id),
            "labels": labels,
            "annotations": {
                f"{PREFIX}tags": json.dumps(dict(task.tags)),
                **({KEEPS: "true"} if task.keeps else {}),
            },
        },
        "spec": {
            "suspend": True,
            "completionMode": "Indexed",  # it numbers the pods
            "completions": task.count,
            "parallelism": task.count,
            "backoffLimitPerIndex": RETRIES,
            "podReplacementPolicy": "Failed",  # never two in one place
            "podFailurePolicy": {
                "rules": [
                    *({"action": "Ignore", **rule} for rule in ignored),
                    {"action": "FailIndex", "onExitCodes": _codes("NotIn", *KILLED)},
                ]
            },
            **({} if task.keeps else {"ttlSecondsAfterFinished": kept}),
            "template": {
                "metadata": {
                    "labels": labels,
                    "annotations": {
                        "karpenter.sh/do-not-disrupt": "true",
                        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                    },
                },
                "spec": _pod(task, wanted, grace),
            },
        },
    }


def wheel(program: Program) -> str:
    """Name the file with the program, beside the script."""
    return f"{program.sha256}.whl"


def claims(task: Task) -> bool:
    """Say if a task's data are in a claim of its own: they aren't in a bucket."""
    return task.keeps and not (_settings(task).get("script") or {}).get("data")


def ways(task: Task) -> dict[str, str]:
    """List what Docker's engine needs of the settings: HTTPS_PROXY …, and its authorities.

    A proxy's address may hold a login.
    """
    found = _settings(task) if task.machine.docker else {}
    authorities = {AUTHORITIES: found["authorities"]} if found.get("authorities") else {}
    return {**(found.get("proxies") or {}), **authorities}


def claim(task: Task) -> dict[str, Any]:
    """Write the volume claim that holds a task's data."""
    storage = task.machine.options.get("kubernetes-storage-class", "")
    return {
        "spec": {
            "accessModes": ["ReadWriteMany" if task.count > 1 else "ReadWriteOnce"],
            "resources": {"requests": {"storage": f"{task.machine.disk or DISK}G"}},
            **({"storageClassName": storage} if storage else {}),
        }
    }


def over(found: Mapping[str, Any]) -> bool:
    """Say if a Job has come to its end."""
    return any(
        one["type"] in OVER and one["status"] == "True"
        for one in found["status"].get("conditions", ())
    )


def keeps(found: Mapping[str, Any]) -> bool:
    """Say if a Job is that of a task which keeps its data."""
    return KEEPS in found["metadata"].get("annotations", {})


def mover(job: Mapping[str, Any]) -> dict[str, Any]:
    """Write the pod through which data are moved; it ends when nothing has moved for a while.

    It lives where the task's own pods do, so that a volume made for it is one for them.
    """
    metadata, own = job["metadata"], job["spec"]["template"]["spec"]
    (image,) = (one["image"] for one in own["containers"] if one["name"] == CONTAINER)
    places = ("affinity", "nodeSelector", "tolerations", "imagePullSecrets", "securityContext")
    amounts = {"cpu": "100m", "memory": "256M"}
    return {
        "metadata": {
            "generateName": f"{metadata['name']}-data-",
            "labels": {**OURS, MOVES: metadata["name"]},
            "ownerReferences": [owner(metadata)],
        },
        "spec": {
            **{name: own[name] for name in places if name in own},
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {
                    "name": CONTAINER,
                    "image": image,
                    "command": ["/bin/sh", "-c", IDLE],
                    "resources": {"requests": amounts, "limits": amounts},
                    "volumeMounts": [{"name": "data", "mountPath": DATA}],
                }
            ],
            "volumes": [_volume(metadata["name"])],
        },
    }


def owner(job: Mapping[str, Any]) -> dict[str, Any]:
    """Refer to a Job, whose metadata these are, as an owner."""
    return {"apiVersion": "batch/v1", "kind": "Job", "name": job["name"], "uid": job["uid"]}


def _settings(task: Task) -> dict[str, Any]:
    """Read the settings, if there are any yet."""
    with suppress(ValueError):
        found = json.loads(task.settings)
        if isinstance(found, dict):
            return found
    return {}


def _volume(name: str) -> dict[str, Any]:
    return {"name": "data", "persistentVolumeClaim": {"claimName": name}}


def _pod(task: Task, wanted: Wanted, grace: int) -> dict[str, Any]:
    machine_ = task.machine
    affinity: dict[str, Any] = (
        {"affinity": {"nodeAffinity": wanted.affinity}} if wanted.affinity else {}
    )
    account: dict[str, Any] = (
        {"serviceAccountName": machine_.permissions} if machine_.permissions else {}
    )
    secrets = [{"name": name} for name in _several(machine_, "image-pull-secret")]
    docker = {"initContainers": [_docker(task)]} if machine_.docker else {}
    return {
        **account,
        **affinity,
        **docker,
        "automountServiceAccountToken": bool(machine_.permissions),
        "enableServiceLinks": False,
        "imagePullSecrets": secrets,
        "nodeSelector": dict(wanted.selector),
        "tolerations": wanted.tolerations,
        "restartPolicy": "Never",
        "shareProcessNamespace": True,  # somebody must be there for orphaned processes
        "terminationGracePeriodSeconds": grace,
        "securityContext": {"fsGroup": GROUP, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [_container(task, wanted, grace)],
        "volumes": [
            {"name": "settings", "secret": {"secretName": str(task.id), "defaultMode": 0o400}},
            {"name": "start", "configMap": {"name": str(task.id), "defaultMode": 0o555}},
            {"name": "run", "emptyDir": {}},
            {"name": "work", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            *([_volume(str(task.id))] if claims(task) else ()),
            *([_trusted(task)] if AUTHORITIES in ways(task) else ()),
        ],
    }


def _container(task: Task, wanted: Wanted, grace: int) -> dict[str, Any]:
    resources = wanted.size.resources
    disk = {"ephemeral-storage": f"{task.machine.disk}G"} if task.machine.disk else {}
    variables = {machine.GRACE: str(grace)}
    if wanted.size.number:
        variables["NVIDIA_DRIVER_CAPABILITIES"] = "compute,utility"
    if task.machine.docker:
        variables["DOCKER_HOST"] = DOCKER
    notice = f"date +%s >{machine.DIRECTORY}/{machine.NOTICE}"
    return {
        "name": CONTAINER,
        "image": wanted.image,
        "command": ["/bin/sh", f"{SCRIPT}/{KEY}"],
        "env": [
            _told(machine.POD, "metadata.name"),
            *(_told(name, f"metadata.annotations['{of}']") for name, of in machine.COUNTS.items()),
            *({"name": name, "value": value} for name, value in variables.items()),
        ],
        "resources": {"requests": {**resources, **disk}, "limits": resources},
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", notice]}}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "settings", "mountPath": SETTINGS, "readOnly": True},
            {"name": "start", "mountPath": SCRIPT, "readOnly": True},
            {"name": "run", "mountPath": str(machine.DIRECTORY)},
            _SHARED,
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - the usual 64 MB are too small
            *([{"name": "data", "mountPath": DATA}] if claims(task) else ()),
        ],
    }


def _told(name: str, field: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}}


def _secret(task: Task, name: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": str(task.id), "key": name}}}


_SHARED = {"name": "work", "mountPath": str(prepare.WORK)}


def _trusted(task: Task) -> dict[str, Any]:
    items = [{"key": AUTHORITIES, "path": AUTHORITIES}]
    return {"name": "trusted", "secret": {"secretName": str(task.id), "items": items}}


def _docker(task: Task) -> dict[str, Any]:
    """Write the container of a Docker engine for this pod alone, there before ours and after it.

    It pulls images through the proxies of the settings, and trusts their authorities: in Go a
    directory adds to the system's file, https://pkg.go.dev/crypto/x509#SystemCertPool
    """
    found = ways(task)
    trusted = AUTHORITIES in found
    mount = {"name": "trusted", "mountPath": TRUSTED, "readOnly": True}
    return {
        "name": "docker",
        "image": DOCKER_IMAGE,
        "restartPolicy": "Always",
        "args": [
            "dockerd",
            "--host=unix:///var/run/docker.sock",
            f"--host={DOCKER}",
            "--tls=false",
        ],
        "env": [
            *(_secret(task, name) for name in found if name != AUTHORITIES),
            *([{"name": "SSL_CERT_DIR", "value": TRUSTED}] if trusted else ()),
        ],
        "securityContext": {"privileged": True},
        "volumeMounts": [
            _SHARED,  # it is asked to mount parts of it
            *([mount] if trusted else ()),
        ],
    }


def _codes(operator: str, *values: int) -> dict[str, Any]:
    return {"containerName": CONTAINER, "operator": operator, "values": list(values)}


def _several(wanted: Machine, name: str) -> list[str]:
    text = wanted.options.get(f"kubernetes-{name}", "")
    return [one for one in text.split(",") if one]


def _mistakes(task: Task) -> list[str]:
    """List what makes no sense on a cluster."""
    machine = task.machine
    found = [
        f"--cloud-{name} makes no sense on Kubernetes: leave it out"
        for name in machine.options
        if name not in OPTIONS
    ]
    if machine.ssh_key:
        found.append("--cloud-ssh-private makes no sense on Kubernetes: use kubectl exec")
    if machine.spot and machine.spot_price > 0:
        found.append("--cloud-spot-price makes no sense on Kubernetes: nodes have their price")
    return found
