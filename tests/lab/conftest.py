"""The lab as a fixture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.lab.prepare import SUITES
from tests.lab.region import Region, missing

if TYPE_CHECKING:
    from collections.abc import Iterator

PREPARED = Path(os.environ.get("LAB_DIRECTORY", "/nonexistent"))


@pytest.fixture
def suite() -> str:
    """The release of Debian that machines run."""
    return next(iter(SUITES))


@pytest.fixture
def forge() -> str:
    """The forge for which runners are launched."""
    return "github"


@pytest.fixture
def region(tmp_path: Path, suite: str, forge: str) -> Iterator[Region]:
    """A set-up account, whose launcher may do no more than our own policy says."""
    if reason := missing(PREPARED):
        pytest.skip(f"the lab {reason}")
    with Region(PREPARED, tmp_path, suite, forge) as found:
        done = found.cli("setup", "aws")
        assert done.returncode == 0, done.stderr
        policy = json.loads(found.cli("permissions", "aws").stdout)
        found.launcher = found.aws.add_user(policy)
        yield found
        refused = [one for one in found.aws.app.calls if "Unauthorized" in one.error]
        assert refused == []
