"""Bytes that lie: a flow ends with a protocol error and a record, or goes on; nothing else is ever raised, nothing grows past its bound."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.codecs.postgres import messages as m
from sidecar.errors import ProtocolError
from sidecar.model.flow import Side
from sidecar.session.commands import SessionLimits
from tests.support import postgres_wire as w
from tests.support.playbook import CLIENT, SERVER, Options, Run, Transcript, greeting
from tests.unit.session.test_postgres_transcripts import CATALOG, ENGINES, ONE, STARTS, TRANSCRIPTS

BOUND = 20_000
LIMITS = SessionLimits(
    statement_max_bytes=BOUND, masked_row_max_bytes=BOUND, held_max_bytes=1000, response_max_bytes=400
)
ENDS = {"protocol_error", "limit"}
SCRIPTS = [(policy, [*greeting(), *([(SERVER, CATALOG)] if policy == "masks" else []), *told]) for policy in ENGINES for told in TRANSCRIPTS.values()] + [("plain", told) for _, told in STARTS.values()]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, Transcript]:
    """A transcript with bytes overwritten, inserted, dropped or repeated in some of its chunks, or with chunks out of order."""
    policy, script = draw(st.sampled_from(SCRIPTS))
    told = list(script)
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.integers(0, len(told) - 1))
        event, data = told[index]
        if not isinstance(data, bytes):
            continue
        at = draw(st.integers(0, len(data)))
        noise = draw(st.one_of(st.binary(max_size=12), st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])))  # fmt: skip
        how = draw(st.sampled_from(["overwrite", "insert", "drop", "repeat", "swap"]))
        if how == "overwrite":
            data = data[:at] + noise + data[at + len(noise) :]
        elif how == "insert":
            data = data[:at] + noise + data[at:]
        elif how == "drop":
            data = data[:at] + data[at + len(noise) + 1 :]
        elif how == "repeat":
            data = data + data
        else:
            other = draw(st.integers(0, len(told) - 1))
            told[index], told[other] = told[other], told[index]
            continue
        told[index] = (event, data)
    connected = [step for step in told if step[0] == "connected"]
    return policy, [*connected, *(step for step in told if step[0] not in ("connected", "tls", "signed", "decided"))]  # fmt: skip


def last_error(run: Run) -> dict[str, str] | None:
    """Of what the client got, where it ends with an ErrorResponse."""
    shown = bytes(run.sent[CLIENT])
    at = shown.rfind(b"SFATAL\0VFATAL\0C")
    return m.parse_fields(shown[at:-1]) if at >= 5 else None


@given(mutated(), st.booleans())
@settings(max_examples=600, deadline=None)
def test_nothing_but_a_protocol_error(case: tuple[str, Transcript], lane: bool) -> None:
    policy, told = case
    run = Run(ENGINES[policy], Options(lane=lane, limits=LIMITS)).play(told)
    assert run.biggest <= BOUND + max(len(data) for _, data in told if isinstance(data, bytes))
    if run.reason in ENDS:
        assert run.records[-1]["kind"] == "close"
        assert run.records[-1]["reason"] == run.reason
        error = last_error(run)
        if run.session._phase != "raw" and not run.session._passing_server:
            assert error is not None
            assert error["C"] in ("08P01", "54000")
            assert error["M"].startswith("sidecar: ")
    elif not run.closed:
        run.play([("eof", CLIENT)])
        assert run.closed or run.session._phase == "raw"


@given(st.sampled_from(["row", "bind", "startup", "description"]), st.binary(max_size=60))
@settings(max_examples=400, deadline=None)
def test_parsers_raise_only_protocol_errors(parser: str, body: bytes) -> None:
    parse = {
        "row": m.parse_row,
        "bind": m.parse_bind,
        "startup": m.parse_startup,
        "description": m.parse_row_description,
    }[parser]
    with contextlib.suppress(ProtocolError):
        parse(body)
    m.parse_fields(body)
    m.strip_channel_binding(body)
    m.parse_row_start(body)


# -- large messages

GIB = 1024**3
CHUNK = b"x" * (1024 * 1024)


def through(run: Run, side: Side, length: int) -> int:
    """Feeds `length` bytes in chunks, forgetting what was sent; returns how many bytes came out at the other side."""
    other = SERVER if side is CLIENT else CLIENT
    came = 0
    while length:
        part = CHUNK[: min(length, len(CHUNK))]
        run.play([(side, part)])
        came += len(run.sent[other])
        run.sent[other].clear()
        length -= len(part)
    return came


def opened(policy: str = "plain", **limits: int) -> Run:
    run = Run(ENGINES[policy], Options(limits=SessionLimits(**limits))).play(greeting())
    if policy == "masks":
        run.play([(SERVER, CATALOG)])
    run.sent[CLIENT].clear()
    run.sent[SERVER].clear()
    return run


def head(kind: bytes, body: int) -> bytes:
    return kind + (body + 4).to_bytes(4)


def test_a_row_of_one_gibibyte_streams() -> None:
    run = opened().play([(CLIENT, w.query("SELECT id FROM people")), (SERVER, ONE)])
    run.sent[CLIENT].clear()
    body = b"\0\x01" + (GIB - 100).to_bytes(4)
    run.play([(SERVER, head(b"D", GIB - 100 + 6) + body)])
    assert through(run, SERVER, GIB - 100) == GIB - 100 + 11
    assert run.biggest <= 66_000
    run.play([(SERVER, w.row(b"1") + w.complete("SELECT 2") + w.ready())])
    (response,) = run.of_kind("response")
    assert response["response"]["rows"] == 2
    assert response["response"]["bytes"] == GIB - 100 + 11 + len(w.row(b"1"))
    assert response["response"]["sample"] == [["x" * (65536 - 6)], ["1"]]


def test_copy_data_of_one_gibibyte_streams_both_ways() -> None:
    run = opened().play([(CLIENT, w.query("COPY people FROM STDIN")), (SERVER, m.message(b"G", b"\0\0\x01\0\0"))])  # fmt: skip
    run.sent[SERVER].clear()
    run.play([(CLIENT, head(b"d", GIB))])
    assert through(run, CLIENT, GIB) == GIB + 5
    run.play([(CLIENT, m.message(b"c", b"")), (SERVER, w.complete("COPY 1") + w.ready())])
    run.play([(CLIENT, w.query("COPY people TO STDOUT")), (SERVER, m.message(b"H", b"\0\0\x01\0\0"))])
    run.sent[CLIENT].clear()
    run.play([(SERVER, head(b"d", GIB // 4))])
    assert through(run, SERVER, GIB // 4) == GIB // 4 + 5
    assert run.biggest <= 5


@pytest.mark.parametrize(
    ("told", "limit"),
    [
        ([(CLIENT, head(b"Q", BOUND + 1))], "statement_max_bytes"),
        ([(CLIENT, head(b"P", BOUND + 1))], "statement_max_bytes"),
        ([(CLIENT, w.query("SELECT id, ssn FROM people")), (SERVER, ONE + head(b"D", 2 * BOUND))], "masked_row_max_bytes"),
        ([(CLIENT, w.query("SELECT id, ssn FROM people")), (SERVER, head(b"T", 65 * 1024 * 1024))], "answer_max_bytes"),
    ],
)  # fmt: skip
def test_what_has_to_be_whole_has_a_bound(told: Transcript, limit: str) -> None:
    run = opened("masks", statement_max_bytes=BOUND, masked_row_max_bytes=BOUND).play(told)
    assert run.reason == "limit"
    assert limit in run.records[-1]["detail"]
    assert (last_error(run) or {})["C"] == "54000"


def test_what_is_sent_ahead_of_the_start_has_a_bound() -> None:
    run = Run(ENGINES["plain"], Options(limits=SessionLimits(statement_max_bytes=BOUND)))
    run.play([(CLIENT, greeting()[3][1])] + [(CLIENT, w.query("SELECT 1") * 100)] * 30)
    assert run.reason == "limit"
    assert run.biggest < BOUND + 2000


def test_a_client_that_is_held_is_read_no_further_than_its_bound() -> None:
    run = opened(held_max_bytes=1000).play([(CLIENT, w.query("DELETE FROM people"))])
    run.play([(CLIENT, w.query("SELECT 1") * 100)])
    assert run.paused
