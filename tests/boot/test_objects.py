from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from cml_runner.boot import objects, web
from cml_runner.store import Store

if TYPE_CHECKING:
    from pathlib import Path


def test_a_lease_is_left_to_data_that_are_kept(tmp_path: Path) -> None:
    leases = Store(tmp_path.as_uri())
    for name, launched in (("kept", True), ("dead", False)):
        claim = {"keeps": True, "launched": launched, "expires": "2030-01-01T00:00:00Z"}
        leases.write(f"{name}.json", json.dumps(claim).encode())
        objects.finish(leases, name)
    assert leases.keys("") == ["kept.json"]
    assert json.loads(leases.read("kept.json") or b"")["expires"] is None


class Denied(Store):
    """A bucket for which the rights are gone."""

    status = 403

    def read(self, key: str) -> bytes | None:
        raise web.Refused("GET", self.status, key)

    def remove(self, keys: object) -> None:
        raise web.Refused("DELETE", self.status, str(keys))


def test_what_may_not_be_deleted_keeps_no_machine_alive(tmp_path: Path) -> None:
    denied = Denied(tmp_path.as_uri())
    objects.clear(denied)
    objects.finish(denied, "cml-x")
    denied.status = 503  # that is another matter: it may do a moment later
    with pytest.raises(web.Refused):
        objects.clear(denied)
    with pytest.raises(web.Refused):
        objects.finish(denied, "cml-x")
