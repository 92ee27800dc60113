"""What machines cost, as clouds tell."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest

from cml_runner import steps
from cml_runner.errors import RunnerError
from cml_runner.model import Bill, Identifier, Machine, Quote, Status, Task
from cml_runner.store import PRICE, status
from tests.lab.aws.oracle import PRICES as LISTED
from tests.lab.azure.retail import PRICES, SPOT
from tests.lab.gcp import billing

if TYPE_CHECKING:
    from pathlib import Path

    from tests.clouds.aws_rig import AwsRig
    from tests.clouds.azure_rig import AzureRig
    from tests.clouds.gcp_rig import GcpRig
    from tests.conftest import Cli

SPOT_ACTION = "ec2:DescribeSpotPriceHistory"


def test_aws_on_demand(aws_rig: AwsRig) -> None:
    task = replace(aws_rig.task(), machine=Machine())
    found = {one.type: one for one in aws_rig.cloud.quotes(task)}
    for name, price in LISTED.items():
        assert found[name] == Quote(type=name, price=price, on_demand=price)
    assert found["m8i.2xlarge"].price is None, "it isn't sold here"


def test_aws_spot(aws_rig: AwsRig) -> None:
    task = replace(aws_rig.task(), machine=Machine(types=("m7i.2xlarge",), spot=True))
    (found,) = aws_rig.cloud.quotes(task)
    assert found.price
    assert found.price > 0
    assert found.on_demand == LISTED["m7i.2xlarge"]


def test_aws_where_prices_may_not_be_asked(
    aws_rig: AwsRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = aws_rig.aws.add_user({"Version": "2012-10-17", "Statement": []})
    for name, value in aws_rig.aws.environment(user).items():
        monkeypatch.setenv(name, value)
    task = replace(aws_rig.task(), machine=Machine(types=("m7i.2xlarge",), spot=True))
    cloud = type(aws_rig.cloud)("us-west")
    assert cloud.quotes(task) == [Quote(type="m7i.2xlarge", price=None)]


@pytest.mark.parametrize("spot", [False, True])
def test_azure(azure_rig: AzureRig, spot: bool) -> None:
    task = replace(azure_rig.task(), machine=Machine(spot=spot))
    found = {one.type: one for one in azure_rig.cloud.quotes(task)}
    for name in ("Standard_D8as_v5", "Standard_D8s_v5"):
        listed = PRICES[name]
        assert found[name].on_demand == listed, "neither Windows' nor that of another market"
        assert found[name].price == pytest.approx(listed * SPOT if spot else listed)
    assert found["Standard_D8s_v4"] == Quote(type="Standard_D8s_v4", price=None)


def test_azure_without_an_answer(azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_RETAIL_PRICES_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunnerError, match="prices aren't known"):
        azure_rig.cloud.quotes(azure_rig.task())


def test_a_launch_that_would_cost_too_much_makes_nothing(
    cli: Cli, aws_rig: AwsRig, tmp_path: Path
) -> None:
    (tmp_path / "forge").mkdir()
    where = ("launch", "--cloud", "aws", "--repo", (tmp_path / "forge").as_uri(), "--count", "2")
    env = aws_rig.aws.environment()
    before = len(aws_rig.aws.app.calls)
    done = cli.run(*where, "--max-price", "0.9", "--no-wait", environment=env, code=6)
    assert "us-west: 0.9274 USD an hour, more than --max-price 0.9" in done.err
    assert aws_rig.aws.left() == []
    made = [one for one in aws_rig.aws.app.calls[before:] if "Create" in one.action]
    assert made == []
    planned = cli.run(*where, "--dry-run", environment=env)
    assert planned.json["pricePerHour"] == pytest.approx(2 * 0.46368)
    assert "0.9274 USD an hour" in planned.err
    cli.run(*where, "--max-price", "1", "--no-wait", environment=env)
    assert aws_rig.aws.left() != []


def test_what_a_runner_has_cost(cli: Cli, aws_rig: AwsRig, tmp_path: Path) -> None:
    (tmp_path / "forge").mkdir()
    where = ("--cloud", "aws", "--cloud-region", "us-west-2")
    repo, env = (tmp_path / "forge").as_uri(), aws_rig.aws.environment()
    launched = cli.run("launch", *where, "--repo", repo, "--no-wait", environment=env).json
    plan = aws_rig.cloud.plan(Task(id=Identifier.parse(launched["id"])))
    began = datetime.now(timezone.utc) - timedelta(hours=2)
    plan.bucket.store.save(PRICE, Bill(price=0.5, since=began))
    (row,) = cli.run("list", *where, "--output", "json", environment=env).json
    assert (row["pricePerHour"], row["cost"]) == (0.5, pytest.approx(1, abs=0.01))
    assert cli.run("list", *where, environment=env).out.rstrip().endswith("~1.00 USD")
    ended = Status(state="ended", at=began + timedelta(hours=1), since=began, runner="one")
    plan.bucket.store.save(status(0), ended)
    steps.delete([one for one in plan.resources if one is not plan.bucket])
    plan.bucket.finish()  # type: ignore[attr-defined]
    shown = cli.run("show", launched["id"], *where, "--output", "json", environment=env).json
    assert shown["over"]
    assert shown["cost"] == pytest.approx(0.5, abs=0.001), "until it was last heard of"


def test_one_cloud_with_expired_credentials_hides_no_other(
    cli: Cli, aws_rig: AwsRig, tmp_path: Path
) -> None:
    (tmp_path / "forge").mkdir()
    local = ("launch", "--repo", (tmp_path / "forge").as_uri(), "--cloud", "local", "--name", "one")
    cli.run(*local)
    user = aws_rig.aws.add_user()
    aws_rig.aws.app.principals[user["id"]].expired = True
    done = cli.run("list", "--output", "json", environment=aws_rig.aws.environment(user))
    assert [row["name"] for row in done.json] == ["one"]
    assert "aws us-west" in done.err
    assert "expired" in done.err
    cli.run("destroy", "one")


def test_google_cloud(gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch) -> None:
    task = replace(gcp_rig.task(), machine=Machine(types=("n2-standard-8",), spot=True))
    assert gcp_rig.cloud.quotes(task) == [], "nobody knows without a key"
    monkeypatch.setenv("GCP_BILLING_API_KEY", billing.KEY)
    (found,) = gcp_rig.cloud.quotes(task)
    listed = 8 * 0.031611 + 32 * 0.004237
    assert found.on_demand == pytest.approx(listed)
    assert found.price == pytest.approx(listed * billing.SPOT)


def test_google_cloud_with_a_gpu(gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCP_BILLING_API_KEY", billing.KEY)
    task = replace(gcp_rig.task(), machine=Machine(types=("n1-standard-4+nvidia-tesla-t4*1",)))
    (found,) = gcp_rig.cloud.quotes(task)
    assert found.price == pytest.approx(4 * 0.031611 + 16 * 0.004237 + 0.35)


def test_google_cloud_with_a_wrong_key(gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCP_BILLING_API_KEY", "wrong")
    with pytest.raises(RunnerError, match="GCP_BILLING_API_KEY") as caught:
        gcp_rig.cloud.quotes(gcp_rig.task())
    assert "wrong" not in str(caught.value)
