"""A region of Google Cloud with machines that really boot, like that of AWS in tests/lab/region.py.

cloud-init asks its GCE datasource, which knows Google's machines by their firmware; that of a
container says nothing, and has its address without DHCP. So these two are switched off in it, and
nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.lab.gcp import GCP
from tests.lab.internet import METADATA
from tests.lab.region import Region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import ExitStack

    from tests.lab.machines import Instance

DATASOURCE = "usr/lib/python3/dist-packages/cloudinit/sources/DataSourceGCE.py"
SWITCHES = {"firmware": "platform_check=True", "network": "perform_dhcp_setup = True"}
CLOUD_INIT = """\
datasource_list: [GCE]
network:
  config: disabled
manage_etc_hosts: false
cloud_config_modules: [runcmd]
"""


class GoogleRegion(Region):
    """All of it; keys are those of a service account."""

    def open(self) -> None:
        """Have the cloud."""
        self.gcp = GCP(self.directory, self)

    def enter(self, stack: ExitStack) -> Mapping[str, Callable[..., Iterable[bytes]]]:
        """Start it; say who answers for which of its hosts."""
        self.gcp = stack.enter_context(self.gcp)
        return {"googleapis.com": self.gcp.app}

    def login(self, keys: dict[str, str]) -> dict[str, str]:
        """Name the variables with somebody's keys; empty: an administrator's."""
        return self.gcp.login(keys or self.gcp.admin)

    def metadata(self, instance: str) -> Callable[..., Iterable[bytes]]:
        """Serve a machine's metadata."""
        return self.gcp.metadata(instance)

    def powered_off(self, instance: str) -> None:
        """Tell the cloud that a machine has ended by itself."""
        self.gcp.compute.powered_off(instance)

    def life(self, instance: str) -> Any:
        """Return what the cloud knows of a machine."""
        return self.gcp.compute.instances[instance]

    def files(self, instance: Instance) -> Mapping[str, str]:
        """Write what machines have in place of what a prepared system has."""
        assert instance
        source = (self.prepared / self.suite / DATASOURCE).read_text()
        for name, text in SWITCHES.items():
            assert text in source, name
            source = source.replace(text, text.replace("True", "False"))
        return {
            "etc/hosts": f"127.0.0.1 localhost\n{METADATA} metadata.google.internal\n",
            "etc/cloud/cloud.cfg.d/99-lab.cfg": CLOUD_INIT,
            DATASOURCE: source,
        }
