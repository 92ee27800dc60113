"""What people ask for, on the command line or in a file: every mistake is found at once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Any

from cml_runner import clouds, times
from cml_runner.errors import ConfigurationError
from cml_runner.launch import provision
from cml_runner.model import Identifier, Machine, Program
from cml_runner.task import defaults
from cml_runner.transfer import Rules

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeVar

    T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `task run`, word for word; an empty one isn't given."""

    cloud: str = ""
    region: str = ""
    machine: str = ""
    image: str = ""
    disk_size: str = ""
    spot: str = ""
    parallelism: str = ""
    timeout: str = ""
    environment: tuple[str, ...] = ()
    workdir: str = ""
    output: str = ""
    exclude: tuple[str, ...] = ()
    script: str = ""
    storage_container: str = ""
    storage_container_opts: tuple[str, ...] = ()
    name: str = ""
    permission_set: str = ""
    tags: tuple[str, ...] = ()
    machine_index: str = ""
    machine_ca: str = ""
    machine_proxy: str = field(default="", repr=False)
    no_machine_proxy: bool = False
    command: tuple[str, ...] = ()


DEFAULTS = Options(
    region="us-west", machine="m", image="", spot="-1", parallelism="1", timeout="24 h", workdir="."
)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The options of `task run`, understood."""

    id: Identifier
    name: str
    cloud: str
    region: str
    machine: Machine
    program: Program
    authorities: str = field(repr=False)  # PEM: what machines trust beside their system's own
    proxies: Mapping[str, str] = field(repr=False)  # HTTPS_PROXY, …
    count: int
    timeout: float  # seconds
    script: str = field(repr=False)
    environment: Mapping[str, str] = field(repr=False)
    workdir: Path
    output: str  # relative to workdir; empty: whatever is new
    rules: Rules
    container: str  # of the user's own, for the data; empty: the task's bucket
    container_options: Mapping[str, str]
    tags: Mapping[str, str]

    @property
    def deadline(self) -> datetime:
        """When the script must be done, if it begins now."""
        return datetime.now(timezone.utc) + timedelta(seconds=self.timeout)


def read(options: Options, environment: Mapping[str, str], directory: Path) -> Order:
    """Understand the options, with what a file in the directory says where they say nothing.

    Raises ConfigurationError with every mistake.
    """
    known = {one.name for one in fields(Options)} - {"command"}
    given = replace(Options(**defaults.read(directory, known)), **_given(options))
    return _Reader(replace(DEFAULTS, **_given(given)), environment, directory).order()


def _given(options: Options) -> dict[str, Any]:
    return {key: value for key, value in vars(options).items() if value}


class _Reader:
    """Reads option after option; a mistake is noted and reading goes on."""

    def __init__(self, options: Options, environment: Mapping[str, str], directory: Path) -> None:
        self.options, self.environment, self.directory = options, environment, directory
        self.mistakes: list[str] = []

    def order(self) -> Order:
        options = self.options
        if options.cloud not in clouds.NAMES:
            self.mistakes.append(f"--cloud: choose one of {', '.join(clouds.NAMES)}")
        workdir = (self.directory / Path(options.workdir).expanduser()).resolve()
        if not workdir.is_dir():
            self.mistakes.append(f"--workdir {options.workdir}: no such directory")
        count = self.take("--parallelism", lambda: _whole(options.parallelism, 1, 1000), 1)
        timeout = self.take("--timeout", lambda: _lifetime(options.timeout), 1.0)
        opts = self._pairs("--storage-container-opts", options.storage_container_opts)
        machine = self._machine({} if options.storage_container else opts)
        script = self.take("--script", self._script, "")
        environment = self._environment()
        output = self.take("--output", lambda: _inside(options.output), "")
        rules = self.take("--exclude", lambda: Rules(options.exclude), Rules())
        tags = self._pairs("--tags", options.tags)
        asked = provision.Asked.among(vars(options))
        provided = self.take(
            "", lambda: provision.read(asked, self.environment), provision.Provision()
        )
        if self.mistakes:
            raise ConfigurationError(*self.mistakes)
        identifier = _identifier(options.name, workdir)
        return Order(
            id=identifier,
            name=options.name or str(identifier),
            cloud=options.cloud,
            region=options.region,
            machine=machine,
            program=provided.program,
            authorities=provided.authorities,
            proxies=provided.proxies,
            count=count,
            timeout=timeout,
            script=script,
            environment=environment,
            workdir=workdir,
            output=output,
            rules=rules,
            container=_address(options.storage_container, identifier),
            container_options=opts if options.storage_container else {},
            tags=tags,
        )

    def take(self, flag: str, read: Callable[[], T], otherwise: T) -> T:
        """Read a value, or note why it can't be read."""
        try:
            return read()
        except ConfigurationError as error:
            self.mistakes += error.mistakes
        except ValueError as error:
            self.mistakes.append(f"{flag}: {error}")
        return otherwise

    def _machine(self, storage: Mapping[str, str]) -> Machine:
        """Describe it, with the options of the storage that is the cloud's own."""
        options = self.options
        price = self.take("--spot", lambda: float(options.spot), -1.0)
        disk = options.disk_size if options.disk_size != "-1" else ""
        return Machine(
            types=tuple(one.strip() for one in options.machine.split(",") if one.strip()),
            disk=self.take("--disk-size", lambda: _whole(disk, 1) if disk else 0, 0),
            image=options.image,
            spot=price >= 0,
            spot_price=price if price > 0 else -1,
            permissions=options.permission_set,
            options={f"{options.cloud}-{key}": value for key, value in storage.items()},
        )

    def _script(self) -> str:
        """Take a command, or a script: its text, or the name of its file."""
        options = self.options
        if options.command:
            return f"#!/bin/sh\nexec {join(options.command)}\n"
        if not options.script:
            msg = "what is to be run? Give a --script, or a command after --"
            raise ValueError(msg)
        if options.script.startswith("#!") or "\n" in options.script:
            return options.script
        try:
            return (self.directory / Path(options.script).expanduser()).read_text()
        except (OSError, UnicodeDecodeError) as error:
            msg = f"{options.script} can't be read: {error}"
            raise ValueError(msg) from error

    def _environment(self) -> dict[str, str]:
        """Take NAME=VALUE; NAME, or a glob of names, brings values from here."""
        found: dict[str, str] = {}
        for one in self.options.environment:
            name, equals, value = one.partition("=")
            if not name or (equals and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)):
                self.mistakes.append(f"--environment {one}: write NAME=VALUE, NAME or a glob")
            elif equals:
                found[name] = value
            else:
                here = self.environment
                found |= {key: here[key] for key in here if fnmatchcase(key, name)}
        return found

    def _pairs(self, flag: str, texts: Sequence[str]) -> dict[str, str]:
        found = {}
        for one in texts:
            key, equals, value = one.partition("=")
            if not key or not equals:
                self.mistakes.append(f"{flag} {one}: write KEY=VALUE")
            found[key] = value
        return found


def _identifier(name: str, workdir: Path) -> Identifier:
    return Identifier.fixed(name, seed=f"task\n{name}") if name else Identifier.new(workdir.name)


def _address(container: str, identifier: Identifier) -> str:
    """Take NAME/PATH; the path is the task's own if none is given, and empty after a slash.

    An address, s3://NAME/PATH say, is the same behind its scheme.
    """
    name = container.rpartition("://")[2]
    return f"{container}/{identifier.short}" if name and "/" not in name else container


def _lifetime(text: str) -> float:
    seconds = times.seconds(text)
    if seconds <= 0:
        msg = "a task ends some time: write 24 h, say"
        raise ValueError(msg)
    return seconds


def _inside(output: str) -> str:
    """Keep the output within the directory that goes up."""
    parts = Path(output).parts
    if Path(output).is_absolute() or ".." in parts:
        msg = f"{output} must be relative to --workdir, and within it"
        raise ValueError(msg)
    return "/".join(parts)


def _whole(text: str, least: int, most: int = 1 << 30) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        msg = f"{text!r} is no whole number from {least} on" + (f" to {most}" * (most < 1 << 30))
        raise ValueError(msg)
    return number
