from __future__ import annotations

import os
import shutil
import stat
from typing import TYPE_CHECKING

import pytest

from cml_runner.boot import trust
from cml_runner.model import Identifier, Settings
from cml_runner.supervise import network
from cml_runner.supervise.process import scrubbed

if TYPE_CHECKING:
    from pathlib import Path

PEM = "-----BEGIN CERTIFICATE-----\nb25l\n-----END CERTIFICATE-----\n"
PROXIES = {"HTTPS_PROXY": "http://me:p%40ss@proxy:3128", "NO_PROXY": "169.254.169.254"}


def settings(user: str = "runner", authorities: str = "", **proxies: str) -> Settings:
    return Settings(
        id=Identifier.new("task"),
        driver="local",
        repo="",
        names=("a",),
        labels=(),
        user=user,
        authorities=authorities,
        proxies=proxies,
    )


@pytest.fixture(autouse=True)
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose init writes down what it is asked for, as root sees it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sh").symlink_to(shutil.which("sh") or "sh")
    script = f'echo "$@" >>{tmp_path}/calls; [ ! -e {tmp_path}/broken ]'
    for name in ("systemctl", "docker"):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "init").mkdir()
    names = (*trust.PROXIES, *map(str.lower, trust.PROXIES), *trust.REPLACING, trust.ADDING)
    for name in names:
        monkeypatch.setenv(name, "")  # or it would outlive this test
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(network, "INIT", tmp_path / "init")
    monkeypatch.setattr(network, "DROP_IN", tmp_path / "docker.service.d" / "cml-runner.conf")
    monkeypatch.setattr(trust, "STORES", ())
    monkeypatch.setattr(trust, "BUNDLES", ())
    for function in (trust.install, trust.keep):
        monkeypatch.setattr(function, "__defaults__", (tmp_path / "etc",))


def asked(tmp_path: Path) -> list[str]:
    calls = tmp_path / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


def test_it_holds_for_us_and_for_jobs(tmp_path: Path) -> None:
    network.set_up(settings(authorities=PEM, **PROXIES))
    bundle = str(tmp_path / "etc" / "bundle.pem")
    for seen in (os.environ, scrubbed(os.environ, ("ghp_secret",))):
        assert seen["https_proxy"] == seen["HTTPS_PROXY"] == PROXIES["HTTPS_PROXY"]
        assert seen["no_proxy"] == seen["NO_PROXY"] == "169.254.169.254"
        assert {seen[name] for name in trust.REPLACING} == {bundle}
        assert seen["NODE_EXTRA_CA_CERTS"] == str(tmp_path / "etc" / "authorities.pem")


def test_what_the_image_trusts_holds_for_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle.crt"
    bundle.write_text(PEM)
    monkeypatch.setattr(trust, "BUNDLES", (bundle,))
    network.set_up(settings())
    assert os.environ["REQUESTS_CA_BUNDLE"] == os.environ["SSL_CERT_FILE"] == str(bundle)
    assert not network.DROP_IN.exists()


def test_docker_knows_it_and_nobody_else(tmp_path: Path) -> None:
    network.set_up(settings(**PROXIES))
    file = tmp_path / "etc" / "environment"
    assert network.DROP_IN.read_text() == f"[Service]\nEnvironmentFile=-{file}\n"
    assert stat.S_IMODE(network.DROP_IN.stat().st_mode) == 0o644
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert f'https_proxy="{PROXIES["HTTPS_PROXY"]}"\n' in file.read_text()
    assert asked(tmp_path) == ["daemon-reload", "try-restart docker.service"]


def test_docker_that_is_yet_to_be_installed_will_know_it(tmp_path: Path) -> None:
    (tmp_path / "bin" / "docker").unlink()
    network.set_up(settings(**PROXIES))
    assert network.DROP_IN.exists()
    assert asked(tmp_path) == []


def test_a_machine_goes_on_without_docker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "broken").touch()
    network.set_up(settings(**PROXIES))
    assert "Docker may not reach what this machine reaches" in caplog.text


def test_a_container_has_no_init(tmp_path: Path) -> None:
    (tmp_path / "init").rmdir()
    network.set_up(settings(**PROXIES))
    assert os.environ["https_proxy"] == PROXIES["HTTPS_PROXY"]
    assert not network.DROP_IN.exists()


@pytest.mark.parametrize("quiet", [settings(), settings(user="", authorities=PEM, **PROXIES)])
def test_a_machine_of_somebodys_is_left_as_it_is(quiet: Settings, tmp_path: Path) -> None:
    network.set_up(quiet)
    assert not os.environ["https_proxy"]
    assert not os.environ["SSL_CERT_FILE"]
    assert not network.DROP_IN.exists()
    assert not (tmp_path / "etc").exists()


def test_logins_are_not_for_logs() -> None:
    found = network.secrets(settings(**PROXIES, HTTP_PROXY="http://you@proxy"))
    assert found == ("me:p%40ss", "p%40ss", "p@ss", "you")
    assert network.secrets(settings(HTTPS_PROXY="http://proxy")) == ()
