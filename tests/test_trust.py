from __future__ import annotations

import os
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner import trust
from cml_runner.boot import trust as system
from cml_runner.errors import ConfigurationError
from tests.authority import Company

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Cli

GIVEN = "--machine-proxy"
ALWAYS = "localhost,127.0.0.1,::1,169.254.169.254,fd00:ec2::254,metadata.google.internal"
PUBLIC = Path(__import__("certifi").where())


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    found = Company(tmp_path_factory.mktemp("company"))
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A computer whose store holds public authorities only; variables are forgotten afterwards."""
    store = tmp_path / "store.pem"
    store.write_bytes(PUBLIC.read_bytes())
    monkeypatch.setattr(system, "BUNDLES", (tmp_path / "none.pem", store))
    monkeypatch.setattr(trust, "ANCHORS", (tmp_path / "anchors",))
    (tmp_path / "anchors").mkdir()
    for name in (*trust.BUNDLES, trust.FOLDER):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The system's store of certificates."""
    return tmp_path / "store.pem"


# Our own clients


def _requests(url: str) -> None:
    import requests

    requests.get(url, timeout=10).raise_for_status()


def _github(url: str) -> None:
    from github import Auth, Github

    hub = Github(base_url=url, auth=Auth.Token("token"), retry=None)
    assert hub.get_user().login == "somebody"


def _gitlab(url: str) -> None:
    from gitlab import Gitlab

    assert Gitlab(url, "token").http_get("/user")["login"] == "somebody"  # type: ignore[index]


def _boto3(url: str) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client(
        "s3",
        region_name="us-west-2",
        endpoint_url=url,
        aws_access_key_id="a",
        aws_secret_access_key="b",
        config=Config(retries={"total_max_attempts": 1}),
    )
    client.get_object(Bucket="bucket", Key="key")


def _obstore(url: str) -> None:
    import obstore
    from obstore.store import HTTPStore

    bucket = HTTPStore.from_url(url, retry_config={"max_retries": 0})
    assert b"somebody" in bytes(obstore.get(bucket, "key").bytes())


def _azure(url: str) -> None:
    from azure.core.pipeline.transport import HttpRequest, RequestsTransport

    with RequestsTransport() as transport:
        assert transport.send(HttpRequest("GET", url)).status_code == 200


def _google(url: str) -> None:
    from google.auth.transport.requests import Request

    assert Request()(url=url, method="GET").status == 200


def _kubernetes(url: str) -> None:
    from kubernetes.client import ApiClient, Configuration

    api: Any = ApiClient(Configuration(host=url))
    assert api.rest_client.pool_manager.request("GET", url, retries=False).status == 200


def _standard(url: str) -> None:
    from cml_runner.boot import web

    assert web.ask("GET", url).json()["login"] == "somebody"


CLIENTS = (
    *(_requests, _github, _gitlab, _boto3, _obstore, _azure, _google, _kubernetes, _standard),
)


@pytest.fixture(params=CLIENTS, ids=lambda one: one.__name__.strip("_"))
def client(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Each library that speaks to somebody."""
    found: Callable[[str], None] = request.param
    return found


def test_a_company_is_a_stranger(company: Company, client: Callable[[str], None]) -> None:
    trust.use_system_store()
    asked = len(company.asked)
    with pytest.raises(Exception, match=r"(?i)certificate|UnknownIssuer|error sending request"):
        client(company.url)
    assert len(company.asked) == asked


@pytest.mark.parametrize("name", trust.BUNDLES)
def test_a_variable_holds_for_every_client(
    company: Company, client: Callable[[str], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, str(company.authority))
    trust.use_system_store()
    client(company.url)


def test_the_systems_store_holds_for_every_client(
    company: Company, client: Callable[[str], None], store: Path
) -> None:
    with store.open("a") as file:
        file.write(company.authority.read_text())
    trust.use_system_store()
    client(company.url)


def test_a_folder_holds_for_every_client(
    company: Company,
    client: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "company.crt").write_text(company.authority.read_text())
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "folder"))
    trust.use_system_store()
    client(company.url)


def test_one_file_is_named_as_it_is(store: Path, tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    trust.use_system_store(environment)
    assert environment == {"SSL_CERT_FILE": str(store), "REQUESTS_CA_BUNDLE": str(store)}
    only = str(PUBLIC)
    environment = {"SSL_CERT_FILE": only, "SSL_CERT_DIR": str(tmp_path), "AWS_CA_BUNDLE": only}
    trust.use_system_store(environment)
    assert environment["REQUESTS_CA_BUNDLE"] == environment["AWS_CA_BUNDLE"] == only


def test_several_files_become_one(company: Company, store: Path, home: Path) -> None:
    environment = {"AWS_CA_BUNDLE": str(company.authority), "CML_RUNNER_HOME": str(home)}
    again = dict(environment)
    trust.use_system_store(environment)
    (bundle,) = {environment[name] for name in ("SSL_CERT_FILE", *trust.BUNDLES[1:2])}
    assert environment["AWS_CA_BUNDLE"] == bundle
    known = system.CERTIFICATE.findall(Path(bundle).read_text())
    assert len(known) == len(set(system.CERTIFICATE.findall(store.read_text()))) + 1

    old = Path(bundle).with_name("old.pem")
    old.touch()
    os.utime(old, (0, time.time() - trust.KEPT - 1))
    trust.use_system_store(again)
    assert again == environment
    assert list(Path(bundle).parent.iterdir()) == [Path(bundle)]
    trust.use_system_store(again)  # what we have set ourselves changes nothing
    assert again == environment


def test_nothing_is_changed_if_there_is_nothing_to_say(
    company: Company, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a variable names in vain is left to its client to complain of."""
    broken = {"REQUESTS_CA_BUNDLE": str(tmp_path / "gone.pem")}
    environment = dict(broken)
    trust.use_system_store(environment)
    assert environment["REQUESTS_CA_BUNDLE"] == broken["REQUESTS_CA_BUNDLE"]
    monkeypatch.setattr(system, "BUNDLES", ())
    for before in ({}, broken):
        environment = dict(before)
        trust.use_system_store(environment)
        assert environment == before
    (tmp_path / "file").touch()
    environment = {
        "SSL_CERT_FILE": str(PUBLIC),
        "AWS_CA_BUNDLE": str(company.authority),
        "CML_RUNNER_HOME": str(tmp_path / "file"),
    }
    before = dict(environment)
    trust.use_system_store(environment)
    assert environment == before


def test_where_the_systems_store_is_no_file(
    company: Company, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import truststore

    calls: list[str] = []
    monkeypatch.setattr(truststore, "inject_into_ssl", lambda: calls.append("injected"))
    monkeypatch.setattr(sys, "platform", "darwin")
    environment: dict[str, str] = {}
    trust.use_system_store(environment)
    assert (calls, environment) == (["injected"], {})
    environment = {"SSL_CERT_FILE": str(company.authority)}
    trust.use_system_store(environment)
    assert environment["REQUESTS_CA_BUNDLE"] == str(company.authority)


def test_truststore_holds_for_requests_and_boto3(company: Company, tmp_path: Path) -> None:
    """It is asked on macOS and Windows; its own idea of Linux's store serves to try it."""
    script = f"""
import sys
from cml_runner import trust
sys.platform = "darwin"
trust.use_system_store({{}})
sys.platform = "linux"
from tests.test_trust import _requests, _boto3
_requests({company.url!r})
_boto3({company.url!r})
"""
    folder = tmp_path / "folder"
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env={**os.environ, "SSL_CERT_FILE": str(company.authority)},
        cwd=Path(__file__).parent.parent,
    )


def test_commands_use_it(company: Company, cli: Cli) -> None:
    command = ("recover", f"{company.url}/a/b/-/pipelines/1", "--driver", "gitlab", "--no-wait")
    own = {"GITLAB_TOKEN": "token"}
    done = cli.run(*command, environment=own, code=1)
    assert "has a certificate that isn't trusted here" in done.err
    own["SSL_CERT_FILE"] = str(company.authority)
    done = cli.run(*command, environment=own, code=1)
    assert "doesn't answer as GitLab would" in done.err


def test_neither_help_nor_version_asks_for_certificates() -> None:
    script = (
        "import sys\nfrom cml_runner import trust\ntrust.use_system_store()\n"
        "assert not {'ssl', 'requests', 'truststore', 'urllib3'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# The authorities of machines


def _ders(pem: str) -> list[bytes]:
    return [ssl.PEM_cert_to_DER_cert(one) for one in system.CERTIFICATE.findall(pem)]


def test_public_authorities_are_not_handed_over(store: Path) -> None:
    assert trust.authorities("", {}) == ""
    for name in trust.BUNDLES:
        assert trust.authorities("", {name: str(PUBLIC)}) == ""
        assert trust.authorities("", {name: str(store)}) == ""


def test_what_the_system_brings_is_public(company: Company, store: Path) -> None:
    """It may have authorities that requests doesn't know, or knows no more."""
    with store.open("a") as file:
        file.write(company.authority.read_text())
    for environment in ({}, {"SSL_CERT_FILE": str(store)}):
        assert trust.authorities("", environment) == ""


@pytest.mark.parametrize("binary", [False, True])
def test_what_somebody_has_added_to_it_is_not(
    company: Company,
    store: Path,
    tmp_path: Path,
    binary: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pem = company.authority.read_text()
    (tmp_path / "anchors" / "of-a-package").mkdir()
    content = ssl.PEM_cert_to_DER_cert(pem) if binary else pem.encode()
    (tmp_path / "anchors" / "of-a-package" / "company.crt").write_bytes(content)
    with store.open("a") as file:
        file.write(pem)
    caplog.set_level("INFO")
    for environment in ({}, {"SSL_CERT_FILE": str(store)}):
        assert _ders(trust.authorities("", environment)) == _ders(pem)
    assert "private authorities that machines trust, as this computer does: 1" in caplog.text


def test_what_variables_name(company: Company, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_text(f"# comment\n{PUBLIC.read_text()}\n{company.authority.read_text()}")
    pem = company.authority.read_text()
    for name in trust.BUNDLES:
        assert _ders(trust.authorities("", {name: str(both)})) == _ders(pem)
    environment = {name: str(both) for name in trust.BUNDLES}
    trust.use_system_store(environment)
    found = trust.authorities("", environment)
    assert _ders(found) == _ders(pem)
    assert found.startswith("-----BEGIN")


def test_those_that_are_given_come_first(company: Company, tmp_path: Path) -> None:
    Company(tmp_path / "other").close()
    other = (tmp_path / "other" / "ca.pem").read_text()
    mine = company.authority.read_text()
    environment = {"CURL_CA_BUNDLE": str(company.authority)}
    assert _ders(trust.authorities(other + other, environment)) == _ders(other + mine)
    assert _ders(trust.authorities(mine, environment)) == _ders(mine)


def test_nothing_else_is_taken_from_files(
    company: Company, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "all.pem"
    broken = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n"
    key = (company.authority.parent / "server.pem").read_text().partition("-----BEGIN CERT")[0]
    pem = company.authority.read_text()
    file.write_text(key + broken.format("AAAA") + broken.format("A") + broken.format("ÄÖ") + pem)
    environment = {"REQUESTS_CA_BUNDLE": str(file), "AWS_CA_BUNDLE": str(tmp_path / "gone.pem")}
    found = trust.authorities("", environment)
    assert "PRIVATE" in key
    assert "PRIVATE" not in found
    assert _ders(found) == _ders(pem)
    assert f"AWS_CA_BUNDLE names what isn't there: {tmp_path}/gone.pem" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_file_that_can_not_be_read(
    company: Company, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "ca.pem"
    file.write_text(company.authority.read_text())
    file.chmod(0)
    assert trust.authorities("", {"SSL_CERT_FILE": str(file)}) == ""
    assert f"can't read {file}" in caplog.text


def test_there_may_be_too_many(company: Company, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = company.authority.read_text()
    monkeypatch.setattr(trust, "LIMIT", len(pem))
    assert trust.authorities(pem, {})
    monkeypatch.setattr(trust, "LIMIT", len(pem) - 1)
    with pytest.raises(ConfigurationError, match="KiB of private authorities"):
        trust.authorities(pem, {})


# The proxies of machines


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {}),
        ({"NO_PROXY": "internal"}, {}),
        ({"HTTPS_PROXY": "http://proxy:3128/"}, {"HTTPS_PROXY": "http://proxy:3128"}),
        ({"https_proxy": "proxy:3128"}, {"HTTPS_PROXY": "http://proxy:3128"}),
        (
            {"https_proxy": "http://lower", "HTTPS_PROXY": "http://upper"},
            {"HTTPS_PROXY": "http://lower"},
        ),
        ({"https_proxy": "", "HTTPS_PROXY": "http://upper"}, {}),
        (
            {"http_proxy": "http://me:pa%40ss@proxy:1", "HTTPS_PROXY": "http://[fd00::1]:80"},
            {"HTTP_PROXY": "http://me:pa%40ss@proxy:1", "HTTPS_PROXY": "http://[fd00::1]:80"},
        ),
    ],
)
def test_machines_get_the_launchers_proxies(own: dict[str, str], expected: dict[str, str]) -> None:
    found = trust.proxies("", without=False, environment=own)
    assert found == ({**expected, "NO_PROXY": ALWAYS} if expected else {})


@pytest.mark.parametrize(
    "proxy",
    [
        *("http://localhost:3128", "127.0.0.1:3128", "http://127.1.2.3", "http://[::1]:3128"),
        *("http://me:secret@localhost", "http://LOCALHOST.", "http://0.0.0.0:1"),
    ],
)
def test_but_not_one_that_is_the_launcher_itself(
    proxy: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    own = {"https_proxy": proxy, "http_proxy": "http://proxy"}
    found = trust.proxies("", without=False, environment=own)
    assert found == {"HTTP_PROXY": "http://proxy", "NO_PROXY": ALWAYS}
    assert "machines do without HTTPS_PROXY: http://" in caplog.text or "@" in proxy
    assert "is this computer" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("proxy", ["socks5://proxy:1080", "http://", "http://a b", "http://a:x"])
def test_and_none_that_they_would_not_understand(
    proxy: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert trust.proxies("", without=False, environment={"HTTPS_PROXY": proxy}) == {}
    assert "machines do without HTTPS_PROXY" in caplog.text


def test_another_proxy(caplog: pytest.LogCaptureFixture) -> None:
    own = {"HTTPS_PROXY": "http://proxy", "no_proxy": "*, internal.example;x .corp 10.0.0.0/8"}
    found = trust.proxies("http://me:secret@other:3128/", without=False, environment=own)
    url = "http://me:secret@other:3128"
    direct = f".corp,10.0.0.0/8,{ALWAYS}"
    assert found == {"HTTPS_PROXY": url, "HTTP_PROXY": url, "NO_PROXY": direct}
    assert trust.proxies("", without=False, environment=own)["NO_PROXY"] == f"*,{direct}"


@pytest.mark.parametrize(
    "proxy",
    [
        *("proxy:3128", "socks5://proxy", "http://", "http://proxy:port", "http://proxy/path"),
        *("http://a b", 'http://"x', "http://a\nb", "http://a'b", "http://$HOME", "http://me@"),
    ],
)
def test_one_that_is_none(proxy: str) -> None:
    with pytest.raises(ConfigurationError, match=GIVEN) as caught:
        trust.proxies(proxy, without=False, environment={})
    assert str(caught.value) == f"{GIVEN}: http://HOST:PORT is expected, or https://HOST:PORT"


def test_no_proxy_at_all() -> None:
    own = {"HTTPS_PROXY": "http://proxy"}
    assert trust.proxies("", without=True, environment=own) == {}
    with pytest.raises(ConfigurationError, match="exclude each other"):
        trust.proxies("http://proxy", without=True, environment=own)


def test_what_everybody_may_read() -> None:
    plain = {"HTTPS_PROXY": "http://proxy", "NO_PROXY": "a"}
    assert trust.public(plain) == plain
    assert trust.public({**plain, "HTTP_PROXY": "http://me:secret@proxy"}) == plain
    assert trust.public({"HTTP_PROXY": "http://me@proxy", "NO_PROXY": "a"}) == {}
    assert trust.public({}) == {}


def test_what_is_of_use_in_a_container() -> None:
    own = {"https_proxy": "http://proxy", "HTTP_PROXY": "localhost:3128", "NO_PROXY": "localhost"}
    assert trust.for_containers(own) == {"HTTPS_PROXY": "http://proxy", "NO_PROXY": "localhost"}
    assert trust.for_containers({"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": "a"}) == {}
