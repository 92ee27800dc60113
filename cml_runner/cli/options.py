"""The options that several commands share, each declared once, and how results are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from cml_runner import clouds, forges
from cml_runner.cli import completion

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cml_runner.access import Asked

F = TypeVar("F", bound="Callable[..., Any]")

LEVELS = ("error", "warn", "info", "debug")

# Every option is also a variable: CML_RUNNER_ and its name.
SETTINGS = {"auto_envvar_prefix": "CML_RUNNER"}
# The forges' own variables come after these: see access.find.
TOKENS = (
    "CML_RUNNER_TOKEN",
    "CML_RUNNER_DRIVER_TOKEN",
    "REPO_TOKEN",
    "repo_token",
)


def option(*names: str, default: Any = "", **more: Any) -> Callable[[F], F]:
    """Declare an option; its help shows the default if that says anything."""
    shown = isinstance(default, str) and default != ""
    if "is_flag" not in more and not more.get("multiple"):
        more["default"] = default
    if completion.known(names[0].strip("-").replace("-", "_")):
        more["shell_complete"] = completion.values
    return click.option(*names, show_default=shown, **more)


def choice(names: tuple[str, ...]) -> str:
    """Show what there is to choose from; it is checked later, together with everything else."""
    return f"[{'|'.join(names)}]"


def log(command: F) -> F:
    """Add how much to say."""
    return option(
        "--log",
        type=click.Choice(LEVELS),
        default="info",
        is_eager=True,
        expose_value=False,
        callback=lambda _context, _option, value: _set_up(value),
        help="How much to say, on stderr.",
    )(command)


def common(command: F) -> F:
    """Add what every command has."""
    output = option(
        "--output",
        type=click.Choice(["text", "json"]),
        default="text",
        help="How to print the result, on stdout.",
    )
    return log(output(command))


def forge(command: F) -> F:
    """Add what names a repository, and what opens its door."""
    for one in reversed(
        [
            option(
                "--driver",
                metavar=choice(forges.NAMES),
                help="The forge.  [default: from --repo, then from the CI's variables]",
            ),
            option(
                "--repo",
                metavar="URL|SLUG",
                help="Repository, organisation or group.  "
                "[default: from the CI's variables, then from the git remote]",
            ),
            option(
                "--token",
                "--driver-token",
                "token",
                envvar=TOKENS,
                help="Personal access token; a variable keeps it out of the process list: "
                "REPO_TOKEN, GITHUB_TOKEN, GITLAB_TOKEN or BITBUCKET_TOKEN.",
            ),
            option("--github-app-id", help="GitHub App, in place of a token."),
            option("--github-app-key", metavar="PEM|FILE", help="Private key of the App."),
            option(
                "--runner-group",
                help="Group of runners, of a GitHub organisation or enterprise.",
            ),
        ]
    ):
        command = one(command)
    return command


def provision(command: F) -> F:
    """Add from where machines get packages, and how."""
    for one in reversed(
        [
            option(
                "--machine-index",
                metavar="URL",
                help="Package index for what machines install.  [default: the one your pip uses]",
            ),
            option(
                "--machine-ca",
                metavar="FILE",
                help="Certificates (PEM) that machines trust too.  [default: what this computer "
                "trusts beside the public ones]",
            ),
            option(
                "--machine-proxy",
                metavar="URL",
                help="HTTP proxy of the machines.  [default: this computer's]",
            ),
            option("--no-machine-proxy", is_flag=True, help="Machines use no proxy."),
        ]
    ):
        command = one(command)
    return command


def place(command: F) -> F:
    """Add where to look."""
    cloud = option(
        "--cloud",
        type=clouds.named,
        metavar=choice(clouds.NAMES),
        help="Look at this cloud only.  [default: all that have credentials]",
    )
    region = option("--cloud-region", help="Look at this region only.  [default: all usual ones]")
    return cloud(region(command))


def asked(values: Mapping[str, Any]) -> Asked:
    """Pick the options of `forge`."""
    from cml_runner import logs
    from cml_runner.access import Asked

    logs.hide(values["token"], values["github_app_key"])
    return Asked.among(values)


def echo_json(value: Any) -> None:
    """Print one JSON document, on one line."""
    import json

    click.echo(json.dumps(value, ensure_ascii=False))


def _set_up(level: str) -> None:
    from cml_runner import logs

    logs.set_up(level)
