"""The listening sockets: one reuseport pair (IPv4, IPv6) a worker, bound by the supervisor, which keeps them.

What containers send is redirected to their bridge's address, so that with containers the sockets listen on every address; a rule on
input (kernel.nft, `protect`) resets whoever was not redirected, and what no hook has noted is refused.

A restarted worker gets the same descriptors, so that the port is never free for someone else to take.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from sidecar.errors import PrerequisiteError

_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Listeners:
    """`port` on 127.0.0.1 and, where the host has IPv6, on ::1, or on all addresses; `by_worker[i]` are worker i's sockets."""

    port: int
    by_worker: tuple[tuple[socket.socket, ...], ...]

    def close(self) -> None:
        for sockets in self.by_worker:
            for sock in sockets:
                sock.close()


def _bind(family: int, host: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def _has_ipv6() -> bool:
    try:
        _bind(socket.AF_INET6, "::1", 0).close()
    except OSError:
        return False
    return True


def open_listeners(workers: int, *, everywhere: bool = False) -> Listeners:
    """Bind one free port for all workers. Sockets do not listen until a worker calls listen(2): a redirect to a port
    without listener is refused at once.

    Raises PrerequisiteError where the loopback interface is down or no port is free.
    """
    families = [(socket.AF_INET, "0.0.0.0" if everywhere else "127.0.0.1")]
    if _has_ipv6():
        families.append((socket.AF_INET6, "::" if everywhere else "::1"))
    failure: OSError | None = None
    for _ in range(_ATTEMPTS):
        opened: list[socket.socket] = []
        port = 0
        try:
            rows = []
            for _worker in range(workers):
                row = []
                for family, host in families:
                    sock = _bind(family, host, port)
                    opened.append(sock)
                    port = sock.getsockname()[1]
                    row.append(sock)
                rows.append(tuple(row))
            return Listeners(port, tuple(rows))
        except OSError as error:
            failure = error
            for sock in opened:
                sock.close()
    raise PrerequisiteError(
        f"no listening port could be bound on loopback: {failure}",
        hint="bring the loopback interface up: ip link set lo up",
    )
