"""The account that an agent and its jobs get on a machine which is ours alone.

The supervisor is root there; its settings, its memory and the machine's identity are none of a
job's business. Jobs that may become root can get at all of it: see "Security" in the README.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cml_runner.boot import trust
from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

SUDOERS = Path("/etc/sudoers.d/cml-runner")
RETAINED = (*trust.PROXIES, *map(str.lower, trust.PROXIES), *trust.REPLACING, trust.ADDING)
# design 22; it answers on port 80
METADATA = {"iptables": "169.254.169.254", "ip6tables": "fd00:ec2::254"}
EAGER = 300  # oom_score_adj: when memory is short a job goes, not the supervisor
SHELLS = ("/bin/bash", "/bin/sh")
SUBORDINATES = Path("/etc/subuid")
POWERFUL = frozenset({"root", "sudo", "admin", "wheel", "docker", "lxd", "incus", "disk", "shadow"})
ROUNDS = 100  # of killing, should somebody start new processes as fast


@dataclass(frozen=True, kw_only=True)
class Account:
    """An account of this machine."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: Path
    shell: str
    sudo: bool  # it may become root
    ids: tuple[range, ...]  # its own, and those that it may take in a name space of users

    def environment(self) -> dict[str, str]:
        """Name the variables which a login would set."""
        return {
            "HOME": str(self.home),
            "USER": self.name,
            "LOGNAME": self.name,
            "SHELL": self.shell,
        }

    def own(self, directory: Path) -> None:
        """Give the account a directory and all that is in it; links are not followed.

        What is given can't be had back, as its jobs may put links where we are about to look: so
        every directory goes after what is in it, and never twice if the account isn't root anyway.
        """
        if not self.sudo and self.owns(directory):
            return
        for parent, directories, files in os.walk(directory, topdown=False):
            for name in (*directories, *files):
                os.lchown(os.path.join(parent, name), self.uid, self.gid)
        os.lchown(directory, self.uid, self.gid)

    def owns(self, path: Path) -> bool:
        """Say if a file is the account's."""
        return any(path.lstat().st_uid in ids for ids in self.ids)

    def end(self) -> None:
        """Kill everything that the account runs."""
        for _ in range(ROUNDS):
            found = [one for one in psutil.process_iter(["uids", "status"]) if self._runs(one)]
            for process in found:
                with suppress(psutil.Error):
                    process.kill()
            if not found:
                return

    def _runs(self, process: psutil.Process) -> bool:
        uids = process.info["uids"]
        if not uids or process.info["status"] == psutil.STATUS_ZOMBIE:
            return False
        return any(uid in ids for uid in (uids.real, uids.effective) for ids in self.ids)


def prepare(name: str, *, sudo: bool, isolated: bool, metadata: bool = True) -> Account:
    """Make the account if there is none, and cut it off from the machine's identity.

    That is what a metadata service tells, if there is one. Raises RunnerError where that can't be
    done; if it needn't be isolated, only warns. Raises it as well if the account can become root
    though it must not.
    """
    if not _exists(name):
        shell = next(one for one in SHELLS if Path(one).exists())
        _run("useradd", "--create-home", "--user-group", "--shell", shell, name)
    found = pwd.getpwnam(name)
    ids = (range(found.pw_uid, found.pw_uid + 1), *_subordinates(name, found.pw_uid))
    _make_powerful(name) if sudo else _keep_powerless(found)
    try:
        if metadata:
            _cut_off(ids)
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
        sudo=sudo,
        ids=ids,
    )


def expendable(pid: int) -> None:
    """Have a process die first when memory is short, with all that it will start."""
    with suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(EAGER))


def _exists(name: str) -> bool:
    with suppress(KeyError):
        return bool(pwd.getpwnam(name))
    return False


def _subordinates(name: str, uid: int) -> list[range]:
    """List what the account may be in containers of its own, from subuid(5)."""
    if not SUBORDINATES.exists():
        return []
    fields = (line.split(":") for line in SUBORDINATES.read_text().split())
    return [
        range(int(first), int(first) + int(count))
        for who, first, count in fields
        if who in (name, str(uid)) and int(count)
    ]


def _keep_powerless(account: pwd.struct_passwd) -> None:
    """Make sure that it can't become root. Raises RunnerError if the image lets it."""
    name = account.pw_name
    SUDOERS.unlink(missing_ok=True)
    gids = os.getgrouplist(name, account.pw_gid)
    groups = {group.gr_name for group in grp.getgrall() if group.gr_gid in gids}
    ways = [f"it is in the group {group}" for group in sorted(groups & POWERFUL)]
    if account.pw_uid == 0:
        ways.append("it is root")
    if shutil.which("sudo") and "may run the following" in _run("sudo", "-n", "-l", "-U", name):
        ways.append("sudo lets it")
    if ways:
        msg = f"the account {name} can become root: {', '.join(ways)}"
        raise RunnerError(msg)


def _make_powerful(name: str) -> None:
    """Let it become root without a password, as hosted runners do.

    sudo would drop the variables without which `sudo apt-get` may reach nothing.
    """
    with suppress(KeyError):
        grp.getgrnam("docker")
        _run("usermod", "--append", "--groups", "docker", name)
    SUDOERS.parent.mkdir(mode=0o750, exist_ok=True)
    new = SUDOERS.with_name(".cml-runner.new")  # names with a dot are not read
    keep = f'Defaults:{name} env_keep += "{" ".join(RETAINED)}"'
    new.write_text(f"{name} ALL=(ALL:ALL) NOPASSWD:ALL\n{keep}\n")
    new.chmod(0o440)
    new.replace(SUDOERS)


def _cut_off(ids: Sequence[range]) -> None:
    """Reject what the account sends to the metadata service, from where credentials come."""
    spans = [f"{span[0]}-{span[-1]}" for span in ids]
    if not shutil.which("iptables"):
        _cut_off_with_nft(spans)
        return
    for tool, address in METADATA.items():
        for span in spans:
            owner = ("-m", "owner", "--uid-owner", span, "-p", "tcp", "--dport", "80")
            rule = ("OUTPUT", "-d", address, *owner, "-j", "REJECT")
            try:
                if not _succeeds(tool, "-w", "-C", *rule):
                    _run(tool, "-w", "-I", *rule)
            except RunnerError:
                if tool == "iptables" or Path("/proc/net/if_inet6").exists():
                    raise
        _cut_off_containers(tool, address)


def _cut_off_containers(tool: str, address: str) -> None:
    """Drop what is forwarded there, before the rules of whoever runs containers let it pass."""
    table = ("-w", "-t", "mangle")
    rule = ("FORWARD", "-d", address, "-p", "tcp", "--dport", "80", "-j", "DROP")
    done = _succeeds(tool, *table, "-C", *rule) or _succeeds(tool, *table, "-I", *rule)
    if not done and tool == "iptables":
        log.warning("containers can reach the metadata service")


def _cut_off_with_nft(spans: Sequence[str]) -> None:
    table = "inet cml_runner"
    chain, forward = f"{table} output", f"{table} forward"
    if not shutil.which("nft"):
        msg = "neither iptables nor nft is here to keep jobs from the metadata service"
        raise RunnerError(msg)
    who = f"meta skuid {{ {', '.join(spans)} }} tcp dport 80"
    rules = [
        f"add table {table}",
        f"delete table {table}",  # it may be there already
        f"add table {table}",
        f"add chain {chain} {{ type filter hook output priority 0; }}",
        f"add rule {chain} {who} ip daddr {METADATA['iptables']} reject",
        f"add rule {chain} {who} ip6 daddr {METADATA['ip6tables']} reject",
        f"add chain {forward} {{ type filter hook forward priority -150; }}",
        f"add rule {forward} tcp dport 80 ip daddr {METADATA['iptables']} drop",
        f"add rule {forward} tcp dport 80 ip6 daddr {METADATA['ip6tables']} drop",
    ]
    _run("nft", "\n".join(rules))


def _succeeds(*command: str) -> bool:
    with suppress(RunnerError):
        _run(*command)
        return True
    return False


def _run(*command: str) -> str:
    """Run a tool of the system; return its output. Raises RunnerError."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        msg = f"{command[0]}: {error}"
        raise RunnerError(msg) from error
    if done.returncode:
        msg = f"{' '.join(command[:3])}: {done.stderr.strip()} (exit code {done.returncode})"
        raise RunnerError(msg)
    return done.stdout
