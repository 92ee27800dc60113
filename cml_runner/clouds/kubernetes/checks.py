"""What a launch needs of a cluster and namespace, looked at before anything runs."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from cml_runner import checkup
from cml_runner.checkup import Probe
from cml_runner.errors import ConfigurationError, NotFound
from cml_runner.model import Check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from cml_runner.clouds.kubernetes.pod import Wanted
    from cml_runner.clouds.kubernetes.session import Session
    from cml_runner.model import Task

    Rules = Sequence[tuple[str, str, Sequence[str]]]

LOGIN = "renew the kubeconfig, whose user was refused: see kubectl config view"
OLDEST = (1, 29)
TASKS = {  # verbs and resources that only tasks with data need
    *("create persistentvolumeclaims", "get persistentvolumeclaims", "create pods"),
    *("delete pods", "get pods/exec", "create pods/exec"),
}
COUNTED = ("jobs.batch", "secrets", "configmaps")  # one of each belongs to a launch
APPLIES = {"NotTerminating", "NotBestEffort"}  # scopes of quotas that our pods are in
UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
UNITS |= {f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", 1)}
AMOUNT = re.compile(r"(?P<number>[0-9.]+(?:[eE][0-9]+)?)(?P<unit>[A-Za-z]*)")


def checks(
    session: Session, task: Task, rules: Rules, read: Callable[[], Wanted]
) -> Iterator[Check]:
    """Look at all of it."""

    def login() -> str:
        return f"{session.who()} at {session.host}, namespace {session.namespace}"

    found, well = checkup.login(login, session.clock, LOGIN)
    yield from found
    wanted, mistakes = checkup.understood(read)
    yield from mistakes
    if well:
        yield from checkup.made(_Namespace(session, task, rules).probes())
        yield from checkup.made(_Pods(session, task, wanted).probes() if wanted else ())


class _Namespace:
    """What doesn't depend on what the pods are to be."""

    def __init__(self, session: Session, task: Task, rules: Rules) -> None:
        self._session, self._task, self._rules = session, task, rules

    def probes(self) -> Iterator[Probe]:
        """Name what is looked at."""
        name = self._session.namespace
        yield Probe(what="version", look=self._version, hint="use a newer cluster", own=True)
        hint = f"make it: kubectl create namespace {name}"
        yield Probe(what=f"namespace {name}", look=self._there, hint=hint, own=True)
        yield Probe(what="permissions", look=self._permissions)
        if account := self._task.machine.permissions:
            what, mend = f"service account {account}", "name one that exists"
            yield Probe(what=what, look=lambda: self._account(account), hint=mend, own=True)

    def _version(self) -> str:
        told = self._session.read("/version")
        found = tuple(int(re.sub(r"\D.*", "", told[part])) for part in ("major", "minor"))
        if found < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            msg = f"it is {told['gitVersion']}, and {oldest} is the oldest that will do"
            raise ConfigurationError(msg)
        return str(told["gitVersion"])

    def _there(self) -> str:
        found = self._session.read(f"/api/v1/namespaces/{self._session.namespace}")
        if found["metadata"].get("deletionTimestamp"):
            msg = "it is being deleted"
            raise NotFound(msg)
        return "it's there"

    def _account(self, name: str) -> str:
        self._session.call("GET", "serviceaccounts", name)
        return "it's there"

    def _permissions(self) -> Iterator[Check]:
        """Ask about each verb; everybody may ask what they may."""
        asked = [(group, kind, verb) for group, kind, verbs in self._rules for verb in verbs]
        with ThreadPoolExecutor() as pool:
            had = list(pool.map(lambda one: self._session.may(*one), asked))
        missing = [
            f"{verb} {kind}" for (_, kind, verb), ok in zip(asked, had, strict=True) if not ok
        ]
        hint = (
            "give them a role: cml-runner permissions kubernetes | kubectl apply --namespace"
            f" {self._session.namespace} -f -"
        )
        data = [one for one in missing if one in TASKS]
        yield from checkup.allowed(data, 0, hint, "only tasks need it")
        rest = [one for one in missing if one not in TASKS]
        yield from checkup.allowed(rest, len(asked), hint)


class _Pods:
    """What depends on it."""

    def __init__(self, session: Session, task: Task, wanted: Wanted) -> None:
        self._session, self._task, self._wanted = session, task, wanted

    def probes(self) -> Iterator[Probe]:
        """Name what is looked at. Only nodes pull images."""
        yield Probe(what="type", look=self._nodes, own=True)
        yield Probe(what="image", look=self._image)
        yield Probe(what="quota", look=self._quota, own=True)

    def _image(self) -> Check:
        message = f"{self._wanted.image}: whether they can pull it only nodes know"
        return Check(what="image", state="unknown", message=message)

    def _nodes(self) -> Check | str:
        """See if a node is large enough when it is empty, and takes such pods."""
        listed = self._session.read("/api/v1/nodes?limit=500")["items"]
        fitting = [one for one in listed if self._takes(one)]
        size = ", ".join(f"{amount} {name}" for name, amount in self._wanted.size.resources.items())
        if not fitting:
            message = f"none of {len(listed)} nodes takes a pod of {size}"
            hint = "add such nodes, or have an autoscaler that does; or ask for a smaller type"
            return Check(what="type", state="warning", message=message, hint=hint)
        return f"{len(fitting)} of {len(listed)} nodes are made for a pod of {size}"

    def _takes(self, node: Mapping[str, Any]) -> bool:
        labels, spec = node["metadata"].get("labels", {}), node.get("spec", {})
        room = node["status"].get("allocatable", {})
        return (
            not spec.get("unschedulable")
            and self._wanted.selector.items() <= labels.items()
            and _attracted(self._wanted.affinity, labels)
            and all(_tolerated(one, self._wanted.tolerations) for one in spec.get("taints", ()))
            and all(
                amount(room.get(name, "0")) >= amount(needed)
                for name, needed in self._wanted.size.resources.items()
            )
        )

    def _quota(self) -> Iterable[Check]:
        """Compare what the namespace may use with what it uses."""
        found = []
        for one in self._session.items("resourcequotas"):
            if {*one["spec"].get("scopes", ())} <= APPLIES and "scopeSelector" not in one["spec"]:
                found += list(self._compared(one))
        if not found:
            return [Check(what="quota", state="ok", message="the namespace has none for this")]
        return found

    def _compared(self, quota: Mapping[str, Any]) -> Iterator[Check]:
        name, status = quota["metadata"]["name"], quota.get("status", {})
        needs = _needs(self._wanted.size.resources, self._task.count)
        for key, limit in status.get("hard", {}).items():
            if key in needs:
                used = amount(status.get("used", {}).get(key, "0"))
                hint = f"raise it: kubectl edit resourcequota {name}; or ask for less"
                what = f"quota {name}, {key}"
                yield checkup.room(what, used, amount(limit), needs[key], hint)


def amount(text: str) -> float:
    """Read a quantity, 500m or 32Gi.

    https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
    """
    match = AMOUNT.fullmatch(text)
    if not match or match["unit"] not in ("", *UNITS):
        msg = f"{text!r} is no quantity"
        raise ConfigurationError(msg)
    return float(match["number"]) * UNITS.get(match["unit"], 1)


def _needs(resources: Mapping[str, str], count: int) -> dict[str, float]:
    """Say what a launch takes, under every name that quotas have for it."""
    found = {"pods": float(count), "count/pods": float(count)}
    for name, needed in resources.items():
        for key in (name, f"requests.{name}", f"limits.{name}"):
            found[key] = amount(needed) * count
    for name in COUNTED:
        found[name] = found[f"count/{name}"] = 1
    return found


def _attracted(affinity: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Evaluate what is required; all of our expressions are of the kind In."""
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if not required:
        return True
    return any(
        all(labels.get(one["key"]) in one["values"] for one in term["matchExpressions"])
        for term in required["nodeSelectorTerms"]
    )


def _tolerated(taint: Mapping[str, str], tolerations: Sequence[Mapping[str, str]]) -> bool:
    if taint["effect"] == "PreferNoSchedule":
        return True
    return any(
        one["key"] == taint["key"]
        and one.get("effect", taint["effect"]) == taint["effect"]
        and (one["operator"] == "Exists" or one.get("value") == taint.get("value", ""))
        for one in tolerations
    )
