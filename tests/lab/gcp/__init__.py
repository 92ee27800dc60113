"""A fake Google Cloud: Compute Engine, Cloud Storage, IAM, and what google-auth asks for a login.

with GCP(tmp_path) as gcp:
    os.environ.update(gcp.environment())      # the SDKs speak to it now, through a proxy
    gcp.compute.preempt(number, after=5)
    gcp.fail("compute.instanceTemplates.insert", 503, "backendError")
    gcp.left()                                # what costs money or is secret
"""

from __future__ import annotations

import json
import logging
import secrets
import ssl
import threading
import time
from functools import cache
from typing import TYPE_CHECKING, Any

from tests.lab.gcp.compute import PROJECT, Compute, Nobody
from tests.lab.gcp.front import Fault, Front, Principal
from tests.lab.gcp.iam import Iam
from tests.lab.gcp.login import Login
from tests.lab.gcp.metadata import Metadata
from tests.lab.gcp.proxy import Proxy
from tests.lab.gcp.storage import Storage
from tests.lab.internet import certify

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tests.lab.gcp.compute import Machines

BUCKET = f"cml-runner-{PROJECT}"
IMAGES: dict[tuple[str, str], dict[str, Any]] = {
    ("ubuntu-os-cloud", "ubuntu-2404-noble-amd64-v20261101"): {
        "family": "ubuntu-2404-lts-amd64", "architecture": "X86_64", "diskSizeGb": "10",
    },
    ("ubuntu-os-cloud", "ubuntu-2404-noble-arm64-v20261101"): {
        "family": "ubuntu-2404-lts-arm64", "architecture": "ARM64", "diskSizeGb": "10",
    },
    ("ubuntu-os-accelerator-images", "ubuntu-accelerator-2404-v20261101"): {
        "family": "ubuntu-accelerator-2404-amd64-with-nvidia-580",
        "architecture": "X86_64", "diskSizeGb": "20",
    },
}  # fmt: skip


class GCP:
    """One project."""

    def __init__(self, directory: Path, machines: Machines | None = None) -> None:
        self.directory = directory
        self.compute, self.storage, self.iam = Compute(machines or Nobody()), Storage(), Iam()
        self.compute.images = dict(IMAGES)
        self.compute.types, self.compute.gpus = _types()
        self.app = Front(self)
        self.login_service = Login(self.token)
        self._servers: list[Any] = []
        self.admin = self.add_user()

    def __enter__(self) -> GCP:
        self.compute.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.compute.stop()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, key: Mapping[str, str] | None = None) -> dict[str, str]:
        """Name the variables with which the SDKs speak to this."""
        if not self._servers:
            certify(self.directory)
            self._proxy = Proxy(self._listen(self.app, tls=True))
            self._servers.append(self._proxy)
        return {
            **self.login(key),
            "HTTPS_PROXY": self._proxy.url,
            "SSL_CERT_FILE": str(self.directory / "ca.pem"),
            "REQUESTS_CA_BUNDLE": str(self.directory / "ca.pem"),
        }

    def login(self, key: Mapping[str, str] | None = None) -> dict[str, str]:
        """Name the variables that say who we are."""
        return {"GOOGLE_APPLICATION_CREDENTIALS_DATA": json.dumps(dict(key or self.admin))}

    def add_user(self, role: Mapping[str, Any] | None = None) -> dict[str, str]:
        """Make a key for a service account that has this role; it may do everything by default."""
        name = f"user-{len(self.app.principals)}@{PROJECT}.iam.gserviceaccount.com"
        rights = set(role["includedPermissions"]) if role else None
        self.app.principals[name] = Principal(name, (lambda _: rights) if rights else None)
        return {
            "type": "service_account",
            "project_id": PROJECT,
            "private_key_id": secrets.token_hex(20),
            "private_key": _private_key(),
            "client_email": name,
            "client_id": "1",
            "token_uri": "https://oauth2.googleapis.com/token",
        }

    def fail(self, action: str, status: int, reason: str, message: str = "", **more: Any) -> Fault:
        """Answer the next call of this method, or more of them, with an error."""
        fault = Fault(action, status, reason, message or f"the fake says {reason}", **more)
        self.app.faults.append(fault)
        return fault

    def metadata(self, number: str) -> Metadata:
        """Serve an instance's metadata."""
        return Metadata(self.compute, number, self.token, self.app.faults)

    def federation(self, account: str, directory: Path) -> dict[str, Any]:
        """Make what a CI's login leaves: where its token is, and whose it becomes."""
        token = secrets.token_urlsafe(20)
        self.login_service.accepted.add(token)
        (directory / "token").write_text(token)
        url = "https://iamcredentials.googleapis.com/v1/projects/-/serviceAccounts"
        pool = "projects/123456789012/locations/global/workloadIdentityPools/ci/providers/github"
        return {
            "type": "external_account",
            "audience": f"//iam.googleapis.com/{pool}",
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": "https://sts.googleapis.com/v1/token",
            "service_account_impersonation_url": f"{url}/{account}:generateAccessToken",
            "credential_source": {"file": str(directory / "token")},
        }

    def token(self, account: str) -> str:
        """Log a service account in, whose machines may do what its policies say."""
        found = f"ya29.{secrets.token_urlsafe(40)}"
        rights = Principal(account, lambda call: self.iam.granted(account, call))
        self.app.tokens[found] = self.app.principals.setdefault(account, rights)
        return found

    def left(self, region: str = "us-west1") -> list[str]:
        """List what costs money, or is secret."""
        here = [one for one in self.compute.alive() if one.zone.startswith(region)]
        found = [f"instance {one.name}" for one in here]
        found += [f"group {name}" for place, name in self.compute.groups if place == region]
        found += [f"template {name}" for name in self.compute.templates]
        return found + [f"object {key}" for key in self.objects(region) if not _record(key)]

    def objects(self, region: str = "us-west1") -> dict[str, bytes]:
        """Read every object of a region in our bucket."""
        bucket = self.storage.buckets.get(BUCKET)
        there = dict(bucket.objects) if bucket else {}
        return {key: one.content for key, one in there.items() if f"/{region}/" in key}

    def serve(self, app: Callable[..., Any]) -> str:
        """Serve one more application on this computer, until the end; return its address."""
        return f"127.0.0.1:{self._listen(app)}"

    def _listen(self, app: Callable[..., Any], *, tls: bool = False) -> int:
        from werkzeug.serving import WSGIRequestHandler, make_server

        front = self.app

        class Handler(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def date_time_string(self, timestamp: float | None = None) -> str:
                """Tell the time by a clock which may be wrong."""
                return super().date_time_string((timestamp or time.time()) + front.ahead)

            def log(self, *_: object) -> None:
                """Keep quiet."""

        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        context = None
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.directory / "server.pem")
        server = make_server(
            "127.0.0.1", 0, app, threaded=True, request_handler=Handler, ssl_context=context
        )
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self._servers.append(server)
        return int(server.port)


def _types() -> tuple[set[str], set[str]]:
    """Every machine type and accelerator of our own tables, and some more."""
    from cml_runner.clouds.gcp import catalogue

    tables = [catalogue.data()["sizes"], *catalogue.data()["gpus"].values()]
    found = catalogue.types(("n1-standard-4", "n4-standard-8")[:1])
    for table in tables:
        for names in table.values():
            found += catalogue.types(names)
    return {one.name for one in found}, {one.gpu for one in found if one.gpu}


@cache
def _private_key() -> str:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    made = rsa.generate_private_key(65537, 2048)
    pkcs8, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return made.private_bytes(serialization.Encoding.PEM, pkcs8, none).decode()


def _record(key: str) -> bool:
    """Say if it is what may remain of a runner that is over."""
    return key.rpartition("/")[2].startswith(("log-", "status-", "events", "price"))
