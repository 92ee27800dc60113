"""An HTTPS proxy behind which one server has every name in the world."""

from __future__ import annotations

import select
import socketserver
import threading
from contextlib import suppress
from socket import create_connection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from socket import socket


class Proxy(socketserver.ThreadingTCPServer):
    """Connects whoever wants to speak to whomever, in TLS, with one port of this computer."""

    daemon_threads = allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = port
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        request = self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        if not request.startswith(b"CONNECT "):
            self.wfile.write(b"HTTP/1.1 405 Only CONNECT\r\nContent-Length: 0\r\n\r\n")
            return
        with suppress(OSError), create_connection(("127.0.0.1", self.server.port)) as far:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            _join(self.connection, far)


def _join(near: socket, far: socket) -> None:
    others = {near: far, far: near}
    while True:
        ready, _, _ = select.select(list(others), [], [])
        for one in ready:
            piece = one.recv(65536)
            if not piece:
                return
            others[one].sendall(piece)
