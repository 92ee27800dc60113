"""Whose cluster it is, and what becomes of each answer of its API server."""

from __future__ import annotations

import json
import stat
import sys
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from flask import Response, jsonify, request

from cml_runner.clouds.kubernetes import session
from cml_runner.clouds.kubernetes.session import Session
from cml_runner.errors import (
    AlreadyExists,
    ConfigurationError,
    CredentialsError,
    MissingDependency,
    NoCapacity,
    NoCredentials,
    NotFound,
    RunnerError,
)
from tests.lab.far_side import FarSide

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

JOBS = "/apis/batch/v1/namespaces/{}/jobs"


class Server(FarSide):
    """An API server with some Jobs, which come page by page."""

    names = ("a", "b", "c")

    def routes(self) -> None:
        self.app.add_url_rule(JOBS.format("<_>"), "list", self._list)
        self.app.add_url_rule(JOBS.format("<_>"), "create", self._create, methods=["POST"])
        self.app.add_url_rule(JOBS.format("<_>") + "/<name>", "read", self._read)

    def _list(self, _: str) -> Any:
        first = int(request.args.get("continue") or 0)
        more = str(first + 2) if first + 2 < len(self.names) else ""
        items = [{"metadata": {"name": name}} for name in self.names[first : first + 2]]
        return jsonify(metadata={"continue": more}, items=items)

    def _create(self, _: str) -> Any:
        return jsonify(request.get_json()), 201

    def _read(self, _: str, name: str) -> Any:
        return jsonify(metadata={"name": name})

    def refusal(self, status: int, message: str) -> Response:
        return Response(json.dumps({"message": message}), status, mimetype="application/json")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as there:
        yield there


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a kubeconfig nor a cluster around us; and nobody waits long."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(session, "PAUSES", (0.01,))
    monkeypatch.setattr(session, "OURS", tmp_path / "account")


def config(server: Server, user: dict[str, Any], namespace: str = "team") -> str:
    context = {"cluster": "there", "user": "me", "namespace": namespace}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "mine",
            "clusters": [{"name": "there", "cluster": {"server": server.url}}],
            "users": [{"name": "me", "user": user}],
            "contexts": [
                {"name": "other", "context": {"cluster": "x", "user": "y", "namespace": "z"}},
                {"name": "mine", "context": context},
            ],
        }
    )


@pytest.fixture
def logged_in(server: Server, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setenv("KUBECONFIG_DATA", config(server, {"token": "abc"}))
    return Session()


# Whose cluster it is


@pytest.mark.parametrize("variable", ["KUBECONFIG_DATA", "KUBERNETES_CONFIGURATION"])
def test_the_contents_of_a_kubeconfig(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    monkeypatch.setenv(variable, config(server, {"token": "abc"}))
    one = Session()
    assert one.namespace == "team"
    one.call("GET", "jobs", "x")
    (asked,) = server.asked("GET", JOBS.format("team") + "/x")
    assert asked.headers["Authorization"] == "Bearer abc"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_path_of_a_kubeconfig(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "config"
    path.write_text(config(server, {"username": "me", "password": "secret"}, namespace=""))
    monkeypatch.setenv("KUBECONFIG", str(path))
    one = Session()
    assert one.namespace == "default"
    one.call("GET", "jobs", "x")
    assert server.requests[0].headers["Authorization"].startswith("Basic ")


def test_the_usual_place(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".kube").mkdir()
    (tmp_path / ".kube" / "config").write_text(config(server, {"token": "abc"}))
    assert Session().namespace == "team"


def test_a_plugin_is_asked_for_the_token_and_asked_again_once_it_has_expired(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plugin = tmp_path / "plugin"
    status = {"token": "NUMBER", "expirationTimestamp": "2026-01-01T00:00:00Z"}
    kind = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential"}
    text = json.dumps({**kind, "status": status})
    count = tmp_path / "count"
    plugin.write_text(
        f"#!{sys.executable}\n"
        f"file = open({str(count)!r}, 'a+'); file.seek(0); number = len(file.read()) + 1\n"
        f"file.write('.')\n"
        f"print({text!r}.replace('NUMBER', f'token-{{number}}'))\n"
    )
    plugin.chmod(plugin.stat().st_mode | stat.S_IXUSR)
    command = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": str(plugin),
        "interactiveMode": "Never",
    }
    monkeypatch.setenv("KUBECONFIG_DATA", config(server, {"exec": command}))
    one = Session()
    one.call("GET", "jobs", "x")
    one.call("GET", "jobs", "x")
    first, second = (one.headers["Authorization"] for one in server.requests)
    assert first.startswith("Bearer token-")
    assert second.startswith("Bearer token-")
    assert first != second


def test_in_a_pod_of_the_cluster(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    account = tmp_path / "account"
    account.mkdir()
    (account / "namespace").write_text("ours\n")
    (account / "token").write_text("abc")
    (account / "ca.crt").write_text("-")
    from kubernetes.config import incluster_config

    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(account / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(account / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", server.url.rpartition(":")[2])
    assert Session().namespace == "ours"


def test_the_namespace_that_is_asked_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG_DATA", config(server, {"token": "abc"}))
    assert Session("special").namespace == "special"
    monkeypatch.setenv("CML_RUNNER_CLOUD_KUBERNETES_NAMESPACE", "usual")
    assert Session().namespace == "usual"
    assert Session("special").namespace == "special"


def test_no_cluster_at_all() -> None:
    with pytest.raises(CredentialsError, match="set KUBECONFIG"):
        Session().call("GET", "jobs", "x")


@pytest.mark.parametrize("text", ["just words", "{", "[]", "{}", '{"current-context": "x"}'])
def test_what_is_no_kubeconfig(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KUBECONFIG_DATA", text)
    with pytest.raises(CredentialsError, match="set KUBECONFIG"):
        Session().call("GET", "jobs", "x")


def test_without_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(MissingDependency, match="kubernetes"):
        Session().call("GET", "jobs", "x")


# What becomes of an answer


def test_all_pages(logged_in: Session, server: Server) -> None:
    found = logged_in.items("jobs", labelSelector="a=b")
    assert [one["metadata"]["name"] for one in found] == ["a", "b", "c"]
    assert [one.query.get("continue") for one in server.requests] == [None, "2"]
    assert {one.query["labelSelector"] for one in server.requests} == {"a=b"}


@pytest.mark.parametrize(
    ("status", "answer", "error", "said"),
    [
        (401, {"message": "Unauthorized"}, CredentialsError, "refuses our credentials"),
        (403, {"message": "you may not"}, CredentialsError, "permissions kubernetes"),
        (403, {"message": "x is forbidden: exceeded quota: q"}, NoCapacity, "exceeded quota"),
        (403, {"message": "because it is being terminated"}, NotFound, "terminated"),
        (404, {"message": "not there"}, NotFound, "not there"),
        (409, {"message": "is there", "reason": "AlreadyExists"}, AlreadyExists, "is there"),
        (409, {"message": "changed", "reason": "Conflict"}, RunnerError, "changed"),
        (400, {"message": "nonsense"}, ConfigurationError, "nonsense"),
        (422, {"message": "invalid"}, ConfigurationError, "invalid"),
        (418, "a teapot", RunnerError, "teapot"),
    ],
)
def test_a_refusal_has_its_type(
    logged_in: Session,
    server: Server,
    status: int,
    answer: Any,
    error: type[Exception],
    said: str,
) -> None:
    server.fault("POST", ".*", status=status, body=answer)
    with pytest.raises(error, match=said):
        logged_in.call("POST", "jobs", body={})
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again(
    logged_in: Session, server: Server, status: int
) -> None:
    server.fault("GET", ".*", 2, status=status, body="<html>")
    assert logged_in.call("GET", "jobs", "x") == {"metadata": {"name": "x"}}
    assert len(server.requests) == 3


def test_a_connection_that_breaks(logged_in: Session, server: Server) -> None:
    server.fault("GET", ".*", 2, drop=True)
    assert logged_in.call("GET", "jobs", "x") == {"metadata": {"name": "x"}}


def test_a_server_that_never_answers(logged_in: Session, server: Server) -> None:
    server.fault("GET", ".*", 1000, status=503, body={"message": "starting"})
    with pytest.raises(RunnerError, match=r"can't reach the cluster.*starting"):
        logged_in.items("jobs", patience=0.1)


def test_the_token_is_in_no_error(logged_in: Session, server: Server) -> None:
    server.fault("GET", ".*", 1000, drop=True)
    with pytest.raises(RunnerError) as caught:
        logged_in.items("jobs", patience=0.1)
    assert "abc" not in str(caught.value)


# What time it is


def test_every_answer_tells_the_time(server: Server, logged_in: Session) -> None:
    assert server.asked("GET", "/version") == []
    difference = logged_in.now() - datetime.now(timezone.utc)
    assert abs(difference) < timedelta(minutes=1)


def test_no_answer_tells_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server() as server:
        monkeypatch.setenv("KUBECONFIG_DATA", config(server, {"token": "abc"}))
        logged_in = Session()
    with pytest.raises(RunnerError, match="what time it is"):
        logged_in.now()


@pytest.mark.parametrize(("given", "missing"), [("", True), ("no kubeconfig", False)])
def test_no_access_is_not_the_same_as_none_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, given: str, *, missing: bool
) -> None:
    monkeypatch.setenv("KUBECONFIG_DATA", given)
    with pytest.raises(CredentialsError) as caught:
        _ = Session().namespace
    assert isinstance(caught.value, NoCredentials) is missing
