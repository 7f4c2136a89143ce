"""A PostgreSQL session played from a transcript: what went in, in order; what came out, joined by side; what was recorded.

A transcript is a list of (event, argument): CLIENT and SERVER are bytes from that side, the rest are the driver's own events. However
the bytes are cut, the same must come out: TCP promises nothing about chunks.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgpack

from sidecar.audit.encode import encode_record
from sidecar.audit.writer import place_of
from sidecar.codecs.postgres import messages as m
from sidecar.model.flow import Address, FlowFacts, Side, Target
from sidecar.model.ids import IdSource
from sidecar.model.principal import Attachment
from sidecar.model.record import EncodedRecord, Record
from sidecar.model.verdict import Engine
from sidecar.model.workload import Workload
from sidecar.session.commands import (
    CloseFlow,
    Command,
    OpenHold,
    PauseReading,
    Send,
    SessionLimits,
    StartTls,
    WithdrawHold,
    WriteRecord,
)
from sidecar.session.context import SessionContext
from sidecar.session.postgres import PostgresSession

CLIENT, SERVER = Side.CLIENT, Side.SERVER
FLOW = "0190a000-0000-7000-8000-000000000000"
BEGAN_NS = 1_700_000_000_000_000_000
SSL_REQUEST = struct.pack("!ii", 8, m.SSL_REQUEST)
GSSENC_REQUEST = struct.pack("!ii", 8, m.GSSENC_REQUEST)

Step = tuple[Side | str, Any]
Transcript = list[Step]


def greeting(*, tls: bytes = b"N") -> Transcript:
    """A client that asks for TLS, is told N, and logs in without a password."""
    return [
        ("connected", None),
        (CLIENT, SSL_REQUEST),
        (SERVER, tls),
        (CLIENT, m.Startup(196608, ((b"user", b"u"), (b"database", b"d"))).encode()),
        (
            SERVER,
            m.message(b"R", b"\0\0\0\0")
            + m.message(b"S", b"client_encoding\0UTF8\0")
            + m.message(b"S", b"standard_conforming_strings\0on\0")
            + m.message(b"K", b"\0\0\0\x05\0\0\0\x06")
            + m.message(b"Z", b"I"),
        ),
    ]


def decoded(record: Record | EncodedRecord) -> dict[str, Any]:
    if isinstance(record, EncodedRecord):
        data = record.front + place_of("h", "s") + b"\x05" + record.rest
    else:
        record.v, record.host, record.stream, record.seq = 1, "h", "s", 5
        data = encode_record(record)
    found: dict[str, Any] = msgpack.unpackb(data, raw=False, unicode_errors="surrogateescape")
    return found


@dataclass
class Options:
    lane: bool = True
    attachment: Attachment = field(default_factory=Attachment)
    limits: SessionLimits = field(default_factory=SessionLimits)
    client_wants_tls: bool = False
    tls_mode: str | None = None


class Run:
    """One session, and all that it did."""

    def __init__(self, engine: Engine, options: Options | None = None) -> None:
        options = options or Options()
        self.engine = engine
        target = Target(Address("127.0.0.1", 5999), "127.0.0.1", "address", "postgres", tls_mode=options.tls_mode)  # fmt: skip
        facts = FlowFacts(
            FLOW, 1, Address("127.0.0.1", 1), target, None, Workload(),
            attachment=options.attachment, client_wants_tls=options.client_wants_tls,
        )  # fmt: skip
        self.session = PostgresSession(SessionContext(facts, engine, IdSource(), options.limits))
        if not options.lane:
            self.session._lane = None
        self.sent = {CLIENT: bytearray(), SERVER: bytearray()}
        self.records: list[dict[str, Any]] = []
        self.encoded = 0
        self.holds: list[OpenHold] = []
        self.withdrawn: list[str] = []
        self.tls: list[StartTls] = []
        self.reason = ""
        self.biggest = 0
        """Bytes that were kept at once, at most."""
        self.paused = False
        self.now = BEGAN_NS
        self._note(self.session.start(self.now))

    @property
    def closed(self) -> bool:
        return bool(self.reason)

    def play(self, transcript: Iterable[Step], cut: Any = None) -> Run:
        """`cut(data)` yields the pieces in which a chunk arrives."""
        for event, argument in transcript:
            self.now += 1_000_000  # a chunk's pieces arrive together: else times could not be compared
            pieces = cut(argument) if cut is not None and isinstance(argument, bytes) else (argument,)
            for piece in pieces:
                if not self.closed:
                    self._note(self._step(event, piece))
        return self

    def _step(self, event: Side | str, argument: Any) -> list[Command]:
        session, now = self.session, self.now
        if isinstance(event, Side):
            found = session.receive(event, argument, now) if argument else []
            self.biggest = max(self.biggest, len(session._client) + len(session._server) + len(session._early_client))  # fmt: skip
            return found
        match event:
            case "connected":
                return session.upstream_connected(now)
            case "tls":
                return session.tls_started(now)
            case "signed":
                return session.assertion_signed(argument, now)
            case "decided":
                outcome, by = argument
                return session.hold_decided(self.holds[-1].hold_id, outcome, by, "", now)
            case "policy":
                return session.engine_changed(argument, now)
            case "eof":
                return session.eof(argument, now)
        raise ValueError(event)

    def _note(self, commands: list[Command]) -> None:
        for command in commands:
            assert not self.closed, "a command after CloseFlow"
            if isinstance(command, Send):
                self.sent[command.side] += command.data
            elif isinstance(command, WriteRecord):
                self.encoded += isinstance(command.record, EncodedRecord)
                self.records.append(decoded(command.record))
            elif isinstance(command, OpenHold):
                self.holds.append(command)
            elif isinstance(command, WithdrawHold):
                self.withdrawn.append(command.hold_id)
            elif isinstance(command, StartTls):
                self.tls.append(command)
            elif isinstance(command, PauseReading):
                self.paused = command.paused
            elif isinstance(command, CloseFlow):
                self.reason = command.reason.value

    # -- what tests compare

    def shown(self, side: Side) -> bytes:
        """What was sent to `side`, but for identifiers."""
        return re.sub(rb"\b(record|why|hold|approve) [0-9a-f]{8}", rb"\1 id", bytes(self.sent[side]))

    def normal(self) -> list[dict[str, Any]]:
        """Records with their identifiers named by order."""
        names: dict[str, str] = {}
        shown = []
        for record in self.records:
            names[record["id"]] = f"record {len(names)}"
            copy = {**record, "id": names[record["id"]]}
            if "request" in copy:
                copy["request"] = names.get(copy["request"], copy["request"])
            if "hold" in copy:
                copy["hold"] = {**copy["hold"], "id": "hold"}
            shown.append(copy)
        return shown

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


def same(one: Run, other: Run) -> None:
    """Asserts that both did the same."""
    for side in (CLIENT, SERVER):
        assert one.shown(side) == other.shown(side), side
    assert one.normal() == other.normal()
    assert (one.reason, len(one.holds), one.tls) == (other.reason, len(other.holds), other.tls)


def byte_by_byte(data: bytes) -> Iterable[bytes]:
    return (data[index : index + 1] for index in range(len(data)))
