"""Looks at the first bytes, then hands the flow to the session of what they are. A server that speaks first is opaque."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar.codecs import detect, tls_hello
from sidecar.model.flow import Side
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.model.verdict import Engine
from sidecar.session.commands import CloseFlow, Command, OpenUpstream, Session
from sidecar.session.context import SessionContext
from sidecar.session.http import HttpSession
from sidecar.session.opaque import OpaqueSession
from sidecar.session.postgres import PostgresSession

if TYPE_CHECKING:
    from sidecar.session.postgres_lane import Lane


class AutoSession:
    """Implements session.commands.Session. Until it knows, nothing is sent upstream; the chosen session writes the `open` record."""

    def __init__(self, context: SessionContext) -> None:
        self.context = context
        self._inner: Session | None = None
        self._seen = bytearray()

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
        return self._inner.upstream_connected(now_ns) if self._inner else []

    def receive(self, side: Side, data: bytes, now_ns: int) -> list[Command]:
        if self._inner is not None:
            return self._inner.receive(side, data, now_ns)
        self._seen += data
        seen = bytes(self._seen)
        kind = detect.detect(seen)
        if kind is None and len(seen) < detect.DETECT_MAX_BYTES:
            return []
        if (
            kind == "tls"
            and len(seen) < 5 + int.from_bytes(seen[3:5])
            and len(seen) < tls_hello.HELLO_MAX_BYTES
        ):
            return []
        self._choose(kind or "opaque", seen)
        assert self._inner is not None
        out = self._inner.start(now_ns)
        return out if _ended(out) else out + self._inner.receive(side, seen, now_ns)

    def settle(self, now_ns: int) -> list[Command]:
        """The client has said nothing for a while: the server may have to speak first, so the flow is opaque."""
        if self._inner is not None:
            return []
        self._inner = OpaqueSession(
            self.context, GapReason.UNKNOWN_PROTOCOL, "the client did not speak first"
        )
        out = self._inner.start(now_ns)
        if self._seen and not _ended(out):
            out += self._inner.receive(Side.CLIENT, bytes(self._seen), now_ns)
        return out

    def _choose(self, kind: str, seen: bytes) -> None:
        context = self.context
        if kind == "postgres":
            self._inner = PostgresSession(context)
        elif kind == "http":
            self._inner = HttpSession(context)
        elif kind == "tls":
            name = tls_hello.server_name(seen)
            self._inner = OpaqueSession(
                context,
                GapReason.ENCRYPTED,
                f"TLS, server name {name}" if name else "TLS without a server name",
            )
        elif kind == "http2":
            self._inner = OpaqueSession(
                context, GapReason.ENCRYPTED, "HTTP/2 in plain text is not inspected in this version"
            )
        else:
            self._inner = OpaqueSession(
                context, GapReason.UNKNOWN_PROTOCOL, "the first bytes are of no known protocol"
            )

    def eof(self, side: Side, now_ns: int) -> list[Command]:
        if self._inner is None:
            out = self.settle(now_ns)
            return out if _ended(out) else out + (self._inner.eof(side, now_ns) if self._inner else [])
        return self._inner.eof(side, now_ns)

    def tls_started(self, now_ns: int) -> list[Command]:
        return self._inner.tls_started(now_ns) if self._inner else []

    def assertion_signed(self, assertion: str | None, now_ns: int) -> list[Command]:
        return self._inner.assertion_signed(assertion, now_ns) if self._inner else []

    def hold_decided(
        self, hold_id: str, outcome: str, by: str | None, reason: str, now_ns: int
    ) -> list[Command]:
        return self._inner.hold_decided(hold_id, outcome, by, reason, now_ns) if self._inner else []

    def engine_changed(self, engine: Engine, now_ns: int) -> list[Command]:
        self.context.engine = engine
        return self._inner.engine_changed(engine, now_ns) if self._inner else []

    def abort(self, reason: CloseReason, detail: str, now_ns: int) -> list[Command]:
        if self._inner is None:
            self._inner = OpaqueSession(self.context)
            opening = [command for command in self._inner.start(now_ns) if not _is_open(command)]
            if _ended(opening):
                return opening
            return opening + self._inner.abort(reason, detail, now_ns)
        return self._inner.abort(reason, detail, now_ns)


def _is_open(command: Command) -> bool:
    return isinstance(command, OpenUpstream)


def _ended(commands: list[Command]) -> bool:
    return bool(commands) and isinstance(commands[-1], CloseFlow)
