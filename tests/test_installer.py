"""Which index this computer's installer uses, and what adds an extra to the running program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner import installer
from cml_runner.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

MIRROR = "https://mirror.example/simple"


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let this computer have no installer, as far as we can see; return where programs are."""
    monkeypatch.setattr(installer, "_pips_places", lambda _: [])
    monkeypatch.setitem(sys.modules, "pip._internal.models.index", None)
    monkeypatch.setattr("sysconfig.get_config_var", lambda _: str(tmp_path))
    monkeypatch.setattr(os, "__file__", str(tmp_path / "lib" / "os.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_none_is_found(nothing: Path) -> None:
    assert nothing
    with pytest.raises(ConfigurationError, match="--machine-index"):
        installer.default_index({})


def test_variables_come_first(nothing: Path) -> None:
    (nothing / "pip.conf").write_text("[global]\nindex-url = https://file.example/\n")
    found = {"PIP_CONFIG_FILE": str(nothing / "pip.conf")}
    assert installer.default_index(found) == "https://file.example/"
    for name in ("PIP_INDEX_URL", "UV_INDEX_URL", "UV_DEFAULT_INDEX"):
        found[name] = f"https://{name.lower()}/"
        assert installer.default_index(found) == found[name]
    found["UV_DEFAULT_INDEX"] = f"mirror={MIRROR}"
    assert installer.default_index(found) == MIRROR


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (".config/pip/pip.conf", f"[global]\nindex-url = {MIRROR}\n"),
        (".config/pip/pip.conf", f"[install]\nindex_url = {MIRROR}\n"),
        (".pip/pip.conf", f"[global]\ntimeout = 9\n[install]\nindex-url={MIRROR}\n"),
    ],
)
def test_pips_own_files(home: Path, file: str, content: str) -> None:
    place = home.parent / file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(content)
    assert installer.default_index({"HOME": str(home.parent)}) == MIRROR
    ignoring = {"HOME": str(home.parent), "PIP_CONFIG_FILE": os.devnull}
    assert installer.default_index(ignoring) != MIRROR


def test_a_file_that_is_broken_is_passed_over(nothing: Path) -> None:
    (nothing / "pip.conf").write_text("what is this?\n")
    found = {"PIP_CONFIG_FILE": str(nothing / "pip.conf"), "PIP_INDEX_URL": MIRROR}
    assert installer.default_index(found) == MIRROR


def test_pips_default() -> None:
    from pip._internal.models.index import PyPI

    assert installer.default_index({"PIP_CONFIG_FILE": os.devnull}) == PyPI.simple_url


def test_the_pip_that_python_brings(nothing: Path) -> None:
    with zipfile.ZipFile(nothing / "pip-26.whl", "w") as wheel:
        text = 'PyPI = PackageIndex("https://index.example/", file_storage_domain="files")\n'
        wheel.writestr("pip/_internal/models/index.py", text)
    assert installer.default_index({}) == "https://index.example/simple"


def test_the_pip_that_python_really_brings(nothing: Path) -> None:
    import ensurepip

    for file in (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"):
        shutil.copy(file, nothing)
        assert installer.default_index({}).endswith("/simple")
        return
    pytest.skip("this Python brings no pip")


def test_uvs_default(nothing: Path) -> None:
    help_ = f"--default-index\n  The default package index (by\n  default: <{MIRROR}>)\n"
    (nothing / "uv").write_text(f"#!/bin/sh\nprintf '%s' '{help_}'\n")
    (nothing / "uv").chmod(0o755)
    assert installer.default_index({}) == MIRROR


@pytest.mark.parametrize("login", ["me@", "me:secret@", "__token__:secret@"])
def test_no_login_is_handed_on(login: str) -> None:
    with pytest.raises(ConfigurationError, match="--machine-index") as error:
        installer.default_index({"PIP_INDEX_URL": f"https://{login}mirror.example/simple"})
    assert "secret@" not in str(error.value)


@pytest.mark.parametrize("index", ["file:///srv/index", "/srv/index", "mirror"])
def test_an_index_that_only_this_computer_has(index: str) -> None:
    with pytest.raises(ConfigurationError, match="--machine-index"):
        installer.default_index({"PIP_INDEX_URL": index})


# What adds an extra


class Environment:
    """A virtual environment with a copy of ours in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        python = (sys.executable, "-m", "venv", "--without-pip", directory)
        subprocess.run(python, check=True)
        self.python = directory / "bin" / "python"
        (self.site,) = (directory / "lib").glob("python3*/site-packages")
        self.packages = self.site / "cml_runner"

    def install(self, direct: Mapping[str, Any] | None, by: str = "pip") -> None:
        """Put our package there as an installer would."""
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(installer.PACKAGE, self.packages, ignore=ignored)
        self.describe(direct, by)

    def describe(self, direct: Mapping[str, Any] | None, by: str = "pip") -> None:
        """Say that it is installed."""
        info = self.site / "cml_runner-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cml-runner\nVersion: 0.1.0\n")
        (info / "INSTALLER").write_text(f"{by}\n")
        if direct is not None:
            (info / "direct_url.json").write_text(json.dumps(direct))

    def command(self, place: Path | None = None) -> str:
        """What the program there says."""
        script = "from cml_runner import installer; print(installer.command('aws'))"
        done = subprocess.run(
            [self.python, "-c", script],
            env={"PATH": f"{self.directory}/bin", "PYTHONPATH": str(place or "")},
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip().replace(str(self.directory), "ENV")


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "env")


ARCHIVE = "https://github.com/OWNER/cml-runner/archive/refs/heads/main.tar.gz"
GIT = "https://github.com/OWNER/cml-runner"


@pytest.mark.parametrize(
    ("direct", "told"),
    [
        (None, "'cml-runner[aws]'"),
        ({"url": "file:///a%20b", "dir_info": {}}, "'/a b[aws]'"),
        ({"url": ARCHIVE, "archive_info": {}}, f"'cml-runner[aws] @ {ARCHIVE}'"),
        (
            {"url": GIT, "vcs_info": {"vcs": "git", "commit_id": "01", "requested_revision": "v1"}},
            f"'cml-runner[aws] @ git+{GIT}@v1'",
        ),
        (
            {"url": GIT, "vcs_info": {"vcs": "git", "commit_id": "01"}, "subdirectory": "x"},
            f"'cml-runner[aws] @ git+{GIT}#subdirectory=x'",
        ),
        (
            {"url": "https://me:secret@host/x.zip", "archive_info": {}},
            "'cml-runner[aws] @ https://host/x.zip'",
        ),
    ],
    ids=["index", "directory", "archive", "revision", "subdirectory", "login"],
)
def test_pip(environment: Environment, direct: Mapping[str, Any] | None, told: str) -> None:
    environment.install(direct)
    assert environment.command() == f"ENV/bin/python -m pip install {told}"
    pip = environment.python.with_name("pip")
    pip.write_text("#!/bin/sh\n")
    pip.chmod(0o755)
    assert environment.command() == f"pip install {told}"


def test_an_editable_install(environment: Environment, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(installer.PACKAGE, checkout / "cml_runner")
    (environment.site / "cml_runner.pth").write_text(f"{checkout}\n")
    environment.describe({"url": checkout.as_uri(), "dir_info": {"editable": True}}, "uv")
    assert environment.command() == f"uv pip install --python ENV -e '{checkout}[aws]'"


def test_a_checkout_is_not_the_copy_that_is_installed(
    environment: Environment, tmp_path: Path
) -> None:
    environment.install({"url": ARCHIVE, "archive_info": {}})
    checkout = tmp_path / "checkout"
    shutil.copytree(installer.PACKAGE, checkout / "cml_runner")
    (checkout / "pyproject.toml").touch()
    told = environment.command(checkout)
    assert told == f"ENV/bin/python -m pip install -e '{checkout}[aws]'"


@pytest.mark.parametrize(
    ("note", "content", "told"),
    [
        (
            "uv-receipt.toml",
            f'[tool]\nrequirements = [{{ name = "cml-runner", url = "{ARCHIVE}" }}]\n',
            "uv tool install 'cml-runner[aws]",
        ),
        (
            "uv-receipt.toml",
            '[tool]\nrequirements = [{ name = "cml-runner", extras = ["gcp", "azure"] }]\n',
            "uv tool install 'cml-runner[aws,azure,gcp]",
        ),
        (
            "pipx_metadata.json",
            json.dumps({"main_package": {"package_or_url": f"cml-runner @ {ARCHIVE}"}}),
            "pipx install --force 'cml-runner[aws]",
        ),
        (
            "pipx_metadata.json",
            json.dumps({"main_package": {"package_or_url": f"cml-runner[gcp] @ {ARCHIVE}"}}),
            "pipx install --force 'cml-runner[aws,gcp]",
        ),
    ],
)
def test_tools(environment: Environment, note: str, content: str, told: str) -> None:
    environment.install({"url": ARCHIVE, "archive_info": {}}, "uv")
    (environment.directory / note).write_text(content)
    assert environment.command() == f"{told} @ {ARCHIVE}'"


def test_what_is_said_of_a_missing_package() -> None:
    said = installer.lacking("aws")
    assert said.startswith("aws needs more packages: ")
    assert "[aws]'" in said
