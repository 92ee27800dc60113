"""A shell on an instance through Session Manager: no port, no key, and no network of ours.

The instance's agent keeps a connection to AWS, through which sessions come. We begin one with our
own credentials, hand it to AWS's plugin, which has the terminal, and end it.
https://docs.aws.amazon.com/systems-manager/latest/userguide/session-manager.html
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cml_runner import signals
from cml_runner.errors import MissingDependency, RunnerError
from cml_runner.terminal import Program

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cml_runner.clouds.aws.session import Session

log = logging.getLogger(__name__)

PLUGIN = "session-manager-plugin"
RESPONSE = "AWS_SSM_START_SESSION_RESPONSE"  # a variable, so that no token is an argument …
OLDER = (1, 2, 497, 0)  # … which plugins up to this version don't know
COMMAND = "AWS-StartInteractiveCommand"  # a document of AWS's own
HELP = (
    "https://docs.aws.amazon.com/systems-manager/latest/userguide/"
    "session-manager-working-with-install-plugin.html"
)


@contextmanager
def opened(session: Session, instance: str, command: Sequence[str]) -> Iterator[Program]:
    """Begin a session, and end it; should nobody be left to do so, AWS does when it is idle."""
    _check()
    wanted: dict[str, Any] = {"Target": instance}
    if command:
        wanted |= {"DocumentName": COMMAND, "Parameters": {"command": [shlex.join(command)]}}
    begun = _begin(session, wanted)
    told = json.dumps({key: begun[key] for key in ("SessionId", "TokenValue", "StreamUrl")})
    profile, url = os.environ.get("AWS_PROFILE", ""), session.endpoint("ssm")
    arguments = (PLUGIN, RESPONSE, session.region, "StartSession", profile, json.dumps(wanted), url)
    try:
        yield Program(arguments, {RESPONSE: told})
    finally:
        _end(session, begun["SessionId"])


def _begin(session: Session, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        return session.call("ssm", "start_session", **wanted)
    except RunnerError as error:
        if "TargetNotConnected" not in str(error):
            raise
        msg = (
            f"{wanted['Target']} isn't connected to Session Manager: it may be too young; or its"
            " image has no amazon-ssm-agent (Ubuntu's has); or the role of our machines is older"
            " than this: cml-runner setup aws renews it"
        )
        raise RunnerError(msg) from error


def _end(session: Session, name: str) -> None:
    try:
        with signals.undisturbed():
            session.call("ssm", "terminate_session", SessionId=name)
    except RunnerError as error:
        log.warning("the session %s ends by itself when it is idle: %s", name, error)


def _check() -> None:
    """Raise MissingDependency unless the plugin is there, and new enough."""
    if not shutil.which(PLUGIN):
        msg = f"a shell on AWS needs the program {PLUGIN}; to install it, see {HELP}"
        raise MissingDependency(msg)
    done = subprocess.run((PLUGIN, "--version"), capture_output=True, text=True, check=False)
    version = tuple(int(part) for part in re.findall(r"\d+", done.stdout))
    if version <= OLDER:
        found = done.stdout.strip() or "unknown"
        msg = f"{PLUGIN} is too old ({found}): its successors take no secrets as arguments: {HELP}"
        raise MissingDependency(msg)
