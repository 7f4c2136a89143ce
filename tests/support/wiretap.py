"""Every frame on one interface of a namespace, taken with a packet socket and read with scapy; streams are put together by sequence
numbers, so that a value cut over two segments is found as well."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from tests.support.far_host import FarHost

ROOT = Path(__file__).parents[2]
ETH_P_ALL = 3
SO_RCVBUFFORCE = 33
BUFFER_BYTES = 64 * 1024 * 1024
SETTLE_S = 0.3

Endpoint = tuple[str, int]
Stream = tuple[Endpoint, Endpoint]


@dataclass
class Wire:
    """What was seen. A stream is one direction of one connection: (from, to)."""

    frames: list[bytes] = field(default_factory=list)
    opened: list[Stream] = field(default_factory=list)
    """By SYNs of those who connect, in order, retransmissions once."""
    others: list[str] = field(default_factory=list)
    """IP packets that are no TCP."""
    _parts: dict[Stream, dict[int, bytes]] = field(default_factory=dict)

    def read(self) -> Wire:
        for frame in self.frames:
            packet = Ether(frame)
            ip = packet.getlayer(IP) or packet.getlayer(IPv6)
            if ip is None:
                continue
            tcp = ip.getlayer(TCP)
            if tcp is None:
                self.others.append(ip.summary())
                continue
            stream = ((ip.src, tcp.sport), (ip.dst, tcp.dport))
            if tcp.flags.S and not tcp.flags.A and stream not in self.opened:
                self.opened.append(stream)
            payload = bytes(tcp.payload) if tcp.payload else b""
            # A padded short frame: the IP header says what is payload.
            if isinstance(ip, IP):
                payload = payload[: ip.len - ip.ihl * 4 - tcp.dataofs * 4]
            if payload:
                parts = self._parts.setdefault(stream, {})
                if len(payload) > len(parts.get(tcp.seq, b"")):
                    parts[tcp.seq] = payload
        return self

    def streams(self) -> Iterator[tuple[Stream, bytes]]:
        for stream, parts in self._parts.items():
            first = min(parts)
            found = bytearray()
            for seq in sorted(parts):
                offset = seq - first
                found[offset : offset + len(parts[seq])] = parts[seq]
            yield stream, bytes(found)

    def holding(self, text: bytes) -> list[Stream]:
        """The streams, and failing that the single frames, that hold these bytes."""
        found = [stream for stream, data in self.streams() if text in data]
        return found or [(("frame", 0), ("frame", 0)) for frame in self.frames if text in frame]


class Wiretap:
    """Context manager; `wire` is there afterwards."""

    def __init__(self, hosts: FarHost, where: str, interface: str, file: Path) -> None:
        self.wire = Wire()
        self._file = file
        self._process = hosts.popen(
            where,
            [sys.executable, "-m", "tests.support.wiretap", interface, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )

    def __enter__(self) -> Wiretap:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "listening\n"
        return self

    def __exit__(self, *_: object) -> None:
        out, _ = self._process.communicate("", timeout=30)
        assert out == "dropped 0\n", "the capture is not complete"
        data = self._file.read_bytes()
        offset = 0
        while offset < len(data):
            size = int.from_bytes(data[offset : offset + 4], "big")
            self.wire.frames.append(data[offset + 4 : offset + 4 + size])
            offset += 4 + size
        self.wire.read()


def main(interface: str, path: str) -> None:
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    packets.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    packets.bind((interface, 0))
    packets.settimeout(SETTLE_S)
    stopping = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stopping.set()), daemon=True).start()
    print("listening", flush=True)
    with Path(path).open("wb") as file:
        while True:
            try:
                frame, where = packets.recvfrom(0x40000)
            except TimeoutError:
                if stopping.is_set():
                    break
                continue
            if interface == "lo" and where[2] == socket.PACKET_OUTGOING:
                continue  # seen once more on its way in
            file.write(len(frame).to_bytes(4, "big") + frame)
    # SOL_PACKET, PACKET_STATISTICS: packets, drops
    _, dropped = (int.from_bytes(part, sys.byteorder) for part in _halves(packets.getsockopt(263, 6, 8)))
    print(f"dropped {dropped}", flush=True)


def _halves(raw: bytes) -> tuple[bytes, bytes]:
    return raw[:4], raw[4:]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
