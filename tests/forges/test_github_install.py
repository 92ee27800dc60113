"""GitHub's runner program comes onto a machine, or nothing of it does."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from cml_runner import web
from cml_runner.errors import AgentFailed
from cml_runner.forges.github import Agent, Forge, install
from cml_runner.model import Credential, Package

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lab.github import GitHub

DOWNLOADS = "/_downloads/.*"
OTHERS = ("externals", "work")  # in the home of an image's user


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(web, "time", SimpleNamespace(sleep=lambda _: None))


@pytest.fixture
def packages(gh: GitHub) -> list[Package]:
    return _packages(gh)


def _packages(gh: GitHub) -> list[Package]:
    return Forge(f"{gh.url}/owner/repo", Credential(token=gh.add_token("repo"))).packages()


def _version(directory: Path) -> str:
    program = str(directory / "bin" / "Runner.Listener")
    return subprocess.check_output([program, "--version"], text=True).strip()


def _left(path: Path) -> list[str]:
    names = {one.name for one in path.iterdir()} if path.exists() else set()
    return sorted(names - {web.LOCK})


def test_install(gh: GitHub, packages: list[Package], tmp_path: Path, home: Path) -> None:
    directory = tmp_path / "deep" / "inside"
    assert Agent().install(directory, packages) == "2.337.0"
    assert _version(directory) == "2.337.0"
    assert Agent().install(directory, packages) == "2.337.0"
    assert Agent().install(tmp_path / "other", packages) == "2.337.0"
    assert _version(tmp_path / "other") == "2.337.0"
    assert len(gh.asked("GET", DOWNLOADS)) == 1
    assert _left(home / "agents") == ["actions-runner-linux-x64-2.337.0.tar.gz"]
    assert _left(directory) == [".cml-runner-version", "bin", "config.sh", "run.sh"]


def test_a_newer_version(gh: GitHub, packages: list[Package], tmp_path: Path, home: Path) -> None:
    Agent().install(tmp_path, packages)
    (tmp_path / "_work").mkdir()
    (tmp_path / "bin" / "old").touch()
    gh.version = "2.340.0"
    assert Agent().install(tmp_path, _packages(gh)) == "2.340.0"
    assert _version(tmp_path) == "2.340.0"
    assert not (tmp_path / "bin" / "old").exists()
    assert (tmp_path / "_work").exists()
    assert _left(home / "agents") == ["actions-runner-linux-x64-2.340.0.tar.gz"]


@pytest.mark.parametrize(
    ("machine", "arch"), [("amd64", "x64"), ("aarch64", "arm64"), ("arm64", "arm64")]
)
def test_architecture(
    packages: list[Package],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    arch: str,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    Agent().install(tmp_path, packages)
    assert (tmp_path / "bin" / "stand-in").read_text() == f"2.337.0 {arch}\n"


@pytest.mark.parametrize(("machine", "system"), [("riscv64", "linux"), ("x86_64", "darwin")])
def test_other_machines(
    packages: list[Package],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    system: str,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("sys.platform", system)
    with pytest.raises(AgentFailed, match="offers linux-x64, linux-arm64"):
        Agent().install(tmp_path, packages)
    with pytest.raises(AgentFailed, match="offers nothing"):
        Agent().install(tmp_path, [])


def test_wrong_checksum(gh: GitHub, tmp_path: Path, home: Path) -> None:
    gh.checksum = "f" * 64
    with pytest.raises(AgentFailed, match="is not what GitHub says"):
        Agent().install(tmp_path, _packages(gh))
    assert (_left(tmp_path), _left(home / "agents")) == ([], [])
    gh.checksum = ""
    Agent().install(tmp_path, _packages(gh))


def test_a_spoilt_cache(gh: GitHub, packages: list[Package], tmp_path: Path, home: Path) -> None:
    Agent().install(tmp_path / "a", packages)
    kept = next((home / "agents").glob("actions-*"))
    kept.write_bytes(b"spoilt")
    (home / "agents" / ".part-stale").touch()
    Agent().install(tmp_path / "b", packages)
    assert _version(tmp_path / "b") == "2.337.0"
    assert _left(home / "agents") == [kept.name]


def test_no_such_file(gh: GitHub, packages: list[Package], tmp_path: Path, home: Path) -> None:
    gh.fault("GET", DOWNLOADS, 9, status=404)
    with pytest.raises(AgentFailed, match="status 404"):
        Agent().install(tmp_path, packages)
    assert len(gh.asked("GET", DOWNLOADS)) == 1
    assert (_left(tmp_path), _left(home / "agents")) == ([], [])


def test_passing_faults(gh: GitHub, packages: list[Package], tmp_path: Path) -> None:
    gh.fault("GET", DOWNLOADS, status=503)
    gh.fault("GET", DOWNLOADS, drop=True)
    Agent().install(tmp_path, packages)
    assert _version(tmp_path) == "2.337.0"


def test_lasting_faults(gh: GitHub, packages: list[Package], tmp_path: Path, home: Path) -> None:
    gh.fault("GET", DOWNLOADS, 9, drop=True)
    with pytest.raises(AgentFailed, match=r"can't be downloaded: http://127\.0\.0\.1"):
        Agent().install(tmp_path, packages)
    assert len(gh.asked("GET", DOWNLOADS)) == 3
    assert (_left(tmp_path), _left(home / "agents")) == ([], [])


def test_a_full_disk(packages: list[Package], tmp_path: Path, home: Path) -> None:
    """A limit on the size of files stands for the disk's."""
    code = """if True:
        import resource, sys
        from cml_runner.errors import AgentFailed
        from cml_runner import web
        from cml_runner.forges.github import Agent
        from cml_runner.model import Package
        from pathlib import Path
        web.ARCHES = dict.fromkeys(("x86_64", "aarch64", "arm64"), "x64")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        directory, url, sha256 = sys.argv[1:]
        package = Package(version="1.2.3", arch="x64", url=url, sha256=sha256)
        try:
            Agent().install(Path(directory), [package])
        except AgentFailed as error:
            print(error)
    """
    arguments = [str(tmp_path / "a"), packages[0].url, packages[0].sha256]
    command = [sys.executable, "-B", "-c", code, *arguments]  # or it spoils its modules
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert (_left(tmp_path / "a"), _left(home / "agents")) == ([], [])


def test_no_place_to_keep_it(packages: list[Package], tmp_path: Path, home: Path) -> None:
    home.parent.mkdir(exist_ok=True)
    home.write_text("a file, where a directory should be")
    with pytest.raises(AgentFailed, match="can't be installed"):
        Agent().install(tmp_path, packages)


def test_many_at_once(gh: GitHub, packages: list[Package], tmp_path: Path, home: Path) -> None:
    places = [tmp_path / str(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda place: Agent().install(place, packages), places))
    assert versions == ["2.337.0"] * 8
    assert {_version(place) for place in places} == {"2.337.0"}
    assert len(gh.asked("GET", DOWNLOADS)) == 1
    assert _left(home / "agents") == ["actions-runner-linux-x64-2.337.0.tar.gz"]


def _keep(home: Path, package: Package, name: str, link: str = "") -> Package:
    """Put an archive into the cache, with one file of that name or a link to there."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
        tar.addfile(entry, io.BytesIO())
    agents = home / "agents"
    agents.mkdir(parents=True)
    (agents / f"actions-runner-linux-x64-{package.version}.tar.gz").write_bytes(content.getvalue())
    return replace(package, sha256=hashlib.sha256(content.getvalue()).hexdigest())


@pytest.mark.parametrize(("name", "link"), [("../../escaped", ""), ("bin", "/etc")])
def test_an_archive_that_leads_out(
    packages: list[Package], tmp_path: Path, home: Path, name: str, link: str
) -> None:
    if link and not hasattr(tarfile, "data_filter"):
        pytest.skip("this early Python unpacks such a link, though nothing through it")
    package = _keep(home, packages[0], name, link)
    with pytest.raises(AgentFailed, match="can't be installed"):
        Agent().install(tmp_path / "a" / "b", [package])
    assert _left(tmp_path / "a" / "b") == []
    assert _left(tmp_path) == ["a"]


def test_an_old_python(
    packages: list[Package], tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    Agent().install(tmp_path / "a", packages)
    assert _version(tmp_path / "a") == "2.337.0"
    shutil.rmtree(home / "agents")
    package = _keep(home, packages[0], "../../escaped")
    with pytest.raises(AgentFailed, match="can't be installed"):
        Agent().install(tmp_path / "b" / "c", [package])
    assert _left(tmp_path / "b" / "c") == []


@pytest.fixture
def image(gh: GitHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of the user of a container image which brings an old version."""
    gh.version = "2.336.0"
    home = tmp_path / "home"
    Agent().install(home, _packages(gh))
    (home / install.MARK).unlink()
    for name in OTHERS:
        (home / name).mkdir(exist_ok=True)
    gh.version = "2.337.0"
    gh.requests.clear()
    monkeypatch.setattr(install, "BROUGHT", home)
    return home


def test_what_an_image_brings_is_not_downloaded(
    gh: GitHub, packages: list[Package], image: Path
) -> None:
    directory = image / "work" / "mine"  # inside: it must not copy itself
    assert Agent().install(directory, packages) == "2.336.0"
    assert gh.asked("GET", DOWNLOADS) == []
    assert _version(directory) == "2.336.0"
    assert _left(directory) == [install.MARK, "bin", "externals"]
    assert (directory / "externals").resolve() == image / "externals"


def test_an_engine_elsewhere_has_to_see_it(
    packages: list[Package], image: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:2375")
    Agent().install(tmp_path / "mine", packages)
    assert not (tmp_path / "mine" / "externals").is_symlink()
    assert (image / "externals").is_dir()


def test_what_an_image_brings_is_replaced_once_it_is_refused(
    gh: GitHub, image: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "mine"
    Agent().install(directory, _packages(gh))
    assert Agent().install(directory, _packages(gh)) == "2.337.0"
    assert _version(directory) == "2.337.0"
    assert _version(image) == "2.336.0"
    assert (image / "externals").is_dir()
