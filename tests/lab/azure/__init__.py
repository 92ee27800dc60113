"""Azure, as a launcher and its machines see it, in this process.

Resource Manager with scale sets, autoscale and operations that take their time, the login service,
blobs, rights and faults. What is sent is compared with the vendor's models.

    with Azure() as azure:
        os.environ.update(azure.environment())    # the SDK and obstore speak to it now
        azure.fleet.evict("…", after=5)           # a spot eviction
        azure.fail("Microsoft.Compute/virtualMachineScaleSets/write", "SkuNotAvailable")
        azure.trouble("/metadata/identity", 429)  # of machines with their metadata service
        azure.left()                              # what costs money or is secret
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from tests.lab.azure.azurite import Azurite, Vendors
from tests.lab.azure.blobs import Blobs
from tests.lab.azure.front import Fault, Front, Principal, Role
from tests.lab.azure.imds import Metadata, Trouble
from tests.lab.azure.logins import Logins
from tests.lab.azure.machines import Nobody
from tests.lab.azure.manager import SUBSCRIPTION, Manager

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.azure.machines import Machines

REGION = "westus2"
MANAGER = "https://management.azure.com"


class Azure:
    """One subscription."""

    def __init__(
        self,
        machines: Machines | None = None,
        *,
        real: bool = False,
        azurite: Azurite | None = None,
    ) -> None:
        """With `real`, everything has the name that it has in the world."""
        self.real = real
        self.app = Front(self)
        self.blobs = Vendors(self, azurite) if azurite else Blobs(self)
        self.manager = Manager(self, machines or Nobody())
        self.fleet = self.manager.fleet
        self.logins = Logins(self.app.principals)
        self.troubles: list[Trouble] = []
        self.spread: float = 0  # seconds until what an identity was given is known everywhere
        self._identities: dict[str, Principal] = {}
        self._servers: list[Any] = []

    def __enter__(self) -> Azure:
        self.url = self.serve(self.app)
        self.admin = self.add_user()
        self.fleet.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.fleet.stop()
        self.blobs.clear()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        if self.app.bugs:
            raise AssertionError("\n".join(sorted(set(self.app.bugs))))

    @property
    def manager_url(self) -> str:
        """Where Resource Manager is."""
        return MANAGER if self.real else self.url

    @property
    def prices_url(self) -> str:
        """Where the list of prices is."""
        return "https://prices.azure.com" if self.real else self.url

    def environment(self, keys: dict[str, str] | None = None) -> dict[str, str]:
        """Name the variables with which the SDK and obstore speak to this."""
        found = keys or self.admin
        if self.real:
            return {
                "AZURE_CLIENT_ID": found["client"],
                "AZURE_CLIENT_SECRET": found["secret"],
                "AZURE_TENANT_ID": found["tenant"],
                "AZURE_SUBSCRIPTION_ID": SUBSCRIPTION,
            }
        from cml_runner.clouds.azure.account import Place

        account = Place(SUBSCRIPTION, REGION).storage
        return {
            "AZURE_CLIENT_ID": found["client"],
            "AZURE_SUBSCRIPTION_ID": SUBSCRIPTION,
            "AZURE_POD_IDENTITY_AUTHORITY_HOST": self.url,
            "AZURE_RESOURCE_MANAGER_ENDPOINT": self.url,
            "AZURE_RETAIL_PRICES_ENDPOINT": self.url,
            "AZURE_STORAGE_ENDPOINT": f"{self.url}/{account}",
            "AZURE_ALLOW_HTTP": "true",
        }

    def add_user(self, role: dict[str, Any] | None = None) -> dict[str, str]:
        """Make somebody who may do what a role definition for az says; everything by default."""
        name = f"user-{len(self.logins.secrets)}"
        return self.logins.add(name, (lambda: [_role(role)]) if role else None)

    def fail(self, action: str, code: str, message: str = "", **more: Any) -> Fault:
        """Answer the next call of this action, or more of them, with an error."""
        fault = Fault(action, code, message or f"the fake says {code}", **more)
        self.app.faults.append(fault)
        return fault

    def trouble(self, path: str, status: int = 0, times: float = 1) -> Trouble:
        """Have machines' metadata services answer with an error; without a status, not at all."""
        trouble = Trouble(path, status, times)
        self.troubles.append(trouble)
        return trouble

    def metadata(self, name: str) -> Metadata:
        """Serve a machine's metadata."""
        return Metadata(self.fleet, name, self._login, self.troubles)

    def left(self, region: str = REGION) -> list[str]:
        """List what costs money, or is secret."""
        lives = [one for one in self.fleet.lives.values() if f"-{region}/" in one.path]
        found = [f"machine {one.instance.id}" for one in lives if not one.ended]
        for path in list(self.manager.resources):
            kind, _, name = path.rpartition("/")
            if f"-{region}/" in path and kind.endswith(("scalesets", "autoscalesettings")):
                found.append(f"{kind.rpartition('/')[2]} {name}")
        return found + [f"object {key}" for key in self.objects(region) if not _record(key)]

    def objects(self, region: str = REGION) -> dict[str, bytes]:
        """Read every object of our container with leases and tasks."""
        from cml_runner.clouds.azure.account import NAME, Place

        return self.blobs.content(Place(SUBSCRIPTION, region).storage, NAME)

    def programs(self, region: str = REGION) -> dict[str, bytes]:
        """Read every program."""
        from cml_runner.clouds.azure.account import PROGRAMS, Place

        return self.blobs.content(Place(SUBSCRIPTION, region).storage, PROGRAMS)

    def serve(self, app: Callable[..., Any]) -> str:
        """Serve one more application on this computer, until the end; return its address."""
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
        server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self._servers.append(server)
        return f"http://127.0.0.1:{server.port}"

    def _login(self, identity: str, resource: str) -> str:
        """Return a token of a managed identity, which may do what it was given."""
        new = Principal(identity, lambda: self._roles(identity))
        who = self._identities.setdefault(identity.lower(), new)
        return self.logins.token(who, resource)

    def _roles(self, identity: str) -> list[Role]:
        principal = self.manager.resources[identity.lower()]["properties"]["principalId"]
        found = []
        for path, one in list(self.manager.resources.items()):
            properties = one.get("properties", {})
            if "/roleassignments/" not in path or self.manager.age(path) < self.spread:
                continue
            if properties["principalId"] == principal:
                definition = self.manager.resources[properties["roleDefinitionId"].lower()]
                scope = path.rpartition("/providers/")[0]
                (permission,) = definition["properties"]["permissions"]
                actions = tuple(permission["actions"])
                data = tuple(permission["dataActions"])
                found.append(Role(actions=actions, data=data, scopes=(scope,)))
        return found


def _role(definition: dict[str, Any]) -> Role:
    return Role(
        actions=tuple(definition["Actions"]),
        data=tuple(definition["DataActions"]),
        scopes=tuple(definition["AssignableScopes"]),
    )


def _record(key: str) -> bool:
    """Say if it is what may remain of a runner that is over."""
    return key.rpartition("/")[2].startswith(("log-", "status-", "events", "price"))
