"""The account that an agent and its jobs get on a machine which is ours alone.

The supervisor is root there; its settings, its memory and the machine's identity are none of a
job's business. Jobs that may become root can get at all of it: see "Security" in the README.
"""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cml_runner.errors import RunnerError

log = logging.getLogger(__name__)

SUDOERS = Path("/etc/sudoers.d/cml-runner")
METADATA = {"iptables": "169.254.169.254", "ip6tables": "fd00:ec2::254"}  # answers on port 80
EAGER = 300  # oom_score_adj: when memory is short a job goes, not the supervisor
SHELLS = ("/bin/bash", "/bin/sh")


@dataclass(frozen=True, kw_only=True)
class Account:
    """An account of this machine."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: Path
    shell: str

    def environment(self) -> dict[str, str]:
        """Name the variables which a login would set."""
        return {
            "HOME": str(self.home),
            "USER": self.name,
            "LOGNAME": self.name,
            "SHELL": self.shell,
        }

    def own(self, directory: Path) -> None:
        """Give the account a directory and all that is in it; links are not followed."""
        os.lchown(directory, self.uid, self.gid)
        for parent, directories, files in os.walk(directory):
            for name in (*directories, *files):
                os.lchown(os.path.join(parent, name), self.uid, self.gid)

    def end(self) -> None:
        """Kill everything that the account runs."""
        for process in psutil.process_iter(["uids"]):
            uids = process.info["uids"]
            if uids and self.uid in (uids.real, uids.effective):
                with suppress(psutil.Error):
                    process.kill()


def prepare(name: str, *, sudo: bool, isolated: bool) -> Account:
    """Make the account if there is none, and cut it off from the machine's identity.

    Raises RunnerError where that can't be done; if it needn't be isolated, only warns.
    """
    if not _exists(name):
        shell = next(one for one in SHELLS if Path(one).exists())
        _run("useradd", "--create-home", "--user-group", "--shell", shell, name)
    _allow_sudo(name) if sudo else SUDOERS.unlink(missing_ok=True)
    found = pwd.getpwnam(name)
    if sudo and shutil.which("docker"):  # whoever may use it, is root
        _run("usermod", "--append", "--groups", "docker", name)
    try:
        _cut_off(found.pw_uid)
    except RunnerError as error:
        if isolated:
            raise
        log.warning("jobs can reach the metadata service: %s", error)
    return Account(
        name=name,
        uid=found.pw_uid,
        gid=found.pw_gid,
        groups=tuple(os.getgrouplist(name, found.pw_gid)),
        home=Path(found.pw_dir),
        shell=found.pw_shell,
    )


def expendable(pid: int) -> None:
    """Have a process die first when memory is short, with all that it will start."""
    with suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(EAGER))


def _exists(name: str) -> bool:
    with suppress(KeyError):
        return bool(pwd.getpwnam(name))
    return False


def _allow_sudo(name: str) -> None:
    """Let it become root without a password, as hosted runners do."""
    SUDOERS.parent.mkdir(mode=0o750, exist_ok=True)
    new = SUDOERS.with_name(".cml-runner.new")  # names with a dot are not read
    new.write_text(f"{name} ALL=(ALL:ALL) NOPASSWD:ALL\n")
    new.chmod(0o440)
    new.replace(SUDOERS)


def _cut_off(uid: int) -> None:
    """Reject what the account sends to the metadata service, from where credentials come."""
    if not shutil.which("iptables"):
        _cut_off_with_nft(uid)
        return
    owner = ("-m", "owner", "--uid-owner", str(uid), "-p", "tcp", "--dport", "80")
    for tool, address in METADATA.items():
        rule = ("OUTPUT", "-d", address, *owner, "-j", "REJECT")
        try:
            if not _succeeds(tool, "-w", "-C", *rule):
                _run(tool, "-w", "-I", *rule)
        except RunnerError:
            if tool == "iptables" or Path("/proc/net/if_inet6").exists():
                raise


def _cut_off_with_nft(uid: int) -> None:
    table = "inet cml_runner"
    chain = f"{table} output"
    if _succeeds("nft", "list", "table", *table.split()):
        return
    who = f"meta skuid {uid} tcp dport 80"
    rules = [
        f"add table {table}",
        f"add chain {chain} {{ type filter hook output priority 0; }}",
        f"add rule {chain} {who} ip daddr {METADATA['iptables']} reject",
        f"add rule {chain} {who} ip6 daddr {METADATA['ip6tables']} reject",
    ]
    _run("nft", "\n".join(rules))


def _succeeds(*command: str) -> bool:
    with suppress(RunnerError):
        _run(*command)
        return True
    return False


def _run(*command: str) -> None:
    """Run a tool of the system. Raises RunnerError."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        msg = f"{command[0]}: {error}"
        raise RunnerError(msg) from error
    if done.returncode:
        msg = f"{' '.join(command[:3])}: {done.stderr.strip()} (exit code {done.returncode})"
        raise RunnerError(msg)
