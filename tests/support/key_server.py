"""A small HTTP server for key sets on loopback, which can rotate, break, redirect, dribble and hang."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class KeyServer:
    """`mode`: `serve`, `garbage`, `huge`, `error`, `redirect`, `hang`, `dribble`. `requests` counts what
    came."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.mode = "serve"
        self.cache_control = ""
        self.requests = 0
        self.released = threading.Event()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.requests += 1
                owner._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                """Silent: a test's output is its assertion."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/jwks"

    def _answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        if self.mode == "hang":
            self.released.wait(10)
            return
        body = json.dumps(self.document).encode()
        if self.mode == "garbage":
            body = b"<html>sign in</html>"
        elif self.mode == "huge":
            body = b" " * (2 * 1024 * 1024) + body
        request.send_response({"error": 500, "redirect": 302}.get(self.mode, 200))
        if self.mode == "redirect":
            request.send_header("location", self.url)
        if self.cache_control:
            request.send_header("cache-control", self.cache_control)
        request.send_header("content-length", str(len(body)))
        request.end_headers()
        try:
            if self.mode == "dribble":
                for byte in body:
                    if self.released.wait(0.2):
                        return
                    request.wfile.write(bytes([byte]))
                    request.wfile.flush()
            else:
                request.wfile.write(body)
        except OSError:
            return  # the client had enough

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


@contextmanager
def key_server(document: dict[str, Any]) -> Iterator[KeyServer]:
    server = KeyServer(document)
    server.start()
    try:
        yield server
    finally:
        server.stop()
