"""The lab as a fixture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.lab.prepare import SUITES
from tests.lab.region import missing
from tests.lab.stage import PLACES, opened

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.stage import Stage

PREPARED = Path(os.environ.get("LAB_DIRECTORY", "/nonexistent"))


@pytest.fixture
def suite() -> str:
    """The release of Debian that machines run."""
    return next(iter(SUITES))


@pytest.fixture
def forge() -> str:
    """The forge for which runners are launched."""
    return "github"


@pytest.fixture(params=PLACES)
def stage(
    request: pytest.FixtureRequest, tmp_path: Path, suite: str, forge: str
) -> Iterator[Stage]:
    """A region of each cloud, whose launcher may do no more than our own policy says."""
    if reason := missing(PREPARED):
        pytest.skip(f"the lab {reason}")
    with opened(request.param, PREPARED, tmp_path, suite, forge) as found:
        yield found
