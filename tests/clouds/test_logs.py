"""Logs that are followed, whatever becomes of their machines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cml_runner import inventory, steps
from cml_runner.errors import CredentialsError
from cml_runner.store import Log, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.clouds.aws_rig import AwsRig
    from tests.clouds.conftest import LocalRig

LOG = "log-000-000000.txt"


def following(cloud: str) -> Iterator[tuple[int, str]]:
    (found,) = inventory.tasks(cloud, "us-west")
    return inventory.logs(found, follow=True)


def test_a_log_grows_and_where_nobody_remembers_it_begins_anew(local_rig: LocalRig) -> None:
    plan = local_rig.launch(1)
    bucket = plan.bucket.store
    bucket.write(LOG, b"one\ntw")
    lines = following("local")
    assert next(lines) == (0, "one\n"), "no half lines"
    bucket.write(LOG, b"one\ntwo\n")
    assert next(lines) == (0, "two\n")
    bucket.write(LOG, b"another machine\n")  # as on Kubernetes, where a pod's log goes with it
    assert next(lines) == (0, "another machine\n")
    steps.delete(plan.resources)
    assert list(lines) == []


def test_a_long_log_is_read_once(local_rig: LocalRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "FOLLOW", 0.01)
    plan = local_rig.launch(1)
    log = Log(plan.bucket.store, 0)
    long = "a line of the log\n" * 50_000
    log.append(long)
    log.flush()
    sizes: list[int] = []
    read = Store.read

    def counted(self: Store, key: str) -> bytes | None:
        content = read(self, key)
        sizes.append(len(content or b""))
        return content

    monkeypatch.setattr(Store, "read", counted)
    lines = following("local")
    assert next(lines) == (0, long)
    for number in range(5):
        log.append(f"{number}\n")
        log.flush()
        assert next(lines) == (0, f"{number}\n")
    assert len(long) <= sum(sizes) < 2 * len(long)
    steps.delete(plan.resources)
    assert list(lines) == []


def test_a_cloud_that_is_away_for_a_moment(aws_rig: AwsRig) -> None:
    plan = aws_rig.launch(1)
    bucket = plan.bucket.store
    bucket.write(LOG, b"one\n")
    lines = following("aws")
    assert next(lines) == (0, "one\n")
    fault = aws_rig.aws.fail("s3:GetObject", "AccountProblem", times=2, status=400)
    bucket.write(LOG, b"one\ntwo\n")
    assert next(lines) == (0, "two\n")
    assert fault.times == 0
    for principal in aws_rig.aws.app.principals.values():
        principal.expired = True
    with pytest.raises(CredentialsError):
        next(lines)
