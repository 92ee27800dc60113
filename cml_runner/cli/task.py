"""cml-runner task: a script on machines of a cloud."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cml_runner import clouds
from cml_runner.cli import options
from cml_runner.cli.terraform import import_
from cml_runner.errors import RunnerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cml_runner.inventory import Found
    from cml_runner.task.follow import Follow, Line

COLUMNS = ("id", "name", "cloud", "region", "status", "created", "expires")
EVERY = 0.1  # seconds between two words on how far a transfer is


@click.group("task", context_settings=options.SETTINGS)
def task_() -> None:
    """Run a script on machines of a cloud: files go up, results come down.

    The machines are gone when the script has ended; its data stay until they are pulled and the
    task is destroyed. Spot machines that are taken away are replaced, with the data of ten seconds
    before.
    """


task_.add_command(import_)


@task_.command("run", context_settings=options.SETTINGS)
@options.option("--cloud", metavar=options.choice(clouds.NAMES), help="Where to run it.")
@options.option("--region", help=f"{', '.join(clouds.REGIONS)} or native.  [default: us-west]")
@options.option("--machine", help=f"{', '.join(clouds.SIZES)}, m+t4 … or native.  [default: m]")
@options.option("--image", help="ubuntu, nvidia or native.  [default: ubuntu]")
@options.option("--disk-size", metavar="GB", help="Size of the disk.  [default: the image's]")
@options.option(
    "--spot",
    metavar="USD",
    help="Spot machines, for so much an hour; 0: as it comes.  [default: -1, none]",
)
@options.option("--parallelism", metavar="N", help="How many machines.  [default: 1]")
@options.option("--timeout", metavar="DURATION", help="When the script is ended.  [default: 24 h]")
@options.option(
    "--environment",
    multiple=True,
    metavar="K[=V]",
    help="A variable for the script; without a value, or as a glob, those from here.",
)
@options.option(
    "--workdir", metavar="DIR", help="What is sent, and where the script works.  [default: .]"
)
@options.option(
    "--output",
    metavar="DIR",
    help="What is fetched, in the workdir.  [default: all that is new or has changed]",
)
@options.option(
    "--exclude",
    multiple=True,
    metavar="RULE",
    help="What isn't sent: a path or glob in the workdir, a rule of rclone's, or @FILE, which is "
    "like .gitignore.",
)
@options.option("--script", metavar="FILE", help="What to run, unless a command follows.")
@options.option(
    "--storage-container",
    metavar="NAME[/PATH]",
    help="A bucket of your own for the data, which the machines may use.  [default: ours]",
)
@options.option(
    "--storage-container-opts", multiple=True, metavar="K=V", help="Its options: AWS has region."
)
@options.option("--name", help="Of the task; there is only one of this name.")
@options.option("--permission-set", help="Identity of the machines.  [default: ours]")
@options.option("--tags", multiple=True, metavar="K=V", help="Tags, labels.")
@options.provision
@options.option("--detach", is_flag=True, help="Don't wait; print the identifier.")
@options.option("--json", "as_json", is_flag=True, help="Print JSON, as --output json elsewhere.")
@click.argument("command", nargs=-1)
@options.log
def run_(*, detach: bool, as_json: bool, **values: Any) -> None:
    """Run a script, or a command given after --, and show what it says.

    Its exit code is that of the script. On Ctrl-C the task goes on. task.toml here, or
    [tool.cml-runner.task] in pyproject.toml, says what flags don't: keys are named like these.
    """
    from cml_runner import task
    from cml_runner.cli import progress
    from cml_runner.task import options as reading
    from cml_runner.task.follow import Follow

    order = reading.read(reading.Options(**values), os.environ, Path.cwd())
    _hide(order.environment)
    with progress.shown(order.name) as tell:
        plan = task.run(order, tell, _transfer("sent"))
    where = f"{order.id} --cloud {order.cloud} --cloud-region {order.region}"
    if detach:
        if as_json:
            place = {"cloud": order.cloud, "region": order.region}
            options.echo_json({"id": str(order.id), **place})
        else:
            click.echo(str(order.id))
        click.echo(f"cml-runner task logs -f {where} shows what it does", err=True)
        return
    try:
        _follow(Follow(plan, order.count), where, as_json=as_json)
    except RunnerError:
        task.give_up(plan, order.count)
        raise


@task_.command("list", context_settings=options.SETTINGS)
@options.place
@options.common
def list_(cloud: str, cloud_region: str, output: str) -> None:
    """List tasks: those that run, and those whose data are still there."""
    from cml_runner import task
    from cml_runner.cli import tasks as printing
    from cml_runner.task import view

    rows = [view.row(found) for found in task.tasks(cloud, cloud_region)]
    if output == "json":
        options.echo_json(rows)
    elif rows:
        printing.table(COLUMNS, rows)
    else:
        click.echo("no task is there", err=True)


@task_.command("show", context_settings=options.SETTINGS)
@click.argument("identifier", metavar="ID|NAME")
@options.place
@options.common
def show_(identifier: str, cloud: str, cloud_region: str, output: str) -> None:
    """Show all that is known of a task: status, addresses, machines, events."""
    from cml_runner import task
    from cml_runner.cli import tasks as printing
    from cml_runner.task import view

    details = view.details(task.find(identifier, cloud, cloud_region))
    if output == "json":
        options.echo_json(details)
    else:
        printing.page(details)


@task_.command("logs", context_settings=options.SETTINGS)
@click.argument("identifier", metavar="ID|NAME")
@options.option("-f", "--follow", is_flag=True, help="Go on until the task is over.")
@options.place
@options.common
def logs_(identifier: str, cloud: str, cloud_region: str, output: str, *, follow: bool) -> None:
    """Print what the script has said; what was done about it goes to stderr.

    With --follow, the exit code is that of the script.
    """
    from cml_runner import task
    from cml_runner.reports import Tail
    from cml_runner.task import view
    from cml_runner.task.follow import lines

    found = task.find(identifier, cloud, cloud_region)
    count = view.parallelism(found)
    if follow:
        _follow(task.follow(found), _where(found), as_json=output == "json")
    for rank in range(count):
        for line in lines(Tail(found.bucket, rank), last=True):
            _echo(line, several=count > 1, as_json=output == "json")


@task_.command("pull", context_settings=options.SETTINGS)
@click.argument("identifier", metavar="ID|NAME")
@options.option(
    "--to", metavar="DIR", help="Where to.  [default: the workdir it came from, or ./ID elsewhere]"
)
@options.place
@options.common
def pull_(identifier: str, to: str, cloud: str, cloud_region: str, output: str) -> None:
    """Fetch the results, also while the script runs."""
    from cml_runner import task

    found = task.find(identifier, cloud, cloud_region)
    place, count = task.pull(found, Path(to) if to else None, _transfer("fetched"))
    if output == "json":
        options.echo_json({"id": str(found.id), "directory": str(place), "files": count})
    else:
        click.echo(f"{count} new or changed files in {place}", err=True)


@task_.command("stop", context_settings=options.SETTINGS)
@click.argument("identifier", metavar="ID|NAME")
@options.place
@options.common
def stop_(identifier: str, cloud: str, cloud_region: str, output: str) -> None:
    """End the machines of a task, and keep its data: it can be started again."""
    from cml_runner import task
    from cml_runner.cli import progress

    found = task.find(identifier, cloud, cloud_region)
    with progress.shown(str(found.id)) as tell:
        task.stop(found, tell)
    _done(found, "stopped", output)


@task_.command("start", context_settings=options.SETTINGS)
@click.argument("identifier", metavar="ID|NAME")
@options.place
@options.common
def start_(identifier: str, cloud: str, cloud_region: str, output: str) -> None:
    """Have a stopped task go on, with its data and the time that was left to it."""
    from cml_runner import task

    found = task.find(identifier, cloud, cloud_region)
    task.start(found)
    _done(found, "started", output)


@task_.command("destroy", context_settings=options.SETTINGS)
@click.argument("identifiers", metavar="ID|NAME…", nargs=-1, required=True)
@options.option("--to", metavar="DIR", help="Where to fetch the results, as for pull.")
@options.option("--no-pull", is_flag=True, help="Don't fetch them: they are lost.")
@options.place
@options.common
def destroy_(
    identifiers: Sequence[str],
    to: str,
    cloud: str,
    cloud_region: str,
    output: str,
    *,
    no_pull: bool,
) -> None:
    """Fetch the results of tasks, then delete all that there is of them.

    What can't be fetched is not deleted.
    """
    from cml_runner import task

    for identifier in identifiers:
        found = task.find(identifier, cloud, cloud_region)
        place = Path(to) if to else None
        task.destroy(found, place, _transfer("fetched"), fetch=not no_pull)
        _done(found, "destroyed", output)


def _follow(follow: Follow, where: str, *, as_json: bool) -> None:
    """Show what is said, and end as the script does."""
    from cml_runner.task.follow import Line

    try:
        for line in follow.lines():
            assert isinstance(line, Line)
            _echo(line, several=follow.count > 1, as_json=as_json)
    except KeyboardInterrupt:
        click.echo(
            f"the task goes on; to come back: cml-runner task logs -f {where}\n"
            f"to be rid of it: cml-runner task destroy {where}",
            err=True,
        )
        raise
    click.echo(f"to have its results: cml-runner task destroy {where}", err=True)
    sys.exit(follow.code)


def _echo(line: Line, *, several: bool, as_json: bool) -> None:
    if as_json:
        options.echo_json({"rank": line.rank, "line": line.text, "script": line.script})
        return
    click.echo(f"{line.rank}| {line.text}" if several else line.text, err=not line.script)


def _done(found: Found, what: str, output: str) -> None:
    if output == "json":
        options.echo_json({"id": str(found.id), what: True})
    else:
        click.echo(f"{found.id}: {what}", err=True)


def _where(found: Found) -> str:
    return f"{found.id} --cloud {found.place.name} --cloud-region {found.place.region}"


def _hide(environment: Any) -> None:
    """Keep what looks like a secret out of our messages."""
    from cml_runner import logs
    from cml_runner.supervise.process import SECRET

    logs.hide(*(value for name, value in environment.items() if SECRET.search(name)))


def _transfer(verb: str) -> Callable[[int, int], None]:
    """Show how far a transfer is: live on a terminal, at its end elsewhere."""
    live, last = sys.stderr.isatty(), 0.0

    def moved(some: int, total: int) -> None:
        nonlocal last
        end = some == total
        if end or (live and time.monotonic() > last + EVERY):
            last = time.monotonic()
            text = f"{verb} {some / 1e6:.1f} of {total / 1e6:.1f} MB"
            click.echo(f"\r{text}" if live else text, err=True, nl=end)

    return moved
