"""Ways into machines: what they need and leave behind, and what is told where there is none."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest

from cml_runner.clouds.gcp import session
from cml_runner.clouds.gcp import shell as gcp_shell
from cml_runner.errors import (
    ConfigurationError,
    CredentialsError,
    MissingDependency,
    NotFound,
    NotReady,
    RunnerError,
)
from cml_runner.model import Identifier, Task
from tests.clouds.conftest import directory
from tests.lab.pods import Pods

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.clouds.aws_rig import AwsRig
    from tests.clouds.azure_rig import AzureRig
    from tests.clouds.conftest import LocalRig
    from tests.clouds.gcp_rig import GcpRig
    from tests.conftest import Cli

ON_AWS = ("--cloud", "aws", "--cloud-region", "us-west")


# AWS


def test_a_command_on_an_instance(aws_rig: AwsRig, cli: Cli) -> None:
    plan = aws_rig.launch(2)
    first, second = sorted(aws_rig.running(plan))
    name, environment = plan.group.name, aws_rig.aws.environment()  # type: ignore[attr-defined]
    arguments = ("ssh", name, *ON_AWS, "--instance", second, "--", "echo", "a b", "$HOME")
    done = cli.run(*arguments, environment=environment)
    assert done.out == f"entered {second} us-west-2\na b $HOME\n"
    assert aws_rig.aws.sessions.begun == 1
    assert aws_rig.aws.sessions.open == {}
    done = cli.run("ssh", name, *ON_AWS, environment=environment)
    assert done.out in (f"entered {one} us-west-2\n" for one in (first, second))


def test_the_least_policy_lets_one_in(aws_rig: AwsRig, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = aws_rig.launch(1)
    keys = aws_rig.aws.add_user(dict(aws_rig.cloud.permissions()))
    for name, value in aws_rig.aws.environment(keys).items():
        monkeypatch.setenv(name, value)
    fresh = type(aws_rig.cloud)("us-west").plan(plan.bucket.task)  # type: ignore[attr-defined]
    with fresh.group.shell("", ("true",)) as shell:
        assert len(aws_rig.aws.sessions.open) == 1
        assert shell.run() == 0
    assert aws_rig.aws.sessions.open == {}


def test_who_may_not_begin_a_session(aws_rig: AwsRig, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = aws_rig.launch(1)
    policy = dict(aws_rig.cloud.permissions())
    policy["Statement"] = [one for one in policy["Statement"] if "Shell" not in one["Sid"]]
    for name, value in aws_rig.aws.environment(aws_rig.aws.add_user(policy)).items():
        monkeypatch.setenv(name, value)
    fresh = type(aws_rig.cloud)("us-west").plan(plan.bucket.task)  # type: ignore[attr-defined]
    with pytest.raises(CredentialsError, match="ssm:StartSession"), fresh.group.shell("", ()):
        pass


def test_an_instance_whose_role_is_of_the_past(aws_rig: AwsRig) -> None:
    plan = aws_rig.launch(1)
    aws_rig.aws.fail("ssm:StartSession", "TargetNotConnected")
    with pytest.raises(RunnerError, match="cml-runner setup aws"), plan.group.shell("", ()):
        pass


def test_the_plugin_is_missing_or_too_old(aws_rig: AwsRig, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = aws_rig.launch(1)
    monkeypatch.setenv("PLUGIN_VERSION", "1.2.497.0")
    with pytest.raises(MissingDependency, match="too old"), plan.group.shell("", ()):
        pass
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MissingDependency, match="install"), plan.group.shell("", ()):
        pass
    assert aws_rig.aws.sessions.begun == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_session_is_ended_when_we_are(aws_rig: AwsRig, cli: Cli, number: signal.Signals) -> None:
    plan = aws_rig.launch(1)
    name = plan.group.name  # type: ignore[attr-defined]
    arguments = ("ssh", name, *ON_AWS, "--", "sleep", "30")
    process = cli.start(*arguments, environment=aws_rig.aws.environment())
    assert process.stdout
    assert process.stdout.readline().startswith("entered")
    process.send_signal(number)
    process.wait(timeout=20)
    assert process.returncode == 128 + number
    assert aws_rig.aws.sessions.open == {}


# The embedded cloud


def test_a_shell_is_a_part_of_its_machine(local_rig: LocalRig, cli: Cli) -> None:
    plan = local_rig.launch(1)
    local_rig.up(plan, "0.1")
    name = directory(plan).name
    secret = {"GITHUB_TOKEN": "ghp_secret"}
    done = cli.run(
        "ssh", name, "--", "/bin/sh", "-c", "pwd; env; exit 7", environment=secret, code=7
    )
    place = directory(plan) / "machines" / "0.1"
    assert done.out.startswith(f"{place}\n")
    assert f"LOCAL_CLOUD_MACHINE={place}" in done.out
    assert "ghp_secret" not in done.out
    process = cli.start("ssh", name, "--", "/bin/sh", "-c", "echo here; exec sleep 60")
    assert process.stdout
    assert process.stdout.readline() == "here\n"
    local_rig.die(plan, "0.1")
    process.wait(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL, "it ended with its machine"


def test_ctrl_c_is_for_the_shell(local_rig: LocalRig) -> None:
    plan = local_rig.launch(1)
    local_rig.up(plan, "0.1")
    script = "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.1; done"
    arguments = ("ssh", directory(plan).name, "--", "/bin/sh", "-c", script)
    code, out = on_a_terminal([sys.executable, "-m", "cml_runner", *arguments], "ready", "\x03")
    assert (code, "caught" in out) == (3, True)


def on_a_terminal(command: list[str], mark: str, keys: str) -> tuple[int, str]:
    """Run a program on a terminal of its own; type once it has said something."""
    pid, terminal = pty.fork()
    fcntl.ioctl(terminal if pid else 0, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    if not pid:
        os.execvpe(command[0], command, os.environ)
    out, typed = "", False
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:
            piece = b""
        if not piece:
            break
        out += piece.decode(errors="replace")
        if mark in out and not typed:
            os.write(terminal, keys.encode())
            typed = True
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), out


# Google Cloud


def machine_of(rig: GcpRig) -> Any:
    (found,) = [one for one in rig.gcp.compute.instances.values() if not one.ended]
    return found


@pytest.mark.parametrize("key", ["", "somebody:ssh-ed25519 AAAA their own"])
def test_a_machine_is_open_to_googles_proxy_meanwhile(
    gcp_rig: GcpRig, capfd: pytest.CaptureFixture[str], key: str
) -> None:
    plan = gcp_rig.launch(1)
    machine = machine_of(gcp_rig)
    if key:
        machine.metadata |= {"ssh-keys": key, "enable-oslogin": "FALSE"}
    before = dict(machine.metadata), list(machine.tags)
    with plan.group.shell("", ("echo", "a b")) as shell:
        assert "cml-runner-iap" in machine.tags
        line = machine.metadata["ssh-keys"].splitlines()[-1]
        assert line.startswith("cml-shell:ssh-ed25519 ")
        note = json.loads(line.partition(" google-ssh ")[2])
        until = datetime.fromisoformat(note["expireOn"].replace("+0000", "+00:00"))
        assert timedelta() < until - datetime.now(timezone.utc) < timedelta(minutes=11)
        assert shell.run() == 0
    assert f"entered cml-shell@{machine.name}\na b\n" in capfd.readouterr().out
    assert (machine.metadata, machine.tags) == before


def test_the_proxys_rule_is_for_it_alone(gcp_rig: GcpRig) -> None:
    rules = gcp_rig.gcp.compute.firewalls
    rule = rules["cml-runner-iap"]
    assert rule["sourceRanges"] == ["35.235.240.0/20"]
    assert rule["targetTags"] == ["cml-runner-iap"]
    assert rule["priority"] < rules["cml-runner"]["priority"]
    gcp_rig.launch(1)
    assert "cml-runner-iap" not in machine_of(gcp_rig).tags
    del rules["cml-runner-iap"]
    plan = gcp_rig.launch(1)
    with pytest.raises(NotFound, match="setup gcp"), plan.group.shell("", ()):
        pass


def test_the_least_role_opens_it(gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = gcp_rig.launch(1)
    user = gcp_rig.gcp.add_user(dict(gcp_rig.cloud.permissions()))
    monkeypatch.setenv(session.DATA, gcp_rig.gcp.login(user)[session.DATA])
    fresh = type(gcp_rig.cloud)("us-west").plan(Task(id=Identifier.parse(plan.group.name)))  # type: ignore[attr-defined]
    with fresh.group.shell("", ("true",)) as shell:
        assert shell.run() == 0
    fresh.group.evict("")


def test_a_machine_that_takes_no_key(gcp_rig: GcpRig, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = gcp_rig.launch(1)
    monkeypatch.setattr(gcp_shell, "PATIENCE", 0.1)
    monkeypatch.setenv("SSH_REFUSES", "yes")
    with pytest.raises(NotReady, match="to take a key"), plan.group.shell("", ()):
        pass
    assert "cml-runner-iap" not in machine_of(gcp_rig).tags
    assert "ssh-keys" not in machine_of(gcp_rig).metadata


# Where we don't open anything


def test_what_azure_says_is_told(azure_rig: AzureRig) -> None:
    plan = azure_rig.launch(1)
    (machine,) = azure_rig.running(plan)
    with pytest.raises(ConfigurationError) as caught, plan.group.shell(machine, ("ls",)):
        pass
    assert f"--name {machine} --command-id RunShellScript --scripts ls" in str(caught.value)


def test_only_spot_machines_are_evicted(gcp_rig: GcpRig) -> None:
    task = gcp_rig.task()
    plan = gcp_rig.launch(1, replace(task, machine=replace(task.machine, spot=False)))
    with pytest.raises(ConfigurationError, match="no spot machine"):
        plan.group.evict("")


# Kubernetes

IN_A_POD = """
import sys
from cml_runner.clouds.kubernetes.session import Session
from cml_runner.clouds.kubernetes.shell import Shell
sys.exit(Shell(Session(), "a-pod", sys.argv[1:]).run())
"""


@pytest.fixture
def pods(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pods]:
    with Pods() as found:
        monkeypatch.setenv("KUBECONFIG_DATA", found.config)
        yield found


def test_a_terminal_in_a_pod(pods: Pods) -> None:
    script = "trap 'echo caught; stty size; exit 3' INT; test -t 0 && echo ready; cat"
    command = [sys.executable, "-c", IN_A_POD, "/bin/sh", "-c", script]
    code, out = on_a_terminal(command, "ready", "typed\r\x03")
    assert code == 3
    assert "caught" in out, "Ctrl-C goes to the pod"
    assert "33 77" in out, "its terminal is as large as ours"
    (asked,) = pods.asked
    assert asked["tty"] == ["true"]
    assert "stderr" not in asked


def test_a_pipe_through_a_pod(pods: Pods) -> None:
    command = [sys.executable, "-c", IN_A_POD, "/bin/sh", "-c", "wc -c; echo oh >&2; exit 5"]
    done = subprocess.run(command, input=b"x" * 1_000_000, capture_output=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (5, b"1000000", b"oh\n")
    assert "tty" not in pods.asked[0]


def test_a_shell_that_breaks_off(pods: Pods) -> None:
    """Its connection is lost, and with it what it would have said at its end."""
    code = "import os, signal; print('here', flush=True); signal.pause()"
    command = [sys.executable, "-c", IN_A_POD, sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "here\n"
    pods.cut()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "broke off" in err or "is broken" in err


def test_the_least_role_of_azure_evicts(
    azure_rig: AzureRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = azure_rig.launch(1)
    (machine,) = azure_rig.running(plan)
    user = azure_rig.azure.add_user(json.loads(json.dumps(azure_rig.cloud.permissions())))
    for name, value in azure_rig.azure.environment(user).items():
        monkeypatch.setenv(name, value)
    fresh = type(azure_rig.cloud)("us-west").plan(Task(id=Identifier.parse(plan.group.name)))  # type: ignore[attr-defined]
    fresh.group.evict(machine)
    assert azure_rig.notice(plan, machine)
