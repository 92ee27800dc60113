"""cml-runner launch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from cml_runner import clouds
from cml_runner.cli import options

if TYPE_CHECKING:
    from cml_runner.launch import Launch
    from cml_runner.launch.options import Order

OLD: dict[str, Any] = {"hidden": True, "help": "Accepted for CML's sake, without effect."}


@click.command("launch", context_settings=options.SETTINGS)
@options.forge
@options.option("--labels", default="cml", help="Labels of the runner, delimited with commas.")
@options.option("--name", help="Name of the runner.  [default: cml-{ID}]")
@options.option(
    "--idle-timeout",
    default="5 minutes",
    metavar="DURATION",
    help="End after waiting so long for a job: 300, 5min, 1h 30m, never.",
)
@options.option("--single", is_flag=True, help="End after one job.")
@options.option(
    "--reuse",
    is_flag=True,
    help="Launch nothing if a runner with this name, or with all these labels, is online.",
)
@options.option("--reuse-idle", is_flag=True, help="The same, if it is idle too.")
@options.option(
    "--no-retry",
    is_flag=True,
    help="Don't run jobs again which an interruption or a time limit ended.",
)
@options.option("--docker-volumes", multiple=True, help="GitLab: volumes of the jobs' containers.")
@options.option(
    "--cloud",
    type=clouds.named,
    metavar=options.choice(clouds.NAMES),
    help="Where to launch.  [default: this machine is the runner, in the foreground]",
)
@options.option(
    "--cloud-region",
    default="us-west",
    help=f"{', '.join(clouds.REGIONS)} or native; a list is tried in its order.",
)
@options.option(
    "--cloud-type",
    default="m",
    help=f"{', '.join(clouds.SIZES)} or native; a list is a choice, in order of preference.",
)
@options.option("--cloud-gpu", help="GPU model: t4, v100, a100 … or native; nogpu.")
@options.option(
    "--cloud-hdd-size",
    metavar="GB",
    help="Size of the disk.  [default: 35; on Kubernetes, whatever the node has]",
)
@options.option("--cloud-image", default="ubuntu", help="ubuntu, nvidia or native.")
@options.option(
    "--cloud-spot", is_flag=True, help="Take a spot machine; interruptions are survived."
)
@options.option(
    "--cloud-spot-price", default="-1", metavar="USD", help="Most to pay an hour; -1: as it comes."
)
@options.option(
    "--cloud-spot-fallback", is_flag=True, help="Pay on demand when there is no spot capacity."
)
@options.option(
    "--cloud-permission-set",
    help="Identity of the machine: instance profile, service account …  [default: ours]",
)
@options.option("--cloud-metadata", multiple=True, metavar="K=V", help="Tags, labels.")
@options.option(
    "--cloud-ssh-private",
    metavar="PEM",
    help="Let whoever has this key in, from here.  [default: nobody gets in]",
)
@options.option(
    "--cloud-startup-script",
    metavar="BASE64|@FILE",
    help="Run this on the machine before anything else.",
)
@options.option("--cloud-aws-security-group", help="AWS.  [default: nothing comes in]")
@options.option(
    "--cloud-aws-subnet",
    "--cloud-aws-subnet-id",
    help="AWS.  [default: those of the default VPC]",
)
@options.option(
    "--cloud-kubernetes-namespace",
    help="Kubernetes: the namespace.  [default: the kubeconfig's]",
)
@options.option(
    "--cloud-kubernetes-image-pull-secret",
    multiple=True,
    metavar="NAME",
    help="Kubernetes: a secret to pull the image with; can be repeated.",
)
@options.option(
    "--cloud-kubernetes-node-selector",
    multiple=True,
    metavar="K=V",
    help="Kubernetes: labels of the nodes to run on.  [default: by the GPU's kind]",
)
@options.option(
    "--cloud-kubernetes-toleration",
    multiple=True,
    metavar="K=V:EFFECT",
    help="Kubernetes: taints of nodes to bear.  [default: those of GPUs and spot machines]",
)
@options.option(
    "--workdir",
    "--path",
    "workdir",
    help="Where the agent lives.  [default: ~/.cml/NAME; below /opt on a cloud's machine]",
)
@options.option("--sudo/--no-sudo", default=True, help="Whether jobs may become root.")
@options.option(
    "--docker", is_flag=True, help="Have Docker on the machines, where it has to be installed, too."
)
@options.provision
@options.option("--count", default="1", metavar="N", help="Launch N machines: NAME-0, NAME-1 …")
@options.option(
    "--max-lifetime",
    default="5 days",
    metavar="DURATION",
    help="The cloud itself ends everything then; never is allowed.",
)
@options.option(
    "--max-price",
    metavar="USD",
    help="Refuse if all machines together would cost more an hour, or nobody knows.",
)
@options.option("--wait/--no-wait", default=True, help="Wait until the forge says online.")
@options.option(
    "--wait-timeout", default="20 minutes", metavar="DURATION", help="Then give up, and delete all."
)
@options.option("--dry-run", is_flag=True, help="Say what would be created; change nothing.")
@options.option("--tpi-version", **OLD)
@options.option("--cml-version", **OLD)
@options.option("--tf-resource", **OLD)
@options.option("--gcp-access-token", **OLD)
@options.option("--runner-path", **OLD)
@options.option("--destroy-delay", **OLD)
@options.common
def launch_(output: str, **values: Any) -> None:
    """Launch a runner, or several.

    With --cloud on a machine of a cloud: when the command returns, the runner is online, and one
    JSON object on stdout says what was launched. Without it this machine is the runner, until it
    has been idle for long enough, or Ctrl-C.

    Every option can be given as a variable: CML_RUNNER_CLOUD_TYPE for --cloud-type.
    """
    from cml_runner import logs
    from cml_runner.launch import options as reading

    logs.hide(values["token"], values["github_app_key"], values["cloud_ssh_private"])
    order = reading.read(reading.Options(**values), os.environ)
    if order.dry_run:
        _dry_run(order)
    elif order.cloud:
        _away(order, output)
    else:
        _here(order)


def _dry_run(order: Order) -> None:
    from cml_runner import launch
    from cml_runner.launch import result

    launched = launch.Launch(order)
    _, found = launch.prepare(order)
    launched.reused = found.name if found else ""
    if not order.cloud or found:
        options.echo_json({**result.fields(launched), "resources": []})
        return
    launched.region, *_ = order.regions
    launched.plan = launch.plan(order, launched.region)
    launched.price = launch.price(order, launched.region)
    options.echo_json(result.plan(launched))
    click.echo(f"{launched.region}: {launched.price.text}", err=True)


def _here(order: Order) -> None:
    """Be the runner."""
    from cml_runner import launch, supervise

    forge, found = launch.prepare(order)
    if not found:
        supervise.here(launch.settings(order, forge))


def _away(order: Order, output: str) -> None:
    from cml_runner import launch
    from cml_runner.cli import ci, progress
    from cml_runner.launch import result

    with progress.shown(order.name) as tell:
        launched: Launch = launch.launch(order, tell)
    fields = result.fields(launched)
    options.echo_json(fields)
    ci.report(fields, os.environ)
    if output == "text":
        click.echo(_summary(launched), err=True)


def _summary(launched: Launch) -> str:
    order = launched.order
    if launched.reused:
        return f"{launched.reused} is there already: nothing was launched"
    spent = sum(launched.phases.values())
    state = "online" if order.wait else "on its way"
    return (
        f"{', '.join(order.names)}: {state} after {spent:.1f} s; "
        f"cml-runner logs -f {order.id} --cloud {order.cloud} --cloud-region {launched.region}"
        " shows what it does"
    )
