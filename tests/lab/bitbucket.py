"""A stateful Bitbucket on loopback: its REST API, and a runner protocol of its own.

What programs see of Bitbucket is as its documentation has it, and what Atlassian's own autoscaler
relies on. The protocol between Bitbucket and its runner program is not documented, so the one
below /_runner is made up; only the stand-in in bitbucket_runner_program.py speaks it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import os
import secrets
import sys
import tarfile
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Response, jsonify, request

from tests.lab.far_side import FarSide

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = Path(__file__).with_name("bitbucket_runner_program.py")
READ, WRITE = "read:runner:bitbucket", "write:runner:bitbucket"
ALL = (
    READ,
    WRITE,
    "read:pipeline:bitbucket",
    "write:pipeline:bitbucket",
    "read:repository:bitbucket",
)


# What people read beside a step that was lost with its runner:
# https://support.atlassian.com/bitbucket-cloud/kb/pipeline-build-failed-with-unexpected-system-error-that-may-have-left-your
LOST = (
    "There was an unexpected system error that may have left your step half-completed. To solve "
    "this error, check your step progress and rerun it if you see fit."
)


def _uuid() -> str:
    return f"{{{uuid.uuid4()}}}"


@dataclass
class Repository:
    """A repository of a workspace."""

    workspace: str
    slug: str
    uuid: str = field(default_factory=_uuid)


@dataclass
class Runner:
    """A runner, and its step, if it has one."""

    name: str
    labels: list[str]
    repository: Repository | None
    workspace: str
    uuid: str = field(default_factory=_uuid)
    client: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    secret: str = field(default_factory=lambda: f"ATOA{secrets.token_urlsafe(40)}")
    status: str = "UNREGISTERED"
    cordoned: bool = False
    seen: float = 0
    step: Step | None = None


@dataclass
class Step:
    """The one step of a pipeline."""

    name: str
    script: str
    labels: tuple[str, ...]
    uuid: str = field(default_factory=_uuid)
    state: str = "PENDING"
    result: str = ""
    runner: str = ""
    started: str = ""
    log: str = ""


@dataclass
class Pipeline:
    """One run of a pipeline."""

    repository: Repository
    number: int
    target: dict[str, Any]
    step: Step
    others: list[Step] = field(default_factory=list)  # which run elsewhere at the same time
    uuid: str = field(default_factory=_uuid)


class Refused(Exception):
    """An answer with an error."""

    def __init__(self, status: int, message: str, **detail: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.detail = status, message, detail


@dataclass
class Bitbucket(FarSide):
    """One Bitbucket with some repositories."""

    page: int = 100  # runners on a page at most
    offline_after: float = 3  # seconds without a word …
    lost_after: float = 0  # … and more of them until the step has failed
    tells_scopes: bool = True
    repositories: dict[str, Repository] = field(default_factory=dict)
    workspaces: dict[str, str] = field(default_factory=dict)  # and their numbers
    credentials: dict[str, tuple[str, ...]] = field(default_factory=dict)  # headers, and scopes
    runners: dict[str, Runner] = field(default_factory=dict)
    pipelines: list[Pipeline] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)
    checksum: str = ""  # given in place of the right one

    # What people do

    def add(self, path: str) -> Repository:
        workspace, slug = path.split("/")
        self.workspaces.setdefault(workspace, _uuid())
        self.repositories[path] = Repository(workspace, slug)
        return self.repositories[path]

    def add_token(self, *scopes: str) -> str:
        """Make an API token, with its owner's address."""
        token = f"me@example.com:ATATT{secrets.token_urlsafe(20)}"
        self.credentials[_basic(token)] = scopes or ALL
        return token

    def add_access_token(self, *scopes: str) -> str:
        token = f"ATCTT{secrets.token_urlsafe(20)}"
        self.credentials[f"Bearer {token}"] = scopes or ALL
        return token

    def add_consumer(self, *scopes: str) -> str:
        consumer = f"{secrets.token_hex(9)}:{secrets.token_hex(16)}"
        self.credentials[_basic(consumer)] = scopes or ("runner:write", "pipeline:write")
        return consumer

    def add_pipeline(
        self, path: str, name: str, script: str, labels: Sequence[str] = ("cml",)
    ) -> Pipeline:
        """Push a commit with a pipeline of one step."""
        target = {
            "type": "pipeline_ref_target",
            "ref_type": "branch",
            "ref_name": "main",
            "commit": {"type": "commit", "hash": secrets.token_hex(20), "links": {}},
            "selector": {"type": "default", "pattern": ""},
        }
        return self._start(self.repositories[path], target, Step(name, script, tuple(labels)))

    def runs(self, first: Pipeline) -> list[Pipeline]:
        """Return all runs of the same commit."""
        self.sweep()
        with self.changed:
            commit = first.target["commit"]["hash"]
            return [one for one in self.pipelines if one.target["commit"]["hash"] == commit]

    def package(self) -> bytes:
        """Return the archive with the stand-in."""
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for name, data in {
                "runner.jar": PROGRAM.read_bytes(),
                "start.sh": b"#!/bin/sh\n",
            }.items():
                entry = tarfile.TarInfo(f"./bin/{name}")
                entry.size, entry.mode = len(data), 0o644
                tar.addfile(entry, io.BytesIO(data))
        return gzip.compress(content.getvalue(), mtime=0)

    def environment(self, directory: Path) -> dict[str, str]:
        """Make a Java that runs the stand-in, and say how to find all that it needs."""
        java = directory / "bin" / "java"
        java.parent.mkdir(parents=True, exist_ok=True)
        start = f'LAB_BITBUCKET={self.own_url} exec {sys.executable} -IB "$3" "$1"'
        java.write_text(f"#!/bin/sh\n{start}\n")
        java.chmod(0o755)
        return {
            "JAVA_HOME": str(directory),
            "PATH": f"{java.parent}:{os.environ['PATH']}",
            "BITBUCKET_RUNNER_PACKAGE": self.archive,
            "BITBUCKET_RUNNER_RUNTIME": "shell",
        }

    @property
    def archive(self) -> str:
        """Where the archive is, and its checksum."""
        content = self.package()
        name = "atlassian-bitbucket-pipelines-runner-3.24.0.tar.gz"
        digest = self.checksum or hashlib.sha256(content).hexdigest()
        return f"{self.own_url}/_downloads/{name}#sha256={digest}"

    def _start(self, repository: Repository, target: dict[str, Any], step: Step) -> Pipeline:
        with self.changed:
            number = sum(one.repository is repository for one in self.pipelines) + 1
            self.pipelines.append(Pipeline(repository, number, target, step))
            return self.pipelines[-1]

    # The server

    def routes(self) -> None:
        repository = "/repositories/<workspace>/<slug>"
        pipeline = f"{repository}/pipelines/<number>"
        rules: tuple[tuple[str, str, Any], ...] = (
            ("GET", "/workspaces/<workspace>", self._workspace),
            ("GET", repository, self._repository),
            ("GET", f"{repository}/pipelines/", self._pipelines),
            ("POST", f"{repository}/pipelines/", self._run),
            ("GET", pipeline, self._pipeline),
            ("GET", f"{pipeline}/steps/", self._steps),
            ("GET", f"{pipeline}/steps/<step>", self._step),
            ("POST", f"{pipeline}/stopPipeline", self._stop),
        )
        for method, rule, view in rules:
            self.app.add_url_rule(f"/2.0{rule}", f"{method} {rule}", view, methods=[method])
        for scope in ("/workspaces/<workspace>", "/repositories/<workspace>/<slug>"):
            root = f"/2.0{scope}/pipelines-config/runners"
            views = (("GET", self._list), ("POST", self._create))
            for method, view in views:
                self.app.add_url_rule(root, f"{method} {root}", view, methods=[method])
            one = f"{root}/<number>"
            for method, single in (
                ("GET", self._show),
                ("PUT", self._put),
                ("DELETE", self._delete),
            ):
                self.app.add_url_rule(one, f"{method} {one}", single, methods=[method])
        token = "/site/oauth2/access_token"
        self.app.add_url_rule(token, "token", self._token, methods=["POST"])
        self.app.add_url_rule("/_runner/next", "next", self._next, methods=["POST"])
        self.app.add_url_rule("/_runner/end", "end", self._end, methods=["POST"])
        self.app.add_url_rule("/_downloads/<path:file>", "downloads", lambda file: self.package())
        self.app.register_error_handler(
            Refused, lambda no: self.refusal(no.status, no.message, no.detail)
        )

    def refusal(self, status: int, message: str, detail: Any = None) -> Response:
        error = {"message": message, **({"detail": detail} if detail else {})}
        body = jsonify(type="error", error=error).get_data()
        return Response(body, status, mimetype="application/json")

    def sweep(self) -> None:
        """End the steps of runners that are gone."""
        with self.changed:
            for runner in self.runners.values():
                silent = _now() - runner.seen
                if runner.step and silent > self.offline_after + self.lost_after:
                    runner.step.state, runner.step.result = "COMPLETED", "ERROR"
                    runner.step = None

    def _before(self) -> Response | None:
        self.sweep()
        return super()._before()

    def _after(self, response: Response) -> Response:
        scopes = self.credentials.get(request.headers.get("Authorization", ""))
        if scopes and self.tells_scopes:
            response.headers["X-OAuth-Scopes"] = ", ".join(scopes)
        return super()._after(response)

    # Who asks

    def _caller(self, needed: str) -> None:
        granted = self.credentials.get(request.headers.get("Authorization", ""))
        if granted is None:
            raise Refused(401, "Token is invalid, expired, or not supported for this endpoint.")
        kind, _, rest = needed.partition(":")
        older = (
            f"{rest.partition(':')[0]}:write" if kind == "write" else f"{rest.partition(':')[0]}"
        )
        if not {needed, older, f"{older}:write"} & {*granted}:
            message = "Your credentials lack one or more required privilege scopes."
            raise Refused(403, message, required=[needed], granted=list(granted))

    def _token(self) -> Any:
        scopes = self.credentials.get(request.headers.get("Authorization", ""))
        if scopes is None:
            return jsonify(error="unauthorized_client"), 400
        token = secrets.token_urlsafe(20)
        self.credentials[f"Bearer {token}"] = scopes
        return {"access_token": token, "expires_in": 7200, "token_type": "bearer"}

    def _found(self, workspace: str, slug: str) -> Repository:
        for one in self.repositories.values():
            if one.workspace == workspace and slug in (one.slug, one.uuid):
                return one
        raise Refused(404, f"Repository {workspace}/{slug} not found")

    # REST

    def _workspace(self, workspace: str) -> Any:
        self._caller("read:repository:bitbucket")
        if workspace not in self.workspaces:
            raise Refused(404, f"No workspace with identifier '{workspace}'.")
        return {"type": "workspace", "uuid": self.workspaces[workspace], "slug": workspace}

    def _repository(self, workspace: str, slug: str) -> Any:
        self._caller("read:repository:bitbucket")
        found = self._found(workspace, slug)
        owner = {"type": "workspace", "uuid": self.workspaces[workspace], "slug": workspace}
        full = f"{workspace}/{found.slug}"
        return {"type": "repository", "uuid": found.uuid, "full_name": full, "workspace": owner}

    def _scope(self, workspace: str, slug: str) -> tuple[str, Repository | None]:
        if workspace not in self.workspaces:
            raise Refused(404, f"No workspace with identifier '{workspace}'.")
        return workspace, self._found(workspace, slug) if slug else None

    def _here(self, workspace: str, slug: str) -> list[Runner]:
        scope = self._scope(workspace, slug)
        return [o for o in self.runners.values() if (o.workspace, o.repository) == scope]

    def _list(self, workspace: str, slug: str = "") -> Any:
        self._caller(READ)
        found, number = self._here(workspace, slug), int(request.args.get("page", 1))
        size = min(int(request.args.get("pagelen", 10)), self.page)
        answer = {"page": number, "pagelen": size, "size": len(found)}
        answer["values"] = [self._shown(o) for o in found[(number - 1) * size : number * size]]  # type: ignore[assignment]
        if len(found) > number * size:
            root = f"{self.url}{request.path}"
            answer["next"] = f"{root}?pagelen={size}&page={number + 1}"  # type: ignore[assignment]
        return answer

    def _create(self, workspace: str, slug: str = "") -> Any:
        self._caller(WRITE)
        scope, body = self._scope(workspace, slug), request.get_json()
        if len(self._here(workspace, slug)) >= 100:
            raise Refused(400, "You have reached the maximum number of runners.")
        if len(body["labels"]) > 10 or "self.hosted" not in body["labels"]:
            raise Refused(400, "Invalid labels.")
        with self.changed:
            runner = Runner(body["name"], body["labels"], scope[1], scope[0])
            self.runners[runner.uuid] = runner
            self.secrets.append(runner.secret)
        return self._shown(runner, runner.secret)

    def _one(self, workspace: str, slug: str, number: str) -> Runner:
        found = next((o for o in self._here(workspace, slug) if o.uuid == number), None)
        if not found:
            raise Refused(404, "Runner not found.")
        return found

    def _show(self, workspace: str, number: str, slug: str = "") -> Any:
        self._caller(READ)
        return self._shown(self._one(workspace, slug, number))

    def _put(self, workspace: str, number: str, slug: str = "") -> Any:
        self._caller(WRITE)
        runner = self._one(workspace, slug, number)
        runner.cordoned = request.get_json()["state"]["cordoned"]
        return self._shown(runner)

    def _delete(self, workspace: str, number: str, slug: str = "") -> Any:
        self._caller(WRITE)
        runner = self._one(workspace, slug, number)
        del self.runners[runner.uuid]
        return "", 204

    def status(self, runner: Runner) -> str:
        silent = _now() - runner.seen > self.offline_after
        return "OFFLINE" if silent and runner.status == "ONLINE" else runner.status

    def _shown(self, runner: Runner, secret: str = "") -> dict[str, Any]:
        stamp = datetime.fromtimestamp(runner.seen, timezone.utc).isoformat()
        state: dict[str, Any] = {
            "type": "pipeline_runner_state",
            "status": self.status(runner),
            "updated_on": stamp,
            "cordoned": runner.cordoned,
        }
        if runner.step:
            state["step"] = {"uuid": runner.step.uuid}
        client = {"id": runner.client, "token_endpoint": "https://auth.atlassian.com/oauth/token"}
        return {
            "type": "pipeline_runner",
            "uuid": runner.uuid,
            "name": runner.name,
            "labels": runner.labels,
            "state": state,
            "oauth_client": {**client, **({"secret": secret} if secret else {})},
        }

    def _pipelines(self, workspace: str, slug: str) -> Any:
        self._caller("read:pipeline:bitbucket")
        repository = self._found(workspace, slug)
        found = [self._told(o) for o in self.pipelines if o.repository is repository]
        return {"page": 1, "pagelen": 100, "size": len(found), "values": found[::-1][:100]}

    def _which(self, workspace: str, slug: str, number: str) -> Pipeline:
        repository = self._found(workspace, slug)
        for one in self.pipelines:
            if one.repository is repository and number in (one.uuid, str(one.number)):
                return one
        raise Refused(404, "Pipeline not found.")

    def _pipeline(self, workspace: str, slug: str, number: str) -> Any:
        self._caller("read:pipeline:bitbucket")
        return self._told(self._which(workspace, slug, number))

    def _step(self, workspace: str, slug: str, number: str, step: str) -> Any:
        self._caller("read:pipeline:bitbucket")
        found = self._which(workspace, slug, number).step
        if found.uuid != step:
            raise Refused(404, "Step not found.")
        return self._told_step(found)

    def _steps(self, workspace: str, slug: str, number: str) -> Any:
        self._caller("read:pipeline:bitbucket")
        pipeline = self._which(workspace, slug, number)
        found = [self._told_step(one) for one in (pipeline.step, *pipeline.others)]
        return {"page": 1, "pagelen": 100, "size": len(found), "values": found}

    def _told_step(self, step: Step) -> dict[str, Any]:
        state = self._state(step, "pipeline_step_state")
        told = {"type": "pipeline_step", "uuid": step.uuid, "name": step.name, "state": state}
        return {**told, "started_on": step.started} if step.started else told

    def _run(self, workspace: str, slug: str) -> Any:
        self._caller("write:pipeline:bitbucket")
        repository, target = self._found(workspace, slug), request.get_json()["target"]
        before = [
            o for o in self.pipelines if o.target["commit"]["hash"] == target["commit"]["hash"]
        ]
        old = before[-1].step
        made = self._start(repository, target, Step(old.name, old.script, old.labels))
        return self._told(made), 201

    def _stop(self, workspace: str, slug: str, number: str) -> Any:
        self._caller("write:pipeline:bitbucket")
        with self.changed:
            step = self._which(workspace, slug, number).step
            if step.state == "COMPLETED":
                raise Refused(400, "The pipeline is already completed.")
            step.state, step.result = "COMPLETED", "STOPPED"
        return "", 204

    def _told(self, pipeline: Pipeline) -> dict[str, Any]:
        return {
            "type": "pipeline",
            "uuid": pipeline.uuid,
            "build_number": pipeline.number,
            "created_on": "2026-11-01T10:00:00.000Z",
            "state": self._state(pipeline.step, "pipeline_state"),
            "target": pipeline.target,
        }

    def _state(self, step: Step, kind: str) -> dict[str, Any]:
        word = step.state.lower()
        state: dict[str, Any] = {"type": f"{kind}_{word}", "name": step.state}
        if step.result:
            result: dict[str, Any] = {"name": step.result}
            result["type"] = f"{kind}_completed_{step.result.lower()}"
            if step.result == "ERROR" and kind == "pipeline_step_state":
                result["error"] = {"type": "pipeline_step_error", "key": "error", "message": LOST}
            state["result"] = result
        return state

    # The made-up protocol

    def _runner(self) -> Runner:
        body = request.get_json()
        for one in self.runners.values():
            if (one.uuid, one.client, one.secret) == (body["uuid"], body["client"], body["secret"]):
                return one
        raise Refused(401, "Unauthorized")

    def _next(self) -> Any:
        with self.changed:
            runner = self._runner()
            runner.status, runner.seen = "ONLINE", _now()
            for pipeline in self.pipelines:
                step = pipeline.step
                inside = runner.repository in (None, pipeline.repository)
                fits = inside and {*step.labels} <= {*runner.labels} and step.state == "PENDING"
                if fits and not runner.cordoned and not runner.step:
                    step.state, step.runner, runner.step = "IN_PROGRESS", runner.name, step
                    step.started = datetime.now(timezone.utc).isoformat()
                    return {
                        "account": self.workspaces[runner.workspace],
                        "repository": pipeline.repository.uuid,
                        "pipeline": pipeline.uuid,
                        "step": step.uuid,
                        "script": step.script,
                    }
        return {}

    def _end(self) -> Any:
        with self.changed:
            body, runner = request.get_json(), self._runner()
            runner.seen = _now()
            if step := runner.step:
                step.log = body["log"]
                if body.get("result"):
                    step.state, step.result, runner.step = "COMPLETED", body["result"], None
        return {}


def _basic(token: str) -> str:
    return f"Basic {base64.b64encode(token.encode()).decode()}"


def _now() -> float:
    return datetime.now(timezone.utc).timestamp()
