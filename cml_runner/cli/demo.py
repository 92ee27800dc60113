"""cml-runner demo."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from cml_runner.cli import options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cml_runner.demo import Entry, Summary

COLOURS = {"launcher": "cyan", "cloud": "magenta", "runner": "green", "job": "yellow"}


@click.command("demo", context_settings=options.SETTINGS)
@options.common
def demo_(output: str) -> None:
    """Watch a spot runner's whole life on this machine; no account is needed.

    It is born, takes a long job, is interrupted in the middle of it, comes back, runs it again,
    runs another one, has nothing more to do and leaves. Ctrl-C ends it at any time, and nothing
    is left behind.
    """
    from cml_runner import demo

    with _shown(err=output == "json") as (show, busy):
        summary = demo.run(show, busy)
    if output == "json":
        options.echo_json(_fields(summary))
    else:
        click.echo(_text(summary))


@contextmanager
def _shown(*, err: bool) -> Iterator[tuple[Callable[[Entry], None], Callable[[str], None]]]:
    """Give what shows a line, and what shows the moment."""

    def line(entry: Entry) -> str:
        return f"{entry.seconds:5.1f} s  {entry.who:8}  {entry.what}"

    stream = sys.stderr if err else sys.stdout
    if not stream.isatty():
        yield lambda entry: click.echo(line(entry), err=err), lambda _: None
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=err)
    with console.status("getting ready") as status:
        yield (
            lambda entry: console.print(Text(line(entry), COLOURS[entry.who])),
            lambda text: status.update(Text(text)),
        )


def _fields(summary: Summary) -> dict[str, object]:
    return {
        "seconds": round(summary.seconds, 1),
        "machines": summary.machines,
        "jobs": [
            {"name": one.job.name, "state": one.state, "attempts": one.attempt}
            for one in summary.jobs
        ],
        "left": summary.left,
    }


def _text(summary: Summary) -> str:
    jobs = "\n".join(
        f"  {one.job.name:8} {one.state} in attempt {one.attempt}" for one in summary.jobs
    )
    return (
        f"\n{summary.seconds:.0f} s, {summary.machines} machines, {len(summary.jobs)} jobs:\n"
        f"{jobs}\nleft behind: {', '.join(summary.left) or 'nothing'}\n\n"
        "The same for a real repository, with its token in REPO_TOKEN:\n"
        "  cml-runner launch --repo https://github.com/OWNER/REPO --cloud local --cloud-spot"
    )
