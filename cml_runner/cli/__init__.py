"""The command line: it reads options, calls one function and prints the result."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module

import click

from cml_runner import __version__
from cml_runner.errors import RunnerError

# A command's module is imported when the command is used, so that each one starts fast.
COMMANDS = {
    "demo": "demo",
    "launch": "launch",
    "list": "tasks",
    "show": "tasks",
    "logs": "tasks",
    "ssh": "shell",
    "interrupt": "tasks",
    "destroy": "tasks",
    "gc": "tasks",
    "recover": "recover",
    "task": "task",
    "doctor": "doctor",
    "setup": "setup",
    "permissions": "setup",
    "completion": "completion",
    "supervise": "supervise",
}


class Commands(click.Group):
    """Finds commands by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name all commands, in the order in which people meet them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"{__name__}.{COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, f"{cmd_name}_")
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda context, _option, value: _tell_version(context) if value else None,
    help="Show the version, with the first digits of the SHA-256 of all its files, and exit.",
)
def cli() -> None:
    """Launch CI runners on any cloud, for any git forge.

    To see all that happens in a runner's life, without any account: cml-runner demo

    Exit codes: 1 any other error, 2 wrong options, 3 credentials, 4 not found, 5 name taken,
    6 no capacity, 7 a job is running, 8 the agent failed, 9 a package is missing, 10 something
    may still cost money, 11 not online in time, 130 Ctrl-C, 143 SIGTERM.
    """
    from cml_runner import trust

    trust.use_system_store()


def _tell_version(context: click.Context) -> None:
    from cml_runner import program

    if not context.resilient_parsing:
        click.echo(f"cml-runner, version {__version__} ({program.digest()[:12]})")
        context.exit()


class Terminated(KeyboardInterrupt):
    """Somebody ended us by another signal than Ctrl-C's; everything is cleared up all the same."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def main() -> None:
    """Run the command line, and turn every error into a message and an exit code."""
    sys.exit(_run())


def _run() -> int:
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _terminate)
    try:
        code = cli.main(prog_name="cml-runner", standalone_mode=False)
    except BaseException as error:
        return _code(error)
    return code if isinstance(code, int) else 0


def _code(error: BaseException) -> int:
    """Say what went wrong; return the exit code."""
    if isinstance(error, click.exceptions.Abort):  # click's disguise of a KeyboardInterrupt
        error = error.__cause__ or error.__context__ or KeyboardInterrupt()
    match error:
        case KeyboardInterrupt():
            return 128 + (error.number if isinstance(error, Terminated) else signal.SIGINT)
        case click.ClickException():
            error.show()
            return error.exit_code
        case RunnerError():
            _complain(str(error), error)
            return error.exit_code
        case BrokenPipeError():  # whoever reads our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        case Exception():  # a fault of ours, or one which we didn't think of
            _complain(f"unexpected {type(error).__name__}: {error} (see --log debug)", error)
            return 1
    raise error


def _terminate(number: int, _: object) -> None:
    raise Terminated(number)


def _complain(message: str, error: BaseException) -> None:
    import logging

    debug = logging.getLogger("cml_runner").isEnabledFor(logging.DEBUG)
    logging.getLogger("cml_runner").error("error: %s", message, exc_info=error if debug else None)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        text = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
        click.echo(f"::error title=cml-runner::{text}", err=True)
