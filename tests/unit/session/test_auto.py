"""What first bytes are, however slowly they come, and that waiting is no way around the policy."""

from __future__ import annotations

import functools
import ssl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.codecs.detect import detect
from sidecar.codecs.tls_hello import server_name
from sidecar.session.auto import AutoSession
from tests.support.http_play import C, Play, S

GET = b"GET /a HTTP/1.1\r\nHost: api.internal\r\n\r\n"
DELETE = GET.replace(b"GET", b"DELETE")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
POLICY = (
    "version: 1\nrules: [{name: no-delete, when: {protocol: http, method: [DELETE]}, deny: not by a job}]\n"
)
SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"
GREETING = b"J\0\0\0\x0a8.0.36\0"


def auto(policy: str = POLICY, **more: object) -> Play:
    return Play(policy, make=AutoSession, protocol="auto", **more)  # type: ignore[arg-type]


def protocol_of(play: Play) -> str:
    (opened,) = play.of_kind("open")
    return opened.target.protocol


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (GET, "http"),
        (b"GET /", "http"),
        (b"delete /a", "http"),
        (b"GET http://a/", "http"),
        (b"OPTIONS * HTTP/1.1", "http"),
        (b"\r\n\n\r\nDELETE /a HTTP/1.1\r\n", "http"),
        (b" \tDELETE\t/a HTTP/1.1\r\n", "http"),
        (b"FROBNICATE /a HTTP/1.1\r\n", "http"),
        (b"FROBNICATE /a http/1.1\r\n", "http"),
        (b"X a HTTP/", "http"),
        (b"\r\n" * 3000, "http"),
        (b"FROBNICATE /" + b"a" * 5000, "http"),
        (b"GET" + b" " * 5000, "http"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "http2"),
        (SSL_REQUEST, "postgres"),
        (b"\0\0\0\x50\0\x03\0\0user", "postgres"),
        (b"\0\0\0\x50\0\x09\0\0user", "opaque"),
        (b"\x16\x03\x01", "tls"),
        (b"\x16\x05\x01", "opaque"),
        (b"EHLO a\r\n", "opaque"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "opaque"),
        (b"*1\r\n$4\r\nPING\r\n", "opaque"),
        (b"\x10\x0e\0\x04MQTT", "opaque"),
        (b"\x80\x01", "opaque"),
        (b"a" * 5000, "opaque"),
        (b"0032git-upload-pack /p.git\0host=a\0", "opaque"),
        (b"G", None),
        (b"FROB /a", None),
        (b"\0\0\0", None),
        (b"\x16", None),
        (b"PRI * H", None),
        (b"\r\n", None),
    ],
)
def test_detection(data: bytes, kind: str | None) -> None:
    assert detect(data) == kind


@pytest.mark.parametrize("data", [GET, b"\r\n\r\n" + GET, SSL_REQUEST, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
def test_detection_never_changes_its_mind(data: bytes) -> None:
    whole = detect(data)
    assert {detect(data[:size]) for size in range(1, len(data))} <= {None, whole}


def test_nothing_is_sent_before_it_is_known() -> None:
    play = auto()
    for byte in DELETE:
        play.client(bytes([byte]))
    assert play.to_client.startswith(b"HTTP/1.1 403 ")
    assert (play.opened, play.to_server, protocol_of(play)) == (False, b"", "http")


@pytest.mark.parametrize("before", [0, 1, 3, 6])
def test_a_slow_client_is_judged_all_the_same(before: int) -> None:
    play = auto().client(DELETE[:before]).do("settle").client(DELETE[before:])
    assert play.to_client.startswith(b"HTTP/1.1 403 ")
    assert play.to_server == b""
    assert play.client(GET).server(OK).to_client.endswith(OK)
    assert play.to_server == GET


def test_a_slow_client_before_the_server_is_reached() -> None:
    play = auto(connects=False).do("settle").client(GET)
    assert play.to_server == b""
    assert play.do("upstream_connected").to_server == GET
    assert [record.kind for record in play.records] == ["open", "request"]


def test_a_slow_postgres_client() -> None:
    play = auto().do("settle").client(SSL_REQUEST)
    assert protocol_of(play) == "unknown"
    assert play.to_client == b"N"


def test_a_word_that_becomes_http_after_it_was_relayed_ends_the_flow() -> None:
    request = b"FROBNICATE /a HTTP/1.1\r\nHost: a\r\n\r\n"
    play = auto().client(request[:6]).do("settle")
    assert play.to_server == request[:6]
    play.client(request[6:] + DELETE)
    assert play.to_server == request[:6]
    assert play.closed == "protocol_error"


def test_a_word_that_stays_one_is_relayed_without_stall() -> None:
    play = auto().client(b"HELLO").do("settle").server(b"world").client(b"\n", DELETE)
    assert play.to_server == b"HELLO\n" + DELETE  # no HTTP server: it had a line of another protocol first
    assert play.to_client == b"world"
    assert play.of_kind("gap")[0].reason == "unknown_protocol"


def test_a_server_that_speaks_first_does_not_stall() -> None:
    play = auto().do("settle")
    assert play.opened
    play.server(GREETING).client(b"\x01\0\0\x01\x85")
    assert (play.to_client, play.to_server) == (GREETING, b"\x01\0\0\x01\x85")
    assert [record.kind for record in play.records] == ["open", "gap"]
    assert play.records[1].detail == "the server spoke first"
    assert protocol_of(play) == "unknown"
    assert play.do("eof", C).do("eof", S).closed == "server_closed"


def test_an_http_server_cannot_make_it_opaque() -> None:
    play = auto().do("settle").server(b"HTTP/1.1 408 Request Time-out\r\n\r\n")
    assert (play.to_client, play.closed) == (b"", "server_closed")


def test_a_client_that_only_listens_is_served() -> None:
    play = auto().do("eof", C)
    assert play.opened
    assert play.half_closed == [S]
    assert play.server(GREETING).to_client == GREETING


def test_default_deny_closes_what_is_unknown() -> None:
    policy = "version: 1\ndefault: deny\nrules: [{name: a, when: {protocol: http}, allow: true}]\n"
    assert auto(policy).do("settle").closed == "denied"
    assert auto(policy).client(b"EHLO a\r\n").closed == "denied"
    assert auto(policy).client(b"GE").do("settle").client(b"T /a HTTP/1.1\r\nHost: a\r\n\r\n").to_server


def test_required_identity_closes_what_is_unknown() -> None:
    assert auto(required=True).do("settle").closed == "identity_required"


def test_http2_without_tls_is_recorded() -> None:
    play = auto().client(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0")
    assert play.of_kind("gap")[0].reason == "encrypted"


def test_tls_is_relayed_with_the_servers_name() -> None:
    hello = client_hello("orders.example")
    for parts in ([hello], [bytes([byte]) for byte in hello]):
        play = auto(host="10.0.0.7").client(*parts)
        assert play.to_server == hello
        gap = play.of_kind("gap")[0]
        assert (gap.reason, gap.detail) == ("encrypted", "TLS, server name orders.example")
    slow = auto().client(hello[:40]).do("settle").client(hello[40:])
    assert slow.to_server == hello
    policy = (
        "version: 1\nrules: [{name: n, when: {protocol: postgres, host: orders.example}, deny: not there}]\n"
    )
    assert auto(policy).client(hello).to_server == hello


@functools.cache
def client_hello(name: str) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        session.do_handshake()
    return outgoing.read()


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 300), st.integers(0, 300))
def test_a_hello_of_any_shape_names_a_host_or_none(noise: bytes, start: int, size: int) -> None:
    hello = client_hello("orders.example")
    name = server_name(hello[:start] + noise + hello[start + size :])
    assert name is None or name.isascii()
    assert server_name(hello.replace(b"orders.example", b"orders\nexample")) is None


def test_garbage_is_relayed_and_recorded() -> None:
    for data in (b"\xff" * 10, bytes(range(1, 32)), b"\n\0"):
        play = auto().client(data)
        assert play.to_server == data
        assert play.of_kind("gap")[0].reason == "unknown_protocol"
