"""How the GitHub forge talks to GitHub: packages, limits, faults, and secrets kept."""

from __future__ import annotations

import logging
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner.errors import AgentFailed, ConfigurationError, NotFound, RunnerError
from cml_runner.forges import github
from cml_runner.forges.github import Forge, api
from cml_runner.forges.github.address import Address
from cml_runner.model import Credential
from tests.lab.github import GitHub
from tests.lab.github_shapes import moment

if TYPE_CHECKING:
    from cml_runner import forges

RUNNERS = r"/repos/owner/repo/actions/runners"
DAY = 86_400


@pytest.fixture
def forge(gh: GitHub) -> forges.Forge:
    return Forge(f"{gh.url}/owner/repo", Credential(token=gh.add_token("repo")))


# Packages


def _versions(forge: forges.Forge) -> set[tuple[str, str]]:
    return {(package.version, package.arch) for package in forge.packages()}


def _pair(version: str) -> set[tuple[str, str]]:
    return {(version, "x64"), (version, "arm64")}


def _offer(gh: GitHub, version: str, sha256: str) -> None:
    name = f"actions-runner-linux-{{}}-{version}.tar.gz"
    body = [
        {"os": "linux", "architecture": arch, "filename": name.format(arch)}
        | {"download_url": f"{gh.url}/{version}-{arch}"}
        | ({"sha256_checksum": sha256} if sha256 else {})
        for arch in ("x64", "arm64")
    ]
    gh.fault("GET", f"{RUNNERS}/downloads", 9, status=200, body=body)


def test_packages(gh: GitHub, forge: forges.Forge) -> None:
    packages = {package.arch: package for package in forge.packages()}
    assert set(packages) == {"x64", "arm64"}
    assert packages["x64"].sha256 == gh.package()[1]
    assert packages["x64"].url.startswith(f"{gh.url}/_downloads/2.337.0/")
    assert gh.asked("GET", ".*/releases/latest") == []


@pytest.mark.parametrize("version", ["", "2.336.0"])
def test_packages_without_checksums(gh: GitHub, forge: forges.Forge, version: str) -> None:
    if version:
        _offer(gh, version, "")
    else:
        gh.fault("GET", f"{RUNNERS}/downloads", status=200, body=[])
    assert _versions(forge) == _pair("2.337.0")
    assert forge.packages()[0].sha256 == gh.package()[1]


@pytest.mark.parametrize(
    ("registration", "runtime", "fine"),
    [(-1, None, False), (None, 1, False), (5, 1, False), (5, 5, True), (None, None, True)],
)
def test_deprecated_packages(
    gh: GitHub, forge: forges.Forge, registration: int, runtime: int, *, fine: bool
) -> None:
    _offer(gh, "2.330.0", "a" * 64)
    dates = [moment(time.time() + days * DAY) if days else None for days in (registration, runtime)]
    gh.deprecate("2.330.0", *dates)
    assert _versions(forge) == _pair("2.330.0" if fine else "2.337.0")


def test_a_deprecation_without_time(gh: GitHub, forge: forges.Forge) -> None:
    _offer(gh, "2.330.0", "a" * 64)
    gh.deprecate("2.330.0", "2026-04-30", None)
    assert _versions(forge) == _pair("2.337.0")


def test_only_deprecated_packages(gh: GitHub, forge: forges.Forge) -> None:
    gh.deprecate("2.337.0")
    with pytest.raises(AgentFailed, match=r"2\.337\.0"):
        forge.packages()


def test_packages_of_the_public_github(
    gh: GitHub, forge: forges.Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    gh.fault("GET", f"{RUNNERS}/downloads", status=200, body=[])
    gh.fault("GET", ".*/releases/latest", status=404, body={"message": "Not Found"})
    with GitHub() as public:
        public.version = "2.340.0"
        monkeypatch.setattr(github, "RELEASES", Address(public.url, "actions/runner"))
        assert _versions(forge) == _pair("2.340.0")
        assert [request.authorization for request in public.requests] == ["none"]


# Trouble


def _said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name.startswith("cml_runner")]


@pytest.mark.parametrize(
    ("status", "headers", "message", "seconds"),
    [
        (403, {"Retry-After": "7"}, "You have exceeded a secondary rate limit.", 7),
        (403, {}, "You have exceeded a secondary rate limit.", 60),
        (429, {"Retry-After": "7"}, "Too many requests", 7),
        (429, {}, "Too many requests", 60),
        (429, {"X-RateLimit-Remaining": "0"}, "API rate limit exceeded", 31),
        (403, {"X-RateLimit-Remaining": "0"}, "API rate limit exceeded for user.", 31),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_rate_limits(
    gh: GitHub,
    forge: forges.Forge,
    naps: list[float],
    caplog: pytest.LogCaptureFixture,
    method: str,
    status: int,
    headers: dict[str, str],
    message: str,
    seconds: float,
) -> None:
    if "X-RateLimit-Remaining" in headers:
        headers = {**headers, "X-RateLimit-Reset": str(int(time.time() + 30))}
    body = {"message": message}
    gh.fault(method, f"{RUNNERS}.*", 1, status=status, headers=headers, body=body)
    forge.check() if method == "POST" else forge.runners()
    assert naps == pytest.approx([seconds], abs=2)
    assert f"waiting {naps[0]:.0f} s for GitHub's rate limit" in _said(caplog)


def test_a_rate_limit_without_end(gh: GitHub, forge: forges.Forge, naps: list[float]) -> None:
    gh.fault("GET", RUNNERS, 99, status=429, headers={"Retry-After": "1"})
    with pytest.raises(RunnerError, match="goes on answering with errors"):
        forge.runners()
    assert len(naps) == 6


@pytest.mark.parametrize("broken", [{"status": 502}, {"drop": True}])
def test_passing_faults(
    gh: GitHub, forge: forges.Forge, naps: list[float], broken: dict[str, Any]
) -> None:
    gh.fault("GET", RUNNERS, 2, **broken)
    gh.fault("POST", f"{RUNNERS}/registration-token", 2, **broken)
    assert forge.runners() == []
    forge.check()
    assert sum(naps) < 10


def test_a_server_that_is_gone(naps: list[float]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        forge = Forge(f"http://127.0.0.1:{taken.getsockname()[1]}/o/r", Credential(token="t"))
        with pytest.raises(RunnerError, match=r"127\.0\.0\.1:\d+ can't be reached"):
            forge.check()
    assert 0 < sum(naps) < 10


def test_a_silent_server(gh: GitHub, forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "TIMEOUT", 1)
    gh.fault("GET", RUNNERS, 1, delay=1.5)
    assert forge.runners() == []
    gh.fault("GET", RUNNERS, 9, delay=1.5)
    with pytest.raises(RunnerError, match="timed out"):
        forge.runners()
    assert sum(fault.hits for fault in gh.faults) == 3


@pytest.mark.parametrize(
    ("status", "headers", "body", "error", "words"),
    [
        (200, {}, "<html>", RunnerError, "doesn't answer as GitHub would"),
        (200, {}, {"hello": "world"}, RunnerError, "doesn't answer as GitHub would"),
        (307, {}, {"message": "Moved Permanently"}, NotFound, "new name"),
        (301, {"Location": "https://x.example/y"}, {}, ConfigurationError, "leads elsewhere"),
        (451, {}, {"message": "gone for legal reasons"}, RunnerError, "legal reasons"),
    ],
)
def test_strange_answers(
    gh: GitHub,
    forge: forges.Forge,
    status: int,
    headers: dict[str, str],
    body: Any,
    error: type[RunnerError],
    words: str,
) -> None:
    gh.fault("GET", RUNNERS, status=status, headers=headers, body=body)
    with pytest.raises(error, match=words):
        forge.runners()


def test_no_secret_in_the_log(gh: GitHub, caplog: pytest.LogCaptureFixture) -> None:
    app = gh.add_app("owner", administration="write")
    secrets = [app.key]
    caplog.set_level(logging.DEBUG)
    for credential in (
        Credential(app_id=str(app.id), app_key=app.key),
        Credential(token=gh.add_token("repo")),
    ):
        forge = Forge(f"{gh.url}/owner/repo", credential)
        for single in (True, False):
            secrets.append(forge.register("a", [], single=single, arch="x64").secret)
    secrets += gh.tokens
    assert "DEBUG" in caplog.text
    assert [secret for secret in secrets if secret in caplog.text] == []
