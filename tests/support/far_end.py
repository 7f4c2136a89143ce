"""The far host of steering tests: greets on some ports with `far`, and counts every packet to a port that reaches its interface,
with a packet socket, so that what got past the inspector shows even where no connection came of it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.support.far_host import FarHost

ROOT = Path(__file__).parents[2]
ETH_P_ALL = 3
SETTLE_S = 0.15


class FarEnd:
    """Context manager. `packets()` are those that arrived since the last call, by `tcp/port` and `udp/port`."""

    def __init__(self, host: FarHost, ports: tuple[int, ...]) -> None:
        self.process = host.popen(
            host.far,
            [sys.executable, "-m", "tests.support.far_end", f"{host.interface}f", *map(str, ports)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )

    def __enter__(self) -> FarEnd:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)

    def packets(self) -> dict[str, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: dict[str, int] = json.loads(self.process.stdout.readline())
        return found


def _destination(frame: bytes) -> str | None:
    """`tcp/port` or `udp/port` of an Ethernet frame."""
    kind = int.from_bytes(frame[12:14], "big")
    if kind == 0x0800:
        protocol, offset = frame[23], 14 + (frame[14] & 15) * 4
    elif kind == 0x86DD:
        protocol, offset = frame[20], 54
    else:
        return None
    name = {6: "tcp", 17: "udp"}.get(protocol)
    return f"{name}/{int.from_bytes(frame[offset + 2 : offset + 4], 'big')}" if name else None


def _serve(sock: socket.socket) -> None:
    kept = []
    while True:
        connection, _ = sock.accept()
        connection.sendall(b"far")
        kept.append(connection)


def _sniff(sock: socket.socket, seen: dict[str, int]) -> None:
    while True:
        frame, where = sock.recvfrom(2048)
        destination = _destination(frame) if where[2] != socket.PACKET_OUTGOING else None
        if destination is not None:
            seen[destination] = seen.get(destination, 0) + 1


def main(interface: str, ports: list[int]) -> None:
    seen: dict[str, int] = {}
    threads: list[tuple[Any, tuple[Any, ...]]] = []
    for port in ports:
        sock = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
        threads.append((_serve, (sock,)))
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    packets.bind((interface, 0))
    threads.append((_sniff, (packets, seen)))
    for target, arguments in threads:
        threading.Thread(target=target, args=arguments, daemon=True).start()
    print("ready", flush=True)
    for _ in sys.stdin:
        time.sleep(SETTLE_S)
        print(json.dumps(seen), flush=True)
        seen.clear()


if __name__ == "__main__":
    main(sys.argv[1], [int(port) for port in sys.argv[2:]])
