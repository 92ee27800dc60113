"""What people ask for, checked as a whole: every mistake is found before anything is done."""

from __future__ import annotations

import base64
import binascii
import logging
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cml_runner import access, clouds, times
from cml_runner.errors import ConfigurationError
from cml_runner.launch import provision
from cml_runner.model import Identifier, Machine, Program, names

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeVar

    T = TypeVar("T")

log = logging.getLogger(__name__)

# Flags of one cloud; they reach it as Machine.options, the others refuse them.
NATIVE = (
    "cloud_aws_security_group",
    "cloud_aws_subnet",
    "cloud_kubernetes_image_pull_secret",
    "cloud_kubernetes_namespace",
    "cloud_kubernetes_node_selector",
    "cloud_kubernetes_toleration",
)
DISK = 35  # GB
IDLE = (
    "tpi_version", "cml_version", "tf_resource", "gcp_access_token", "runner_path", "destroy_delay",
)  # fmt: skip
ONLY_ON_CLOUDS = (
    "cloud_spot", "cloud_gpu", "cloud_startup_script", "cloud_ssh_private",
    "machine_index", "machine_ca", "machine_proxy",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `launch`, word for word."""

    driver: str = ""
    repo: str = ""
    token: str = field(default="", repr=False)
    github_app_id: str = ""
    github_app_key: str = field(default="", repr=False)
    runner_group: str = ""
    labels: str = "cml"
    name: str = ""
    idle_timeout: str = "5 minutes"
    single: bool = False
    reuse: bool = False
    reuse_idle: bool = False
    no_retry: bool = False
    docker_volumes: tuple[str, ...] = ()
    cloud: str = ""
    cloud_region: str = "us-west"
    cloud_type: str = "m"
    cloud_gpu: str = ""
    cloud_hdd_size: str = ""
    cloud_image: str = "ubuntu"
    cloud_spot: bool = False
    cloud_spot_price: str = "-1"
    cloud_spot_fallback: bool = False
    cloud_permission_set: str = ""
    cloud_metadata: tuple[str, ...] = ()
    cloud_ssh_private: str = field(default="", repr=False)
    cloud_startup_script: str = ""
    cloud_aws_security_group: str = ""
    cloud_aws_subnet: str = ""
    cloud_kubernetes_image_pull_secret: tuple[str, ...] = ()
    cloud_kubernetes_namespace: str = ""
    cloud_kubernetes_node_selector: tuple[str, ...] = ()
    cloud_kubernetes_toleration: tuple[str, ...] = ()
    workdir: str = ""
    sudo: bool = True
    docker: bool = False
    machine_index: str = ""
    machine_ca: str = ""
    machine_proxy: str = field(default="", repr=False)
    no_machine_proxy: bool = False
    count: str = "1"
    max_lifetime: str = "5 days"
    max_price: str = ""
    wait: bool = True
    wait_timeout: str = "20 minutes"
    dry_run: bool = False
    tpi_version: str = ""
    cml_version: str = ""
    tf_resource: str = ""
    gcp_access_token: str = field(default="", repr=False)
    runner_path: str = ""
    destroy_delay: str = ""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The options of `launch`, understood."""

    access: access.Access
    id: Identifier
    name: str
    names: tuple[str, ...]
    labels: tuple[str, ...]
    idle_timeout: float
    single: bool
    reuse: bool
    reuse_idle: bool
    retry: bool
    docker_volumes: tuple[str, ...]
    cloud: str
    regions: tuple[str, ...]
    machine: Machine
    tags: Mapping[str, str]
    startup: str = field(repr=False)
    workdir: str
    sudo: bool
    docker: bool
    program: Program
    authorities: str = field(repr=False)  # PEM: what machines trust beside their system's own
    proxies: Mapping[str, str] = field(repr=False)  # HTTPS_PROXY, …
    count: int
    expires: datetime | None
    wait: bool
    wait_timeout: float
    max_price: float | None  # USD per hour, for all machines
    dry_run: bool


def read(options: Options, environment: Mapping[str, str]) -> Order:
    """Understand the options. Raises ConfigurationError with every mistake."""
    return _Reader(options, environment).order()


def machine(options: Options, cloud: str) -> tuple[Machine, int]:
    """Understand only what is said of machines, for one of the clouds; and how many there are.

    Options that are another cloud's own are left out. Raises ConfigurationError.
    """
    own: dict[str, Any] = {
        name: _nothing(options, name) for name in NATIVE if not _is_of(name, cloud)
    }
    return _Reader(replace(options, **own, cloud=cloud), {}).machine()


def labels(options: Options) -> tuple[str, ...]:
    """List the runner's labels."""
    return _split(options.labels)


def regions(options: Options) -> tuple[str, ...]:
    """List the regions, in order of preference."""
    return _split(options.cloud_region)


def _limit(text: str) -> float | None:
    if not text:
        return None
    found = float(text)
    if not 0 < found < float("inf"):
        msg = "it must be more than nothing"
        raise ValueError(msg)
    return found


class _Reader:
    """Reads option after option; a mistake is noted and reading goes on."""

    def __init__(self, options: Options, environment: Mapping[str, str]) -> None:
        self.options, self.environment = options, environment
        self.mistakes: list[str] = []

    def order(self) -> Order:
        options = self.options
        found = self.take("", self._access, None)
        named = labels(options)
        count = self.take("--count", lambda: _count(options.count), 1)
        lifetime = self.duration("--max-lifetime", options.max_lifetime)
        machine = self._machine()
        tags = self._pairs("--cloud-metadata", options.cloud_metadata)
        idle_timeout = self.duration("--idle-timeout", options.idle_timeout)
        wait_timeout = self.duration("--wait-timeout", options.wait_timeout)
        max_price = self.take("--max-price", lambda: _limit(options.max_price), None)
        startup = self.take("--cloud-startup-script", self._startup, "")
        asked = provision.Asked.among(vars(options))
        provided = self.take(
            "", lambda: provision.read(asked, self.environment), provision.Provision()
        )
        self._together(named, count)
        self._without_effect()
        if self.mistakes or not found:
            raise ConfigurationError(*self.mistakes)
        identifier = _identifier(options.name, found.url)
        name = options.name or str(identifier)
        return Order(
            access=found,
            id=identifier,
            name=name,
            names=names(name, count),
            labels=named,
            idle_timeout=idle_timeout,
            single=options.single,
            reuse=options.reuse,
            reuse_idle=options.reuse_idle,
            retry=not options.no_retry,
            docker_volumes=options.docker_volumes,
            cloud=options.cloud,
            regions=regions(options),
            machine=machine,
            tags=tags,
            startup=startup,
            workdir=options.workdir,
            sudo=options.sudo,
            docker=options.docker,
            program=provided.program,
            authorities=provided.authorities,
            proxies=provided.proxies,
            count=count,
            expires=datetime.now(timezone.utc) + timedelta(seconds=lifetime) if lifetime else None,
            wait=options.wait,
            wait_timeout=wait_timeout or float("inf"),
            max_price=max_price,
            dry_run=options.dry_run,
        )

    def machine(self) -> tuple[Machine, int]:
        options = self.options
        count = self.take("--count", lambda: _count(options.count), 1)
        found = self._machine(), count
        self._together(labels(options), count)
        if self.mistakes:
            raise ConfigurationError(*self.mistakes)
        return found

    def take(self, flag: str, reading: Callable[[], T], otherwise: T) -> T:
        try:
            return reading()
        except ConfigurationError as error:
            self.mistakes += [f"{flag}: {one}" if flag else one for one in error.mistakes]
        except ValueError as error:
            self.mistakes.append(f"{flag}: {error}")
        return otherwise

    def duration(self, flag: str, text: str) -> float:
        return self.take(flag, lambda: times.seconds(text), 0.0)

    def _access(self) -> access.Access | None:
        return access.find(access.Asked.among(vars(self.options)), self.environment)

    def _machine(self) -> Machine:
        options = self.options
        gpu = {"nogpu": "", "tesla": "v100"}.get(options.cloud_gpu, options.cloud_gpu)
        if options.cloud_gpu == "tesla":
            log.warning("--cloud-gpu tesla is taken for v100: better name the model")
        if options.cloud_spot_price != "-1" and not options.cloud_spot:
            log.warning("--cloud-spot-price has no effect without --cloud-spot")
        native = {name: getattr(options, name) for name in NATIVE}
        return Machine(
            types=_split(options.cloud_type),
            gpu=gpu,
            disk=self.take("--cloud-hdd-size", self._disk, 1),
            image=options.cloud_image,
            spot=options.cloud_spot,
            spot_price=self.take(
                "--cloud-spot-price", lambda: float(options.cloud_spot_price), -1.0
            ),
            spot_fallback=options.cloud_spot_fallback,
            permissions=options.cloud_permission_set,
            ssh_key=options.cloud_ssh_private,
            docker=options.docker,
            options={
                name.removeprefix("cloud_").replace("_", "-"): ",".join(_several(value))
                for name, value in native.items()
                if value
            },
        )

    def _disk(self) -> int:
        """A machine is given a disk of its own; a pod shares that of its node, unless it asks."""
        usual = 0 if self.options.cloud == "kubernetes" else DISK
        return _whole(self.options.cloud_hdd_size, 1) if self.options.cloud_hdd_size else usual

    def _pairs(self, flag: str, texts: Sequence[str]) -> dict[str, str]:
        found = {}
        for text in texts:
            key, equals, value = text.partition("=")
            if not key or not equals:
                self.mistakes.append(f"{flag} {text}: write KEY=VALUE")
            found[key] = value
        return found

    def _startup(self) -> str:
        text = self.options.cloud_startup_script
        try:
            if text.startswith("@"):
                return Path(text[1:]).expanduser().read_text()
            return base64.b64decode(text, validate=True).decode()
        except OSError as error:
            msg = f"{text[1:]}: {error.strerror}"
            raise ValueError(msg) from error
        except (binascii.Error, UnicodeDecodeError) as error:
            msg = "neither Base64 nor @FILE"
            raise ValueError(msg) from error

    def _together(self, named: Sequence[str], count: int) -> None:
        """What makes no sense together."""
        options = self.options
        lists = {"labels": named, "cloud-region": regions(options)}
        lists["cloud-type"] = _split(options.cloud_type)
        for flag in (flag for flag, values in lists.items() if not values):
            self.mistakes.append(f"--{flag}: at least one is needed")
        if options.single and (options.reuse or options.reuse_idle):
            self.mistakes.append("--single conflicts with --reuse and --reuse-idle")
        if options.cloud and options.cloud not in clouds.NAMES:
            self.mistakes.append(
                f"--cloud {options.cloud}: choose one of {', '.join(clouds.NAMES)}"
            )
        if options.max_price and not options.cloud:
            self.mistakes.append("--max-price needs --cloud: this machine has no price")
        if not options.cloud and count > 1:
            self.mistakes.append("--count needs --cloud: this machine is just one")
        if options.docker and not options.sudo:
            self.mistakes.append("--docker conflicts with --no-sudo: who may use Docker is root")
        if not options.sudo and options.cloud in ("", "local"):
            self.mistakes.append("--no-sudo needs a machine of its own: use a --cloud")

    def _without_effect(self) -> None:
        options = self.options
        for name in IDLE:
            if getattr(options, name):
                log.warning("--%s has no effect any more", name.replace("_", "-"))
        for name in () if options.cloud else ONLY_ON_CLOUDS:
            if getattr(options, name):
                log.warning("--%s has no effect without --cloud", name.replace("_", "-"))


def _is_of(native: str, cloud: str) -> bool:
    return native.startswith(f"cloud_{cloud}_")


def _nothing(options: Options, name: str) -> str | tuple[str, ...]:
    return "" if isinstance(getattr(options, name), str) else ()


def _identifier(name: str, url: str) -> Identifier:
    """With a name, the same one for everybody who launches it for this repository."""
    if name:
        return Identifier.fixed(name, seed=f"{url}\n{name}")
    return Identifier.new(url.rstrip("/").rpartition("/")[2])


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _several(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        msg = f"{text!r} is no whole number from {least} on"
        raise ValueError(msg)
    return number


def _count(text: str) -> int:
    number = _whole(text, 1)
    if number > 1000:
        msg = "1000 machines at most"
        raise ValueError(msg)
    return number
