"""cml-runner completion, and what a shell can complete: only what is known without a network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cml_runner import clouds, forges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from click.shell_completion import CompletionItem

VARIABLE = "_CML_RUNNER_COMPLETE"  # in which click looks for what a shell wants
SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def completion_(shell: str) -> None:
    """Print the script that has a shell complete our commands, options and values.

    For bash, in ~/.bashrc: eval "$(cml-runner completion bash)"

    For zsh, in ~/.zshrc: eval "$(cml-runner completion zsh)"

    For fish: cml-runner completion fish > ~/.config/fish/completions/cml-runner.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind
    root = click.get_current_context().find_root()
    click.echo(kind(root.command, {}, "cml-runner", VARIABLE).source())


def values(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Say what an option or an argument may be; of a list, complete the last part."""
    from click.shell_completion import CompletionItem

    kind = KINDS.get(str(parameter.name), "")
    if kind:
        return [CompletionItem(incomplete, type=kind)]
    before, comma, last = incomplete.rpartition(",")
    known = WORDS[str(parameter.name)](context.params)
    return [CompletionItem(before + comma + one) for one in known if one.startswith(last)]


def known(name: str) -> bool:
    """Tell if there is something to complete for an option or an argument."""
    return name in WORDS or name in KINDS


def _regions(given: Mapping[str, Any]) -> Iterable[str]:
    native = _catalogue(given).get("regions", {}).values()
    return (*clouds.REGIONS, *(one for one in native if isinstance(one, str)))


def _sizes(given: Mapping[str, Any]) -> Iterable[str]:
    found = _catalogue(given)
    models = [f"{size}+{gpu}" for gpu, sizes in found.get("gpus", {}).items() for size in sizes]
    return (*(found.get("sizes") or clouds.SIZES), *models)


def _models(given: Mapping[str, Any]) -> Iterable[str]:
    return ("nogpu", *_catalogue(given).get("gpus", {}))


def _catalogue(given: Mapping[str, Any]) -> dict[str, Any]:
    """Read what a cloud has names for; without a cloud, of all what they share."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    asked = clouds.named(given.get("cloud") or "")
    found: dict[str, Any] = {}
    for file in sorted(Path(next(iter(clouds.__path__))).glob(f"{asked or '*'}/catalogue.toml")):
        read = tomllib.loads(file.read_text())
        for title in read if asked else ("gpus",):  # the names that all clouds share
            found[title] = read[title] | found.get(title, {})
    return found


WORDS: dict[str, Callable[[Mapping[str, Any]], Iterable[str]]] = {
    "cloud": lambda _: (*clouds.NAMES, *clouds.ALIASES),
    "driver": lambda _: forges.NAMES,
    "cloud_region": _regions,
    "region": _regions,
    "cloud_type": _sizes,
    "machine": _sizes,
    "cloud_gpu": _models,
    "cloud_image": lambda _: ("ubuntu", "nvidia"),
    "image": lambda _: ("ubuntu", "nvidia"),
}
KINDS = {
    **dict.fromkeys(("script", "github_app_key", "output_file"), "file"),
    **dict.fromkeys(("workdir", "to"), "dir"),
}
