"""What machines need before anything else: our program, and the way to what it depends on."""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cml_runner import installer, program, trust
from cml_runner.boot.trust import CERTIFICATE
from cml_runner.errors import ConfigurationError
from cml_runner.model import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeVar

    T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What people say of it on the command line, word for word."""

    cloud: str = ""
    machine_index: str = ""
    machine_ca: str = ""
    machine_proxy: str = field(default="", repr=False)
    no_machine_proxy: bool = False

    @classmethod
    def among(cls, values: Mapping[str, Any]) -> Asked:
        """Pick them from all the options of a command."""
        return cls(**{one.name: values[one.name] for one in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Provision:
    """What is asked for, together with what this computer has itself."""

    program: Program = field(default_factory=Program)
    authorities: str = field(default="", repr=False)  # PEM
    proxies: Mapping[str, str] = field(default_factory=dict, repr=False)  # HTTPS_PROXY, …


def read(asked: Asked, environment: Mapping[str, str]) -> Provision:
    """Find out what machines get. Raises ConfigurationError with every mistake.

    This computer has everything already, as the runner itself and as the embedded cloud.
    """
    mistakes: list[str] = []

    def take(reading: Callable[[], T], otherwise: T) -> T:
        try:
            return reading()
        except ConfigurationError as error:
            mistakes.extend(error.mistakes)
        return otherwise

    away = asked.cloud not in ("", "local")
    here = environment if away else {}
    index = take(lambda: _index(asked.machine_index, here if away else None), "")
    given = take(lambda: _certificates(asked.machine_ca), "")
    authorities = take(lambda: trust.authorities(given, here), "") if away else ""
    none: dict[str, str] = {}
    without = asked.no_machine_proxy
    proxies = take(lambda: trust.proxies(asked.machine_proxy, without, here), none)
    if mistakes:
        raise ConfigurationError(*mistakes)
    if not away:
        return Provision()
    found = Program(index=index, proxies=trust.public(proxies), authorities=given)
    return Provision(program=with_wheel(found), authorities=authorities, proxies=proxies)


def with_wheel(wanted: Program) -> Program:
    """Add the program that runs here, unless the machines have it already."""
    if not wanted.index:
        return wanted
    wheel = program.wheel()
    return replace(wanted, wheel=wheel, sha256=hashlib.sha256(wheel).hexdigest())


def without_wheel(wanted: Program) -> Program:
    """Keep only what was chosen: who starts a task again sends the program of their own."""
    return replace(wanted, wheel=b"", sha256="")


def _index(given: str, environment: Mapping[str, str] | None) -> str:
    """Take the index that was given, else this computer's own, if machines need any."""
    if given and (reason := installer.fault(given)):
        msg = f"--machine-index: {reason}"
        raise ConfigurationError(msg)
    return given or (installer.default_index(environment) if environment is not None else "")


def _certificates(file: str) -> str:
    """Read what --machine-ca names, and leave out all but certificates."""
    if not file:
        return ""
    try:
        text = Path(file).expanduser().read_text()
        if "PRIVATE KEY" in text:
            msg = f"--machine-ca {file}: it holds a private key: machines need certificates only"
            raise ConfigurationError(msg)
        found = CERTIFICATE.findall(text)
        for one in found:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=one)
    except ssl.SSLError as error:
        msg = f"--machine-ca {file}: it holds something else than a certificate"
        raise ConfigurationError(msg) from error
    except OSError as error:
        msg = f"--machine-ca {file}: {error.strerror}"
        raise ConfigurationError(msg) from error
    except UnicodeDecodeError:
        found = []
    if not found:
        msg = f"--machine-ca {file}: it holds no certificate in PEM"
        raise ConfigurationError(msg)
    return "".join(f"{one}\n" for one in found)
