from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from cml_runner.boot import trust

PEM = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----"
SYSTEM, ONE, TWO = (PEM.format(text) for text in ("c3lzdGVt", "b25l\nb25l", "dHdv"))


class Machine:
    """A machine with a store of certificates like Debian's, and a tool that renews it."""

    def __init__(self, root: Path) -> None:
        self.home, self.anchors = root / "etc" / "cml-runner", root / "anchors"
        self.bundle, self.calls = root / "bundle.crt", root / "calls"
        self.bin = root / "bin"
        self.bin.mkdir()
        for name in ("sh", "cat"):
            (self.bin / name).symlink_to(shutil.which(name) or name)
        self.anchors.mkdir()
        (root / "brought.crt").write_text(f"{SYSTEM}\n")
        self.bundle.write_text(f"{SYSTEM}\n")
        self.renews(f"cat {root}/brought.crt {self.anchors}/*.crt >{self.bundle}")

    def renews(self, script: str) -> None:
        tool = self.bin / "renew"
        tool.write_text(f"#!/bin/sh\necho renew >>{self.calls}\n{script}\n")
        tool.chmod(0o755)

    def install(self, pem: str) -> dict[str, str]:
        return trust.install(pem, self.home)

    @property
    def renewed(self) -> int:
        return len(self.calls.read_text().split()) if self.calls.exists() else 0


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(tmp_path)
    monkeypatch.setenv("PATH", str(found.bin))
    monkeypatch.setattr(
        trust, "STORES", ((tmp_path / "elsewhere", "other"), (found.anchors, "renew"))
    )
    monkeypatch.setattr(trust, "BUNDLES", (tmp_path / "none.crt", found.bundle))
    return found


def test_authorities_go_into_the_systems_store(machine: Machine) -> None:
    found = machine.install(f"# the company's\n{ONE}\n{TWO}\n")
    assert machine.bundle.read_text() == f"{SYSTEM}\n{ONE}\n{TWO}\n"
    assert [one.name for one in sorted(machine.anchors.iterdir())] == [
        "cml-runner-1.crt",
        "cml-runner-2.crt",
    ]
    own = machine.home / "authorities.pem"
    bundles = dict.fromkeys(trust.REPLACING, str(machine.bundle))
    assert found == {**bundles, "NODE_EXTRA_CA_CERTS": str(own)}
    assert own.read_text() == f"{ONE}\n{TWO}\n"
    assert stat.S_IMODE(own.stat().st_mode) == 0o644
    assert stat.S_IMODE(machine.home.stat().st_mode) == 0o755


def test_that_is_done_once_and_may_be_repeated(machine: Machine) -> None:
    found = machine.install(ONE + "\n")
    wrapped = machine.bundle.read_text().replace("b25l\nb25l", "b2\n5lb25l")
    machine.bundle.write_text(wrapped)
    assert machine.install(ONE) == found
    assert machine.renewed == 1
    machine.install(TWO)
    assert machine.bundle.read_text() == f"{SYSTEM}\n{TWO}\n"


def test_without_authorities_nothing_happens(machine: Machine) -> None:
    assert machine.install("") == machine.install("nothing") == {}
    assert not machine.home.exists()
    assert not machine.renewed


@pytest.mark.parametrize("script", ["echo full >&2; exit 3", ":", None])
def test_where_the_store_stays_as_it_is_we_have_one_of_our_own(
    machine: Machine, script: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if script is None:
        (machine.bin / "renew").unlink()
    else:
        machine.renews(script)
    found = machine.install(ONE)
    bundle = Path(found["SSL_CERT_FILE"])
    assert bundle == machine.home / "bundle.pem"
    assert trust.CERTIFICATE.findall(bundle.read_text()) == [SYSTEM, ONE]
    assert set(found) == {*trust.REPLACING, trust.ADDING}
    assert ("renew failed: full" in caplog.text) == bool(script and "full" in script)
    assert ("stays as it is" in caplog.text) == (script is None)


def test_a_system_without_any_certificates(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "STORES", ())
    monkeypatch.setattr(trust, "BUNDLES", ())
    found = machine.install(ONE)
    assert Path(found["REQUESTS_CA_BUNDLE"]).read_text().strip() == ONE


def test_a_directory_that_is_not_ours_to_make(machine: Machine, tmp_path: Path) -> None:
    """As in a container whose user isn't root."""
    (tmp_path / "file").touch()
    found = trust.install(ONE, tmp_path / "file" / "cml-runner")
    own = Path(found["NODE_EXTRA_CA_CERTS"])
    assert own.read_text() == f"{ONE}\n"
    assert stat.S_IMODE(own.parent.stat().st_mode) == 0o755
    shutil.rmtree(own.parent)


def test_proxies_have_two_spellings() -> None:
    assert trust.variables({}) == {}
    found = trust.variables({"HTTPS_PROXY": "http://proxy", "NO_PROXY": "a,b"})
    assert found == {
        "HTTPS_PROXY": "http://proxy",
        "https_proxy": "http://proxy",
        "NO_PROXY": "a,b",
        "no_proxy": "a,b",
    }


def test_variables_for_init_are_for_root_alone(tmp_path: Path) -> None:
    value = "http://me:p%40$&'()*+,;=~!ss@proxy:3128"
    old = os.umask(0)
    try:
        file = trust.keep({"HTTPS_PROXY": value, "A": 'a "b" \\ `c`'}, tmp_path / "new")
    finally:
        os.umask(old)
    assert file == tmp_path / "new" / "environment"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o755
    shell = f'. {file}; printf "%s\\n" "$HTTPS_PROXY" "$A"'  # init reads it as a shell would
    said = subprocess.run(["sh", "-c", shell], check=True, capture_output=True, text=True).stdout
    assert said.splitlines() == [value, 'a "b" \\ `c`']


def test_a_file_is_never_half_written(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="directory"):
        trust.write(tmp_path / "directory", "text", 0o644)
    assert [one.name for one in tmp_path.iterdir()] == ["directory"]
