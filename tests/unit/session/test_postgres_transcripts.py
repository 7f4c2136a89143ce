"""Whole, byte by byte, split anywhere: the same bytes to both sides, the same records. Transcripts of everything the session does."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.codecs.postgres import messages as m
from sidecar.model.principal import Attachment
from sidecar.policy import load_policy
from sidecar.session.commands import SessionLimits
from tests.support import postgres_wire as w
from tests.support.playbook import (
    CLIENT,
    GSSENC_REQUEST,
    SERVER,
    SSL_REQUEST,
    Options,
    Run,
    Transcript,
    byte_by_byte,
    greeting,
    same,
)

POLICY = """\
version: 1
default: allow
rules:
  - {name: no-drops, when: {protocol: postgres, statement: [DROP]}, deny: not here}
  - {name: deletes, when: {statement: [DELETE]}, approve: {within: 5m}}
"""
MASKS = (
    POLICY
    + """\
  - name: pii
    when: {protocol: postgres}
    mask: {columns: {"*.ssn": redact}, detect: {us_ssn: redact}}
"""
)
ENGINES = {
    "plain": load_policy(POLICY, "policy.yaml"),
    "masks": load_policy(MASKS, "policy.yaml"),
}
CATALOG = (
    m.message(b"1", b"") + m.message(b"2", b"")
    + b"".join(m.row([b"c", b"16400", b"public", b"people", str(n).encode(), name]) for n, name in enumerate((b"id", b"ssn"), 1))
    + w.complete("SELECT 2") + m.message(b"3", b"") * 2 + w.ready()
)  # fmt: skip
ONE = w.description(w.column("id", table=16400, attnum=1))
SSN = w.description(w.column("id", table=16400, attnum=1), w.column("s", table=16400, attnum=2))
FAILED = m.fields(b"E", {"S": "ERROR", "V": "ERROR", "C": "22012", "M": "division by zero"})
REJECTED = m.fields(
    b"E", {"S": "ERROR", "V": "ERROR", "C": "42601", "M": 'syntax error at or near "sidecar"'}
)
EXTENDED = w.parse("SELECT id FROM people WHERE id = $1") + w.bind(b"1") + w.describe() + w.execute()
COPY_IN = m.message(b"G", b"\0\0\x01\0\0")
COPY_OUT = m.message(b"H", b"\0\0\x01\0\0")

TRANSCRIPTS: dict[str, Transcript] = {
    "query": [(CLIENT, w.query("SELECT id FROM people")), (SERVER, ONE + w.row(b"1") + w.row(None) + w.complete("SELECT 2") + w.ready())],
    "long rows": [
        (CLIENT, w.query("SELECT id FROM people")),
        (SERVER, ONE + w.row(b"x" * 700) + w.row(b"y" * 300) + w.row(b"z" * 5) + w.complete("SELECT 3") + w.ready()),
    ],
    "masked": [(CLIENT, w.query("SELECT id, ssn FROM people")), (SERVER, SSN + w.row(b"1", b"123-45-6789") + w.complete("SELECT 1") + w.ready())],
    "several": [
        (CLIENT, w.query("SELECT 1; SELECT 2; DROP TABLE t")),
        (CLIENT, w.query("SELECT id FROM people; SELECT 1/0")),
        (SERVER, ONE + w.row(b"1") + w.complete("SELECT 1") + FAILED + w.ready()),
    ],
    "extended": [
        (CLIENT, EXTENDED + w.SYNC),
        (SERVER, m.message(b"1", b"") + m.message(b"2", b"") + ONE + w.row(b"1") + w.complete("SELECT 1") + w.ready()),
    ],
    "a pipeline with an error in the middle": [
        (CLIENT, EXTENDED + w.parse("SELECT 1/0") + w.bind() + w.execute() + EXTENDED + w.SYNC + w.query("SELECT id FROM people")),
        (SERVER, m.message(b"1", b"") + m.message(b"2", b"") + ONE + w.row(b"1") + w.complete("SELECT 1") + m.message(b"1", b"")),
        (SERVER, m.message(b"2", b"") + FAILED + w.ready() + ONE + w.complete("SELECT 0") + w.ready()),
    ],
    "portals, partly fetched": [
        (CLIENT, w.query("BEGIN")), (SERVER, w.complete("BEGIN") + w.ready("T")),
        (CLIENT, w.parse("SELECT id FROM people", "s") + w.bind(statement="s", portal="p") + w.describe("s", "S") + w.execute("p", 1) + w.FLUSH),
        (SERVER, m.message(b"1", b"") + m.message(b"2", b"") + m.message(b"t", b"\0\0") + ONE + w.row(b"1") + m.message(b"s", b"")),
        (CLIENT, w.execute("p", 1) + w.close("p", "P") + w.close("s") + w.SYNC),
        (SERVER, w.row(b"2") + w.complete("SELECT 1") + m.message(b"3", b"") * 2 + w.ready("T")),
    ],
    "denied": [
        (CLIENT, w.query("DROP TABLE people")),
        (CLIENT, w.query("BEGIN")), (SERVER, w.complete("BEGIN") + w.ready("T")),
        (CLIENT, w.query("DROP TABLE people")), (SERVER, REJECTED + w.ready("E")),
        (CLIENT, w.query("ROLLBACK")), (SERVER, w.complete("ROLLBACK") + w.ready()),
        (CLIENT, w.parse("DROP TABLE people") + w.bind(b"secret") + w.execute() + w.SYNC), (SERVER, REJECTED + w.ready()),
    ],
    "a syntax error": [
        (CLIENT, w.query("SELEC 1")), (SERVER, m.message(b"3", b"") + REJECTED + w.ready()),
        (CLIENT, w.parse("SELEC 1") + w.bind() + w.execute() + w.SYNC), (SERVER, m.message(b"3", b"") + REJECTED + w.ready()),
        (CLIENT, w.query("SELEC 1")), (SERVER, m.message(b"3", b"") + m.message(b"1", b"") + REJECTED + w.ready()),
    ],
    "held and approved": [
        (CLIENT, w.query("DELETE FROM people") + w.query("SELECT id FROM people")), ("decided", ("approved", "alice")),
        (SERVER, w.complete("DELETE 3") + w.ready() + ONE + w.row(b"1") + w.complete("SELECT 1") + w.ready()),
    ],
    "held and rejected": [
        (CLIENT, EXTENDED + w.parse("DELETE FROM people") + w.bind() + w.execute() + w.SYNC + w.query("SELECT id FROM people")),
        (SERVER, m.message(b"1", b"") + m.message(b"2", b"") + ONE + w.row(b"1") + w.complete("SELECT 1") + m.message(b"1", b"") + m.message(b"2", b"")),
        ("decided", ("rejected", "bob")),
        (SERVER, REJECTED + w.ready() + ONE + w.complete("SELECT 0") + w.ready()),
    ],
    "held and left": [(CLIENT, w.query("DELETE FROM people")), ("eof", CLIENT)],
    "copy in": [
        (CLIENT, w.query("COPY people FROM STDIN")), (SERVER, COPY_IN),
        (CLIENT, m.message(b"d", b"1\tx\n") + m.message(b"d", b"2\ty\n" * 60) + m.message(b"c", b"") + w.query("SELECT id FROM people")),
        (SERVER, w.complete("COPY 2") + w.ready() + ONE + w.complete("SELECT 0") + w.ready()),
    ],
    "copy in, given up": [
        (CLIENT, w.query("COPY people FROM STDIN")), (SERVER, COPY_IN),
        (CLIENT, m.message(b"d", b"1\tx\n") + m.message(b"f", b"no\0")), (SERVER, FAILED + w.ready()),
    ],
    "copy in, extended": [
        (CLIENT, w.parse("COPY people FROM STDIN") + w.bind() + w.execute() + w.SYNC),
        (SERVER, m.message(b"1", b"") + m.message(b"2", b"") + COPY_IN),
        (CLIENT, m.message(b"d", b"1\tx\n") + m.message(b"c", b"") + w.SYNC), (SERVER, w.complete("COPY 1") + w.ready()),
    ],
    "copy out": [
        (CLIENT, w.query("COPY (SELECT id FROM people) TO STDOUT")),
        (SERVER, COPY_OUT + m.message(b"d", b"1\n") + m.message(b"d", b"123-45-6789\n") + m.message(b"c", b"") + w.complete("COPY 2") + w.ready()),
    ],
    "unasked for": [
        (SERVER, m.message(b"A", b"\0\0\0\x05chan\0hello\0") + m.notice("by the way") + m.message(b"S", b"TimeZone\0UTC\0")),
        (CLIENT, w.query("SELECT id FROM people")),
        (SERVER, ONE + m.notice("meanwhile") + w.complete("SELECT 0") + w.ready()),
    ],
    "nothing to say": [(CLIENT, w.query("")), (SERVER, m.message(b"I", b"") + w.ready()), (CLIENT, w.TERMINATE), ("eof", CLIENT)],
    "a message nobody knows": [(CLIENT, m.message(b"y", b"whatever") + w.query("SELECT id FROM people")), (SERVER, m.message(b"v", b"whatever") + ONE + w.complete("SELECT 0") + w.ready())],
    "a function call": [(CLIENT, m.message(b"F", b"\0\0\x03\xe8" + b"\0\0" + b"\0\0" + b"\0\0")), (SERVER, m.message(b"V", b"\0\0\0\x011") + w.ready())],
    "an encoding": [
        (CLIENT, w.query("SET client_encoding = latin1")), (SERVER, m.message(b"S", b"client_encoding\0LATIN1\0") + w.complete("SET") + w.ready()),
        (CLIENT, w.query(b"SELECT '\xe9'")), (SERVER, ONE + w.row(b"\xe9") + w.complete("SELECT 1") + w.ready()),
    ],
    "another policy": [(CLIENT, w.query("DROP TABLE people")), ("policy", load_policy("version: 1\ndefault: allow\n", "p")), (CLIENT, w.query("DROP TABLE people")), (SERVER, w.complete("DROP TABLE") + w.ready())],
    "the server goes in the middle of a row": [(CLIENT, w.query("SELECT id FROM people")), (SERVER, ONE + w.row(b"1") + w.row(b"x" * 700)[:300]), ("eof", SERVER)],
    "the client goes": [(CLIENT, w.query("SELECT id FROM people")), (SERVER, ONE + w.row(b"1")), ("eof", CLIENT)],
    "a length that lies": [(CLIENT, b"Q\0\0\0\x02")],
    "a server's length that lies": [(CLIENT, w.query("SELECT id FROM people")), (SERVER, b"T\0\0\0\x01")],
    "an answer that nothing asked for": [(SERVER, w.row(b"1"))],
}  # fmt: skip
SHORT = Options(limits=SessionLimits(response_max_rows=3, response_max_bytes=400))


PLAIN_ONLY = ("portals, partly fetched", "copy in, extended")
"""With masks in force the session asks for descriptions of its own, which these servers do not answer."""
CASES = [
    (name, policy)
    for policy in ENGINES
    for name in TRANSCRIPTS
    if policy == "plain" or name not in PLAIN_ONLY
]


def transcript(name: str, policy: str) -> Transcript:
    told = list(greeting())
    if policy == "masks":
        told.append((SERVER, CATALOG))
    return told + TRANSCRIPTS[name]


def options(lane: bool) -> Options:
    return dataclasses.replace(SHORT, lane=lane)


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_byte_by_byte(name: str, policy: str) -> None:
    told, engine = transcript(name, policy), ENGINES[policy]
    whole = Run(engine, options(lane=False)).play(told)
    assert whole.of_kind("open")
    for lane in (True, False):
        same(whole, Run(engine, options(lane)).play(told, byte_by_byte))


@pytest.mark.parametrize(("name", "policy"), CASES)
@given(st.data())
@settings(max_examples=6, deadline=None)
def test_cut_anywhere(name: str, policy: str, data: st.DataObject) -> None:
    told, engine = transcript(name, policy), ENGINES[policy]

    def cut(chunk: bytes) -> list[bytes]:
        places = sorted(data.draw(st.lists(st.integers(0, len(chunk)), max_size=4)))
        return [chunk[start:end] for start, end in zip([0, *places], [*places, len(chunk)], strict=True)]

    same(Run(engine, options(lane=False)).play(told), Run(engine, options(lane=True)).play(told, cut))


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_chunks_that_arrive_together(name: str) -> None:
    """What one side sends in two chunks may come as one."""
    joined: Transcript = []
    for event, argument in TRANSCRIPTS[name]:
        if joined and joined[-1][0] is event and isinstance(argument, bytes):
            joined[-1] = (event, joined[-1][1] + argument)
        else:
            joined.append((event, argument))
    engine = ENGINES["plain"]
    apart, together = (Run(engine, options(lane=True)).play([*greeting(), *told]) for told in (TRANSCRIPTS[name], joined))  # fmt: skip
    for side in (CLIENT, SERVER):
        assert apart.shown(side) == together.shown(side)
    assert [r["kind"] for r in apart.records] == [r["kind"] for r in together.records]


STARTS: dict[str, tuple[Options, Transcript]] = {
    "GSS, TLS, then plain": (Options(), [("connected", None), (CLIENT, GSSENC_REQUEST), (SERVER, b"N"), (CLIENT, SSL_REQUEST), *greeting()[3:]]),
    "the client is faster than the connection": (Options(), [(CLIENT, SSL_REQUEST + greeting()[3][1]), ("connected", None), (SERVER, b"N"), greeting()[4]]),
    "TLS upstream": (Options(), [*greeting(tls=b"S")[:3], ("tls", None), *greeting()[3:]]),
    "SASL over TLS": (
        Options(),
        [
            *greeting(tls=b"S")[:3], ("tls", None), greeting()[3], (SERVER, m.message(b"R", struct.pack("!i", 10) + b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0")),
            (CLIENT, m.message(b"p", b"SCRAM-SHA-256\0\0\0\0\x05n,,n=")), (SERVER, m.message(b"R", struct.pack("!i", 11) + b"r=1")),
            (CLIENT, m.message(b"p", b"c=biws")), (SERVER, m.message(b"R", struct.pack("!i", 12) + b"v=1") + greeting()[4][1]),
        ],
    ),
    "a wrong password": (Options(), [*greeting()[:4], (SERVER, m.message(b"R", b"\0\0\0\x03")), (CLIENT, m.message(b"p", b"no\0")), (SERVER, m.error("28P01", "no", severity="FATAL")), ("eof", SERVER)]),
    "cancel": (Options(), [("connected", None), (CLIENT, struct.pack("!iiii", 16, m.CANCEL_REQUEST, 5, 6)), (SERVER, b"N"), ("eof", SERVER)]),
    "cancel with a long key": (Options(), [(CLIENT, SSL_REQUEST), ("connected", None), (SERVER, b"N"), (CLIENT, struct.pack("!iii", 44, m.CANCEL_REQUEST, 5) + b"k" * 32), ("eof", CLIENT), ("eof", SERVER)]),
    "direct TLS": (Options(), [("connected", None), (CLIENT, b"\x16\x03\x01\0\x05hello"), (SERVER, b"\x16whatever"), ("eof", CLIENT), ("eof", SERVER)]),
    "TLS that the client insists on": (Options(client_wants_tls=True), [("connected", None), (CLIENT, SSL_REQUEST), (SERVER, b"S"), (CLIENT, b"\x16hello"), (SERVER, b"\x16hello"), ("eof", CLIENT), ("eof", SERVER)]),
    "a client that leaves after our N": (Options(), [("connected", None), (CLIENT, SSL_REQUEST), (SERVER, b"N"), ("eof", CLIENT)]),
    "an identity": (
        Options(attachment=Attachment(postgres_setting="workload.identity", postgres_application_name="job", reserved_setting="workload.identity")),
        [
            *greeting(), ("signed", "assertion"), (SERVER, m.message(b"1", b"") + m.message(b"2", b"") + w.row(b"x") + w.complete("SELECT 1") + m.message(b"3", b"") * 2 + w.ready()),
            (CLIENT, w.query("SET workload.identity = 'me'")), (CLIENT, w.query("RESET ALL")), (SERVER, w.complete("RESET") + w.ready()), (CLIENT, w.query("SELECT 1")),
        ],
    ),
    "no TLS where it is required": (Options(tls_mode="require"), [*greeting()[:3]]),
    "too much of a start": (Options(), [("connected", None), (CLIENT, struct.pack("!ii", 10_001, 196608))]),
    "another protocol": (Options(), [("connected", None), (CLIENT, struct.pack("!ii", 9, 131072) + b"\0")]),
    "3.2, which the server puts down": (Options(), [*greeting()[:3], (CLIENT, m.Startup(196610, ((b"user", b"u"),)).encode()), (SERVER, m.message(b"v", struct.pack("!ii", 196608, 0)) + greeting()[4][1])]),
}  # fmt: skip


@pytest.mark.parametrize("name", STARTS)
def test_every_start_byte_by_byte(name: str) -> None:
    how, told = STARTS[name]
    engine = ENGINES["plain"]
    same(Run(engine, how).play(told), Run(engine, how).play(told, byte_by_byte))


@pytest.mark.parametrize("name", STARTS)
@given(st.data())
@settings(max_examples=6, deadline=None)
def test_every_start_cut_anywhere(name: str, data: st.DataObject) -> None:
    how, told = STARTS[name]
    engine = ENGINES["plain"]

    def cut(chunk: bytes) -> list[bytes]:
        at = data.draw(st.integers(0, len(chunk)))
        return [chunk[:at], chunk[at:]]

    same(Run(engine, how).play(told), Run(engine, how).play(told, cut))
