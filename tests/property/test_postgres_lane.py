"""The short way and the long way are one way: the same bytes to both sides, the same records, whatever is sent and however it is cut."""

from __future__ import annotations

import re
import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.audit.encode import encode_record
from sidecar.audit.writer import place_of
from sidecar.codecs.postgres import messages as m
from sidecar.model.flow import Address, FlowFacts, Side, Target
from sidecar.model.ids import IdSource
from sidecar.model.record import EncodedRecord, Record
from sidecar.model.workload import Workload
from sidecar.policy import load_policy
from sidecar.session.commands import CloseFlow, Send, WriteRecord
from sidecar.session.context import SessionContext
from sidecar.session.postgres import PostgresSession
from sidecar.session.postgres_lane import COMPILED

pytestmark = pytest.mark.skipif(not COMPILED, reason="the short way was not compiled (setup.py)")

POLICY = """\
version: 1
default: allow
rules:
  - name: no-drops
    when: {protocol: postgres, statement: [DROP, TRUNCATE]}
    deny: not here
  - name: pii
    when: {protocol: postgres}
    mask:
      columns: {"*.ssn": redact}
"""
ENGINE = load_policy(POLICY, "policy.yaml")
FLOW = "0190a000-0000-7000-8000-000000000000"
START_NS = 1_700_000_000_000_000_000
COLUMNS = {1: b"id", 2: b"name", 3: b"ssn"}


def make_session(*, lane: bool) -> PostgresSession:
    facts = FlowFacts(
        FLOW,
        1,
        Address("127.0.0.1", 1),
        Target(Address("127.0.0.1", 5999), "127.0.0.1", "address", "postgres"),
        None,
        Workload(),
    )
    session = PostgresSession(SessionContext(facts, ENGINE, IdSource()))
    if not lane:
        session._lane = None
    session.start(1)
    session.upstream_connected(1)
    session.receive(Side.CLIENT, struct.pack("!ii", 8, 80877103), 1)
    session.receive(Side.SERVER, b"N", 1)
    session.receive(Side.CLIENT, m.Startup(196608, ((b"user", b"u"), (b"database", b"d"))).encode(), 1)
    session.receive(
        Side.SERVER,
        m.message(b"R", b"\0\0\0\0")
        + m.message(b"S", b"client_encoding\0UTF8\0")
        + m.message(b"S", b"standard_conforming_strings\0on\0")
        + m.message(b"K", b"\0\0\0\x05\0\0\0\x06")
        + m.message(b"Z", b"I"),
        START_NS,
    )
    catalog = [
        m.row([b"c", b"16400", b"public", b"people", str(n).encode(), name]) for n, name in COLUMNS.items()
    ]
    session.receive(
        Side.SERVER,
        m.message(b"1", b"") + m.message(b"2", b"") + b"".join(catalog) + m.message(b"C", b"SELECT 3\0")
        + m.message(b"3", b"") + m.message(b"3", b"") + m.message(b"Z", b"I"),
        START_NS,
    )  # fmt: skip
    return session


def decoded(record: Record | EncodedRecord) -> dict[str, Any]:
    if isinstance(record, EncodedRecord):
        data = record.front + place_of("h", "s") + b"\x05" + record.rest
    else:
        record.v, record.host, record.stream, record.seq = 1, "h", "s", 5
        data = encode_record(record)
    found: dict[str, Any] = msgpack.unpackb(data, raw=False, unicode_errors="surrogateescape")
    return found


class Run:
    """What one session did with all that it was given."""

    def __init__(self, session: PostgresSession) -> None:
        self.session = session
        self.sent = {Side.CLIENT: b"", Side.SERVER: b""}
        self.records: list[dict[str, Any]] = []
        self.encoded = 0
        self.closed = False
        self.now = START_NS

    def feed(self, side: Side, data: bytes) -> None:
        self.now += 1_000_000
        if data and not self.closed:
            self._note(self.session.receive(side, data, self.now))

    def _note(self, commands: list[Any]) -> None:
        for command in commands:
            if isinstance(command, Send):
                self.sent[command.side] += bytes(command.data)
            elif isinstance(command, WriteRecord):
                self.encoded += isinstance(command.record, EncodedRecord)
                self.records.append(decoded(command.record))
            elif isinstance(command, CloseFlow):
                self.closed = True

    def shown(self) -> dict[Side, bytes]:
        """What was sent, but for the record's id in a denial."""
        return {
            side: re.sub(rb"(record|why) [0-9a-f]{8}", rb"\1 id", data) for side, data in self.sent.items()
        }

    def normal(self) -> list[dict[str, Any]]:
        """Records with their identifiers named by order."""
        names: dict[str, str] = {}
        shown = []
        for record in self.records:
            names[record["id"]] = f"record {len(names)}"
            copy = {**record, "id": names[record["id"]]}
            if "request" in copy:
                copy["request"] = names.get(copy["request"], copy["request"])
            shown.append(copy)
        return shown


def description(*columns: int) -> bytes:
    fields = b"".join(COLUMNS[n] + b"\0" + struct.pack("!IhIhih", 16400, n, 25, -1, -1, 0) for n in columns)
    return m.message(b"T", struct.pack("!h", len(columns)) + fields)


values = st.one_of(
    st.none(),
    st.binary(max_size=40),
    st.sampled_from([b"x" * 31, b"y" * 32, b"z" * 255, b"w" * 256, "é".encode()]),
)
statuses = st.sampled_from([b"I", b"T", b"E"])


@st.composite
def steps(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """One statement as a client sends it, and the server's answer."""
    kind = draw(
        st.sampled_from(["query", "query", "extended", "prepared", "named", "undescribed", "fails", "plain"])
    )
    number = draw(st.integers(0, 10**9))
    columns = draw(st.sampled_from([(1,), (1, 2), (2, 3), (3,)]))
    rows = b"".join(m.row([draw(values) for _ in columns]) for _ in range(draw(st.integers(0, 3))))
    ready = m.message(b"Z", draw(statuses))
    tag = m.message(b"C", draw(st.sampled_from([b"SELECT 1\0", b"INSERT 0 1\0", b"\xff\0"])))
    answer = description(*columns) + rows + tag + ready
    if kind == "plain":
        return m.query(b"UPDATE people SET name = 'n%d' WHERE id = %d" % (number, number)), tag + ready
    if kind == "query":
        text = draw(
            st.sampled_from(
                [
                    b"SELECT a FROM people WHERE id = %d",
                    b"SELECT 'it''s %d'",
                    b"SELECT 1.5, %d",
                    b"DROP TABLE t%d",
                ]
            )
        )
        return m.query(text % number), answer
    if kind == "fails":
        failure = m.fields(b"E", {"S": "ERROR", "V": "ERROR", "C": "22012", "M": "division by zero"})
        return m.query(b"SELECT %d / 0" % number), failure + ready
    formats = draw(st.sampled_from([(), (0,), (1,)]))
    parameters = [draw(values) for _ in range(draw(st.integers(0, 3)))]
    name = b"p1" if kind in ("named", "undescribed") else b""
    body = (
        b"\0"
        + name
        + b"\0"
        + struct.pack(f"!h{len(formats)}h", len(formats), *formats)
        + struct.pack("!h", len(parameters))
    )
    for value in parameters:
        body += struct.pack("!i", -1) if value is None else struct.pack("!i", len(value)) + value
    bind = m.message(b"B", body + struct.pack("!hh", 1, draw(st.sampled_from([0, 1]))))
    described = kind != "undescribed"
    tail = (m.describe_portal(b"") if described else b"") + m.message(b"E", b"\0\0\0\0\0") + m.SYNC
    parse = m.parse(b"", b"SELECT name FROM people WHERE id = $1") if kind == "extended" else b""
    acknowledged = (m.message(b"1", b"") if parse else b"") + m.message(b"2", b"")
    if not described:
        answer = tag + ready
    return parse + bind + tail, acknowledged + answer


@given(
    st.lists(steps(), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 400)), max_size=3),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_short_way_equals_long_way(
    script: list[tuple[bytes, bytes]], cuts: list[tuple[int, int]], pipelined: bool
) -> None:
    named = (
        m.parse(b"p1", b"SELECT name FROM people WHERE id = $1") + m.SYNC,
        m.message(b"1", b"") + m.message(b"Z", b"I"),
    )
    chunks: list[tuple[Side, bytes]] = [(Side.CLIENT, named[0]), (Side.SERVER, named[1])]
    if pipelined:
        chunks += [(Side.CLIENT, request) for request, _ in script] + [
            (Side.SERVER, answer) for _, answer in script
        ]
    else:
        for request, answer in script:
            chunks += [(Side.CLIENT, request), (Side.SERVER, answer)]
    for index, at in cuts:
        if index < len(chunks) and at < len(chunks[index][1]):
            side, data = chunks[index]
            chunks[index : index + 1] = [(side, data[:at]), (side, data[at:])]
    short, long = Run(make_session(lane=True)), Run(make_session(lane=False))
    for side, data in chunks:
        short.feed(side, data)
        long.feed(side, data)
    for run in (short, long):
        if not run.closed:
            run._note(run.session.eof(Side.CLIENT, run.now))
    assert short.shown() == long.shown()
    assert short.normal() == long.normal()
    assert long.encoded == 0


def test_a_driver_s_ordinary_statements_take_the_short_way() -> None:
    """Else the comparison above compares nothing."""
    run = Run(make_session(lane=True))
    for number in range(20):
        run.feed(Side.CLIENT, m.query(b"SELECT name FROM people WHERE id = %d" % number))
        run.feed(
            Side.SERVER,
            description(2) + m.row([b"n"]) + m.message(b"C", b"SELECT 1\0") + m.message(b"Z", b"I"),
        )
    assert run.encoded >= 2 * 17


@given(st.binary(max_size=200), st.integers(0, 300), st.booleans())
@settings(max_examples=200, deadline=None)
def test_mutated_chunks_never_harm(noise: bytes, at: int, to_client: bool) -> None:
    """Bytes overwritten anywhere: both ways end alike, in a protocol error or not at all."""
    run, other = Run(make_session(lane=True)), Run(make_session(lane=False))
    request = m.query(b"SELECT name FROM people WHERE id = 1")
    answer = description(2) + m.row([b"n"]) + m.message(b"C", b"SELECT 1\0") + m.message(b"Z", b"I")
    for number in range(4):
        for one in (run, other):
            one.feed(Side.CLIENT, m.query(b"SELECT name FROM people WHERE id = %d" % number))
            one.feed(Side.SERVER, answer)
    bad = answer if to_client else request
    bad = (bad[:at] + noise + bad[at + len(noise) :])[: len(bad)]
    for one in (run, other):
        if to_client:
            one.feed(Side.CLIENT, request)
            one.feed(Side.SERVER, bad)
        else:
            one.feed(Side.CLIENT, bad)
    assert run.shown() == other.shown()
    assert run.normal() == other.normal()
