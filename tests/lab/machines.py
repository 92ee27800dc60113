"""Machines that really boot: systemd and cloud-init in a container each, from one root file system.

A machine is an overlay of the prepared system and a network namespace which is connected with the
private internet and nothing else. It boots in some three seconds, fetches its user data from the
metadata service at the real address, and can power itself off.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import psutil

from tests.lab.internet import GATEWAY, ip

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tests.lab.internet import Internet

BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
CLOUD_INIT = """\
datasource_list: [Ec2]
datasource:
  Ec2:
    strict_id: false
    max_wait: 20
    timeout: 5
network:
  config: disabled
manage_etc_hosts: false
# The others configure what a container hasn't got (a boot loader, locales), and may hang there.
cloud_config_modules: [runcmd]
"""
NO_CLOUD = CLOUD_INIT.replace("[Ec2]", "[NoCloud]")
SEED = "var/lib/cloud/seed/nocloud"
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Instance(Protocol):
    """What a cloud says of a machine."""

    @property
    def id(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def user_data(self) -> str: ...


def seeded(instance: Instance) -> dict[str, str]:
    """Write the files in which cloud-init finds its user data where there is no service for it."""
    return {
        f"{SEED}/meta-data": f"instance-id: {instance.id}\n",
        f"{SEED}/user-data": instance.user_data,
        "etc/cloud/cloud.cfg.d/99-lab.cfg": NO_CLOUD,
    }


class Machine:
    """One of them; `files` are what its cloud's images have in place of the system's.

    Layers are directories that lie above the system's.
    """

    def __init__(
        self,
        instance: Instance,
        internet: Internet,
        system: Path,
        directory: Path,
        number: int,
        said: Callable[[str], None],
        ended: Callable[[], None],
        files: Mapping[str, str] | None = None,
        layers: Sequence[Path] = (),
    ) -> None:
        self.instance, self._internet = instance, internet
        self._files = files or {}
        self._host = instance.id.replace("_", "-")
        self._system, self._directory = system, directory
        self._layers = ":".join(map(str, (*layers, system)))
        self._name = f"{internet.name}-{number}"
        self._link = f"m{number}"
        self._said, self._ended, self._files = said, ended, files or {}
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._over = threading.Event()

    def start(self) -> None:
        """Boot it; returns at once."""
        self._thread.start()

    def end(self) -> None:
        """Take its power away, and all that it was made of."""
        self._over.set()
        for process in self.processes()[:1]:  # with its init all of a container ends
            with suppress(psutil.Error):
                process.kill()
        if self._process:
            self._process.kill()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def freeze(self) -> None:
        """Stop everything in it, for good."""
        for process in reversed(self.processes()):
            with suppress(psutil.Error):
                process.suspend()

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as root."""
        enter = ["nsenter", "--target", str(self.processes()[0].pid), "--all", "sh", "-c", command]
        return subprocess.run(enter, check=False, capture_output=True, text=True, timeout=30)

    def processes(self) -> list[psutil.Process]:
        """List what runs in it, its init first."""
        with suppress(psutil.Error):
            if self._process:
                return psutil.Process(self._process.pid).children(recursive=True)
        return []

    def traces(self, secret: str) -> list[str]:
        """List the files that it has written, and processes, in which a secret can be read."""
        found = [
            str(path.relative_to(self._upper))
            for path in self._upper.rglob("*")
            if path.is_file() and not path.is_symlink() and secret.encode() in path.read_bytes()
        ]
        for process in self.processes():
            with suppress(psutil.Error):
                seen = [*process.cmdline(), *process.environ().values()]
                found += [process.name()] if any(secret in text for text in seen) else []
        return found

    def remembers(self, program: str, secret: str) -> bool:
        """Say if a process with this word among its arguments has the secret in its memory."""
        (process,) = (one for one in self.processes() if program in _words(one))
        with open(f"/proc/{process.pid}/mem", "rb", buffering=0) as memory:
            for area in process.memory_maps(grouped=False):
                first, last = (int(text, 16) for text in area.addr.split("-"))
                with suppress(OSError, ValueError, OverflowError):
                    memory.seek(first)
                    if secret.encode() in memory.read(last - first):
                        return True
        return False

    @property
    def _upper(self) -> Path:
        return self._directory / "upper"

    def _live(self) -> None:
        try:
            self._prepare()
            if not self._over.is_set():
                self._boot()
        finally:
            self._remove()
            if not self._over.is_set():
                self._ended()

    def _prepare(self) -> None:
        upper, root = self._upper, self._directory / "root"
        for path in (upper, self._directory / "work", root):
            path.mkdir(parents=True)
        files = {
            "etc/resolv.conf": f"nameserver {GATEWAY}\n",
            "etc/hostname": f"{self._host}\n",
            "etc/hosts": f"127.0.0.1 localhost {self._host}\n",
            "etc/cloud/cloud.cfg.d/99-lab.cfg": CLOUD_INIT,
            "etc/cloud/ds-identify.cfg": "policy: enabled\n",
            BUNDLE[1:]: (self._system / BUNDLE[1:]).read_text()
            + self._internet.authority.read_text(),
            "etc/systemd/system.conf.d/lab.conf": "[Manager]\nDefaultEnvironment="
            + " ".join(f"{name}={BUNDLE}" for name in self._internet.trust())
            + "\n",
            **self._files,
        }
        for name, content in files.items():
            path = upper / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        layers = f"lowerdir={self._layers},upperdir={upper},workdir={self._directory / 'work'}"
        mount = ["mount", "-t", "overlay", "overlay", "-o", layers, str(root)]
        subprocess.run(mount, check=True)
        self._connect()

    def _connect(self) -> None:
        """Lay a cable between the machine and the internet."""
        address, internet = f"{self.instance.address}/32", self._internet
        ip("netns", "add", self._name)
        ip("-n", self._name, "link", "set", "lo", "up")
        internet.ip(
            "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self._name
        )
        internet.ip("link", "set", self._link, "up")
        internet.ip("route", "add", address, "dev", self._link)
        own = ("-n", self._name)
        ip(*own, "addr", "add", address, "dev", "eth0")
        ip(*own, "link", "set", "eth0", "up")
        ip(*own, "route", "add", "default", "via", GATEWAY, "dev", "eth0", "onlink")

    def _boot(self) -> None:
        self._process = subprocess.Popen(
            [
                "systemd-nspawn",
                "--quiet",
                f"--directory={self._directory / 'root'}",
                "--register=no",
                "--keep-unit",
                f"--machine={self._host}",
                "--resolv-conf=off",
                "--timezone=off",
                "--capability=CAP_NET_ADMIN",
                f"--network-namespace-path=/run/netns/{self._name}",
                "--boot",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={"PATH": os.environ["PATH"]},
            start_new_session=True,
        )
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                self._said(COLOURS.sub("", line))
        self._process.wait()

    def _remove(self) -> None:
        for process in self.processes():
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        with suppress(subprocess.CalledProcessError):
            ip("netns", "del", self._name)
        subprocess.run(
            ["umount", "--lazy", str(self._directory / "root")], check=False, capture_output=True
        )
        if not self._over.is_set() or not os.environ.get("LAB_KEEP"):
            shutil.rmtree(self._directory, ignore_errors=True)


def _words(process: psutil.Process) -> list[str]:
    """Return the arguments of a process; none if it is no more."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []
