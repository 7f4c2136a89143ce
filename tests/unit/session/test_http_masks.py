"""Masks on responses: exact where they apply, and what they cannot understand is never passed."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest

from sidecar.session.commands import SessionLimits
from tests.support.http_play import Play, S

GET = b"GET /v1/customers HTTP/1.1\r\nHost: api.internal\r\n\r\n"
SSN = "123-45-6789"
POLICY = """\
version: 1
rules:
  - name: pii
    when: {protocol: http}
    mask: {json: {"$.customers[*].ssn": redact, "$..pin": null, "$.list[1]": {keep_last: 2}}, headers: {set-cookie: redact, x-gone: null}}
"""
DETECT = "version: 1\nrules: [{name: d, when: {protocol: http}, mask: {detect: {us_ssn: redact, credit_card: redact}}}]\n"


def response(body: bytes, *headers: bytes, status: bytes = b"200 OK", chunked: bool = False) -> bytes:
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    wire = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    return b"\r\n".join([b"HTTP/1.1 " + status, *headers, framing, b"", wire])


JSON = b"Content-Type: application/json"


def answered(body: bytes, *headers: bytes, policy: str = POLICY, **more: object) -> Play:
    return Play(policy).client(GET).server(response(body, *headers, **more))  # type: ignore[arg-type]


def body_of(play: Play) -> bytes:
    return play.to_client.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("chunked", [False, True])
def test_only_the_masked_values_change(chunked: bool) -> None:
    body = (
        b'{ "customers" : [ {"id": 12345678901234567890123, "ssn":"123-45-6789", "x": 1e400, "y": 1.10, "z": -0.0}, '
        b'{"s\\u0073n": "\\u0031", "ssn": 5, "ssn": ["a", {"b": "c"}], "ssn": null} ],\n "n\\u00e4me": "\\/", "n\\u00e4me": 2,'
        b' "deep": [{"pin": true, "x": {"pin": "1234"}}], "list": ["abcd", "abcd", 3] }\n'
    )  # fmt: skip
    expected = (
        b'{ "customers" : [ {"id": 12345678901234567890123, "ssn":"[redacted]", "x": 1e400, "y": 1.10, "z": -0.0}, '
        b'{"s\\u0073n": "[redacted]", "ssn": null, "ssn": ["[redacted]", {"b": "[redacted]"}], "ssn": null} ],\n'
        b' "n\\u00e4me": "\\/", "n\\u00e4me": 2,'
        b' "deep": [{"pin": null, "x": {"pin": null}}], "list": ["abcd", "**cd", 3] }\n'
    )  # fmt: skip
    play = answered(body, JSON, b'ETag: "1"', chunked=chunked)
    head, _, got = play.to_client.partition(b"\r\n\r\n")
    assert got == expected
    assert b"Content-Length: %d" % len(expected) in head
    assert b"chunked" not in head
    assert b"ETag" not in head
    record = play.of_kind("response")[0].response
    assert record is not None
    assert record.body == expected.decode()


def test_a_response_without_masked_values_stays_as_it_was() -> None:
    body = b'{"customers": [], "n": 1e5}'
    assert body_of(answered(body, JSON)) == body


@pytest.mark.parametrize(
    "content_type", [(), (b"Content-Type: text/plain",), (b"Content-Type: image/png",), (b"Content-Type: application/octet-stream",)]
)  # fmt: skip
def test_the_content_type_is_not_believed(content_type: tuple[bytes, ...]) -> None:
    body = b'{"customers": [{"ssn": "123-45-6789"}]}'
    play = answered(body, *content_type)
    assert json.loads(body_of(play)) == {"customers": [{"ssn": "[redacted]"}]}


LEAKS = {
    "no JSON": response(b"<p>123-45-6789</p>", b"Content-Type: text/html"),
    "cut": response(b'{"customers": [{"ssn": "123-45-6789"', JSON),
    "something after it": response(b'{"customers": []}{"customers": [{"ssn": "123-45-6789"}]}', JSON),
    "UTF-16": response('{"customers": [{"ssn": "123-45-6789"}]}'.encode("utf-16"), JSON),
    "NaN": response(b'{"customers": [{"ssn": "123-45-6789", "x": NaN}]}', JSON),
    "nested deeply": response(b'{"pin":' * 5000 + b'"123-45-6789"' + b"}" * 5000, JSON),
    "brotli": response(b"\x0b\x02\x80123-45-6789\x03", JSON, b"Content-Encoding: br"),
    "two codings": response(b"123-45-6789", JSON, b"Content-Encoding: gzip", b"Content-Encoding: gzip"),
    "not what its coding says": response(b'{"customers": [{"ssn": "123-45-6789"}]}', JSON, b"Content-Encoding: gzip"),
    "a part": response(b'"123-45-6789"', JSON, b"Content-Range: bytes 9-21/99", status=b"206 Partial Content"),
    "parts": response(b"--x\r\n123-45-6789", b"Content-Type: multipart/byteranges; boundary=x", status=b"206 P"),
    "events": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 123-45-6789\n\n",
    "an upgrade": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n123-45-6789",
}  # fmt: skip


@pytest.mark.parametrize("name", LEAKS)
def test_what_cannot_be_understood_is_denied(name: str) -> None:
    play = Play(POLICY).client(GET).server(LEAKS[name]).do("eof", S)
    assert SSN.encode() not in play.to_client
    assert play.to_client.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    problem = json.loads(body_of(play))
    assert problem["rule"] == "pii"
    assert "cannot be masked" in problem["detail"]
    record = play.of_kind("response")[0].response
    assert record is not None
    assert record.error is not None
    assert record.error["message"].startswith("not passed on: ")
    assert SSN not in repr(play.records)


@pytest.mark.parametrize("status", [b"404 Not Found", b"302 Found", b"500 Oops"])
def test_an_error_of_the_server_keeps_its_status(status: bytes) -> None:
    play = answered(b"<p>123-45-6789</p>", b"Content-Type: text/html", b"Location: /x", status=status)
    head, _, body = play.to_client.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status)
    assert b"Location: /x" in head
    assert b"Content-Type: application/problem+json" in head
    assert json.loads(body)["rule"] == "pii"
    assert play.closed is None
    assert play.client(GET).server(response(b"{}", JSON)).to_client.endswith(b"{}")


def test_a_refused_body_that_was_whole_keeps_the_connection() -> None:
    play = Play(POLICY).client(GET).server(LEAKS["no JSON"]).client(GET).server(response(b"{}", JSON))
    assert play.closed is None
    assert play.to_client.endswith(b"{}")


BODY = b'{"customers": [{"ssn": "123-45-6789"}]}'
MASKED = b'{"customers": [{"ssn": "[redacted]"}]}'


@pytest.mark.parametrize(
    ("coding", "encoded"),
    [
        (b"gzip", gzip.compress(BODY)),
        (b"GZIP", gzip.compress(BODY[:9]) + gzip.compress(BODY[9:])),
        (b"x-gzip", gzip.compress(BODY)),
        (b"deflate", zlib.compress(BODY)),
    ],
)
def test_compressed_bodies_are_read(coding: bytes, encoded: bytes) -> None:
    play = answered(encoded, JSON, b"Content-Encoding: " + coding)
    assert body_of(play) == MASKED
    assert b"Encoding" not in play.to_client


def test_compressed_bodies_are_bounded_and_whole() -> None:
    limits = SessionLimits(masked_body_max_bytes=1000)
    for encoded in (gzip.compress(b" " * 2000 + BODY), gzip.compress(BODY)[:-9]):
        play = (
            Play(POLICY, limits=limits).client(GET).server(response(encoded, JSON, b"Content-Encoding: gzip"))
        )
        assert play.to_client.startswith(b"HTTP/1.1 403 ")


def test_bodies_past_the_limit_are_denied() -> None:
    limits = SessionLimits(masked_body_max_bytes=1000)
    for chunked in (False, True):
        play = Play(POLICY, limits=limits).client(GET)
        play.server(response(BODY + b" " * 2000, JSON, chunked=chunked)[:-900])
        assert play.to_client.startswith(b"HTTP/1.1 403 ")
        assert play.closed == "denied"
        assert SSN.encode() not in play.to_client


def test_requests_ask_for_whole_bodies_in_plain() -> None:
    request = GET[:-2] + b"Accept-Encoding: gzip, br\r\nRange: bytes=9-21\r\nIf-Range: x\r\n\r\n"
    play = Play(POLICY).client(request)
    assert play.to_server == GET[:-2] + b"Accept-Encoding: identity\r\n\r\n"


def test_head_and_304_pass() -> None:
    not_modified = b'HTTP/1.1 304 Not Modified\r\nETag: "1"\r\n\r\n'
    assert Play(POLICY).client(GET).server(not_modified).to_client == not_modified
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    assert Play(POLICY).client(GET.replace(b"GET", b"HEAD")).server(head).to_client == head


def test_an_answer_cut_short_says_so() -> None:
    play = Play(POLICY).client(GET).server(response(BODY, JSON)[:-5]).do("eof", S)
    assert play.to_client.startswith(b"HTTP/1.1 503 ")
    assert SSN.encode() not in play.to_client


def test_headers_are_masked_everywhere() -> None:
    play = Play(POLICY).client(GET)
    play.server(b"HTTP/1.1 103 Early Hints\r\nSet-Cookie: secret\r\nLink: a\r\n\r\n")
    play.server(response(b"{}", b"Set-Cookie: secret", b"SET-COOKIE: secret", b"X-Gone: secret", JSON))
    assert b"secret" not in play.to_client
    assert play.to_client.count(b"[redacted]") == 3
    only_headers = "version: 1\nrules: [{name: h, when: {protocol: http}, mask: {headers: {x-t: redact}}}]\n"
    play = Play(only_headers).client(GET)
    play.server(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-T: secret\r\nY: 1\r\n\r\n")
    assert play.to_client.endswith(b"\r\n\r\n0\r\nX-T: [redacted]\r\nY: 1\r\n\r\n")


def test_upgrades_and_tunnels_under_a_mask_are_denied() -> None:
    upgrade = GET[:-2] + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    play = Play(POLICY).client(upgrade)
    play.server(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n123-45-6789")
    assert play.to_client.startswith(b"HTTP/1.1 403 ")
    assert SSN.encode() not in play.to_client
    play = (
        Play(POLICY)
        .client(b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n")
        .server(b"HTTP/1.1 200 OK\r\n\r\n123-45-6789")
    )
    assert SSN.encode() not in play.to_client


def test_lines_of_json() -> None:
    body = b'{"customers": [{"ssn": "1"}]}\n\n{"pin": 1}\n'
    play = answered(body, b"Content-Type: application/x-ndjson")
    assert body_of(play) == b'{"customers": [{"ssn": "[redacted]"}]}\n\n{"pin": null}\n'


def test_detectors_look_into_json_and_text() -> None:
    body = (
        b'{"a": "x \\u0031\\u0032\\u0033-45-6789", "card": 4111111111111111, "n": 41, "k": [["123-45-6789"]]}'
    )
    play = answered(body, JSON, policy=DETECT)
    assert body_of(play) == b'{"a": "x [redacted]", "card": null, "n": 41, "k": [["[redacted]"]]}'
    assert (
        body_of(answered(b"ssn 123-45-6789\xff", b"Content-Type: text/plain", policy=DETECT))
        == b"ssn [redacted]\xff"
    )
    assert body_of(answered(b"ssn 123-45-6789", policy=DETECT)) == b"ssn [redacted]"
    binary = b"\x89PNG 123-45-6789"
    assert body_of(answered(binary, b"Content-Type: image/png", policy=DETECT)) == binary
    denied = answered(b"123-45-6789", b"Content-Type: text/plain; charset=utf-16", policy=DETECT)
    assert denied.to_client.startswith(b"HTTP/1.1 403 ")


def test_a_trial_masks_the_record_only() -> None:
    policy = POLICY.replace("name: pii", "name: pii\n    mode: observe")
    play = answered(BODY, JSON, policy=policy)
    assert body_of(play) == BODY
    assert SSN not in repr(play.records)
    play = answered(b"<p>123-45-6789</p>", policy=policy)
    assert SSN not in repr(play.records)


def test_a_request_body_under_a_mask_is_not_kept() -> None:
    body = b'{"ssn": "123-45-6789"}'
    request = GET.replace(b"GET", b"POST")[:-2] + b"Content-Length: %d\r\n\r\n" % len(body) + body
    play = Play(POLICY).client(request).server(response(b"{}", JSON))
    assert play.to_server.endswith(body)
    assert SSN not in repr(play.records)
    operation = play.of_kind("response")[0].operation
    assert operation is not None
    assert operation.body_bytes == len(body)
