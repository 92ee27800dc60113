"""What installs packages on this computer: from which index, and how it installed us."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cml_runner.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.metadata import Distribution

PACKAGE = Path(__file__).parent
LOGIN = re.compile(r"://[^/\s]*@")
VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
SAY_WHICH = "say with --machine-index URL where machines get packages"


def default_index(environment: Mapping[str, str]) -> str:
    """Return the package index that this computer's own installer uses: machines use it, too.

    So a mirror that people have set up for themselves needs no option, and nobody's index is
    written into this program. Raises ConfigurationError if there is none that machines can use.
    """
    found = next(filter(None, (environment.get(name) for name in VARIABLES)), "")
    found = found or _of_pips_files(environment) or _of_pip() or _of_a_bundled_pip() or _of_uv()
    if not found:
        msg = f"no installer of this computer says which package index it uses: {SAY_WHICH}"
        raise ConfigurationError(msg)
    found = re.sub(r"^[\w-]+=", "", found)  # a name, as uv allows
    if reason := fault(found):
        msg = f"machines can't use the package index of this computer: {reason}; {SAY_WHICH}"
        raise ConfigurationError(msg)
    return found


def fault(index: str) -> str:
    """Say why machines can't use the package index at this address; empty if they can."""
    if LOGIN.search(index):
        return "its address contains a login, which machines can't keep secret"
    if not re.match(r"https?://[^/\s]+", index):
        return f"{index!r} is not the address of a server"
    return ""


def lacking(extra: str) -> str:
    """Say that packages of an extra of ours are missing, and how to add them."""
    return f"{extra} needs more packages: {command(extra)}"


def command(extra: str) -> str:
    """Return the command that adds an extra to the running program, whatever installed that."""
    import shlex  # noqa: PLC0415

    distribution = _distribution()
    direct = json.loads((distribution and distribution.read_text("direct_url.json")) or "{}")
    if not distribution and (PACKAGE.parent / "pyproject.toml").is_file():
        direct = {"url": PACKAGE.parent.as_uri(), "dir_info": {"editable": True}}
    installer, extras = _installer(distribution)
    wanted = _requirement(direct, ",".join(sorted({*extras, extra})))
    editable = ["-e"] if direct.get("dir_info", {}).get("editable") else []
    return " ".join([installer, *editable, shlex.quote(wanted)])


def _of_pips_files(environment: Mapping[str, str]) -> str:
    """Read pip's configuration: https://pip.pypa.io/en/stable/topics/configuration."""
    import configparser  # noqa: PLC0415

    own = environment.get("PIP_CONFIG_FILE", "")
    if own == os.devnull:
        return ""
    for file in map(Path, filter(None, [own, *_pips_places(environment)])):
        parser = configparser.RawConfigParser()
        with suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read(file)
            for section in ("install", "global"):
                for key in ("index-url", "index_url"):
                    if found := parser.get(section, key, fallback=""):
                        return found
    return ""


def _pips_places(environment: Mapping[str, str]) -> list[str]:
    """List pip's files, the strongest first."""
    home = environment.get("HOME") or os.path.expanduser("~")
    user = environment.get("XDG_CONFIG_HOME") or f"{home}/.config"
    system = environment.get("XDG_CONFIG_DIRS") or "/etc/xdg"
    places = [f"{sys.prefix}/pip.conf", f"{user}/pip/pip.conf", f"{home}/.pip/pip.conf"]
    if sys.platform == "darwin":
        places.insert(1, f"{home}/Library/Application Support/pip/pip.conf")
        places.append("/Library/Application Support/pip/pip.conf")
    return [*places, "/etc/pip.conf", *(f"{one}/pip/pip.conf" for one in system.split(":"))]


def _of_pip() -> str:
    try:
        from pip._internal.models.index import PyPI  # noqa: PLC0415
    except Exception:  # pip isn't there, or is another one than we know
        return ""
    return str(PyPI.simple_url)


def _of_a_bundled_pip() -> str:
    """Look into the pip that Python gives to new environments."""
    import sysconfig  # noqa: PLC0415
    import zipfile  # noqa: PLC0415

    bundled = Path(os.__file__).parent / "ensurepip" / "_bundled"
    for place in (Path(sysconfig.get_config_var("WHEEL_PKG_DIR") or bundled), bundled):
        for file in place.glob("pip-*.whl"):
            with suppress(OSError, KeyError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
                text = archive.read("pip/_internal/models/index.py").decode()
                if found := re.search(r'PackageIndex\(\s*"(https://[^"]+)"', text):
                    return f"{found[1].rstrip('/')}/simple"
    return ""


def _of_uv() -> str:
    import subprocess  # noqa: PLC0415

    words = ["uv", "pip", "install", "--help"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
        if found := re.search(r"default package index[^<]*<(https?://[^>\s]+)>", done.stdout):
            return found[1]
    return ""


def _distribution() -> Distribution | None:
    """Find what the running package was installed as; not another copy on sys.path."""
    from importlib import metadata  # noqa: PLC0415

    with suppress(metadata.PackageNotFoundError):
        found = metadata.distribution("cml-runner")
        direct = found.read_text("direct_url.json") or ""
        if Path(str(found.locate_file("cml_runner"))) == PACKAGE or _editable_here(direct):
            return found
    return None


def _editable_here(direct: str) -> bool:
    return bool(direct) and json.loads(direct)["url"] == PACKAGE.parent.as_uri()


def _requirement(direct: Mapping[str, Any], extras: str) -> str:
    """Name our package with extras, by where it came from.

    https://packaging.python.org/en/latest/specifications/direct-url-data-structure
    """
    url = LOGIN.sub("://", direct.get("url", ""))
    if not url:
        return f"cml-runner[{extras}]"
    if "dir_info" in direct:
        from urllib.request import url2pathname  # noqa: PLC0415

        return f"{url2pathname(url.partition('://')[2])}[{extras}]"
    if found := direct.get("vcs_info"):
        revision = found.get("requested_revision")
        url = f"{found['vcs']}+{url}{f'@{revision}' if revision else ''}"
    if below := direct.get("subdirectory"):
        url += f"#subdirectory={below}"
    return f"cml-runner[{extras}] @ {url}"


def _installer(distribution: Distribution | None) -> tuple[str, list[str]]:
    """Name the program that installed us, with the extras that it would forget otherwise."""
    import shutil  # noqa: PLC0415

    prefix = Path(sys.prefix)
    for note, words, extras in (
        ("uv-receipt.toml", "uv tool install", r'name = "cml-runner", extras = \[([^\]]*)\]'),
        ("pipx_metadata.json", "pipx install --force", r'"package_or_url": "[^"[]*\[([^\]]*)\]'),
    ):
        if (prefix / note).is_file():
            found = re.search(extras, (prefix / note).read_text())
            return words, re.findall(r"[\w-]+", found[1]) if found else []
    if distribution and (distribution.read_text("INSTALLER") or "").strip() == "uv":
        return f"uv pip install --python {prefix}", []
    pip = shutil.which("pip")
    own = pip and Path(pip).parent == Path(sys.executable).parent
    return "pip install" if own else f"{sys.executable} -m pip install", []
