"""TLS of the client's, opened: we are the server to it, with a leaf of the local authority, and the client to the server it meant.

Sans-io: bytes go through memory, the leaf is asked for by a command. What is inside is another session's, which never sees a record of
TLS. The server is verified strictly before anything of the client's is sent to it. Source: RFC 8446; RFC 9325 (TLS 1.2 at least).
"""

from __future__ import annotations

import contextlib
import ssl
from typing import Final

from sidecar.model.flow import Side
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.model.verdict import Engine
from sidecar.session.commands import (
    CloseFlow,
    Command,
    HalfClose,
    MintLeaf,
    Send,
    Session,
    StartTls,
    WriteRecord,
)
from sidecar.session.context import SessionContext

CLIENT, SERVER = Side.CLIENT, Side.SERVER
EARLY_MAX_BYTES: Final = 65_536
"""What a client may send before our leaf is there: a hello, and early data that we do not take."""
READ_BYTES: Final = 65_536
TRUST: Final = "sidecar ca install, or tls: {mode: passthrough} for this target"
REJECTIONS: Final = frozenset(
    {
        "TLSV1_ALERT_UNKNOWN_CA",
        "TLSV1_ALERT_ACCESS_DENIED",
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
        "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE",
        "SSLV3_ALERT_CERTIFICATE_EXPIRED",
    }
)
"""OpenSSL's words for alerts by which a client says that it does not trust our leaf."""


class TlsSession:
    """Implements session.commands.Session. `name` is the hello's server name; `inner` is what speaks inside."""

    def __init__(self, context: SessionContext, name: str | None, inner: Session) -> None:
        self.context = context
        self._name = name
        self._inner = inner
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        self._shaken = False
        self._early = bytearray()
        self._unsent = bytearray()
        """Plain bytes for the client that came before the handshake was done."""
        self._client_ended = False
        self._closed = False

    # -- opening

    def start(self, now_ns: int) -> list[Command]:
        return [*self._outward(self._inner.start(now_ns)), MintLeaf(self._names())]

    def settle(self, now_ns: int) -> list[Command]:
        """A client that says nothing inside for a while may wait for the server to speak first."""
        settle = getattr(self._inner, "settle", None)
        return self._outward(settle(now_ns)) if settle is not None and self._shaken else []

    def _names(self) -> tuple[str, ...]:
        """Whom we pose as: the name that the client asked for, else what it dialled."""
        target = self.context.facts.target
        if self._name is not None:
            return (self._name,)
        return tuple(dict.fromkeys((target.host, target.address.host)))

    def leaf_minted(self, server_context: ssl.SSLContext | None, now_ns: int) -> list[Command]:
        """None: the local authority gave no leaf."""
        if self._closed:
            return []
        if server_context is None:
            why = "the local authority gives no certificate for this name; sidecar ca show"
            return self._end(GapReason.ENCRYPTED, why, CloseReason.INTERNAL_ERROR, now_ns)
        self._tls = server_context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        early, self._early = bytes(self._early), bytearray()
        return self._take(early, now_ns)

    def upstream_connected(self, now_ns: int) -> list[Command]:
        """Nothing of the client's goes to a server that is not who the client meant."""
        target = self.context.facts.target
        mode = target.tls_mode or "verify-full"
        if mode == "disable":
            return self._outward(self._inner.upstream_connected(now_ns))
        name = self._name or (target.host if target.host_source != "address" else target.address.host)
        return [StartTls(server_name=name, verify=mode, ca_file=target.tls_ca)]

    def tls_started(self, now_ns: int) -> list[Command]:
        return self._outward(self._inner.upstream_connected(now_ns))

    # -- bytes

    def receive(self, side: Side, data: bytes, now_ns: int) -> list[Command]:
        if side is SERVER:
            return self._outward(self._inner.receive(SERVER, data, now_ns))
        if self._tls is None:
            self._early += data
            if len(self._early) > EARLY_MAX_BYTES:
                why = "too much was sent before the handshake"
                return self._end(GapReason.ENCRYPTED, why, CloseReason.LIMIT, now_ns)
            return []
        return self._take(data, now_ns)

    def _take(self, data: bytes, now_ns: int) -> list[Command]:
        """Encrypted bytes of the client's."""
        tls = self._tls
        assert tls is not None
        self._incoming.write(data)
        out: list[Command] = []
        try:
            if not self._shaken:
                tls.do_handshake()
                self._shaken = True
                self._write(bytes(self._unsent))
                self._unsent.clear()
            while not self._closed and not self._client_ended:
                plain = tls.read(READ_BYTES)
                if plain:
                    out += self._outward(self._inner.receive(CLIENT, plain, now_ns))
                else:  # close_notify
                    out += self._client_eof(now_ns)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            out += self._flush()
            return out + self._broken(error, now_ns)
        return out + self._flush()

    def _broken(self, error: ssl.SSLError, now_ns: int) -> list[Command]:
        said = error.reason or "TLS error"
        if self._shaken:
            return self._outward(self._inner.abort(CloseReason.PROTOCOL_ERROR, f"TLS: {said}", now_ns))
        if said in REJECTIONS:
            why = f"the client does not trust the local authority ({said}): {TRUST}"
            return self._end(GapReason.LEAF_REJECTED, why, CloseReason.PROTOCOL_ERROR, now_ns)
        return self._end(GapReason.ENCRYPTED, f"TLS handshake: {said}", CloseReason.PROTOCOL_ERROR, now_ns)

    def _end(self, gap: GapReason, detail: str, reason: CloseReason, now_ns: int) -> list[Command]:
        ending = self._inner.abort(reason, detail, now_ns)
        record = WriteRecord(self.context.gap_record(gap, now_ns, detail=detail))
        opening = [
            command
            for command in ending
            if isinstance(command, WriteRecord) and command.record.kind == "open"
        ]
        rest = [command for command in ending if command not in opening]
        return self._outward([*opening, record, *rest])

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        assert self._tls is not None
        left = memoryview(data)
        while left:
            left = left[self._tls.write(left) :]

    def _flush(self) -> list[Command]:
        data = self._outgoing.read()
        return [Send(CLIENT, data)] if data else []

    def _outward(self, commands: list[Command]) -> list[Command]:
        """What the inner session wants, with what it says to the client encrypted, in its place among the rest."""
        out: list[Command] = []
        for command in commands:
            if isinstance(command, Send) and command.side is CLIENT:
                if self._shaken:
                    self._write(command.data)
                    out += self._flush()
                else:
                    self._unsent += command.data
            elif isinstance(command, CloseFlow) or (
                isinstance(command, HalfClose) and command.side is CLIENT
            ):
                self._closed = self._closed or isinstance(command, CloseFlow)
                out += [*self._goodbye(), command]
            else:
                out.append(command)
        return out

    def _goodbye(self) -> list[Command]:
        """close_notify, so that the client can tell an end from a cut."""
        if self._tls is not None and self._shaken:
            with contextlib.suppress(ssl.SSLError):  # its own close_notify is not waited for
                self._tls.unwrap()
        return self._flush()

    # -- ends

    def eof(self, side: Side, now_ns: int) -> list[Command]:
        if side is SERVER:
            return self._outward(self._inner.eof(SERVER, now_ns))
        if not self._shaken:
            why = (
                f"the client left during the TLS handshake; if it does not trust the local authority: {TRUST}"
            )
            return self._end(GapReason.LEAF_REJECTED, why, CloseReason.CLIENT_CLOSED, now_ns)
        return self._client_eof(now_ns)

    def _client_eof(self, now_ns: int) -> list[Command]:
        if self._client_ended:
            return []
        self._client_ended = True
        return self._outward(self._inner.eof(CLIENT, now_ns))

    def abort(self, reason: CloseReason, detail: str, now_ns: int) -> list[Command]:
        return self._outward(self._inner.abort(reason, detail, now_ns))

    # -- passed on

    def assertion_signed(self, assertion: str | None, now_ns: int) -> list[Command]:
        return self._outward(self._inner.assertion_signed(assertion, now_ns))

    def hold_decided(
        self, hold_id: str, outcome: str, by: str | None, reason: str, now_ns: int
    ) -> list[Command]:
        return self._outward(self._inner.hold_decided(hold_id, outcome, by, reason, now_ns))

    def engine_changed(self, engine: Engine, now_ns: int) -> list[Command]:
        return self._outward(self._inner.engine_changed(engine, now_ns))
