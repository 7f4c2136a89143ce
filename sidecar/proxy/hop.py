"""One of a flow's two connections, as asyncio's transports see it.

A chunk that the session's lane takes (see session.postgres_lane) is recorded and handed on by the compiled `Receiver`, without a
command list: a request's record first, then its bytes, as everywhere; an answer's record in the same turn of the loop, with the
next request's where there is one. All else is the flow's to drive (driver.py).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

from sidecar.model.flow import Side
from sidecar.proxy import limits

if TYPE_CHECKING:
    from sidecar.audit.writer import StreamWriter
    from sidecar.model.record import EncodedRecord
    from sidecar.proxy.driver import FlowDriver

try:
    from sidecar.proxy import _hop
except ImportError:
    _COMPILED = False
else:
    _COMPILED = True

if TYPE_CHECKING or _COMPILED:
    Gate = _hop.Gate
    Receiver = _hop.Receiver
else:

    class Gate:
        """There is no short way that could pass it."""

        def __init__(self, full: int, soon: object, failed: object) -> None:
            del soon, failed
            self.full = full
            self.open = False
            self.waiting: list[EncodedRecord] = []

        def take(self) -> list[EncodedRecord]:
            return []

        def flush(self) -> None:
            return

        def set(self, writer: StreamWriter | None, is_open: bool) -> None:
            del writer
            self.open = is_open

    class Receiver:
        """All goes the long way."""

        def __init__(self, gate: Gate, from_client: bool) -> None:
            self.gate = gate
            self.from_client = from_client
            self.lost = False
            self.flow: FlowDriver | None = None
            self.lane = None
            self.peer: Any = None
            self.transport: Any = None
            self.early: list[bytes] = []

        def data_received(self, data: bytes) -> None:
            if self.flow is None:
                self.early.append(data)
                self.transport.pause_reading()
            else:
                self.flow.received(self, data)


PAUSE_PEER: Final = 1
"""The other side's write buffer is full."""


class Hop(Receiver):
    """An asyncio protocol, by shape. `early` is what came before the flow was known, with empty bytes for the end."""

    def __init__(self, gate: Gate, *, from_client: bool) -> None:
        super().__init__(gate, from_client)
        self.paused = 0
        self.eof = False

    @property
    def side(self) -> Side:
        return Side.CLIENT if self.from_client else Side.SERVER

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.set_write_buffer_limits(high=limits.WRITE_HIGH_WATER)

    def eof_received(self) -> bool:
        if self.flow is None:
            self.early.append(b"")
        else:
            self.flow.ended(self)
        return True  # keep the other direction: half-close is the session's to decide

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self.flow is not None:
            self.flow.lost(self, exc)

    def pause_writing(self) -> None:
        if self.flow is not None:
            self.flow.pause(self.peer, PAUSE_PEER, True)

    def resume_writing(self) -> None:
        if self.flow is not None:
            self.flow.pause(self.peer, PAUSE_PEER, False)

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        if self.transport is not None and not self.lost:
            sock = self.transport.get_extra_info("socket")
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
