"""A small TLS server on loopback with a leaf of ours: what a client says of it is what the client trusts."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from types import TracebackType
from typing import Final, Self

from sidecar.tls.authority import Leaf
from sidecar.tls.server_context import server_context

ANSWER: Final = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
"""That is an answer: who reads it has accepted the certificate."""
_PATIENCE_S: Final = 10.0
_MAX_REQUEST_BYTES: Final = 65_536


class Loopback:
    """Serves while it is entered; `port` is on 127.0.0.1. `reached` counts connections, `answered`
    those that got an answer, after a handshake."""

    def __init__(self, leaf: Leaf, answer: bytes = ANSWER) -> None:
        self._context = server_context(leaf)
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.reached = 0
        self.answered = 0
        self._thread = threading.Thread(target=self._serve, name="loopback-tls", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the accept
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.reached += 1
            with connection:
                connection.settimeout(_PATIENCE_S)
                with contextlib.suppress(
                    OSError
                ):  # ssl.SSLError too: a client that does not trust us hangs up
                    self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        with self._context.wrap_socket(connection, server_side=True) as secured:
            request = b""
            while b"\r\n\r\n" not in request and len(request) < _MAX_REQUEST_BYTES:
                data = secured.recv(_MAX_REQUEST_BYTES)
                if not data:
                    return
                request += data
            self.answered += 1  # before: whoever has the answer may look at once
            secured.sendall(self._answer)
            with contextlib.suppress(ssl.SSLError):  # the client may be gone already
                secured.unwrap()
