"""Looks at the first bytes, then hands the flow to the session of what they are.

A client that says nothing for a while may wait for a server that speaks first: then the server is reached, and who speaks first decides.
The server: the flow is opaque. The client, however late: its first bytes decide as ever, so that waiting is no way around the policy.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from sidecar.codecs import detect, tls_hello
from sidecar.model.flow import Side
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.model.verdict import Action, Engine
from sidecar.session.commands import CloseFlow, Command, OpenUpstream, Session, WriteRecord
from sidecar.session.context import SessionContext, verdict_part
from sidecar.session.http import HttpSession
from sidecar.session.opaque import OpaqueSession
from sidecar.session.postgres import PostgresSession
from sidecar.session.tls import TlsSession

if TYPE_CHECKING:
    from sidecar.session.postgres_lane import Lane


class AutoSession:
    """Implements session.commands.Session. Until it knows, nothing of the client's is sent upstream."""

    def __init__(
        self,
        context: SessionContext,
        plain: Callable[[SessionContext], Session] | None = None,
        *,
        inside: bool = False,
    ) -> None:
        """`plain`: what is spoken where it is not TLS; None: found out as well. `inside`: of TLS that we opened."""
        self.context = context
        self._plain = plain
        self._inside = inside
        self._inner: Session | None = None
        self._seen = bytearray()
        self._opened = False
        """The server was reached, and the open record written, before anything was known."""
        self._connected = False
        self._watching = False
        """Relayed as opaque though the first line is not whole: should it become HTTP after all, the flow ends."""

    @property
    def client_requires_tls(self) -> bool:
        return bool(getattr(self._inner, "client_requires_tls", False))

    def start(self, now_ns: int) -> list[Command]:
        """Nothing is known yet; the driver calls `settle` where the client stays silent."""
        return []

    @property
    def lane(self) -> Lane | None:
        return self._inner.lane if isinstance(self._inner, PostgresSession) else None

    def upstream_connected(self, now_ns: int) -> list[Command]:
        self._connected = True
        return self._inner.upstream_connected(now_ns) if self._inner else []

    def receive(self, side: Side, data: bytes, now_ns: int) -> list[Command]:
        if self._inner is not None:
            if self._watching and side is Side.CLIENT and self._turned_out_http(data):
                why = "an HTTP request that trickled in after it was taken for something else"
                return self._inner.abort(CloseReason.PROTOCOL_ERROR, why, now_ns)
            return self._pass(self._inner.receive(side, data, now_ns), now_ns)
        if side is Side.SERVER:
            if data.startswith(b"HTTP/1."):
                return self._begin(HttpSession(self.context), side, data, now_ns)
            gap = OpaqueSession(self.context, GapReason.UNKNOWN_PROTOCOL, "the server spoke first")
            out = self._begin(gap, side, data, now_ns)
            if self._seen and not _ended(out):
                out += self._inner_receive(Side.CLIENT, bytes(self._seen), now_ns)
            return out
        self._seen += data
        seen = bytes(self._seen)
        if self._plain is not None and seen[0] != tls_hello.HANDSHAKE:
            return self._begin(self._plain(self.context), side, seen, now_ns)
        kind = detect.detect(seen)
        if kind is None and len(seen) < detect.DETECT_MAX_BYTES:
            return self._unknown_yet(seen, now_ns) if self._opened else []
        if (
            kind == "tls"
            and len(seen) < 5 + int.from_bytes(seen[3:5])
            and len(seen) < tls_hello.HELLO_MAX_BYTES
        ):
            return []
        return self._begin(self._session_of(kind or "opaque", seen), side, seen, now_ns)

    def settle(self, now_ns: int) -> list[Command]:
        """The client has said nothing, or nothing that is understood, for a while."""
        if self._inner is not None:
            settle = getattr(self._inner, "settle", None)
            return self._pass(settle(now_ns), now_ns) if settle is not None else []
        if self._opened:
            return []
        seen = bytes(self._seen)
        if self._plain is not None and not seen:
            return self._begin(self._plain(self.context), Side.CLIENT, b"", now_ns)
        if seen and detect.detect(seen) == "tls":
            return self._begin(self._session_of("tls", seen), Side.CLIENT, seen, now_ns)
        if seen:
            return self._unknown_yet(seen, now_ns)
        context = self.context
        verdict = context.judge_connect("unknown")
        if context.identity_denial() is not None or verdict.action is Action.DENY:
            gap = OpaqueSession(context, GapReason.UNKNOWN_PROTOCOL, "the client did not speak first")
            return self._begin(gap, Side.CLIENT, b"", now_ns)
        self._opened = True
        return [WriteRecord(context.open_record("unknown", verdict_part(verdict), now_ns)), OpenUpstream()]

    def _unknown_yet(self, seen: bytes, now_ns: int) -> list[Command]:
        """Nothing that is known so far, and the client may be waiting for an answer to it."""
        if detect.may_become_known(seen):
            return []
        self._watching = True
        return self._begin(self._session_of("opaque", seen), Side.CLIENT, seen, now_ns)

    def _begin(self, session: Session, side: Side, data: bytes, now_ns: int) -> list[Command]:
        """Hand over, with what came first."""
        self._inner = session
        out = self._pass(session.start(now_ns), now_ns)
        if data and not _ended(out):
            out += self._inner_receive(side, data, now_ns)
        return out

    def _inner_receive(self, side: Side, data: bytes, now_ns: int) -> list[Command]:
        assert self._inner is not None
        return self._pass(self._inner.receive(side, data, now_ns), now_ns)

    def _pass(self, commands: list[Command], now_ns: int) -> list[Command]:
        """What the chosen session wants, but for what was done before it was chosen."""
        if not self._opened:
            return commands
        kept: list[Command] = [
            command
            for command in commands
            if not isinstance(command, OpenUpstream)
            and not (isinstance(command, WriteRecord) and command.record.kind == "open")
        ]
        if self._connected and self._inner is not None and any(map(_is_open, commands)):
            kept += self._inner.upstream_connected(now_ns)
        return kept

    def _turned_out_http(self, data: bytes) -> bool:
        self._seen += data[: detect.DETECT_MAX_BYTES]
        kind = detect.detect(bytes(self._seen))
        self._watching = kind is None and len(self._seen) < detect.DETECT_MAX_BYTES
        return kind in ("http", "http2")

    def _session_of(self, kind: str, seen: bytes) -> Session:
        context = self.context
        if kind == "postgres":
            return PostgresSession(context)
        if kind == "http":
            return HttpSession(context)
        if kind == "tls":
            name = tls_hello.server_name(seen)
            if not self._inside and self._opens(name):
                return self._opened_tls(name)
            if self._plain is not None:
                return self._plain(self.context)  # which ends what it does not understand
            if name is not None:
                self._named_by_client(name)
            detail = f"TLS, server name {name}" if name else "TLS without a server name"
            return OpaqueSession(context, GapReason.ENCRYPTED, detail)
        if kind == "http2" and self._inside:
            return HttpSession(context)  # not agreed on with us; which ends what it does not understand
        if kind == "http2":
            detail = "HTTP/2 in plain text is not inspected in this version"
            return OpaqueSession(context, GapReason.ENCRYPTED, detail)
        return OpaqueSession(context, GapReason.UNKNOWN_PROTOCOL, "the first bytes are of no known protocol")

    def _opens(self, name: str | None) -> bool:
        """`steering.decrypt`: what the configuration declares, and hosts that a rule names."""
        target = self.context.facts.target
        if target.tls_mode == "passthrough":
            return False
        named = (*target.names, *((name,) if name else ()))
        return target.opens_tls or self.context.engine.names_host(named)

    def _opened_tls(self, name: str | None) -> Session:
        """The server will be verified for this name before anything is sent to it: with that, it is the target's name."""
        facts = self.context.facts
        target = facts.target
        if name is not None and target.tls_mode in (None, "verify-full"):
            names = target.names if name in target.names else (*target.names, name)
            host, source = (
                (name, "sni") if target.host_source == "address" else (target.host, target.host_source)
            )
            target = replace(target, host=host, host_source=source, names=names, tls_name=name)
            self.context.facts = replace(facts, target=target)
        elif name is not None:
            self._named_by_client(name)
        inner = self._plain(self.context) if self._plain else AutoSession(self.context, inside=True)
        return TlsSession(self.context, name, inner)

    def _named_by_client(self, name: str) -> None:
        """The server name of a ClientHello is what the client claims, and the best that records can show where nothing else is known."""
        facts = self.context.facts
        target = facts.target
        if name in target.names:
            return
        if target.host_source == "address":
            target = replace(target, host=name, host_source="sni")
        self.context.facts = replace(facts, target=replace(target, claimed=(*target.claimed, name)))

    def eof(self, side: Side, now_ns: int) -> list[Command]:
        if self._inner is not None:
            return self._pass(self._inner.eof(side, now_ns), now_ns)
        if side is Side.SERVER or self._seen:
            detail = "the connection ended before a known protocol was spoken"
        else:
            detail = "the client did not speak first"
        gap = OpaqueSession(self.context, GapReason.UNKNOWN_PROTOCOL, detail)
        out = self._begin(gap, Side.CLIENT, bytes(self._seen), now_ns)
        return out if _ended(out) else out + gap.eof(side, now_ns)

    def leaf_minted(self, server_context: ssl.SSLContext | None, now_ns: int) -> list[Command]:
        inner = self._inner
        return (
            self._pass(inner.leaf_minted(server_context, now_ns), now_ns)
            if isinstance(inner, TlsSession)
            else []
        )

    def tls_started(self, now_ns: int) -> list[Command]:
        return self._inner.tls_started(now_ns) if self._inner else []

    def assertion_signed(self, assertion: str | None, now_ns: int) -> list[Command]:
        return self._inner.assertion_signed(assertion, now_ns) if self._inner else []

    def hold_decided(
        self, hold_id: str, outcome: str, by: str | None, reason: str, now_ns: int
    ) -> list[Command]:
        if self._inner is None:
            return []
        return self._pass(self._inner.hold_decided(hold_id, outcome, by, reason, now_ns), now_ns)

    def engine_changed(self, engine: Engine, now_ns: int) -> list[Command]:
        self.context.engine = engine
        return self._inner.engine_changed(engine, now_ns) if self._inner else []

    def abort(self, reason: CloseReason, detail: str, now_ns: int) -> list[Command]:
        if self._inner is not None:
            return self._inner.abort(reason, detail, now_ns)
        opaque = OpaqueSession(self.context)
        opening = [
            command for command in self._begin(opaque, Side.CLIENT, b"", now_ns) if not _is_open(command)
        ]
        return opening if _ended(opening) else opening + opaque.abort(reason, detail, now_ns)


def _is_open(command: Command) -> bool:
    return isinstance(command, OpenUpstream)


def _ended(commands: list[Command]) -> bool:
    return bool(commands) and isinstance(commands[-1], CloseFlow)
