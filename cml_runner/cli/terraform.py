"""cml-runner task import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cml_runner.cli import options

if TYPE_CHECKING:
    from cml_runner.task.conversion import Converted
    from cml_runner.task.terraform import Resource


@click.command("import", context_settings=options.SETTINGS)
@click.argument("file", metavar="MAIN.TF", type=click.Path(path_type=Path))
@options.option(
    "--output-file",
    metavar="FILE",
    help="What to write; - is stdout.  [default: task.toml; with --all NAME.toml each]",
)
@options.option("--resource", metavar="NAME", help="Which one, if there are several.")
@options.option("--all", "every", is_flag=True, help="All of them.")
@options.common
def import_(file: Path, output_file: str, resource: str, output: str, *, every: bool) -> None:
    """Convert a Terraform file of terraform-provider-iterative.

    An iterative_task becomes a task.toml for `cml-runner task run`, and a script of its own if
    that is long. For an iterative_cml_runner the command line of a launch is printed. What only
    Terraform can know is told, with its line, and kept as a comment. No file is written over.

    A .tf file needs the extra "import". If that is missing, the error says how to install it.
    """
    from cml_runner.errors import ConfigurationError
    from cml_runner.task import conversion, terraform

    if every and output_file not in ("", "-"):
        msg = "--output-file: with --all every resource has a file of its own name"
        raise ConfigurationError(msg)
    found = conversion.choose(file.name, terraform.read(file.name, _text(file)))
    for one in found if every else [_one(found, resource)]:
        place = output_file or (f"{one.name}.toml" if every else "task.toml")
        _convert(one, file.name, place, output)


def _text(file: Path) -> str:
    from cml_runner.errors import ConfigurationError, NotFound

    try:
        return file.read_text()
    except FileNotFoundError as error:
        msg = f"{file}: no such file"
        raise NotFound(msg) from error
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{file} can't be read: {error}"
        raise ConfigurationError(msg) from error


def _one(found: list[Resource], name: str) -> Resource:
    """Choose by name; ask people if there are several."""
    from cml_runner.errors import ConfigurationError, NotFound

    names = [one.name for one in found]
    if not name and len(found) > 1 and sys.stdin.isatty():
        name = click.prompt("Which one", type=click.Choice(names), err=True)
    if not name and len(found) > 1:
        msg = f"--resource: which one of {', '.join(names)}? Or --all"
        raise ConfigurationError(msg)
    if name and name not in names:
        msg = f"--resource {name}: there is no such one, but {', '.join(names)}"
        raise NotFound(msg)
    return found[names.index(name) if name else 0]


def _convert(resource: Resource, file: str, place: str, output: str) -> None:
    from cml_runner.task import conversion

    script = f"{Path(place if place != '-' else resource.name).with_suffix('')}.sh"
    if resource.kind == conversion.RUNNER:
        done, place = conversion.launch(resource, file), "-"
    else:
        done = conversion.task(resource, file, Path(script).name)
    for warning in done.warnings:
        click.echo(f"warning: {warning}", err=True)
    _write({place: done.text} | ({script: done.script} if done.script else {}), output)
    if output == "json":
        options.echo_json(_row(resource, done, place, script))


def _write(files: dict[str, str], output: str) -> None:
    """Write new files, all or none; what is meant for stdout is part of the JSON, if any."""
    from cml_runner.errors import AlreadyExists

    if there := [name for name in files if name != "-" and Path(name).exists()]:
        msg = f"{', '.join(there)}: already there; name another --output-file, or move it away"
        raise AlreadyExists(msg)
    for name, text in files.items():
        if name == "-" and output != "json":
            click.echo(text, nl=False)
        elif name != "-":
            Path(name).write_text(text)
            click.echo(f"{name}: written", err=True)


def _row(resource: Resource, done: Converted, place: str, script: str) -> dict[str, object]:
    return {
        "resource": f"{resource.kind}.{resource.name}",
        "file": "" if place == "-" else place,
        "script": script if done.script else "",
        "text": done.text,
        "warnings": done.warnings,
    }
