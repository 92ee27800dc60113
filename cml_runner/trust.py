"""Certificates and proxies: what this computer uses itself, and what of that machines get.

A private authority is one that isn't public: that of a company's own servers, or of a proxy that
looks into connections.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
import sys
import time
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cml_runner.boot import trust as system
from cml_runner.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, MutableMapping, Sequence

log = logging.getLogger(__name__)

FILE, FOLDER = "SSL_CERT_FILE", "SSL_CERT_DIR"  # OpenSSL's; the file stands for the system's store
READ = (FILE, "REQUESTS_CA_BUNDLE")  # all our clients read one of these
BUNDLES = (*READ, "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")
LIMIT = 256 * 1024  # bytes of private authorities
KEPT = 30 * 24 * 3600  # seconds without use, of a bundle that we have made

# Where systems keep what somebody has added to their store.
ANCHORS = (
    *(directory for directory, _ in system.STORES),
    Path("/usr/share/pki/ca-trust-source/anchors"),  # Fedora's packages
    Path("/etc/ca-certificates/trust-source/anchors"),  # Arch
)

# https://www.rfc-editor.org/rfc/rfc3986#section-3.2
LOGIN, HOST = r"[\w.~!$&'()*+,;=:%-]+@", r"\[[\da-f:.]+\]|[\w.-]+"
PROXY = re.compile(rf"https?://({LOGIN})?({HOST})(:\d{{1,5}})?", re.IGNORECASE | re.ASCII)
DIRECT = re.compile(r"[\w.*:/\[\]-]+", re.ASCII)  # one entry of NO_PROXY
NEVER = (  # to be reached through a proxy: a machine itself, and its cloud's metadata service
    *("localhost", "127.0.0.1", "::1"),
    *("169.254.169.254", "fd00:ec2::254", "metadata.google.internal"),
)


def use_system_store(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have all our clients trust what this computer trusts, whichever variable says it.

    That is the system's store, or SSL_CERT_FILE in its place, and what the other BUNDLES name.
    Each library has an idea of its own: requests and boto3 trust a list that they bring, unless
    REQUESTS_CA_BUNDLE names another, obstore and the standard library read SSL_CERT_FILE. So both
    variables are set, also for what we start. Call this before there are threads and clients.

    Where the store is no file, on macOS and Windows, truststore asks the system for it. On Linux
    it would read the same file again for every connection, which takes 20 ms, and would let any
    authority vouch for a cluster whose kubeconfig names the only one.
    """
    if not sys.platform.startswith("linux"):
        import truststore

        truststore.inject_into_ssl()
        if not _named(environment):
            return
    files = _trusted(environment)
    if not files:
        return
    try:
        found = files[0] if len(files) == 1 and files[0].is_file() else _joined(files, environment)
    except OSError as error:
        log.debug("each client trusts what it knows itself: %s", error)
        return
    for name in BUNDLES:
        given = environment.get(name, "")
        if Path(given).exists() if given else name in READ:
            environment[name] = str(found)


def authorities(given: str, environment: Mapping[str, str]) -> str:
    """Collect the private authorities that machines need: certificates in PEM.

    They are those that are given, and those that this computer trusts itself. Raises
    ConfigurationError if they are too many.
    """
    wanted = dict.fromkeys(_decoded(_blocks(given)))
    files = _trusted(environment)
    for name, path in _named(environment).items():
        if not path.exists():
            log.warning("%s names what isn't there: %s", name, path)
    public = _public()
    own = [one for path in files for one in _decoded(_read(path)) if one not in public]
    own = [one for one in dict.fromkeys(own) if one not in wanted and _is_sound(one)]
    if own:
        log.info("private authorities that machines trust, as this computer does: %d", len(own))
    pem = "".join(map(_encoded, (*wanted, *own)))
    if len(pem) > LIMIT:
        msg = (
            f"machines can't take {len(pem) // 1024} KiB of private authorities, {LIMIT // 1024}"
            f" are allowed: have {FILE} name a file with those that are needed"
        )
        raise ConfigurationError(msg)
    return pem


def proxies(given: str, without: bool, environment: Mapping[str, str]) -> dict[str, str]:
    """Choose the proxies of machines: HTTPS_PROXY, HTTP_PROXY and NO_PROXY.

    They are the one that is given, none, or this computer's own, but never itself. Raises
    ConfigurationError.
    """
    if given and without:
        msg = "--machine-proxy and --no-machine-proxy exclude each other"
        raise ConfigurationError(msg)
    own = {} if without else own_proxies(environment)
    if given:
        if not PROXY.fullmatch(given.rstrip("/")):
            msg = "--machine-proxy: http://HOST:PORT is expected, or https://HOST:PORT"
            raise ConfigurationError(msg)
        found = dict.fromkeys(system.PROXIES[:2], given.rstrip("/"))
    else:
        found = {name: own[name] for name in system.PROXIES[:2] if _is_of_use(name, own)}
    direct = [one for one in _direct(own) if not (given and one == "*")]
    return {**found, "NO_PROXY": ",".join(direct)} if found else {}


def public(proxies: Mapping[str, str]) -> dict[str, str]:
    """Choose those that everybody may read: those without a login."""
    return _useful({name: value for name, value in proxies.items() if "@" not in value})


def for_containers(environment: Mapping[str, str]) -> dict[str, str]:
    """Choose those of this computer that a container reaches, which is another one."""
    own = own_proxies(environment)
    return _useful({name: value for name, value in own.items() if not _is_here(value)})


def own_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Read this computer's own proxies; the spelling in lower case counts, as for most programs."""
    found = {}
    for name in system.PROXIES:
        value = environment.get(name.lower(), environment.get(name, "")).strip().rstrip("/")
        if value:
            absolute = "://" in value or name == "NO_PROXY"
            found[name] = value if absolute else f"http://{value}"
    return found


def _named(environment: Mapping[str, str]) -> dict[str, Path]:
    return {name: Path(environment[name]) for name in (*BUNDLES, FOLDER) if environment.get(name)}


def _trusted(environment: Mapping[str, str]) -> list[Path]:
    """List the files and folders with what this computer trusts, each once."""
    bundle, named = system.bundle_of_system(), _named(environment)
    found = [named.get(FILE) or bundle, *named.values()]
    if bundle and named.get(FOLDER) == bundle.parent:
        found.remove(bundle.parent)  # the system's store once more
    return list({one.resolve(): one for one in found if one and one.exists()}.values())


def _joined(paths: Sequence[Path], environment: Mapping[str, str]) -> Path:
    """Write what several files hold into one, which is kept while it is used. Raises OSError."""
    text = "\n".join([*dict.fromkeys(one for path in paths for one in _read(path)), ""])
    home = environment.get("CML_RUNNER_HOME") or Path.home() / ".cml-runner"
    directory = Path(home) / "authorities"
    directory.mkdir(parents=True, exist_ok=True)
    found = directory / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.pem"
    if found.exists():
        found.touch()
    else:
        system.write(found, text, 0o644)
    for other in directory.iterdir():
        with suppress(OSError):
            if other.stat().st_mtime < time.time() - KEPT:
                other.unlink()
    return found


def _public() -> set[bytes]:
    """List public authorities: those that requests brings, and those that the system brings."""
    from requests.utils import DEFAULT_CA_BUNDLE_PATH

    anchors = (one for path in ANCHORS for one in path.rglob("*") if one.is_file())
    added = {found for path in anchors for found in _decoded(_read(path))}
    bundle = system.bundle_of_system()
    brought = set(_decoded(_read(bundle))) - added if bundle else set()
    return brought | set(_decoded(_read(Path(DEFAULT_CA_BUNDLE_PATH))))


def _read(path: Path) -> list[str]:
    """Read the certificates in a file, or in all files of a folder, in PEM."""
    if path.is_dir():
        return [found for one in sorted(path.iterdir()) if one.is_file() for found in _read(one)]
    try:
        content = path.read_bytes()
    except OSError as error:
        log.warning("can't read %s: %s", path, error.strerror)
        return []
    if content[:1] == b"\x30":  # Fedora's store takes DER, too
        return [_encoded(content)]
    return _blocks(content.decode(errors="replace"))


def _blocks(text: str) -> list[str]:
    return system.CERTIFICATE.findall(text)


def _decoded(certificates: Iterable[str]) -> list[bytes]:
    """Turn PEM into what can be compared."""
    found = []
    for one in certificates:
        with suppress(ValueError):
            found.append(base64.b64decode("".join(one.splitlines()[1:-1])))
    return found


def _encoded(certificate: bytes) -> str:
    import ssl  # noqa: PLC0415 - takes time, and --version needs none of this

    return ssl.DER_cert_to_PEM_cert(certificate)


def _is_sound(certificate: bytes) -> bool:
    """Say if it is a certificate; one that isn't would spoil a whole bundle."""
    import ssl  # noqa: PLC0415

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=certificate)
    except (ssl.SSLError, ValueError):
        return False
    return True


def _is_of_use(name: str, own: Mapping[str, str]) -> bool:
    """Say if machines can use this computer's proxy."""
    if name not in own:
        return False
    shown = own[name].rpartition("@")[2]
    if not PROXY.fullmatch(own[name]):
        log.warning("machines do without %s: %s is no address that they understand", name, shown)
        return False
    if _is_here(own[name]):
        log.info("machines do without %s: %s is this computer", name, shown)
        return False
    return True


def _is_here(proxy: str) -> bool:
    """Say if a proxy is the very computer that uses it."""
    with suppress(ValueError):
        host = urlsplit(proxy).hostname or ""
        if host.rstrip(".").endswith("localhost"):
            return True
        address = ip_address(host)
        return address.is_loopback or address.is_unspecified
    return False


def _direct(own: Mapping[str, str]) -> list[str]:
    """List what is to be reached without a proxy, each name once."""
    found = re.split(r"[,\s]+", own.get("NO_PROXY", ""))
    return list(dict.fromkeys((*(one for one in found if DIRECT.fullmatch(one)), *NEVER)))


def _useful(proxies: dict[str, str]) -> dict[str, str]:
    return proxies if any(name in proxies for name in system.PROXIES[:2]) else {}
