"""The lock of what machines install fits pyproject.toml; CI also makes it anew: .ci/lock."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNUSED = {"click", "rich", "truststore"}  # for people; for systems other than Linux
PIN = re.compile(
    r"^([a-z0-9-]+)==([^ ;\\]+)(?: ; ([^\\]+?))? *\\$((?:\n +--hash=\S+.*)+)", re.MULTILINE
)


def pins(name: str) -> list[tuple[str, str, str, list[str]]]:
    """Each package's name, version, marker and hashes."""
    text = (ROOT / "cml_runner" / "boot" / name).read_text()
    found = [(*one[:3], re.findall("sha256:[0-9a-f]{64}", one[3])) for one in PIN.findall(text)]
    assert len(found) == text.count("=="), "a line isn't understood"
    return [(name, version, marker.strip(), hashes) for name, version, marker, hashes in found]


@pytest.mark.parametrize("text", PROJECT["dependencies"])
def test_dependencies_are_locked(text: str) -> None:
    wanted = Requirement(text)
    name = canonicalize_name(wanted.name)
    versions = [version for one, version, *_ in pins("lock.txt") if one == name]
    assert bool(versions) != (name in UNUSED)
    assert all(wanted.specifier.contains(version) for version in versions)


def test_nothing_of_a_clouds_sdk_is_locked() -> None:
    extras = PROJECT["optional-dependencies"]
    sdks = {
        canonicalize_name(Requirement(one).name) for several in extras.values() for one in several
    }
    shared = {"cryptography", "cml-runner"}  # GitHub's library needs the one, "all" names the other
    locked = {name for name, *_ in pins("lock.txt")}
    assert locked & (sdks - shared) == set()
    assert not [
        name for name in locked if name.startswith(("azure", "boto", "google", "kubernetes"))
    ]


@pytest.mark.parametrize("name", ["lock.txt", "uv.txt"])
def test_every_pin_has_hashes_and_no_host(name: str) -> None:
    assert all(hashes for *_, hashes in pins(name))
    assert "://" not in (ROOT / "cml_runner" / "boot" / name).read_text()


def test_uv_is_locked_alone() -> None:
    ((name, _, marker, hashes),) = pins("uv.txt")
    assert (name, marker, len(hashes)) == ("uv", "", 4)  # two architectures, two C libraries
