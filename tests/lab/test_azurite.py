"""Blobs in the vendor's own emulator: our fake is like it, and all of our tests pass on it, too.

`npm install azurite`, and set AZURITE=…/node_modules/.bin/azurite-blob.
"""

from __future__ import annotations

import inspect
import re
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
import requests

from cml_runner.errors import CredentialsError
from cml_runner.store import Store
from tests import test_store
from tests.boot import test_azure as test_azure_machine
from tests.boot.test_azure import impatient
from tests.clouds import azure_rig as rigs
from tests.clouds import test_azure, test_azure_launches, test_contract
from tests.clouds.test_azure_launches import environment
from tests.lab.azure import Azure
from tests.lab.azure.azurite import MISSING, PROGRAM, Azurite
from tests.lab.azure.manager import SUBSCRIPTION
from tests.lab.azure.tokens import MANAGER, STORAGE, signed
from tests.transfer import test_restore, test_snapshot
from tests.transfer.conftest import source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from tests.clouds.azure_rig import AzureRig

pytestmark = [pytest.mark.lab, pytest.mark.skipif(not PROGRAM, reason=MISSING)]

CONTAINER, ACCOUNT = "cml-runner", test_azure.PLACE.storage
PARTS = re.compile(rb"Content-ID: (\d+)\r\n.*?HTTP/1\.1 (\d+) .*?\r\n\r\n", re.DOTALL)
USED = ("Content-Range", "Content-Length", "Content-Type")  # by obstore

OURS = {"rig", "azure_rig", "bucket"}  # fixtures
OTHERS = {
    "test_what_can_not_be_written_is_kept_for_the_next_time",  # on a disk, both
    "test_a_disk_that_is_full",
    # which is long, and about the launcher
    "test_a_launcher_that_is_killed_leaves_nothing_that_gc_does_not_find",
}


def borrowed(module: ModuleType) -> dict[str, Any]:
    """Take over those of its tests in which there are blobs."""
    found = {name: one for name, one in vars(module).items() if name.startswith("test_")}
    return {
        name: one
        for name, one in found.items()
        if name not in OTHERS and OURS & set(inspect.signature(one).parameters)
    }


globals().update(borrowed(test_contract) | borrowed(test_azure) | borrowed(test_azure_launches))
globals().update(borrowed(test_azure_machine))
globals().update(borrowed(test_store) | borrowed(test_snapshot) | borrowed(test_restore))
__all__ = ["environment", "impatient", "source"]  # their fixtures


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with Azurite(PROGRAM, tmp_path_factory.mktemp("azurite"), SUBSCRIPTION) as found:
        yield found


@pytest.fixture
def azure_rig(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> Iterator[AzureRig]:
    yield from rigs.rig(monkeypatch, azurite)


@pytest.fixture
def rig(azure_rig: AzureRig) -> AzureRig:
    return azure_rig


@pytest.fixture
def bucket(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A directory in a container; nothing of ours is between it and obstore."""
    with Azure(azurite=azurite) as azure:
        azure.blobs.make(ACCOUNT, CONTAINER)
        yield directly(azurite, monkeypatch, signed(STORAGE))


def directly(azurite: Azurite, monkeypatch: pytest.MonkeyPatch, token: str) -> Store:
    monkeypatch.setenv("SSL_CERT_FILE", str(azurite.authority))
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azurite.url(ACCOUNT))
    monkeypatch.setenv("AZURE_STORAGE_TOKEN", token)
    return Store(f"az://{CONTAINER}/tasks/some task?account_name={ACCOUNT}")


def test_it_takes_the_tokens_that_are_for_it(
    azurite: Azurite, bucket: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bucket.claim("a", b"1")
    other = directly(azurite, monkeypatch, signed(MANAGER))
    with pytest.raises(CredentialsError, match="no access"):
        other.read("a")


def test_a_name_is_claimed_once(bucket: Store) -> None:
    """By one of many who try at the same time."""
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda number: bucket.claim("lease", b"%d" % number), range(16)))
    assert won.count(True) == 1
    assert bucket.read("lease") == b"%d" % won.index(True)


def test_our_fake_is_like_it(azurite: Azurite) -> None:
    with Azure() as fake, Azure(azurite=azurite) as real:
        ours, theirs = (play(one) for one in (fake, real))
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    wrong = [(one, their) for one, their in zip(ours, theirs, strict=True) if one != their]
    assert wrong == []


class Talk:
    """Requests as obstore makes them; what of the answers matters, with ETags by their age."""

    def __init__(self, azure: Azure) -> None:
        self.url = f"{azure.url}/{ACCOUNT}/"
        self.azure = azure
        self.seen: list[tuple[str, Any]] = []
        self.tags: list[str] = []
        who = azure.logins.principal(azure.admin["client"])
        token = azure.logins.token(who, STORAGE)
        self.headers = {"Authorization": f"Bearer {token}", "x-ms-version": "2023-11-03"}

    def ask(self, method: str, target: str, content: bytes = b"", **headers: str) -> None:
        more = {key.replace("_", "-"): one for key, one in headers.items()}
        if method == "PUT":
            more["x-ms-blob-type"] = "BlockBlob"
        more = {**self.headers, **more}
        answer = requests.request(method, self.url + target, data=content, headers=more, timeout=9)
        step = f"{len(self.seen)}: {method} {target} {sorted(headers)}"
        self.seen.append((step, self.read(answer)))

    def read(self, answer: requests.Response) -> dict[str, Any]:
        found: dict[str, Any] = {"status": answer.status_code}
        kind = answer.headers.get("Content-Type", "")
        if not answer.ok:
            said = re.findall("<Code>(.*?)</Code>", answer.text)
            return {**found, "code": answer.headers["x-ms-error-code"], "said": said}
        if kind.startswith("multipart/mixed"):
            return {**found, "parts": PARTS.findall(answer.content)}
        if kind == "application/xml":
            return {**found, "list": self.listed(answer.content)}
        if tag := answer.headers.get("ETag"):
            found["tag"] = self.age(tag)
            parsedate_to_datetime(answer.headers["Last-Modified"])
        if answer.request.method in ("GET", "HEAD"):
            found |= {name: answer.headers.get(name) for name in USED}
        return {**found, "content": answer.content}

    def age(self, tag: str) -> int:
        """Number a tag; all of them are strings in quotes."""
        assert re.fullmatch('"[^"]+"', tag)
        self.tags += [tag] * (tag not in self.tags)
        return self.tags.index(tag)

    def listed(self, content: bytes) -> Any:
        root = ElementTree.fromstring(content)
        assert not root.findtext("NextMarker")
        blobs = []
        for one in root.iter("Blob"):
            about = {each.tag: str(each.text) for each in one.find("Properties") or ()}
            parsedate_to_datetime(about["Last-Modified"])
            age = self.age(f'"{about["Etag"]}"')
            blobs.append(
                (one.findtext("Name"), about["Content-Length"], about["Content-Type"], age)
            )
        folders = [one.findtext("Name") for one in root.iter("BlobPrefix")]
        return root.findtext("Prefix"), blobs, folders

    def batch(self, *names: str) -> None:
        """Delete many."""
        inside = "".join(
            f"--b\r\nContent-Type: application/http\r\nContent-Transfer-Encoding: binary\r\n"
            f"Content-ID: {number}\r\n\r\nDELETE /{ACCOUNT}/{CONTAINER}/{name} HTTP/1.1\r\n"
            f"Content-Length: 0\r\nx-ms-version: 2023-11-03\r\n"
            f"Authorization: {self.headers['Authorization']}\r\n\r\n\r\n"
            for number, name in enumerate(names)
        )
        kind = "multipart/mixed; boundary=b"
        where = f"{CONTAINER}?restype=container&comp=batch"
        self.ask("POST", where, f"{inside}--b--\r\n".encode(), Content_Type=kind)


def play(azure: Azure) -> list[tuple[str, Any]]:
    """Ask for all that obstore asks for, and then some."""
    talk = Talk(azure)
    ask: Callable[..., None] = talk.ask
    base = f"{CONTAINER}/tasks"
    for method in ("PUT", "GET", "DELETE"):  # there is no container yet
        ask(method, f"{base}/a")
    ask("GET", f"{CONTAINER}?restype=container&comp=list")
    azure.blobs.make(ACCOUNT, CONTAINER)
    ask("PUT", f"{base}/a", b"one", If_None_Match="*")
    ask("PUT", f"{base}/a", b"two", If_None_Match="*")
    ask("GET", f"{base}/a")
    ask("PUT", f"{base}/a", b"three")
    ask("HEAD", f"{base}/a")
    ask("PUT", f"{base}/a", b"four", If_Match=talk.tags[0])
    ask("PUT", f"{base}/a", b"five", If_Match=talk.tags[1])
    ask("PUT", f"{base}/none", b"", If_Match=talk.tags[1])
    ask("PUT", f"{base}/empty")
    ask("PUT", f"{base}/x%20y/b&c+d%C3%BC", b"0123456789")
    for span in ("2-4", "7-99", "3-"):
        ask("GET", f"{base}/x%20y/b&c+d%C3%BC", Range=f"bytes={span}")
    ask("GET", f"{base}/x%20y/b&c+d%C3%BC", Range="bytes=11-12")
    ask("GET", f"{base}/x%20y/b&c+d%C3%BC", x_ms_range="bytes=0-0")
    for method in ("GET", "HEAD", "DELETE"):
        ask(method, f"{base}/none")
    where = f"{CONTAINER}?restype=container&comp=list"
    for more in (
        "",
        "&prefix=tasks%2F",
        "&prefix=tasks%2Fx",
        "&prefix=tasks%2Fx+y%2F",
        "&prefix=o",
    ):
        ask("GET", where + more)
        ask("GET", f"{where}{more}&delimiter=%2F")
    talk.batch("tasks/empty", "tasks/none", "tasks/x%20y/b&c+d%C3%BC")
    ask("DELETE", f"{base}/a")
    ask("GET", where)
    return talk.seen
