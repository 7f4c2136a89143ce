"""The collector's composition: store, ingest, API, pages and their guard, as one ASGI application; and the process that serves it.

Loopback by default, where root and the collector's own user read and others need the page's token. Elsewhere it is served only with TLS
and an enrolment token, and then everybody needs it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from sidecar.collector.approvals import ApprovalsGateway
from sidecar.collector.guard import TOKEN_FILE, Guard, Sessions, page_token
from sidecar.collector.ingest import Ingest
from sidecar.collector.pages import Pages
from sidecar.collector.store import Store
from sidecar.errors import ConfigurationError, PrerequisiteError
from sidecar.model.secret import Secret

GRACE_S: Final = 5
"""For requests under way when the collector is told to stop."""
BACKLOG: Final = 128
MAX_CONNECTIONS: Final = 256
"""At once; beyond, 503. With MAX_BODY_BYTES of ingest it bounds what requests can take up."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files; `chain` begins with the server's certificate."""

    chain: Path
    key: Path


def create_app(
    store: Store,
    approvals: ApprovalsGateway | None,
    *,
    token: str,
    enrolment: Secret | None = None,
    hosts: frozenset[str] = frozenset(),
    open_to_own_user: bool = True,
    token_file: str = TOKEN_FILE,
) -> Starlette:
    """`token` is the page's, `token_file` where people find it; `hosts` are the names under which it may be called, empty: any."""
    ingest = Ingest(store, enrolment)
    pages = Pages(store, approvals, Sessions(token), open_to_own_user=open_to_own_user, token_file=token_file)
    routes: list[BaseRoute] = [
        Route("/v1/batches", ingest.batches, methods=["POST"]),
        Route("/v1/flows", pages.api_flows),
        Route("/v1/flows/{flow}", pages.api_flow),
        Route("/v1/records/{record}", pages.api_record),
        Route("/", pages.index),
        Route("/flows/{flow}", pages.flow),
        Route("/login", pages.login, methods=["POST"]),
        Mount("/static", StaticFiles(packages=[("sidecar.collector", "static")])),
    ]
    if approvals is not None:
        routes += [
            Route("/approvals", pages.holds),
            Route("/approvals/{hold}", pages.decide, methods=["POST"]),
        ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, hosts=hosts)])


def parse_listen(listen: str) -> tuple[str, int]:
    """Address and port. Raises ConfigurationError."""
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or not 0 <= int(port) < 65_536:
        raise ConfigurationError(f"{listen!r} is no address and port", hint="such as 127.0.0.1:8420")
    return host, int(port)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Server(uvicorn.Server):
    """Says where it listens once it does. With `of_parent` standard input is a socket of the parent's: it says there that it serves,
    and ends when that does."""

    def __init__(self, config: uvicorn.Config, ready: str, *, of_parent: bool) -> None:
        super().__init__(config)
        self._ready = ready
        self._of_parent = of_parent

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            os.write(2, self._ready.encode())
        if self._of_parent and self.started:
            os.write(0, b"R")
            asyncio.get_running_loop().add_reader(0, self._parent_is_gone)

    def _parent_is_gone(self) -> None:
        if not os.read(0, 1):
            asyncio.get_running_loop().remove_reader(0)
            self.should_exit = True


def serve(
    listen: str,
    data_dir: Path,
    approvals: ApprovalsGateway | None,
    enrolment: Secret | None,
    *,
    certificate: Certificate | None = None,
    listen_fd: int | None = None,
) -> None:
    """Until SIGTERM or SIGINT; requests under way are finished. The address and the token's file are named on stderr.
    `listen_fd`: a listening socket of our parent's, on loopback, instead of `listen`; then also until standard input ends.
    Raises ConfigurationError for an address that must not be served, PrerequisiteError where it cannot be."""
    inherited = socket.socket(fileno=listen_fd) if listen_fd is not None else None
    host, port = inherited.getsockname()[:2] if inherited is not None else parse_listen(listen)
    local = is_loopback(host)
    if not local and (certificate is None or enrolment is None):
        raise ConfigurationError(
            f"{host} is not loopback: hosts and readers would be neither protected nor known",
            hint="give --tls-cert and --tls-key, and an enrolment token (upstream.token of -c); or put a TLS proxy before 127.0.0.1",
        )
    store = Store(data_dir)
    try:
        sock = inherited or _bind(host, port)
        app = create_app(
            store,
            approvals,
            token=page_token(data_dir),
            enrolment=enrolment,
            hosts=frozenset({host.lower(), "localhost"}) if local else frozenset(),
            open_to_own_user=local,
            token_file=str(data_dir / TOKEN_FILE),
        )
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, lifespan="off", http="h11",
            proxy_headers=False,  # who is at the other end is the kernel's word, no header's
            timeout_graceful_shutdown=GRACE_S, limit_concurrency=MAX_CONNECTIONS,
            ssl_certfile=certificate.chain if certificate else None,
            ssl_keyfile=certificate.key if certificate else None,
        )  # fmt: skip
        scheme = "https" if certificate else "http"
        shown = f"[{host}]" if ":" in host else host
        address = f"{scheme}://{shown}:{sock.getsockname()[1]}"
        _Server(
            config,
            f"{address}  (the page's token is in {data_dir / TOKEN_FILE})\n",
            of_parent=inherited is not None,
        ).run(sockets=[sock])
    finally:
        store.close()


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        raise PrerequisiteError(
            f"{host}:{port} cannot be listened on: {error.strerror}",
            hint="another collector? name another address with --listen",
        ) from error
    return sock


__all__ = ["Certificate", "create_app", "is_loopback", "page_token", "parse_listen", "serve"]
