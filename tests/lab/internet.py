"""A private internet: a network namespace in which every name leads to servers of this process.

    with Internet(directory) as internet:
        internet.serve("amazonaws.com", wsgi_application)
        internet.run(["curl", "https://ec2.us-west-2.amazonaws.com/"])

It has a name server, a certificate authority of its own, and room for machines, each of which has
a namespace of its own behind a pair of interfaces. Nothing in it can reach anything outside.
Sockets are made inside by a thread that enters the namespace; this very process serves them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import ssl
import subprocess
import threading
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    Application = Callable[..., Iterable[bytes]]

GATEWAY, METADATA = "10.213.0.1", "169.254.169.254"
NAMES = (
    *("*.amazonaws.com", "*.us-west-2.amazonaws.com", "*.s3.us-west-2.amazonaws.com"),
    *("*.us-east-1.amazonaws.com", "*.s3.us-east-1.amazonaws.com", "*.lab.example"),
    *("*.eu-west-1.amazonaws.com", "*.eu-north-1.amazonaws.com", "*.s3.amazonaws.com"),
    *(
        "management.azure.com",
        "prices.azure.com",
        "*.blob.core.windows.net",
        "login.microsoftonline.com",
    ),
    "*.googleapis.com",
    *("gitlab.com", "bitbucket.org", "*.bitbucket.org", "*.atlassian.com"),
)
NEW_NETWORK = 0x40000000  # CLONE_NEWNET
NUMBERS = count(1)
PREFIX = "cml-lab-"


class Internet:
    """One namespace with its servers."""

    def __init__(self, directory: Path, certified: Path | None = None) -> None:
        """Keep its files in a directory; an authority that is known already may be used."""
        self.name = f"{PREFIX}{os.getpid()}-{next(NUMBERS)}"
        self.authority = (certified or directory) / "ca.pem"
        self._key = (certified or directory) / "server.pem"
        self._sites: dict[str, Application] = {}
        self._metadata: dict[str, Application] = {}  # by the address of who asks
        self._servers: list[Any] = []
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Internet:
        _sweep()
        if not self.authority.exists():
            certify(self.authority.parent)
        ip("netns", "add", self.name)
        try:
            for address in (GATEWAY, METADATA):
                self.ip("addr", "add", f"{address}/32", "dev", "lo")
            self.ip("link", "set", "lo", "up")
            names = Path("/etc/netns", self.name)
            names.mkdir(parents=True)
            (names / "resolv.conf").write_text(f"nameserver {GATEWAY}\n")
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes who waits for it
            one.close()
        _remove(self.name)

    def serve(self, domain: str, application: Application) -> None:
        """Let an application answer for a domain and all names in it."""
        self._sites[domain] = application

    def metadata(self, address: str, application: Application) -> None:
        """Let it answer who asks the metadata service from this address."""
        self._metadata[address] = application

    def ip(self, *arguments: str) -> None:
        """Configure the namespace."""
        ip("-n", self.name, *arguments)

    def command(self, *command: str) -> list[str]:
        """Say how to run something in there."""
        return ["ip", "netns", "exec", self.name, *command]

    def trust(self) -> dict[str, str]:
        """Name the variables that let programs trust our authority, and nobody else."""
        names = ("SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
        return dict.fromkeys(names, str(self.authority))

    def run(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run something in there, for two minutes at most."""
        return subprocess.run(
            self.command(*command),
            env={**os.environ, **self.trust(), **(environment or {})},
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start something in there."""
        return subprocess.Popen(
            self.command(*command),
            env={**os.environ, **self.trust(), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _open(self) -> None:
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Handler(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log(self, *_: object) -> None:
                """Keep quiet."""

        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._key)
        stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
        sites: list[tuple[str, int, Application, ssl.SSLContext | None]] = [
            (GATEWAY, 443, self._answer, context),
            (METADATA, 80, self._answer_metadata, None),
        ]
        for address, port, application, tls in sites:
            opened = self._socket(stream, address, port)
            server = make_server(
                address,
                port,
                application,
                threaded=True,
                request_handler=Handler,
                ssl_context=tls,
                fd=opened.fileno(),
            )
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            self._servers.append(server)
        names = self._socket(datagram, GATEWAY, 53)
        threading.Thread(target=_name, args=(names,), daemon=True).start()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have this thread inside, and whatever threads and processes it starts meanwhile."""
        with open("/proc/thread-self/ns/net", "rb") as outside:
            _enter(f"/run/netns/{self.name}")
            try:
                yield
            finally:
                _enter(f"/proc/self/fd/{outside.fileno()}")

    def _socket(self, kind: int, address: str, port: int) -> socket.socket:
        """Make a socket inside; it stays there, whoever uses it."""
        made: list[socket.socket | OSError] = []

        def make() -> None:
            try:
                _enter(f"/run/netns/{self.name}")
                one = socket.socket(socket.AF_INET, kind)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind((address, port))
                if kind == socket.SOCK_STREAM:
                    one.listen(128)
                made.append(one)
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        self._sockets.append(made[0])
        return made[0]

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        host = environ.get("HTTP_HOST", "").partition(":")[0]
        fitting = [name for name in self._sites if f".{host}".endswith(f".{name}")]
        if not fitting:
            start("404 Not Found", [("Content-Length", "0")])
            return []
        return self._sites[max(fitting, key=len)](environ, start)

    def _answer_metadata(
        self, environ: dict[str, Any], start: Callable[..., Any]
    ) -> Iterable[bytes]:
        application = self._metadata.get(environ["REMOTE_ADDR"])
        if application is None:
            start("404 Not Found", [("Content-Length", "0")])
            return []
        return application(environ, start)


def _enter(network: str) -> None:
    """Move this thread into another network. Raises OSError."""
    with open(network, "rb") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "setns")


def ip(*arguments: str) -> None:
    """Configure the network. Raises CalledProcessError."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, stdin=subprocess.DEVNULL)


def _name(server: socket.socket) -> None:
    """Answer every question for an IPv4 address with ours, and every other with nothing."""
    while True:
        try:
            question, sender = server.recvfrom(512)
        except OSError:
            return
        if len(question) < 17:  # the socket was shut down
            return
        end = question.index(b"\0", 12) + 5
        found = question[end - 4 : end - 2] == b"\0\1"  # type A
        header = question[:2] + b"\x81\x80\0\1" + (b"\0\1" if found else b"\0\0") + b"\0\0\0\0"
        record = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(GATEWAY)
        with suppress(OSError):
            server.sendto(header + question[12:end] + (record if found else b""), sender)


def certify(directory: Path) -> None:
    """Make an authority, and a certificate for all names that we answer for."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    now = datetime.now(timezone.utc)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]

    def certificate(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("lab"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=3650))
        )

    def identified(builder: x509.CertificateBuilder, key: Any) -> x509.CertificateBuilder:
        own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key())
        return builder.add_extension(own, critical=False).add_extension(issuer, critical=False)

    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    root = (
        identified(certificate("lab", keys[0]), keys[0])
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(keys[0], hashes.SHA256())
    )
    here = x509.IPAddress(ip_address("127.0.0.1"))
    names = x509.SubjectAlternativeName([here, *(x509.DNSName(one) for one in NAMES)])
    leaf = (
        identified(certificate("server", keys[1]), keys[1])
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(keys[0], hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    (directory / "ca.pem").write_bytes(root.public_bytes(encoding))
    private = keys[1].private_bytes(
        encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / "server.pem").write_bytes(private + leaf.public_bytes(encoding))


def _remove(name: str) -> None:
    with suppress(subprocess.CalledProcessError):
        ip("netns", "del", name)
    directory = Path("/etc/netns", name)
    (directory / "resolv.conf").unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()


def _sweep() -> None:
    """Remove what processes have left that were killed."""
    for path in Path("/run/netns").glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX).partition("-")[0]
        if not Path("/proc", number).exists():
            _remove(path.name)
