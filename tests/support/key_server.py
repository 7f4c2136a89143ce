"""A small HTTP server for key sets on loopback, which can rotate, break, redirect, dribble and hang."""

from __future__ import annotations

import http.server
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.loopback_http import LoopbackServer


class KeyServer(LoopbackServer):
    """`mode`: `serve`, `garbage`, `huge`, `error`, `redirect`, `hang`, `dribble`. `requests` counts what
    came."""

    def __init__(self, document: dict[str, Any]) -> None:
        super().__init__()
        self.document = document
        self.mode = "serve"
        self.cache_control = ""
        self.requests = 0
        self.issuer = ""
        self.discovery: dict[str, Any] = {}
        """What /.well-known/openid-configuration answers."""
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"{self.origin}/jwks"

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        self.requests += 1
        self.paths.append(request.path)
        if self.mode == "hang":
            self.released.wait(10)
            return
        discovers = request.path == "/.well-known/openid-configuration"
        body = json.dumps(self.discovery if discovers else self.document).encode()
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


@contextmanager
def key_server(document: dict[str, Any]) -> Iterator[KeyServer]:
    with KeyServer(document) as server:
        yield server
