"""What `doctor` sees of clouds on which something is amiss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cml_runner.errors import CredentialsError, NoCapacity, NoCredentials
from tests.clouds.test_killed_launches import REGIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cml_runner.model import Check

LOGINS = (
    *("AWS_ACCESS_KEY_ID", "AZURE_CLIENT_ID", "AZURE_POD_IDENTITY_AUTHORITY_HOST"),
    "GOOGLE_APPLICATION_CREDENTIALS_DATA",
)
# A right that each cloud's launches need, as doctor names it.
RIGHTS = {
    "aws": "ec2:CreateLaunchTemplate",
    "azure": "Microsoft.Compute/virtualMachineScaleSets/write",
    "gcp": "compute.instanceTemplates.create",
}


@pytest.fixture(params=REGIONS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rig(request: pytest.FixtureRequest, name: str) -> Any:
    return request.getfixturevalue(f"{name}_rig")


@pytest.fixture
def far(rig: Any, name: str) -> Any:
    """The fake cloud."""
    return getattr(rig, name)


def look(rig: Any) -> dict[str, Check]:
    """Look anew at everything, as a new process would."""
    cloud = type(rig.cloud)(REGIONS[type(rig.cloud).__module__.rpartition(".")[2]])
    return {one.what: one for one in cloud.checks(rig.task())}


def be(far: Any, monkeypatch: pytest.MonkeyPatch, policy: Mapping[str, Any]) -> None:
    """Be somebody who may do this much."""
    for variable, value in far.environment(far.add_user(dict(policy))).items():
        monkeypatch.setenv(variable, value)


def without(policy: Any, right: str) -> Any:
    """Take a right out of a policy of any cloud."""
    if isinstance(policy, dict):
        return {key: without(value, right) for key, value in policy.items()}
    if isinstance(policy, list):
        return [without(one, right) for one in policy if one != right]
    return policy


def test_who_may_launch_is_told_so(rig: Any, far: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    be(far, monkeypatch, rig.cloud.permissions(doctor=True))
    found = look(rig)
    assert not [one for one in found.values() if one.state == "failed"], found
    assert found["permissions"].state == "ok"


def test_a_right_that_is_missing_is_named(
    rig: Any, far: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    be(far, monkeypatch, without(dict(rig.cloud.permissions(doctor=True)), RIGHTS[name]))
    found = look(rig)[f"permission {RIGHTS[name]}"]
    assert (found.state, found.code) == ("failed", CredentialsError.exit_code)
    assert f"cml-runner permissions {name}" in found.hint


def test_what_only_doctor_asks_hinders_nobody(
    rig: Any, far: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    be(far, monkeypatch, rig.cloud.permissions())
    assert not [one for one in look(rig).values() if one.state == "failed"]


def test_a_quota_that_is_used_up(rig: Any, far: Any, name: str) -> None:
    match name:
        case "aws":
            far.oracle.quotas = dict.fromkeys(far.oracle.quotas, 4.0)
        case "azure":
            far.manager.usages = dict.fromkeys(far.manager.usages, (0, 4))
        case "gcp":
            far.compute.quotas = dict.fromkeys(far.compute.quotas, (4.0, 4.0))
    wrong = [one for one in look(rig).values() if one.state == "failed"]
    assert {one.code for one in wrong} == {NoCapacity.exit_code}
    assert all("quota" in one.what and one.hint for one in wrong)


def test_a_clock_that_is_wrong(rig: Any, far: Any) -> None:
    far.app.ahead = 120
    found = look(rig)["clock"]
    assert found.state == "warning"
    assert "slow" in found.message
    assert "timedatectl" in found.hint


def test_no_credentials_at_all(rig: Any, far: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert far
    for variable in LOGINS:
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(NoCredentials):
        look(rig)


def test_nothing_is_set_up(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = request.getfixturevalue("aws_rig")
    found = {one.what: one for one in type(rig.cloud)("us-east").checks(rig.task())}
    missing = [one for one in found.values() if one.message == "it's missing"]
    assert [one.what.partition(" ")[0] for one in missing] == ["bucket", "security"]
    assert all("cml-runner setup aws --cloud-region us-east-1" in one.hint for one in missing)
