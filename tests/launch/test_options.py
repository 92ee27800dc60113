from __future__ import annotations

import base64
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest

from cml_runner.errors import ConfigurationError
from cml_runner.launch.options import Options, Order, read
from cml_runner.model import Identifier

if TYPE_CHECKING:
    from pathlib import Path

REPO = "https://github.com/acme/model"


def order(**more: object) -> Order:
    return read(Options(repo=REPO, token="t", **more), {})  # type: ignore[arg-type]


def test_defaults_are_those_of_the_predecessor() -> None:
    found = order()
    assert found.labels == ("cml",)
    assert (found.idle_timeout, found.count, found.regions) == (300, 1, ("us-west",))
    assert (found.machine.types, found.machine.disk) == (("m",), 35)
    assert found.expires
    lifetime = found.expires - datetime.now(timezone.utc)
    assert timedelta(days=4, hours=23) < lifetime <= timedelta(days=5)
    assert found.retry
    assert found.access.url == REPO


def test_the_default_name_is_the_identifier() -> None:
    found = order()
    assert found.names == (found.name,)
    assert Identifier.parse(found.name) == found.id
    assert found.id.name == "model"
    assert found.id != order().id


def test_a_name_has_one_identifier_for_each_repository() -> None:
    assert order(name="gpu").id == order(name="gpu").id
    other = read(Options(repo="https://github.com/acme/other", name="gpu"), {})
    assert order(name="gpu").id != other.id


def test_several_machines_are_numbered() -> None:
    assert order(name="gpu", cloud="local", count="3").names == ("gpu-0", "gpu-1", "gpu-2")


def test_lists_and_pairs() -> None:
    found = order(
        labels=" gpu , big,",
        cloud="local",
        cloud_region="us-east,eu-west",
        cloud_type="xl,l",
        cloud_metadata=("team=ml", "note=a=b"),
        cloud_kubernetes_node_selector=("a=b", "c=d"),
    )
    assert found.labels == ("gpu", "big")
    assert found.regions == ("us-east", "eu-west")
    assert found.machine.types == ("xl", "l")
    assert found.tags == {"team": "ml", "note": "a=b"}
    assert found.machine.options == {"kubernetes-node-selector": "a=b,c=d"}


@pytest.mark.parametrize("text", ["never", "-1", "0"])
def test_never(text: str) -> None:
    found = order(idle_timeout=text, max_lifetime=text, wait_timeout=text)
    assert (found.idle_timeout, found.expires) == (0, None)
    assert found.wait_timeout == float("inf")


def test_the_startup_script_as_text_and_as_a_file(tmp_path: Path) -> None:
    script = "#!/bin/sh\necho 'ünï'"
    (tmp_path / "script").write_text(script)
    assert order(cloud_startup_script=f"@{tmp_path}/script").startup == script
    encoded = base64.b64encode(script.encode()).decode()
    assert order(cloud_startup_script=encoded).startup == script


def test_old_and_useless_flags_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    order(tpi_version="0.9", cml_version="0.20", cloud_spot=True, cloud_gpu="tesla")
    for text in (
        "--tpi-version has no effect",
        "--cml-version has no effect",
        "--cloud-spot has no effect without --cloud",
        "tesla is taken for v100",
    ):
        assert text in caplog.text


def test_nothing_secret_is_shown() -> None:
    secret = Options(token="s3cret", github_app_key="s3cret", cloud_ssh_private="s3cret", repo=REPO)
    assert "s3cret" not in repr(secret)
    assert "s3cret" not in repr(order(github_app_id="1", github_app_key="PRIVATE KEY s3cret"))


def test_every_mistake_is_told() -> None:
    with pytest.raises(ConfigurationError) as caught:
        order(labels=",", single=True, reuse_idle=True, count="x", cloud_spot_price="cheap")
    assert len(caught.value.mistakes) == 4
