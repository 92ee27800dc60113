"""The vendor's own emulator of Blob Storage, in the place of our Blobs.

    with Azurite(PROGRAM, directory) as azurite, Azure(azurite=azurite) as azure:

Rights, faults and what was asked stay with us; all else of a request and of its answer is handed
on as it came. It speaks TLS, since it takes tokens by nothing else. To have it: `npm install
azurite`, and set AZURITE=…/node_modules/.bin/azurite-blob.
"""

from __future__ import annotations

import http.client
import os
import re
import ssl
import subprocess
from typing import TYPE_CHECKING
from urllib.parse import quote
from xml.etree import ElementTree

from cml_runner.clouds.azure.account import Place
from cml_runner.wait import until
from tests.lab.azure.blobs import Blobs
from tests.lab.azure.tokens import STORAGE, signed
from tests.lab.internet import certify

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.lab.azure import Azure
    from tests.lab.azure.blobs import Answer
    from tests.lab.azure.wire import Call

PROGRAM = os.environ.get("AZURITE", "")
MISSING = "AZURITE doesn't name the program azurite-blob"
OPTIONS = (
    *("--blobPort", "0", "--oauth", "basic", "--cert", "server.pem", "--key", "server.pem"),
    *("--inMemoryPersistence", "--skipApiVersionCheck", "--silent", "--disableTelemetry"),
)
LISTENS = re.compile(r"listens on https://127\.0\.0\.1:(\d+)")
REGIONS = ("westus2", "eastus")  # for whose accounts it has room
REAL = ".blob.core.windows.net"
HOP = ("connection", "keep-alive", "transfer-encoding", "content-length")
VERSION = "2023-11-03"  # of the API with which we look at it ourselves


class Azurite:
    """One process, which keeps everything in memory."""

    def __init__(self, program: str, directory: Path, subscription: str) -> None:
        self._program, self._directory = program, directory
        names = [Place(subscription, one).storage for one in REGIONS]
        self._accounts = ";".join(f"{one}:bm9ib2R5J3M=" for one in names)  # with nobody's key
        self.authority = directory / "ca.pem"

    def __enter__(self) -> Azurite:
        self._directory.mkdir(exist_ok=True)
        certify(self._directory)
        said = self._directory / "azurite.log"
        with said.open("w") as file:
            self._process = subprocess.Popen(
                [self._program, *OPTIONS],
                cwd=self._directory,
                env={"PATH": os.environ["PATH"], "AZURITE_ACCOUNTS": self._accounts},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            found = until(lambda: LISTENS.search(said.read_text()), "azurite", 30, every=0.05)
        except BaseException:
            self.__exit__()
            raise
        assert found
        self.port = int(found[1])
        self._trust = ssl.create_default_context(cafile=str(self.authority))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def url(self, account: str) -> str:
        """Say where an account is."""
        return f"https://127.0.0.1:{self.port}/{account}"

    def ask(
        self, method: str, target: str, headers: Mapping[str, str], content: bytes = b""
    ) -> Answer:
        """Hand on one request as it is."""
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=60, context=self._trust
        )
        try:
            body = content if method in ("PUT", "POST") else None
            connection.request(method, target, body, dict(headers))
            answer = connection.getresponse()
            found = answer.read()
        finally:
            connection.close()
        kept = [one for one in answer.getheaders() if one[0].lower() not in HOP]
        length = answer.getheader("Content-Length")
        if method == "HEAD" and length:
            kept.append(("Content-Length", length))
        return answer.status, kept, found


class Vendors(Blobs):
    """Containers which azurite keeps."""

    def __init__(self, azure: Azure, azurite: Azurite) -> None:
        super().__init__(azure)
        self._azurite = azurite
        self._made: set[tuple[str, str]] = set()

    def make(self, account: str, name: str) -> None:
        """Have a container, unless there is one of this name."""
        status, _, content = self._look("PUT", f"/{account}/{name}?restype=container")
        assert status in (201, 409), content
        self._made.add((account, name))

    def clear(self) -> None:
        """Lose all containers."""
        while self._made:
            account, name = self._made.pop()
            self._look("DELETE", f"/{account}/{name}?restype=container")

    def content(self, account: str, name: str) -> dict[str, bytes]:
        """Read all that is in a container."""
        base = f"/{account}/{name}"
        status, _, listed = self._look("GET", f"{base}?restype=container&comp=list")
        if status != 200:
            return {}
        names = [str(one.text) for one in ElementTree.fromstring(listed).iter("Name")]
        found = {key: self._look("GET", f"{base}/{quote(key)}") for key in names}
        return {key: content for key, (status, _, content) in found.items() if status == 200}

    def answer(self, call: Call, account: str, name: str) -> Answer:
        """Answer who may ask."""
        assert name
        real = call.headers["host"].endswith(REAL)
        target = call.target.removeprefix(f"/{account}") if real else call.target
        headers = {key: one for key, one in call.headers.items() if key not in HOP}
        return self._azurite.ask(call.method, target, headers, call.raw)

    def _look(self, method: str, target: str) -> Answer:
        headers = {"Authorization": f"Bearer {signed(STORAGE, 'owner')}", "x-ms-version": VERSION}
        return self._azurite.ask(method, target, headers)
