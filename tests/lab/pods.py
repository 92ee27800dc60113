"""The part of an API server through which commands in pods are spoken to; they run here.

Version 5 of the protocol: https://kubernetes.io/docs/reference/using-api/api-concepts/ and
k8s.io/apimachinery, pkg/util/remotecommand/constants.go; each frame begins with its channel.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import pty
import socketserver
import struct
import subprocess
import termios
import threading
from contextlib import suppress
from socket import SHUT_RDWR
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from socket import socket

MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455
BINARY, CLOSING = 2, 8  # kinds of frames
STDIN, STDOUT, STDERR, RESULT, SIZE, CLOSE = 0, 1, 2, 3, 4, 255


class Pods(socketserver.ThreadingTCPServer):
    """A server with one namespace, in which every pod has this computer's programs."""

    daemon_threads = allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, list[str]]] = []
        self.connections: list[socket] = []

    def __enter__(self) -> Pods:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def cut(self) -> None:
        """Break all connections."""
        for one in self.connections:
            with suppress(OSError):
                one.shutdown(SHUT_RDWR)

    @property
    def config(self) -> str:
        """A kubeconfig for it."""
        url = f"http://127.0.0.1:{self.server_address[1]}"
        return json.dumps(
            {
                "current-context": "mine",
                "clusters": [{"name": "there", "cluster": {"server": url}}],
                "users": [{"name": "me", "user": {"token": "abc"}}],
                "contexts": [{"name": "mine", "context": {"cluster": "there", "user": "me"}}],
            }
        )


class _Handler(socketserver.StreamRequestHandler):
    server: Pods

    def handle(self) -> None:
        path = self.rfile.readline().decode().split()[1]
        headers = {}
        while line := self.rfile.readline().decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        asked = parse_qs(urlsplit(path).query)
        self.server.asked.append(asked)
        self.server.connections.append(self.connection)
        key = hashlib.sha1((headers["sec-websocket-key"] + MAGIC).encode()).digest()
        self.wfile.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + base64.b64encode(key) + b"\r\n"
            b"Sec-WebSocket-Protocol: " + headers["sec-websocket-protocol"].encode() + b"\r\n\r\n"
        )
        Command(self.connection, asked["command"], terminal="tty" in asked).run()


class Command:
    """A command, and the connection of who started it."""

    def __init__(self, connection: socket, command: list[str], *, terminal: bool) -> None:
        self._connection, self._terminal = connection, terminal
        self._lock = threading.Lock()
        self._input, self._outputs = -1, {}
        self._files: list[IO[bytes]] = []
        if terminal:
            master, slave = pty.openpty()
            self._input, self._outputs = master, {STDOUT: master}
            given: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
            self._process = subprocess.Popen(
                command,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
                **given,
            )
            os.close(slave)
        else:
            pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            self._process = subprocess.Popen(command, **pipes)
            assert self._process.stdin
            assert self._process.stdout
            assert self._process.stderr
            self._input = os.dup(self._process.stdin.fileno())
            self._process.stdin.close()
            self._files = [self._process.stdout, self._process.stderr]
            outputs = {STDOUT: self._process.stdout, STDERR: self._process.stderr}
            self._outputs = {channel: one.fileno() for channel, one in outputs.items()}

    def run(self) -> None:
        """Carry what is said in both directions, and tell how it ended."""
        threads = [threading.Thread(target=self._tell, args=one) for one in self._outputs.items()]
        threading.Thread(target=self._listen, daemon=True).start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        code = self._process.wait()
        status = {"status": "Success"}
        if code:
            text = f"command terminated with exit code {code}"
            status = {"status": "Failure", "message": text}
        self._send(RESULT, json.dumps(status).encode())
        self._frame(struct.pack("!H", 1000), CLOSING)
        for file in self._files:
            file.close()

    def _tell(self, channel: int, file: int) -> None:
        with suppress(OSError):
            while piece := os.read(file, 4096):
                self._send(channel, piece)

    def _listen(self) -> None:
        from websocket._abnf import ABNF, frame_buffer

        frames = frame_buffer(self._receive, skip_utf8_validation=True)
        with suppress(Exception):
            while (frame := frames.recv_frame()).opcode != ABNF.OPCODE_CLOSE:
                data = bytes(frame.data)  # type: ignore[arg-type]
                channel, content = data[0], data[1:]
                if channel == STDIN:
                    os.write(self._input, content)
                elif channel == SIZE:
                    size = json.loads(content)
                    packed = struct.pack("HHHH", size["Height"], size["Width"], 0, 0)
                    fcntl.ioctl(self._input, termios.TIOCSWINSZ, packed)
                elif channel == CLOSE and content == bytes([STDIN]):
                    os.close(self._input)
        self._process.kill()  # as the runtime does, once nobody is there

    def _receive(self, size: int) -> bytes:
        """Raise EOFError at the end, for which whoever puts frames together would look for ever."""
        if content := self._connection.recv(size):
            return content
        raise EOFError

    def _send(self, channel: int, content: bytes) -> None:
        self._frame(bytes([channel]) + content, BINARY)

    def _frame(self, content: bytes, kind: int) -> None:
        from websocket._abnf import ABNF

        frame = ABNF.create_frame(content, kind)
        frame.mask_value = 0
        with self._lock, suppress(OSError):
            self._connection.sendall(frame.format())
