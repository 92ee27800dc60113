from __future__ import annotations

import os
import pwd
import queue
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import psutil
import pytest

from cml_runner.errors import RunnerError
from cml_runner.model import Command
from cml_runner.supervise import user
from cml_runner.supervise.process import Process
from cml_runner.supervise.user import Account
from cml_runner.wait import until
from tests.supervise.test_process import Talker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cml_runner.forges import Agent
    from cml_runner.model import Event

NOBODY = "nobody"  # is everywhere, and nothing is changed but by tools, which are stubs here
UID = 1_000_000 + os.getpid()  # others run the same tests, and all of an account's is killed
SUBORDINATES = range(10 * UID, 10 * UID + 10)
STRANGER = Account(
    name="stranger",
    uid=UID,
    gid=UID,
    groups=(),
    home=Path("/nonexistent"),
    shell="/bin/sh",
    sudo=False,
    ids=(range(UID, UID + 1), SUBORDINATES),
)


@dataclass
class Tools:
    """The system's tools: each writes down how it was called, and does as it is told."""

    directory: Path

    def add(self, name: str, script: str = "") -> None:
        path = self.directory / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >>"{self.directory}/calls"\n{script}\n')
        path.chmod(0o755)

    def calls(self) -> list[str]:
        path = self.directory / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    found = Tools(tmp_path / "bin")
    found.directory.mkdir()
    found.add("usermod")
    monkeypatch.setenv("PATH", str(found.directory))
    monkeypatch.setattr(user, "SUDOERS", tmp_path / "sudoers.d" / "cml-runner")
    monkeypatch.setattr(user, "SUBORDINATES", tmp_path / "subuid")
    return found


def prepare(*, sudo: bool = False, isolated: bool = True) -> Account:
    return user.prepare(NOBODY, sudo=sudo, isolated=isolated)


def test_it_is_cut_off_from_the_metadata_service(tools: Tools, tmp_path: Path) -> None:
    """Whoever it may be in its containers, too."""
    (tmp_path / "subuid").write_text(f"other:1:2\n{NOBODY}:700000:65536\n{NOBODY}:5:0\n")
    for name in user.METADATA:
        tools.add(name, 'case "$*" in *-C*) exit 1;; esac')
    account = prepare()
    uid = pwd.getpwnam(NOBODY).pw_uid
    assert account.ids == (range(uid, uid + 1), range(700000, 765536))
    inserted = [call for call in tools.calls() if " -I " in call and "mangle" not in call]
    tail = "-p tcp --dport 80 -j REJECT"
    assert inserted == [
        f"{tool} -w -I OUTPUT -d {address} -m owner --uid-owner {span} {tail}"
        for tool, address in user.METADATA.items()
        for span in (f"{uid}-{uid}", "700000-765535")
    ]


def test_containers_are_cut_off_as_well(tools: Tools) -> None:
    for name in user.METADATA:
        tools.add(name, 'case "$*" in *-C*) exit 1;; esac')
    prepare()
    inserted = [call for call in tools.calls() if " -I " in call and "mangle" in call]
    assert inserted == [
        f"{tool} -w -t mangle -I FORWARD -d {address} -p tcp --dport 80 -j DROP"
        for tool, address in user.METADATA.items()
    ]


def test_where_containers_can_not_be_cut_off_this_is_told(
    tools: Tools, caplog: pytest.LogCaptureFixture
) -> None:
    for name in user.METADATA:
        tools.add(name, 'case "$*" in *mangle*) exit 3;; esac')
    prepare()
    assert "containers can reach the metadata service" in caplog.text


def test_a_rule_is_not_set_twice(tools: Tools) -> None:
    for name in user.METADATA:
        tools.add(name)
    prepare()
    assert not [call for call in tools.calls() if " -I " in call]


def test_nft_will_do_as_well(tools: Tools) -> None:
    tools.add("nft")
    prepare()
    uid = pwd.getpwnam(NOBODY).pw_uid
    who = f"meta skuid {{ {uid}-{uid} }} tcp dport 80"
    text = "\n".join(tools.calls())
    assert f"{who} ip daddr 169.254.169.254 reject" in text
    assert f"{who} ip6 daddr fd00:ec2::254 reject" in text
    assert "cml_runner forward tcp dport 80 ip daddr 169.254.169.254 drop" in text


def test_what_was_promised_is_kept_or_refused(
    tools: Tools, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RunnerError, match="neither iptables nor nft is here"):
        prepare()
    prepare(isolated=False)
    assert "jobs can reach the metadata service" in caplog.text
    tools.add("iptables", "echo not here >&2; exit 3")
    with pytest.raises(RunnerError, match="not here"):
        prepare()


def test_sudo_comes_and_goes(tools: Tools) -> None:
    tools.add("nft")
    assert prepare(sudo=True).sudo
    lets, keeps = user.SUDOERS.read_text().splitlines()
    assert lets == f"{NOBODY} ALL=(ALL:ALL) NOPASSWD:ALL"
    assert keeps.startswith(f'Defaults:{NOBODY} env_keep += "HTTPS_PROXY HTTP_PROXY NO_PROXY ')
    assert stat.S_IMODE(user.SUDOERS.stat().st_mode) == 0o440
    assert list(user.SUDOERS.parent.iterdir()) == [user.SUDOERS]
    assert not prepare().sudo
    assert not user.SUDOERS.exists()


def test_an_account_of_the_image_that_can_become_root_is_refused(tools: Tools) -> None:
    tools.add("nft")
    tools.add("sudo", f"echo User {NOBODY} is not allowed to run sudo on here.")
    prepare()
    assert f"sudo -n -l -U {NOBODY}" in tools.calls()
    tools.add("sudo", f"echo User {NOBODY} may run the following commands on here:")
    with pytest.raises(RunnerError, match=f"{NOBODY} can become root: sudo lets it"):
        prepare()
    with pytest.raises(RunnerError, match=r"root can become root: .*it is root"):
        user.prepare("root", sudo=False, isolated=True)


def test_an_account_that_cannot_be_made(tools: Tools) -> None:
    tools.add("useradd", "echo no room >&2; exit 12")
    with pytest.raises(RunnerError, match=r"no room \(exit code 12\)"):
        user.prepare("nobody-of-this-name", sudo=True, isolated=False)
    (call,) = tools.calls()
    assert call.startswith("useradd --create-home")
    assert call.endswith(" nobody-of-this-name")


# With another account, which needn't be in the list of accounts


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory to which every account can get."""
    if os.geteuid():
        pytest.skip("needs root")
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.lab
def test_links_are_given_but_not_followed(shared: Path) -> None:
    (shared / "ours").write_text("ours")
    work = shared / "work"
    (work / "deep").mkdir(parents=True)
    (work / "deep" / "file").touch()
    (work / "link").symlink_to(shared / "ours")
    (work / "way").symlink_to(shared)
    STRANGER.own(work)
    given = (work, work / "deep", work / "deep" / "file", work / "link", work / "way")
    assert all(STRANGER.owns(path) for path in given)
    assert (shared / "ours").stat().st_uid == shared.stat().st_uid == 0
    (work / "new").touch()
    STRANGER.own(work)  # by now its jobs may have changed what is there
    assert not STRANGER.owns(work / "new")


@pytest.mark.lab
def test_an_agent_is_somebody_else(shared: Path) -> None:
    secret = shared / "settings"
    secret.write_text("secret")
    secret.chmod(0o600)
    process, events = start(
        shared / "work", f"id -u; id -G; echo $HOME $USER; cat {secret} || echo no"
    )
    process.wait(10)
    process.stop(1)
    said = [getattr(event, "message", "") for event in list(events.queue)]
    assert said[:3] == [str(UID), str(UID), "/nonexistent stranger"]
    assert said[-2] == "no"


@pytest.mark.lab
def test_nothing_that_it_started_survives(shared: Path) -> None:
    """Wherever it went: into a session of its own, or to another of its identifiers."""
    run = "setsid sh -c 'trap \"\" TERM HUP; echo $$ > {}; sleep 600 & wait' &"
    process, _ = start(shared / "work", f"{run.format('one')} {run.format('two')} sleep 600")
    other = psutil.Popen(["/bin/sleep", "600"], user=SUBORDINATES[7], start_new_session=True)
    files = [shared / "work" / name for name in ("one", "two")]
    until(lambda: all(one.exists() and one.read_text() for one in files), "them", 10, 0.02)
    process.stop(0.2)
    assert other.wait(10) < 0
    left = [one for one in psutil.process_iter(["uids"]) if one.info["uids"].real == UID]
    assert all(one.status() == psutil.STATUS_ZOMBIE for one in left)


def start(directory: Path, script: str) -> tuple[Process, queue.Queue[Event]]:
    directory.mkdir()
    events: queue.Queue[Event] = queue.Queue()
    command = Command(arguments=("/bin/sh", "-c", script), directory=directory)
    return Process(cast("Agent", Talker()), command, (), events, STRANGER), events
