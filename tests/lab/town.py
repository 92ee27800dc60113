"""A namespace of a cluster, a forge, and an index of packages: where pods of runners live.

    with Country(prepared, directory) as country, country.town(directory) as town:
        town.cli("launch", "--cloud", "kubernetes", …)

A launcher may do no more there than our own Role says.
"""

from __future__ import annotations

import json
import sys
import urllib.error
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from typing import TYPE_CHECKING, Any

from cml_runner.clouds.kubernetes import Cloud
from cml_runner.wait import until
from tests.lab.cluster import Cluster
from tests.lab.internet import Internet
from tests.lab.prepare import ROOT
from tests.lab.region import FORGE, PACKAGES, Index, proxy
from tests.worlds import WORLDS, OnGitHub

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from tests.worlds import World

LOST = 40  # seconds until GitHub gives a job up; a cluster needs twenty to replace a dead pod
KINDS = ("jobs", "pods", "secrets", "configmaps", "persistentvolumeclaims")
VOLUMES = 3  # for a namespace
REGISTRY = "images.lab.example"  # of images, all of which are on the node already


class Country:
    """A cluster in its internet."""

    def __init__(self, prepared: Path, directory: Path) -> None:
        self.prepared = prepared
        self.internet = Internet(directory, prepared)
        self.cluster = Cluster(prepared, directory, self.internet)
        self.index = Index(prepared)
        self._numbers = count(1)
        self._stack = ExitStack()

    def __enter__(self) -> Country:
        self._stack.enter_context(self.internet)
        self._stack.enter_context(self.cluster)
        self.internet.serve(PACKAGES, self.index)
        self.internet.serve(REGISTRY, _registry)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def town(self, directory: Path, forge: str = "github") -> Iterator[Town]:
        """Found one, with a forge of its own."""
        world: World = WORLDS[forge](directory)
        if isinstance(world, OnGitHub):
            world.github.lost_after = LOST
        try:
            for host, application in world.move_out(FORGE).items():
                assert application or isinstance(world, OnGitHub)
                self.internet.serve(host, application or proxy(world.github.own_url))  # type: ignore[attr-defined]
            with self.namespace() as name:
                yield Town(self, name, world, directory)
        finally:
            world.leave_alone()

    @contextmanager
    def namespace(self) -> Iterator[str]:
        """Make a namespace with somebody who may launch there."""
        name = f"town-{next(self._numbers)}"
        ask = self.cluster.kubectl
        ask("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        home = f"/api/v1/namespaces/{name}"
        ask("POST", f"{home}/serviceaccounts", {"metadata": {"name": "launcher"}})
        access = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{name}"
        ask("POST", f"{access}/roles", Cloud("us-west").permissions())
        launcher = {"kind": "ServiceAccount", "name": "launcher", "namespace": name}
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "cml-runner"}
        binding = {"metadata": {"name": "launcher"}, "subjects": [launcher], "roleRef": role}
        ask("POST", f"{access}/rolebindings", binding)
        until(lambda: self._is_ready(home), f"the account of pods in {name}", 60, 0.1)
        for number in range(VOLUMES):
            ask("POST", "/api/v1/persistentvolumes", self._volume(f"{name}-{number}"))
        try:
            yield name
        finally:  # at once: the node has but few cores
            for path in (f"/apis/batch/v1/namespaces/{name}/jobs", f"{home}/pods", home):
                with suppress(urllib.error.HTTPError):
                    ask("DELETE", f"{path}?gracePeriodSeconds=0&propagationPolicy=Background")

    def _volume(self, name: str) -> dict[str, Any]:
        """Describe one, for whoever claims any: nobody makes them here on demand."""
        path = self.cluster.volumes / name
        path.mkdir(parents=True)
        path.chmod(0o777)
        return {
            "metadata": {"name": name},
            "spec": {
                "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
                "capacity": {"storage": "100G"},
                "hostPath": {"path": str(path)},
            },
        }

    def _is_ready(self, home: str) -> bool:
        """Say if pods can be made there: a controller has to make their account first."""
        accounts = self.cluster.kubectl("GET", f"{home}/serviceaccounts")["items"]
        return any(one["metadata"]["name"] == "default" for one in accounts)

    def kubeconfig(self, namespace: str, path: Path) -> Path:
        """Write that of the launcher."""
        account = f"/api/v1/namespaces/{namespace}/serviceaccounts/launcher/token"
        token = self.cluster.kubectl("POST", account, {"spec": {}})["status"]["token"]
        path.write_text(self.cluster.kubeconfig_of(token, namespace))
        return path


class Town:
    """One namespace."""

    def __init__(self, country: Country, name: str, world: World, directory: Path) -> None:
        self.country, self.name, self.world, self.directory = country, name, world, directory
        self.kubeconfig = country.kubeconfig(name, directory / "kubeconfig")

    @property
    def environment(self) -> dict[str, str]:
        """Name the variables of a launcher."""
        return {
            "KUBECONFIG": str(self.kubeconfig),
            **self.world.environment,
            "CML_RUNNER_REPO": self.world.repo,
            "CML_RUNNER_MACHINE_INDEX": self.country.index.url,
        }

    def cli(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        checkout: Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        """Run the program on somebody's laptop, from some checkout."""
        command = ["env", "-C", str(checkout), sys.executable, "-m", "cml_runner", *arguments]
        return self.country.internet.run(command, {**self.environment, **(environment or {})})

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start it, and go on."""
        command = [sys.executable, "-m", "cml_runner", *arguments]
        return self.country.internet.start(command, self.environment)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the API server about this namespace, as the administrator."""
        base = "/apis/batch/v1" if path.startswith("jobs") else "/api/v1"
        full = f"{base}/namespaces/{self.name}/{path}"
        return self.country.cluster.kubectl(method, full, body)

    def log(self, pod: str) -> str:
        """Read what a pod has said; nothing if it hasn't begun."""
        path = f"/api/v1/namespaces/{self.name}/pods/{pod}/log"
        with suppress(urllib.error.HTTPError):
            return self.country.cluster.text(path)
        return ""

    def forbid(self, verb: str, resource: str) -> None:
        """Take one permission from the launcher."""
        role = json.loads(json.dumps(Cloud("us-west").permissions()))
        for rule in role["rules"]:
            if rule["resources"] == [resource]:
                rule["verbs"].remove(verb)
        role["rules"] = [rule for rule in role["rules"] if rule["verbs"]]
        path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{self.name}/roles/cml-runner"
        self.country.cluster.kubectl("PUT", path, role)

    def pods(self) -> list[dict[str, Any]]:
        """List those that have not ended, the oldest first."""
        found = self.ask("GET", "pods")["items"]
        alive = [one for one in found if one["status"]["phase"] in ("Pending", "Running")]
        return sorted(alive, key=lambda one: str(one["metadata"]["creationTimestamp"]))

    def traces(self, secret: str) -> list[str]:
        """List the objects, and the logs, in which a secret can be read."""
        found = []
        for kind in ("jobs", "pods", "configmaps", "events"):
            for one in self.ask("GET", kind)["items"]:
                found += [one["metadata"]["name"]] if secret in json.dumps(one) else []
        return found

    def left(self) -> list[str]:
        """List what is there of ours."""
        found = []
        for kind in KINDS:
            for one in self.ask("GET", kind)["items"]:
                if one["metadata"]["name"].startswith("cml-"):
                    found.append(f"{kind} {one['metadata']['name']}")
        return found


def _registry(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    """Be a registry of images which has none."""
    error = {"code": "MANIFEST_UNKNOWN", "message": f"unknown: {environ['PATH_INFO']}"}
    start("404 Not Found", [("Content-Type", "application/json")])
    return [json.dumps({"errors": [error]}).encode()]
