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
    from collections.abc import Callable, Mapping

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

    def _found_cloud(self) -> None:
        self.gcp = GCP(self.directory, self)

    def _open_cloud(self) -> None:
        self.gcp = self._stack.enter_context(self.gcp)
        self.internet.serve("googleapis.com", self.gcp.app)

    def _login(self, keys: dict[str, str]) -> dict[str, str]:
        return self.gcp.login(keys or self.gcp.admin)

    def _console(self, instance: str, line: str) -> None:
        self.gcp.compute.instances[instance].console += line

    def _powered_off(self, instance: str) -> None:
        self.gcp.compute.powered_off(instance)

    def _metadata(self, instance: str) -> Callable[..., Any]:
        return self.gcp.metadata(instance)

    def _files(self) -> Mapping[str, str]:
        source = (self.prepared / self.suite / DATASOURCE).read_text()
        for name, text in SWITCHES.items():
            assert text in source, name
            source = source.replace(text, text.replace("True", "False"))
        return {
            "etc/hosts": f"127.0.0.1 localhost\n{METADATA} metadata.google.internal\n",
            "etc/cloud/cloud.cfg.d/99-lab.cfg": CLOUD_INIT,
            DATASOURCE: source,
        }

    def _is_alive(self, instance: str) -> bool:
        return self.gcp.compute.instances[instance].status in ("STAGING", "RUNNING")
