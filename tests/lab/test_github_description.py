"""Every answer of the fake GitHub is one that GitHub's official description allows.

The npm package @octokit/openapi has the description: `npm pack @octokit/openapi`, unpack it, and
set GITHUB_DESCRIPTION=…/package/generated/ghec.json, the one which has enterprises and the dates
on which versions of the runner program cease to work.
"""

from __future__ import annotations

import json
import os
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt
import pytest
import requests
from openapi_schema_validator import OAS30Validator
from referencing import Registry
from referencing.jsonschema import DRAFT4

from tests.lab import github_api
from tests.lab.github import GitHub, Request, WorkflowJob

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE = os.environ.get("GITHUB_DESCRIPTION", "")
pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(not FILE, reason="GITHUB_DESCRIPTION doesn't name the description's file"),
]
UNKNOWN: dict[str, str] = {}  # path pattern -> why the description lacks it
SOME = {"name": "a", "runner_group_id": 1, "labels": ["self-hosted", "gpu"]}


@lru_cache(maxsize=1)
def description() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(FILE).read_text(), object_hook=_with_null)
    return content


def _with_null(node: dict[str, Any]) -> dict[str, Any]:
    """Let null be a value of an enumeration that is nullable; the description forgets it."""
    if node.get("nullable") is True and isinstance(node.get("enum"), list):
        node["enum"].append(None)
    return node


@lru_cache(maxsize=1)
def registry() -> Registry[Any]:
    found: Registry[Any] = Registry().with_resource(
        "urn:github", DRAFT4.create_resource(description())
    )
    return found


def resolved(node: Any) -> Any:
    """Follow a reference inside the description."""
    while "$ref" in node:
        where = node["$ref"].removeprefix("#/").split("/")
        node = description()
        for step in where:
            node = node[step.replace("~1", "/").replace("~0", "~")]
    return node


def operation(request: Request) -> dict[str, Any] | None:
    """Find what the description says about the request; literal paths come first."""
    templates = sorted(description()["paths"], key=lambda path: path.count("{"))
    for template in templates:
        pattern = re.sub(r"\{[^}]*\}", "[^/]+", template)
        found = description()["paths"][template]
        if request.method.lower() in found and re.fullmatch(pattern, request.path):
            whole: dict[str, Any] = found[request.method.lower()]
            return whole
    return None


def mistakes(request: Request) -> list[str]:
    """Say what is wrong with the answer to a request."""
    where = f"{request.method} {request.path} {request.status}"
    known = operation(request)
    if known is None:
        listed = any(re.fullmatch(pattern, request.path) for pattern in UNKNOWN)
        return [] if listed else [f"{where}: not in the description"]
    reply = known["responses"].get(str(request.status))
    if reply is None and request.status < 400:
        return [f"{where}: no such status"]
    error = {"$ref": "#/components/schemas/basic-error"}  # the answer to missing rights is implied
    content = resolved(reply).get("content", {}) if reply else {"json": {"schema": error}}
    if not content:
        return [] if request.answer is None else [f"{where}: should be empty"]
    schema = next(iter(content.values()))["schema"]
    validator = OAS30Validator(absolute(schema), registry=registry())
    wrong = [
        f"{where}: {one.json_path}: {one.message}" for one in validator.iter_errors(request.answer)
    ]
    if request.status < 400:  # GitHub's errors have more fields than are described
        wrong += [f"{where}: {key} is unknown" for key in unknown(schema, request.answer)]
    return wrong


def absolute(schema: Any) -> Any:
    """Make the references of a part of the description work outside it."""
    text = json.dumps(schema).replace('"#/components/', '"urn:github#/components/')
    return json.loads(text)


def unknown(schema: Any, value: Any) -> Iterator[str]:
    """Find fields which aren't described: a slip in an optional one's name shows only so."""
    schema = resolved(schema)
    fields = schema.get("properties")
    if isinstance(value, list):
        for item in value:
            yield from unknown(schema.get("items", {}), item)
    elif isinstance(value, dict) and fields and "additionalProperties" not in schema:
        yield from (key for key in value if key not in fields)
        for key in value.keys() & fields.keys():
            yield from unknown(fields[key], value[key])


class Caller:
    """Sends requests, each with a credential."""

    def __init__(self, gh: GitHub) -> None:
        self.gh = gh
        scopes = ("repo", "admin:org", "manage_runners:enterprise")
        self.token = gh.add_token(*scopes)

    def __call__(self, method: str, path: str, body: Any = None, token: str | None = None) -> Any:
        value = self.token if token is None else token
        headers = {"Authorization": f"Bearer {value}"} if value else {}
        url = f"{self.gh.api_url}{path}"
        answer = requests.request(method, url, json=body, headers=headers, timeout=10)
        return answer.json() if answer.content else None


@pytest.fixture
def gh() -> Iterator[GitHub]:
    with GitHub() as github:
        github.add_organisation("acme")
        github.add_repository("acme/train")
        github.add_enterprise("big", ["acme"])
        yield github


def use_runners(gh: GitHub, call: Caller, place: str) -> None:
    base = f"{place}/actions/runners"
    made = call("POST", f"{base}/generate-jitconfig", SOME)
    call("POST", f"{base}/generate-jitconfig", SOME)
    call("POST", f"{base}/generate-jitconfig", {"name": "b"})
    call("POST", f"{base}/generate-jitconfig", {**SOME, "name": "b", "runner_group_id": 99})
    call("POST", f"{base}/registration-token")
    call("POST", f"{base}/remove-token")
    call("GET", f"{base}?name=a&per_page=1")
    call("GET", f"{base}/downloads")
    call("GET", f"{base}/deprecations/2.331.0")
    call("GET", f"{base}/deprecations/2.337.0")
    call("GET", f"{base}/deprecations/9.9.9")
    one = f"{base}/{made['runner']['id']}"
    call("GET", one)
    runner = gh.runners()[-1]
    runner.job = gh.add_run("acme/train", [WorkflowJob("busy")]).jobs[0]
    runner.seen = time.monotonic()
    call("DELETE", one)
    runner.job = None
    call("DELETE", one)
    call("DELETE", one)
    if not place.startswith("/repos"):
        call("GET", f"{place}/actions/runner-groups")


def use_runs(gh: GitHub, call: Caller) -> None:
    jobs = [WorkflowJob("a"), WorkflowJob("b"), WorkflowJob("c", needs=["a"])]
    run = gh.add_run("acme/train", jobs)
    base = "/repos/acme/train/actions"
    job, whole = f"{base}/jobs/{run.jobs[0].id}", f"{base}/runs/{run.id}"
    runner = gh.register(run.repository, "r", ["self-hosted"])
    for result in ("Failed", "Succeeded"):
        call("POST", f"{job}/rerun")
        gh.next_message(runner, lambda: True)
        assert runner.job
        gh.start(runner.job)
        call("GET", job)
        call("GET", whole)
        call("GET", f"/repos/acme/train/check-runs/{runner.job.id}/annotations")
        runner.job.message = "Something went wrong."
        call("GET", f"/repos/acme/train/check-runs/{runner.job.id}/annotations")
        gh.finish(runner, result)
    for again in (f"{job}/rerun", f"{whole}/rerun-failed-jobs", f"{whole}/rerun"):
        call("GET", f"{whole}/jobs?filter=latest")
        call("POST", f"{whole}/cancel")
        call("POST", f"{whole}/force-cancel")
        call("POST", again)
        call("GET", f"{whole}/attempts/{run.attempt}/jobs")
    call("GET", f"{whole}/attempts/99/jobs")
    call("POST", f"{whole}/cancel")
    call("POST", f"{whole}/cancel")
    run.too_old = True
    call("POST", f"{whole}/rerun-failed-jobs")
    call("GET", f"{base}/runs")


def use_app(gh: GitHub, call: Caller) -> None:
    app = gh.add_app("acme", administration="write", actions="write", metadata="read")
    now = int(time.time())
    claims = {"iat": now - 60, "exp": now + 540, "iss": app.client_id}
    key = jwt.encode(claims, app.key, algorithm="RS256")
    late = jwt.encode({**claims, "exp": now + 3600}, app.key, algorithm="RS256")
    call("GET", "/app", token=key)
    call("GET", "/app", token=late)
    call("GET", "/orgs/acme/installation", token=key)
    found = call("GET", "/repos/acme/train/installation", token=key)
    path = f"/app/installations/{found['id']}/access_tokens"
    granted = call("POST", path, {}, token=key)["token"]
    call("POST", "/app/installations/1/access_tokens", {}, token=key)
    call("GET", "/repos/acme/train/actions/runners", token=granted)
    call("GET", "/orgs/acme/actions/runners", token=granted)


def use_the_rest(gh: GitHub, call: Caller) -> None:
    for path in ("/user", "/rate_limit", "/meta", "/repos/acme/train", "/repos/no/such"):
        call("GET", path)
    call("GET", "/repos/actions/runner/releases/latest", token="")
    tokens = [gh.add_token(), gh.add_workflow_token("acme/train"), "", "wrong"]
    tokens += [gh.add_fine_grained_token("acme/train"), gh.add_token("repo", role="read")]
    for token in tokens:
        call("GET", "/repos/acme/train", token=token)
        call("GET", "/user", token=token)
        call("GET", "/repos/acme/train/actions/runners", token=token)
        call("POST", "/repos/acme/train/actions/runners/registration-token", token=token)
    gh.limit(60)
    call("GET", "/repos/acme/train/actions/runners")
    gh.limit(60, secondary=True)
    call("GET", "/repos/acme/train/actions/runners")


def test_answers_are_as_described(gh: GitHub) -> None:
    gh.deprecate("2.331.0", enforced=False)
    gh.deprecate("2.337.0", None, None, enforced=False)
    call = Caller(gh)
    for place in ("/repos/acme/train", "/orgs/acme", "/enterprises/big"):
        use_runners(gh, call, place)
    use_runs(gh, call)
    use_app(gh, call)
    use_the_rest(gh, call)
    wrong = [text for request in gh.requests for text in mistakes(request)]
    assert not wrong, "\n".join(wrong)
    served = [f"{method} {pattern}" for method, pattern, *_ in github_api.ROUTES]
    used = [
        f"{method} {pattern}"
        for method, pattern, *_ in github_api.ROUTES
        if any(request.status < 300 for request in gh.asked(method, pattern))
    ]
    assert used == served
