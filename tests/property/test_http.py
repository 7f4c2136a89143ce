"""HTTP however it is cut, and however it is broken: the same bytes and records, no fault, no leak."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.codecs.detect import DETECT_MAX_BYTES, detect
from sidecar.model.operation import HttpOperation
from sidecar.policy import load_policy
from sidecar.policy.json_text import mask_json_text
from sidecar.session.auto import AutoSession
from sidecar.session.commands import SessionLimits
from sidecar.session.http import HttpSession
from tests.support.http_play import ALICE, IDENTIFIED, C, Play, S, split_at

ENGINE = load_policy(
    """\
version: 1
rules:
  - {name: no-delete, when: {protocol: http, method: [DELETE]}, deny: not by a job}
  - {name: no-purge, when: {protocol: http, path: "/json", request_json: {action: purge}}, deny: never}
  - {name: writes, when: {protocol: http, method: [PUT]}, approve: {within: 60s}}
  - {name: pii, when: {protocol: http, path: "/pii/**"}, mask: {json: {"$..ssn": redact}, headers: {set-cookie: redact}}}
""",
    "policy.yaml",
)
LIMITS = SessionLimits(held_max_bytes=2000, head_max_bytes=4096, masked_body_max_bytes=10_000)
SSN = b"123-45-6789"
PLAN = ENGINE.evaluate(
    HttpOperation("GET", None, "/pii/a", "/pii/a", (), ()), Play(ENGINE).context.facts
).masks


def request(line: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([line + b" HTTP/1.1", b"Host: api.internal", *headers, b"", body])


def response(status: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([b"HTTP/1.1 " + status, *headers, b"", body])


CHUNKS = b'5;x="a"\r\nhello\r\n1\r\n!\r\n0\r\nX-Sum: 1\r\nx_workload_identity: forged\r\n\r\n'
PII = b'{"a": [{"ssn": "123-45-6789", "n": 1e400}], "ssn": "123-45-6789"}'
PACKED = gzip.compress(PII, mtime=0)


@dataclass(frozen=True)
class Transcript:
    client: bytes
    server: bytes
    client_ends: bool = False
    server_ends: bool = False


TRANSCRIPTS = {
    "keep-alive": Transcript(
        request(b"GET /a", b"X-Workload-Identity: forged") + request(b"POST /b", b"Content-Length: 3", body=b"abc"),
        response(b"200 OK", b"Content-Length: 2", body=b"hi") + response(b"204 No Content"),
    ),
    "chunks both ways": Transcript(
        request(b"POST /a", b"Transfer-Encoding: chunked", body=CHUNKS) + request(b"GET /b"),
        response(b"100 Continue") + response(b"200 OK", b"Transfer-Encoding: chunked", body=CHUNKS) + response(b"304 No"),
    ),
    "a denial between": Transcript(
        request(b"GET /a") + request(b"DELETE /b", b"Content-Length: 4", body=b"gone") + request(b"HEAD /c"),
        response(b"200 OK", b"Content-Length: 2", body=b"hi") + response(b"200 OK", b"Content-Length: 9"),
    ),
    "masked": Transcript(
        request(b"GET /pii/a") + request(b"GET /pii/b", b"Range: bytes=1-2"),
        response(b"200 OK", b"Content-Length: %d" % len(PII), b"Set-Cookie: a=b", body=PII)
        + response(b"200 OK", b"Transfer-Encoding: chunked", b"Content-Encoding: gzip",
                   body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(PACKED), PACKED)),
    ),
    "looked at": Transcript(
        request(b"POST /json", b"Content-Length: 19", body=b'{"action": "purge"}')
        + request(b"POST /json", b"Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\n\r\n"),
        response(b"201 Created", b"Content-Length: 0"),
    ),
    "held": Transcript(request(b"PUT /a", b"Content-Length: 3", body=b"abc") + request(b"GET /b"), b""),
    "upgrade": Transcript(
        request(b"GET /ws", b"Connection: upgrade", b"Upgrade: websocket") + b"\x81\x80\0\0",
        response(b"101 Switching Protocols", b"Upgrade: websocket", body=b"\x81\0DELETE / HTTP/1.1\r\n\r\n"),
    ),
    "until the end": Transcript(
        request(b"GET /a", b"Connection: close"), response(b"200 OK", body=b"all of it"), True, True
    ),
    "http/1.0": Transcript(b"POST /a HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc", response(b"200 OK", body=b"x"), False, True),
    "bad after good": Transcript(
        request(b"GET /a") + request(b"GET /b", b"Content-Length: 1", b"Transfer-Encoding: chunked"),
        response(b"200 OK", b"Content-Length: 2", body=b"hi"),
    ),
    "empty lines": Transcript(b"\r\n\r\n" + request(b"GET /a") + b"\r\n", response(b"200 OK", b"Content-Length: 0")),
}  # fmt: skip


def played(
    transcript: Transcript, client: list[bytes], server: list[bytes], make: type = HttpSession
) -> Play:
    play = Play(ENGINE, make=make, principal=ALICE, attachment=IDENTIFIED, limits=LIMITS)
    play.client(*client)
    if transcript.client_ends:
        play.do("eof", C)
    play.server(*server)
    if transcript.server_ends:
        play.do("eof", S)
    return play


def outcome(play: Play) -> object:
    holds = [(hold.summary, hold.parameters, hold.digest) for hold in play.holds]
    return (play.to_server, play.to_client, play.facts_of(), holds, play.half_closed, play.closed)


@pytest.mark.parametrize("make", [HttpSession, AutoSession])
@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_byte_by_byte(name: str, make: type) -> None:
    transcript = TRANSCRIPTS[name]
    whole = outcome(played(transcript, [transcript.client], [transcript.server], make))
    client = [bytes([byte]) for byte in transcript.client]
    server = [bytes([byte]) for byte in transcript.server]
    assert outcome(played(transcript, client, server, make)) == whole


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(TRANSCRIPTS)),
    st.lists(st.integers(0, 1000), max_size=6),
    st.lists(st.integers(0, 1000), max_size=6),
)
def test_any_split_gives_the_same(name: str, client_cuts: list[int], server_cuts: list[int]) -> None:
    transcript = TRANSCRIPTS[name]
    whole = outcome(played(transcript, [transcript.client], [transcript.server]))
    client, server = split_at(transcript.client, client_cuts), split_at(transcript.server, server_cuts)
    assert outcome(played(transcript, client, server)) == whole


EDITS = st.lists(
    st.tuples(
        st.integers(0, 1000),
        st.integers(0, 3),
        st.one_of(
            st.binary(max_size=4),
            st.sampled_from([b"\r\n", b"\n", b"\r", b" ", b"\t", b"0", b"\0", b":", b"chunked", b"\r\n\r\n", b"\xff"]),
        ),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for place, drop, put in edits:
        at = place % (len(data) + 1)
        data = data[:at] + put + data[at + drop :]
    return data


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(TRANSCRIPTS)), EDITS, EDITS, st.sampled_from([HttpSession, AutoSession]))
def test_broken_messages_end_in_order(
    name: str, client: list[tuple[int, int, bytes]], server: list[tuple[int, int, bytes]], make: type
) -> None:
    transcript = TRANSCRIPTS[name]
    play = played(transcript, [edited(transcript.client, client)], [edited(transcript.server, server)], make)
    assert not _has_reserved(play) or play.of_kind("gap")
    play.do("eof", C).do("eof", S)
    assert play.closed is not None
    assert play.records[-1].kind == "close"
    if play.closed == "protocol_error":
        assert play.records[-1].detail


def _has_reserved(play: Play) -> bool:
    """Whether a forged header reached the server under the reserved name (bodies that say so do not count)."""
    lines = play.to_server.lower().replace(b"_", b"-").split(b"\r\n")
    return any(line.startswith(b"x-workload-identity:") and b"forged" in line for line in lines)


HEAD_OF_PII = {
    "length": response(b"200 OK", b"Content-Type: application/json", b"Content-Length: %d" % len(PII)),
    "chunks": response(b"200 OK", b"Transfer-Encoding: chunked", body=b"%x\r\n" % len(PII)),
    "until the end": response(b"200 OK", b"Content-Encoding: identity"),
}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(HEAD_OF_PII)), EDITS, st.lists(st.integers(0, 400), max_size=3))
def test_a_head_broken_in_any_way_leaks_no_masked_value(
    name: str, edits: list[tuple[int, int, bytes]], cuts: list[int]
) -> None:
    data = edited(HEAD_OF_PII[name], edits) + PII + (b"\r\n0\r\n\r\n" if name == "chunks" else b"")
    play = (
        Play(ENGINE, limits=LIMITS).client(request(b"GET /pii/a")).server(*split_at(data, cuts)).do("eof", S)
    )
    assert SSN not in play.to_client
    assert SSN.decode() not in repr(play.records)


@given(st.binary(min_size=1, max_size=200))
def test_detection_decides_by_its_bound_and_stays(data: bytes) -> None:
    whole = detect(data)
    assert {detect(data[:size]) for size in range(1, len(data))} <= {None, whole}
    assert detect((data * DETECT_MAX_BYTES)[:DETECT_MAX_BYTES]) is not None


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from(["secret", "x"]), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["ssn", "a", "b", '"', "ä"]), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(JSON, st.sampled_from([None, 1]), st.booleans())
def test_masked_text_is_the_masked_document(document: object, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode()
    assert json.loads(PLAN.mask_json(text)) == masked(document)


def masked(node: object, *, hide: bool = False) -> object:
    if isinstance(node, dict):
        return {key: masked(value, hide=hide or key == "ssn") for key, value in node.items()}
    if isinstance(node, list):
        return [masked(value, hide=hide) for value in node]
    return ("[redacted]" if isinstance(node, str) else None) if hide else node


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_garbage_is_no_json(data: bytes) -> None:
    try:
        assert mask_json_text(data, (), lambda text: text) is data
    except ValueError:
        return
