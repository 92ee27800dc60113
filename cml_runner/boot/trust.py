"""Private authorities and proxies, for everything that runs on a machine.

Authorities go into the system's store, which most programs read. The variables are for those that
bring a list of their own, and for a container in which the store can't be changed.

https://manpages.debian.org/update-ca-certificates, https://manpages.debian.org/update-ca-trust
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

HOME = Path("/etc/cml-runner")
AUTHORITIES, BUNDLE = "authorities.pem", "bundle.pem"  # ours alone, and with the system's
ENVIRONMENT = "environment"  # of the supervisor and of Docker; a proxy's login may be in it
NAME = "cml-runner-"  # our files in the system's store begin with it
CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
PATIENCE = 60  # seconds for the system to renew its store

# Where systems keep the authorities that somebody adds, and what renews their bundle.
STORES = (
    (Path("/usr/local/share/ca-certificates"), "update-ca-certificates"),  # Debian, Ubuntu, Alpine
    (Path("/etc/pki/ca-trust/source/anchors"), "update-ca-trust"),  # Amazon Linux, Fedora
    (Path("/etc/pki/trust/anchors"), "update-ca-certificates"),  # SUSE
)
BUNDLES = (
    Path("/etc/ssl/certs/ca-certificates.crt"),  # Debian, Ubuntu, Alpine, Arch
    Path("/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"),  # Amazon Linux, Fedora
    Path("/etc/ssl/ca-bundle.pem"),  # SUSE
    Path("/etc/ssl/cert.pem"),  # BSD, macOS
)

PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")

# Each of these replaces the list that a program has; NODE_EXTRA_CA_CERTS adds to it.
REPLACING = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO")
ADDING = "NODE_EXTRA_CA_CERTS"


def install(pem: str, home: Path = HOME) -> dict[str, str]:
    """Have this machine trust these authorities; return variables which say so to programs.

    It may be repeated. Without certificates nothing is done, and nothing is returned. Where the
    system's store can't be changed, because we aren't root say, the variables name a file of ours.
    """
    certificates = CERTIFICATE.findall(pem)
    if not certificates:
        return {}
    home = _made(home)
    own = home / AUTHORITIES
    write(own, "\n".join([*certificates, ""]), 0o644)
    bundle = bundle_of_system()
    if not (bundle and _holds(bundle, certificates)):
        _store(certificates)
        bundle = bundle_of_system()
    if not (bundle and _holds(bundle, certificates)):
        known = bundle.read_text(errors="replace") if bundle else ""
        bundle = home / BUNDLE
        write(bundle, f"{known}\n{own.read_text()}", 0o644)
    return {**dict.fromkeys(REPLACING, str(bundle)), ADDING: str(own)}


def variables(proxies: Mapping[str, str]) -> dict[str, str]:
    """Name proxies in both spellings, since some programs read only one of them."""
    return {one: proxies[name] for name in proxies for one in (name.upper(), name.lower())}


def keep(environment: Mapping[str, str], home: Path = HOME) -> Path:
    """Write variables into a file for units of init (EnvironmentFile=), which only root can read.

    A unit itself tells everybody its variables. Raises OSError.
    """
    file = _directory(home) / ENVIRONMENT
    lines = (f"{name}={_quoted(value)}\n" for name, value in environment.items())
    write(file, "".join(lines), 0o600)
    return file


def bundle_of_system() -> Path | None:
    """Find the file with all authorities that the system trusts; None if it has none."""
    return next((path for path in BUNDLES if path.is_file()), None)


def write(path: Path, text: str, mode: int) -> None:
    """Write a file at once as a whole; nobody can read it who mustn't. Raises OSError."""
    new = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with suppress(FileNotFoundError):
            new.unlink()
        with open(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(text)
        new.chmod(mode)
        new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise


def _made(home: Path) -> Path:
    """Make the directory of our files; a new one if that isn't for us to make."""
    with suppress(OSError):
        if os.access(_directory(home), os.W_OK):
            return home
    from tempfile import mkdtemp  # noqa: PLC0415 - needed in some containers only

    return _opened(Path(mkdtemp(prefix=NAME)))


def _directory(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return _opened(path) if path.stat().st_uid == os.geteuid() else path


def _opened(path: Path) -> Path:
    """Let agents look into it, which may have an account of their own."""
    path.chmod(0o755)
    return path


def _store(certificates: Sequence[str]) -> None:
    """Put certificates into the system's store, one a file, and have it renewed."""
    import subprocess  # noqa: PLC0415 - the launcher needs none of this

    for directory, command in STORES:
        if not directory.is_dir():
            continue
        try:
            for old in directory.glob(f"{NAME}*.crt"):
                old.unlink()
            for number, one in enumerate(certificates, 1):
                write(directory / f"{NAME}{number}.crt", f"{one}\n", 0o644)
            subprocess.run((command,), check=True, timeout=PATIENCE, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            log.warning("%s failed: %s", command, error.stderr.strip())
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning("the system's store of certificates stays as it is: %s", error)
        return


def _holds(bundle: Path, certificates: Sequence[str]) -> bool:
    """Say if all these certificates are in a bundle, however its lines are broken."""
    known = {_plain(one) for one in CERTIFICATE.findall(bundle.read_text(errors="replace"))}
    return all(_plain(one) in known for one in certificates)


def _plain(certificate: str) -> str:
    return "".join(certificate.split())


def _quoted(value: str) -> str:
    """Quote a value for an environment file: systemd.exec(5)."""
    plain = re.sub(r'(["\\`$])', r"\\\1", value)
    return f'"{plain}"'
