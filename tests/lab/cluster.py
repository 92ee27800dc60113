"""A Kubernetes cluster of one node in the private internet: the real control plane, real pods.

    with Internet(directory) as internet, Cluster(prepared, directory, internet) as cluster:
        internet.run(["cml-runner", …], {"KUBECONFIG": str(cluster.kubeconfig)})

Everything runs in a process namespace of its own, whose end is the end of every pod.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cml_runner.wait import until
from tests.lab.internet import GATEWAY

if TYPE_CHECKING:
    from tests.lab.internet import Internet

PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet")
TOOLS = ("containerd", "runc", "ip", "nsenter", "unshare", "openssl")
PLUGINS = Path("/usr/lib/cni")
PORT = 6443
NODE = "node-0"
PLACE = {"node": NODE, "address": GATEWAY, "port": PORT}
SERVER = f"https://{GATEWAY}:{PORT}"
# What a wrong clock, a slow disk and a crash could do to the real thing doesn't matter here.
START = """\
set -eu
mount -t tmpfs tmpfs /run
mkdir -p /var/log/pods
mount -t tmpfs tmpfs /var/log/pods  # where another node on this computer would clear up
mkdir -p /run/netns
mount --bind {etc}/resolv.conf /etc/resolv.conf
exec >>{log}/init 2>&1
(exec {bin}/etcd --data-dir {etc}/etcd --unsafe-no-fsync --log-level error \\
  --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \\
  --listen-peer-urls http://127.0.0.1:2380) >{log}/etcd 2>&1 &
(export SSL_CERT_FILE={authority}
  exec containerd --config {etc}/containerd.toml) >{log}/containerd 2>&1 &
{apiserver}
until [ -s {etc}/kubeconfig ]; do sleep 0.1; done
{controllers}
until [ -S {etc}/containerd.sock ]; do sleep 0.1; done
(exec {bin}/kubelet --config {etc}/kubelet.yaml --kubeconfig {etc}/kubeconfig \\
  --hostname-override {node} --node-ip {address} --root-dir {etc}/kubelet) >{log}/kubelet 2>&1 &
# Whatever has lost its parent is ours.
while :; do wait; sleep 1; done
"""
APISERVER = """\
(exec {bin}/kube-apiserver --etcd-servers http://127.0.0.1:2379 --secure-port {port} \\
  --advertise-address {address} --cert-dir {etc} --allow-privileged \\
  --service-cluster-ip-range 10.96.0.0/16 --service-account-issuer https://lab.example \\
  --service-account-key-file {etc}/accounts.key \\
  --service-account-signing-key-file {etc}/accounts.key \\
  --kubelet-preferred-address-types InternalIP --authorization-mode RBAC \\
  --audit-policy-file {etc}/audit.yaml --audit-log-path {log}/audit \
  --token-auth-file {etc}/tokens.csv) >>{log}/apiserver 2>&1 &
echo $! >{etc}/apiserver.pid
"""
CONTROLLERS = """\
(exec {bin}/kube-controller-manager --kubeconfig {etc}/kubeconfig --leader-elect=false \\
  --service-account-private-key-file {etc}/accounts.key --root-ca-file {etc}/apiserver.crt \\
  --secure-port=0 --terminated-pod-gc-threshold=0 --node-monitor-grace-period=15s \\
  --kube-api-qps=200 --kube-api-burst=400) >>{log}/controllers 2>&1 &
echo $! >{etc}/controllers.pid
(exec {bin}/kube-scheduler --kubeconfig {etc}/kubeconfig --leader-elect=false \\
  --secure-port=0) >>{log}/scheduler 2>&1 &
echo $! >{etc}/scheduler.pid
"""
AUDIT = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: Metadata, userGroups: ["system:serviceaccounts"]}
- {level: None}
"""
CONTAINERD = """\
version = 2
root = "{etc}/containerd"
state = "{etc}/containerd-state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "{etc}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "lab.example/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{etc}/cni"
"""
KUBELET = """\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
containerRuntimeEndpoint: unix://{etc}/containerd.sock
resolvConf: {etc}/resolv.conf
failSwapOn: false
authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}
authorization: {{mode: AlwaysAllow}}
clusterDNS: [{address}]
evictionHard: {{memory.available: 1Mi, nodefs.available: "0%", imagefs.available: "0%"}}
imageGCHighThresholdPercent: 100
nodeStatusUpdateFrequency: 4s
serializeImagePulls: false
volumePluginDir: {etc}/plugins
"""
NETWORK = {
    "cniVersion": "0.4.0",
    "name": "lab",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.244.0.0/16"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
    ],
}


def missing(prepared: Path) -> str:
    """Say why there can't be a cluster here; empty if there can."""
    if os.geteuid():
        return "needs root"
    if tools := [name for name in TOOLS if not shutil.which(name)]:
        return f"needs {', '.join(tools)}"
    if not PLUGINS.is_dir():
        return f"needs {PLUGINS}"
    if not all((prepared / "kubernetes" / name).exists() for name in PROGRAMS):
        return "needs LAB_DIRECTORY, as made by python -m tests.lab.prepare"
    return ""


@dataclass(frozen=True)
class Call:
    """A question to the API server, as its own records tell; times in seconds since 1970."""

    verb: str
    resource: str
    began: float
    ended: float


class Cluster:
    """One of them; whoever has its kubeconfig is its administrator."""

    def __init__(self, prepared: Path, directory: Path, internet: Internet) -> None:
        self.internet = internet
        self._prepared, self._etc = prepared, directory / "cluster"
        self._bin = prepared / "kubernetes"
        self.volumes = directory / "volumes"  # of the node's disk
        self.kubeconfig = self._etc / "kubeconfig"
        self.token = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cluster:
        self._configure()
        try:
            self._process = subprocess.Popen(
                self._inside("sh", str(self._etc / "start")), stdin=subprocess.DEVNULL
            )
            until(self._ready, "the control plane", 60, 0.1)
            self._import()
            until(self._has_node, "the node", 60, 0.1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.kill()  # and with its init all of the namespace
            self._process.wait()
        with suppress(subprocess.CalledProcessError):
            self.internet.ip("link", "del", "cni0")

    def said(self) -> str:
        """Return the last lines of every log, to tell what went wrong."""
        logs = sorted((self._etc / "log").iterdir())
        return "\n".join(f"{one.name}:\n{one.read_text()[-1500:]}" for one in logs)

    def kubeconfig_of(self, token: str, namespace: str = "default") -> str:
        """Write the configuration of somebody."""
        authority = base64.b64encode((self._etc / "apiserver.crt").read_bytes()).decode()
        cluster = {"server": SERVER, "certificate-authority-data": authority}
        context = {"cluster": "lab", "user": "somebody", "namespace": namespace}
        return json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "lab",
                "clusters": [{"name": "lab", "cluster": cluster}],
                "users": [{"name": "somebody", "user": {"token": token}}],
                "contexts": [{"name": "lab", "context": context}],
            }
        )

    def kubectl(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the API server as its administrator. Raises HTTPError."""
        return json.loads(self.text(path, method, body))

    def text(self, path: str, method: str = "GET", body: Any = None) -> str:
        """Ask it for what isn't JSON. Raises HTTPError."""
        request = urllib.request.Request(f"{SERVER}{path}", method=method)
        request.add_header("Authorization", f"Bearer {self.token}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        trust = ssl.create_default_context(cafile=str(self._etc / "apiserver.crt"))
        with self.internet.entered(), urllib.request.urlopen(request, context=trust) as answer:
            found: str = answer.read().decode()
            return found

    def calls(self, account: str) -> list[Call]:
        """List what a service account has asked, in the order of the answers."""
        found = []
        for line in (self._etc / "log" / "audit").read_text().splitlines():
            one = json.loads(line)
            if one["user"]["username"] == f"system:serviceaccount:{account}":
                times = (one["requestReceivedTimestamp"], one["stageTimestamp"])
                began, ended = (_seconds(text) for text in times)
                found.append(Call(one["verb"], one["objectRef"]["resource"], began, ended))
        return found

    def stop_server(self) -> None:
        """End the API server."""
        self._end("apiserver")

    def start_server(self) -> None:
        """Start it again, and those who would look for it only once a minute by now."""
        self._run("sh", "-c", self._start(APISERVER))
        until(self._ready, "the control plane", 60, 0.1)
        self._end("controllers")
        self._end("scheduler")
        self._run("sh", "-c", self._start(CONTROLLERS))

    def processes(self, pod: str) -> list[psutil.Process]:
        """List the processes of our container in a pod, parents before their children.

        Only some of them have an environment that tells, an agent for one hasn't.
        """
        assert self._process
        found: dict[int, psutil.Process] = {}
        for one in psutil.Process(self._process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if one.environ().get("CML_RUNNER_POD") == pod:
                    for process in (one, *one.children(recursive=True)):
                        found.setdefault(process.pid, process)
        return list(found.values())

    def volume(self, uid: str, name: str) -> Path:
        """Find the directory that is an empty volume of a pod."""
        return self._etc / "kubelet" / "pods" / uid / "volumes" / "kubernetes.io~empty-dir" / name

    def _start(self, programs: str) -> str:
        return programs.format(bin=self._bin, etc=self._etc, log=self._etc / "log", **PLACE)

    def _end(self, program: str) -> None:
        self._run("kill", "-9", (self._etc / f"{program}.pid").read_text().strip())

    def _inside(self, *command: str) -> list[str]:
        """Say how to start something in a namespace of processes and files of its own."""
        unshare = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        return ["nsenter", f"--net=/run/netns/{self.internet.name}", *unshare, *command]

    def _run(self, *command: str) -> str:
        """Run something beside the cluster's own programs."""
        assert self._process
        (init,) = psutil.Process(self._process.pid).children()
        enter = ("nsenter", "--target", str(init.pid), "--net", "--mount", "--pid")
        done = subprocess.run([*enter, *command], check=True, capture_output=True, text=True)
        return done.stdout

    def _configure(self) -> None:
        etc = self._etc
        for name in ("log", "cni", "plugins", "kubelet"):
            (etc / name).mkdir(parents=True)
        words = {"bin": self._bin, "etc": etc, "log": etc / "log", **PLACE}
        words["authority"] = self.internet.authority
        words |= {"apiserver": self._start(APISERVER), "controllers": self._start(CONTROLLERS)}
        (etc / "start").write_text(START.format(**words))
        (etc / "containerd.toml").write_text(CONTAINERD.format(**words))
        (etc / "kubelet.yaml").write_text(KUBELET.format(**words))
        (etc / "audit.yaml").write_text(AUDIT)
        (etc / "resolv.conf").write_text(f"nameserver {GATEWAY}\n")
        (etc / "cni" / "lab.conflist").write_text(json.dumps(NETWORK))
        (etc / "tokens.csv").write_text(f'{self.token},admin,admin,"system:masters"\n')
        key = str(etc / "accounts.key")
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)

    def _ready(self) -> bool:
        if not (self._etc / "apiserver.crt").exists():
            return False
        if not self.kubeconfig.exists():  # which the others wait for
            self.kubeconfig.write_text(self.kubeconfig_of(self.token))
        with suppress(OSError):
            self.kubectl("GET", "/api/v1/namespaces/default/serviceaccounts/default")
            return True
        return False

    def _has_node(self) -> bool:
        with suppress(urllib.error.HTTPError):
            node = self.kubectl("GET", f"/api/v1/nodes/{NODE}")
            states = {one["type"]: one["status"] for one in node["status"]["conditions"]}
            return states.get("Ready") == "True"
        return False

    def _import(self) -> None:
        ctr = ("ctr", "--address", str(self._etc / "containerd.sock"), "-n", "k8s.io")
        self._run(*ctr, "images", "import", str(self._prepared / "images.tar"))


def _seconds(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%f%z").timestamp()
