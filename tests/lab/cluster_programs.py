"""Build the programs of a Kubernetes cluster from source: `python -m tests.lab.cluster_programs`.

Needs Go, its modules, some minutes, and three gigabytes for Go's own cache. What it makes is kept
in ~/.cache/cml-runner-lab, and made again only when programs/go.sum has changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("programs")
KUBERNETES = "v1.36.3"  # as in programs/go.mod
PACKAGES = (
    "go.etcd.io/etcd/server/v3",
    "k8s.io/kubernetes/cmd/kube-apiserver",
    "k8s.io/kubernetes/cmd/kube-controller-manager",
    "k8s.io/kubernetes/cmd/kube-scheduler",
    "k8s.io/kubernetes/cmd/kubelet",
)


def build() -> Path:
    """Build them, unless they are there; return their directory. Raises CalledProcessError."""
    digest = hashlib.sha256((SOURCE / "go.sum").read_bytes()).hexdigest()[:12]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    final = home / "cml-runner-lab" / f"kubernetes-{KUBERNETES}-{digest}"
    if final.exists():
        return final
    new = final.with_name(f"{final.name}.new")
    new.mkdir(parents=True, exist_ok=True)
    version = f"-X k8s.io/component-base/version.gitVersion={KUBERNETES}"
    flags = ("-trimpath", f"-ldflags=-s -w {version}", "-o", f"{new}/")
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod"}
    with tempfile.TemporaryDirectory() as directory:
        source = shutil.copytree(SOURCE, Path(directory, "source"))  # go may write there
        command = ("go", "build", *flags, *PACKAGES)
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, cwd=source, env=environment)
    (new / "server").rename(new / "etcd")
    new.rename(final)
    return final


if __name__ == "__main__":
    print(build())
