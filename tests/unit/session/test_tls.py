"""TLS that is opened, on paper: a real client's TLS at one end, the session in the middle, what the server would get at the other."""

from __future__ import annotations

import contextlib
import json
import ssl
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from sidecar.model.flow import Side
from sidecar.model.secret import Secret
from sidecar.proxy.leaves import server_context
from sidecar.session.auto import AutoSession
from sidecar.session.commands import MintLeaf, SessionLimits, StartTls
from sidecar.session.context import SessionContext
from sidecar.session.factory import make_session
from tests.support.certificates import TestAuthority
from tests.support.http_play import IDENTIFIED, TOKEN, Play

POLICY = """\
version: 1
default: allow
rules:
  - {name: no-delete, when: {protocol: http, host: api.internal, method: [DELETE]}, deny: not by a job}
  - {name: pii, when: {protocol: http, host: "*.internal"}, mask: {json: {"$.ssn": redact}}}
"""
GET = b"GET /a HTTP/1.1\r\nHost: api.internal\r\n\r\n"
SENT = b"GET /a HTTP/1.1\r\nHost: api.internal\r\nAccept-Encoding: identity\r\n\r\n"
"""Where a mask may have to read the answer."""


@cache
def authority() -> TestAuthority:
    return TestAuthority()


class TlsPlay(Play):
    """`say` and `heard` are what the client says and hears inside its TLS; `trusts`: it knows the authority."""

    def __init__(
        self,
        policy: str = POLICY,
        *,
        name: str | None = "api.internal",
        alpn: tuple[str, ...] = ("http/1.1",),
        trusts: bool = True,
        leaf: bool = True,
        target: dict[str, Any] | None = None,
        port: str = "auto",
        **more: Any,
    ) -> None:
        self._leaf = leaf

        def make(context: SessionContext) -> Any:
            context.facts = replace(
                context.facts, target=replace(context.facts.target, protocol=port, **(target or {}))
            )
            return make_session(context)

        super().__init__(policy, make=make, **more)
        self._in, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cadata=authority().certificate if trusts else None)
        context.set_alpn_protocols(list(alpn))
        context.check_hostname = name is not None
        self.tls = context.wrap_bio(self._in, self._outgoing, server_hostname=name)
        self._taken = 0
        self.heard = b""
        self.error = ""
        self.ended = False
        self.shake()

    def do(self, event: str, *arguments: Any) -> TlsPlay:
        done = len(self.commands) if hasattr(self, "commands") else 0
        super().do(event, *arguments)
        for command in self.commands[done:]:
            if isinstance(command, MintLeaf):
                self.minted = command.names
                pem = authority().leaf(*command.names)
                super().do(
                    "leaf_minted", server_context(pem.certificate, Secret(pem.key)) if self._leaf else None
                )
            if isinstance(command, StartTls):
                self.upstream = command
                super().do("tls_started")
        return self

    def pump(self) -> None:
        """Carry bytes until neither end has any."""
        while True:
            sent = self._outgoing.read()
            if sent:
                self.do("receive", Side.CLIENT, sent)
            fresh = self.to_client[self._taken :]
            self._taken += len(fresh)
            if fresh:
                self._in.write(fresh)
            self._hear()
            if not sent and not fresh:
                return

    def _hear(self) -> None:
        with contextlib.suppress(ssl.SSLWantReadError):
            try:
                self.tls.do_handshake()
                while True:
                    plain = self.tls.read(65536)
                    if not plain:
                        self.ended = True
                        return
                    self.heard += plain
            except ssl.SSLWantReadError:
                raise
            except ssl.SSLError as error:
                self.error = self.error or error.reason or str(error)

    def shake(self) -> TlsPlay:
        self._hear()
        self.pump()
        return self

    def say(self, data: bytes) -> TlsPlay:
        self.tls.write(data)
        self.pump()
        return self

    def answers(self, data: bytes) -> TlsPlay:
        self.server(data)
        self.pump()
        return self


DECLARED = {"name": "api", "opens_tls": True}


def test_a_declared_target_is_opened() -> None:
    play = TlsPlay(target=DECLARED).say(GET)
    assert play.tls.version() == "TLSv1.3"
    assert play.tls.selected_alpn_protocol() == "http/1.1"
    assert play.minted == ("api.internal",)
    assert play.upstream == StartTls("api.internal", "verify-full", None)
    assert play.to_server == SENT
    play.answers(
        b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 21\r\n\r\n{"ssn":"123-45-6789"}'
    )
    assert b'{"ssn":"[redacted]"}' in play.heard
    (request,) = play.of_kind("request")
    assert (request.operation.method, request.operation.path) == ("GET", "/a")  # type: ignore[union-attr]


def test_a_host_that_a_rule_names_is_opened_and_denied_inside() -> None:
    play = TlsPlay(host="10.0.0.7", name="api.internal", target={"host_source": "address", "names": ()})
    play.say(b"DELETE /a HTTP/1.1\r\nHost: api.internal\r\n\r\n")
    assert play.heard.startswith(b"HTTP/1.1 403")
    assert json.loads(play.heard.partition(b"\r\n\r\n")[2])["rule"] == "no-delete"
    assert play.to_server == b""
    play.say(GET)
    assert play.to_server == SENT, "the connection goes on"


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("other.example", {"host_source": "address", "names": ()}),
        ("api.internal", {"tls_mode": "passthrough", "opens_tls": True}),
    ],
    ids=["a host that nobody names", "passthrough"],
)
def test_the_rest_is_relayed(name: str, target: dict[str, Any]) -> None:
    play = TlsPlay(host="10.0.0.7", name=name, target=target)
    assert play.to_server[0] == 0x16
    assert play.of_kind("gap")[0].reason == "encrypted"
    assert not any(isinstance(command, MintLeaf) for command in play.commands)


def test_split_anywhere() -> None:
    """Byte by byte in, byte by byte back: the same."""

    class Dribble(TlsPlay):
        def do(self, event: str, *arguments: Any) -> TlsPlay:
            if event == "receive" and len(arguments[1]) > 1:
                for byte in arguments[1]:
                    super().do(event, arguments[0], bytes([byte]))
                return self
            return super().do(event, *arguments)

    play = Dribble("version: 1\n", target=DECLARED).say(GET)
    assert play.to_server == GET
    play.answers(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
    assert play.heard.endswith(b"hello")


def test_a_long_body_both_ways() -> None:
    body = bytes(range(256)) * 4096
    play = TlsPlay("version: 1\n", target=DECLARED)
    play.say(b"POST /a HTTP/1.1\r\nHost: api.internal\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert play.to_server.endswith(body)
    play.answers(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert play.heard.endswith(body)


def test_the_identity_is_attached_inside() -> None:
    play = TlsPlay(target=DECLARED, attachment=IDENTIFIED).say(GET)
    assert f"X-Workload-Identity: {TOKEN}".encode() in play.to_server


def test_a_client_that_does_not_trust_us() -> None:
    play = TlsPlay(target=DECLARED, trusts=False)
    assert play.error == "CERTIFICATE_VERIFY_FAILED"
    (gap,) = play.of_kind("gap")
    assert gap.reason == "leaf_rejected"
    assert "sidecar ca install" in (gap.detail or "")
    assert play.closed is not None
    assert play.to_server == b""
    assert [record.kind for record in play.records] == ["open", "gap", "close"]


def test_a_client_that_leaves_in_the_handshake() -> None:
    left = Play(POLICY, make=lambda context: _declared(context), host="api.internal")
    left.client(_hello()).do("eof", Side.CLIENT)
    assert left.closed == "client_closed"
    assert left.of_kind("gap")[0].reason == "leaf_rejected"


def _declared(context: SessionContext) -> AutoSession:
    context.facts = replace(context.facts, target=replace(context.facts.target, **DECLARED))
    return AutoSession(context)


def _hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="api.internal")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def test_no_leaf_no_connection() -> None:
    play = TlsPlay(target=DECLARED, leaf=False)
    assert play.closed == "internal_error"
    assert "sidecar ca show" in (play.of_kind("gap")[0].detail or "")


def test_another_host_inside_than_the_one_that_was_verified() -> None:
    play = TlsPlay(target=DECLARED).say(b"GET /a HTTP/1.1\r\nHost: other.internal\r\n\r\n")
    assert play.heard.startswith(b"HTTP/1.1 421")
    assert play.to_server == b""
    assert play.of_kind("request")[0].verdict.action == "deny"  # type: ignore[union-attr]


def test_http2_alone_is_no_way_around() -> None:
    play = TlsPlay(target=DECLARED, alpn=("h2",))
    play.say(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
    assert play.to_server == b""
    assert play.closed is not None


def test_what_is_no_http_inside_is_relayed_and_recorded() -> None:
    """On an `auto` port; the bytes inside are unknown, and policy decides on `connect` as for any opaque flow."""
    play = TlsPlay("version: 1\n", target=DECLARED).say(b"\x00\x01\x02\x03binary")
    assert play.to_server == b"\x00\x01\x02\x03binary"
    assert play.of_kind("gap")[0].reason == "unknown_protocol"
    denied = TlsPlay("version: 1\ndefault: deny\n", target=DECLARED).say(b"\x00\x01\x02\x03binary")
    assert denied.to_server == b""
    assert denied.closed == "denied"


def test_on_an_http_port() -> None:
    assert TlsPlay(target=DECLARED, port="http").say(GET).to_server == SENT
    plain = Play(POLICY, make=make_session, protocol="http").client(GET)
    assert plain.to_server == SENT
    closed = TlsPlay("version: 1\n", port="http")
    assert closed.to_server == b"", "TLS that is not opened is no HTTP"
    assert closed.closed == "protocol_error"


def test_close_notify_ends_in_order() -> None:
    play = TlsPlay("version: 1\n", target=DECLARED).say(
        b"GET /a HTTP/1.1\r\nHost: api.internal\r\nConnection: close\r\n\r\n"
    )
    play.answers(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    play.do("eof", Side.SERVER)
    play.pump()
    assert play.heard.endswith(b"ok")
    assert play.ended, "the client can tell an end from a cut"


def test_garbage_after_the_handshake() -> None:
    play = TlsPlay(target=DECLARED)
    play.do("receive", Side.CLIENT, b"\x17\x03\x03\x00\x05hello")
    assert play.closed == "protocol_error"


def test_garbage_instead_of_a_handshake() -> None:
    play = Play(POLICY, make=_declared, host="api.internal")
    hello = bytearray(_hello())
    hello[40:60] = bytes(20)
    play.client(bytes(hello))
    pem = authority().leaf("api.internal")
    play.do("leaf_minted", server_context(pem.certificate, Secret(pem.key)))
    play.do("receive", Side.CLIENT, b"\x16\x03\x01\x00\x05hello")
    assert play.closed == "protocol_error"
    assert play.of_kind("gap")[0].reason == "encrypted"


def test_early_bytes_are_bounded() -> None:
    play = Play(POLICY, make=_declared, host="api.internal", limits=SessionLimits())
    play.client(_hello(), b"\x17" * 70_000)
    assert play.closed == "limit"


@pytest.mark.parametrize("mode", ["require", "verify-ca"])
def test_weaker_modes_do_not_prove_the_name(mode: str) -> None:
    policy = "version: 1\ndefault: deny\nrules: [{name: a, when: {protocol: http, host: api.internal}, allow: true}]\n"
    weak = TlsPlay(
        policy,
        target={**DECLARED, "tls_mode": mode, "names": (), "host": "10.0.0.7", "host_source": "address"},
    )
    assert weak.say(GET).to_server == b""
    proven = TlsPlay(policy, target={**DECLARED, "names": (), "host": "10.0.0.7", "host_source": "address"})
    assert proven.say(GET).to_server == GET
