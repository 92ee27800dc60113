"""Session Manager: who may begin a session on which instance, and a stand-in for AWS's plugin.

An instance is connected if the role of its profile lets its agent be. The stand-in knows what the
real one is given: a variable's name in place of the answer, so that no token is an argument.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.lab.aws import wire
from tests.lab.aws.instances import ACCOUNT
from tests.lab.aws.policies import Request, allowed
from tests.lab.aws.wire import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

    from tests.lab.aws.instances import Instances
    from tests.lab.aws.wire import Call

AGENT = (
    "ssm:UpdateInstanceInformation",
    "ssmmessages:CreateControlChannel",
    "ssmmessages:CreateDataChannel",
    "ssmmessages:OpenControlChannel",
    "ssmmessages:OpenDataChannel",
)
LOGIN = "SSM-SessionManagerRunShell"
PLUGIN = """#!{python}
import json, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and with us what we run
if sys.argv[1:] == ["--version"]:
    print(os.environ.get("PLUGIN_VERSION", "1.2.707.0"))
    sys.exit()
variable, region, action, profile, wanted, url = sys.argv[1:]
answer = json.loads(os.environ[variable])
assert set(answer) == {{"SessionId", "TokenValue", "StreamUrl"}}
assert not any(answer["TokenValue"] in one for one in sys.argv)
assert action == "StartSession"
assert url.startswith("http")
wanted = json.loads(wanted)
print("entered", wanted["Target"], region, flush=True)
for command in wanted.get("Parameters", {{}}).get("command", []):
    subprocess.run(["/bin/sh", "-c", "exec " + command])
"""


def install(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the stand-in where programs are looked for."""
    directory = Path(tempfile.mkdtemp(prefix="plugin-"))
    plugin = directory / "session-manager-plugin"
    plugin.write_text(PLUGIN.format(python=sys.executable))
    plugin.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    return plugin


class Sessions:
    """All sessions of the account, and which of them are open."""

    def __init__(
        self, instances: Instances, policies: Callable[[str], list[dict[str, Any]]]
    ) -> None:
        self._instances, self._policies = instances, policies
        self.open: dict[str, str] = {}
        self.begun = 0

    def serve(self, call: Call) -> bytes:
        """Begin or end one."""
        given = wire.checked(call)
        if call.action == "TerminateSession":
            self.open.pop(given["SessionId"], None)
            return json.dumps({"SessionId": given["SessionId"]}).encode()
        if call.action != "StartSession":
            raise ApiError("InvalidAction", f"the fake doesn't know {call.action}")
        name = f"somebody-{secrets.token_hex(8)}"
        if not self._connected(given["Target"]):
            raise ApiError("TargetNotConnected", f"{given['Target']} is not connected.")
        self.open[name] = given["Target"]
        self.begun += 1
        url = f"wss://ssmmessages.{call.region}.amazonaws.com/v1/data-channel/{name}"
        answer = {"SessionId": name, "TokenValue": secrets.token_urlsafe(40), "StreamUrl": url}
        return json.dumps(answer).encode()

    def requests(self, call: Call) -> Iterator[Request]:
        """Say what a call amounts to, in IAM's terms."""
        given, action = json.loads(call.body), f"ssm:{call.action}"
        if call.action != "StartSession":
            own = {"ssm:resourceTag/aws:ssmmessages:session-id": "${aws:userid}"}
            yield Request(action, f"arn:aws:ssm:{call.region}:{ACCOUNT}:session/x", own)
            return
        name = given["Target"]
        tags = self._instances.tags(name) if name in self._instances.lives else {}
        context = {f"ssm:resourceTag/{key}": value for key, value in tags.items()}
        yield Request(action, f"arn:aws:ec2:{call.region}:{ACCOUNT}:instance/{name}", context)
        document = given.get("DocumentName", LOGIN)
        owner = ACCOUNT if document == LOGIN else ""
        yield Request(action, f"arn:aws:ssm:{call.region}:{owner}:document/{document}")

    def _connected(self, name: str) -> bool:
        life = self._instances.lives.get(name)
        if not life or life.ended:
            return False
        policies = self._policies(life.instance.profile)
        return all(allowed(policies, Request(action, "*")) for action in AGENT)
