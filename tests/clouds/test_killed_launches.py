"""A launcher that dies at any of its calls leaves nothing that gc doesn't find, on any cloud."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner.forges.local import Forge

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.conftest import Cli

REGIONS = {"aws": "us-west-2", "azure": "westus2", "gcp": "us-west1"}
FEWEST = 7  # calls that any launch makes
MOST = 40


@pytest.fixture(params=REGIONS)
def place(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return ("--cloud", request.param, "--cloud-region", REGIONS[request.param])


@pytest.fixture
def far(request: pytest.FixtureRequest, place: tuple[str, ...]) -> Any:
    """The fake cloud."""
    cloud = place[1]
    return getattr(request.getfixturevalue(f"{cloud}_rig"), cloud)


@pytest.fixture
def environment(
    request: pytest.FixtureRequest, place: tuple[str, ...], far: Any, tmp_path: Path
) -> Mapping[str, str]:
    """Somebody who may do no more than launch."""
    (tmp_path / "forge").mkdir()
    rights = request.getfixturevalue(f"{place[1]}_rig").cloud.permissions()
    user = far.add_user(dict(rights))
    return {**far.environment(user), "CML_RUNNER_REPO": Forge(str(tmp_path / "forge")).url}


def killed(
    far: Any, cli: Cli, place: tuple[str, ...], environment: Mapping[str, str], last: int
) -> bool:
    """Kill the launcher when it makes its call of this number; False if it makes fewer."""
    calls = 0
    process = None

    def watch(_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == last and process:
            process.kill()

    process = cli.start("launch", *place, "--no-wait", environment=environment)
    far.app.watch = watch
    _, err = process.communicate(timeout=60)
    far.app.watch = lambda _: None
    assert process.returncode in (0, -signal.SIGKILL), err
    return process.returncode != 0


def test_a_launcher_that_is_killed_leaves_nothing_that_gc_does_not_find(
    far: Any, cli: Cli, place: tuple[str, ...], environment: Mapping[str, str]
) -> None:
    number = next(
        one for one in range(1, MOST) if not killed(far, cli, place, environment, last=one)
    )
    assert number > FEWEST
    assert far.left()
    cli.run("gc", *place, "--older-than", "0.001", environment=environment)
    assert far.left() == []
