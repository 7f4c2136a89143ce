"""A PostgreSQL flow until the client may speak SQL: encryption requests, start-up, TLS towards the server; and raw relay.

startup   the client's first packets: SSLRequest and GSSENCRequest are answered `N`, the StartupMessage waits for upstream
auth      the server asks, the client answers; anything else of the client waits
raw       opaque relay: TLS that we cannot open, cancel requests
"""

from __future__ import annotations

import re
import struct
from typing import Any, Final

import msgspec

from sidecar.codecs.buffer import Fragment
from sidecar.codecs.postgres import messages
from sidecar.codecs.postgres.messages import Startup
from sidecar.errors import LimitExceeded, ProtocolError
from sidecar.model.flow import Side
from sidecar.model.ids import short_id
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.model.record import OperationPart, Record
from sidecar.model.verdict import Action
from sidecar.session.commands import CloseFlow, Command, OpenUpstream, Send, StartTls, WriteRecord
from sidecar.session.context import (
    IDENTITY_RULE,
    SessionContext,
    denial_message,
    identity_verdict_part,
    verdict_part,
)
from sidecar.session.postgres_judge import ATTACH_RULE, Judge

CLIENT, SERVER = Side.CLIENT, Side.SERVER
PASSWORD_MAX_BYTES: Final = 65_536
"""PG_MAX_AUTH_TOKEN_LENGTH."""
REQUIRES_TLS_DETAIL: Final = "the client left after our answer N: it requires TLS"

_LENGTH = struct.Struct("!I")


class Opening:
    """What every part of the session shares, and the phases before the first ReadyForQuery."""

    def __init__(self, context: SessionContext) -> None:
        self.context = context
        self.facts = context.facts
        self.limits = context.limits
        self.judge = Judge(context)
        self.client_requires_tls = False
        self._phase = "startup"
        self._upstream = "none"
        """none, connecting, connected, ssl (our SSLRequest is asked), tls (handshake), open."""
        self._tls = "none"
        self._early_client = bytearray()
        self._client = Fragment()
        self._server = Fragment()
        self._startup: Startup | None = None
        self._startup_seen = False
        self._spoke = False
        self._client_speaks_tls = False
        self._refused: tuple[str, str, str] | None = None
        self._answered_n = False
        self._out: list[Command] = []
        self._now = 0
        self._bytes = [0, 0]
        self._closed = False
        self._client_eof = False
        self._passing_server = 0

    # -- what the later phases do

    def _client_messages(self, data: bytes) -> None:
        raise NotImplementedError

    def _server_messages(self, data: bytes) -> None:
        raise NotImplementedError

    def _before_close(self) -> None:
        raise NotImplementedError

    # -- shared

    def _take(self) -> list[Command]:
        out, self._out = self._out, []
        return out

    def _send(self, side: Side, data: Any) -> None:
        self._out.append(Send(side, data))

    def _record(self, record: Record) -> None:
        self._out.append(WriteRecord(record))

    def _gap(self, reason: GapReason, detail: str) -> None:
        self._record(self.context.gap_record(reason, self._now, detail=detail))

    def _error(self, sqlstate: str, text: str, record_id: str, *, severity: str = "ERROR") -> bytes:
        """What a client sees of a refusal."""
        short = short_id(record_id)
        target = self.facts.target
        return messages.error(
            sqlstate,
            text,
            severity=severity,
            detail=f"not sent to {target.name or target.host}; record {short}",
            hint=f"sidecar why {short}",
        )

    def _close(self, reason: CloseReason, detail: str | None = None) -> None:
        if self._closed:
            return
        self._closed = True
        self._before_close()
        self._record(
            self.context.close_record(
                reason, self._now, detail=detail, bytes_client=self._bytes[0], bytes_server=self._bytes[1]
            )
        )
        self._out.append(CloseFlow(reason))

    def _fail(self, sqlstate: str, text: str, reason: CloseReason, detail: str) -> None:
        if self._phase != "raw" and not self._passing_server:
            self._send(CLIENT, messages.error(sqlstate, f"sidecar: {text}", severity="FATAL"))
        self._close(reason, detail)

    # -- opening

    def _open(self) -> None:
        context = self.context
        denial = context.identity_denial()
        opaque = self.facts.client_wants_tls or self.facts.target.tls_mode == "passthrough"
        verdict = context.judge_connect("opaque" if opaque else "postgres")
        part = verdict_part(verdict)
        if denial is not None:
            self._refused = ("42501", denial_message(IDENTITY_RULE, denial), IDENTITY_RULE)
            part = identity_verdict_part(denial, context.engine.revision)
        elif verdict.action is Action.DENY:
            self._refused = (
                "42501",
                denial_message(verdict.rule, verdict.reason),
                verdict.rule or "default",
            )
        self._record(context.open_record("postgres", part, self._now))
        if self._refused is not None:
            return
        if opaque:
            self._phase = "raw"
            self._gap(
                GapReason.CLIENT_REQUIRES_TLS, "the client demands TLS, which this version does not open"
            )
        self._upstream = "connecting"
        self._out.append(OpenUpstream())

    def _connected(self) -> None:
        """What to ask the server depends on how the client begins; PostgreSQL's clients always speak first."""
        self._upstream = "connected"
        if self._phase != "startup" or self._spoke:
            self._ask_server()

    def _ask_server(self) -> None:
        if not self._ours() or self._client_speaks_tls or self.facts.target.tls_mode == "disable":
            self._upstream_open()
        else:
            self._upstream = "ssl"
            self._send(SERVER, struct.pack("!ii", 8, messages.SSL_REQUEST))

    def _ours(self) -> bool:
        """Whether the upstream hop's TLS is ours to ask for: not where the client's own goes through untouched."""
        return not (self.facts.client_wants_tls or self.facts.target.tls_mode == "passthrough")

    def _upstream_open(self) -> None:
        self._upstream = "open"
        if self._phase == "raw":
            self._flush_raw()
        elif self._startup is not None:
            self._send(SERVER, self._startup.encode())

    def _flush_raw(self) -> None:
        if self._early_client:
            self._send(SERVER, bytes(self._early_client))
            self._early_client.clear()

    def _ssl_answer(self, data: bytes) -> None:
        target = self.facts.target
        if data[:1] == b"S":
            if len(data) != 1:
                raise ProtocolError("bytes follow the server's answer to SSLRequest before TLS began")
            self._upstream = "tls"
            verify = target.tls_mode if target.tls_mode in ("require", "verify-ca", "verify-full") else None
            name = target.host if target.host_source != "address" else None
            self._out.append(StartTls(name, verify, target.tls_ca))
        elif data[:1] == b"N":
            if target.tls_mode in ("require", "verify-ca", "verify-full"):
                text = f"the server offers no TLS, and the target {target.name or target.host} has tls.mode {target.tls_mode}"
                self._fail("58000", text, CloseReason.UPSTREAM_TLS, text)
                return
            self._upstream_open()
            if len(data) > 1:
                self._from_server(data[1:])
        elif data[:1] == b"E":
            # A server that is full or older than encryption answers with an error: it is the client's to see.
            self._send(CLIENT, data)
            self._close(CloseReason.SERVER_CLOSED, "the server answered SSLRequest with an error")
        else:
            raise ProtocolError("the server does not answer SSLRequest as PostgreSQL does")

    def _from_server(self, data: bytes) -> None:
        if self._closed:
            return
        if self._upstream == "ssl":
            self._ssl_answer(data)
        elif self._phase == "raw":
            self._send(CLIENT, data)
        else:
            self._server_messages(data)

    def _from_client(self, data: bytes) -> None:
        if self._closed:
            return
        if self._phase == "ready":
            self._client_messages(data)
            return
        if self._phase == "raw" and self._upstream == "open":
            self._send(SERVER, data)
            return
        self._early_client += data
        if len(self._early_client) > self.limits.statement_max_bytes:
            raise LimitExceeded(
                "too much was sent ahead",
                limit="statement_max_bytes",
                value=self.limits.statement_max_bytes,
            )
        if self._phase == "startup":
            self._startup_packets()
        elif self._phase == "auth":
            self._auth_answers()

    # -- the client's first packets

    def _startup_packets(self) -> None:
        limit = self.limits.startup_max_bytes
        buffer = self._early_client
        while not self._closed and self._phase == "startup" and buffer:
            if buffer[0] == 0x16:  # a TLS record: handshake
                self._client_hello()
                return
            if len(buffer) < 8:
                return
            length, code = struct.unpack_from("!Ii", buffer)
            if not 8 <= length <= limit:
                raise ProtocolError(f"a start-up packet of {length} bytes (limit {limit})")
            if len(buffer) < length:
                return
            packet = bytes(buffer[4:length])
            del buffer[:length]
            self._spoke = True
            if self._upstream == "connected":
                self._ask_server()
            if code in (messages.SSL_REQUEST, messages.GSSENC_REQUEST):
                self._answered_n = self._answered_n or code == messages.SSL_REQUEST
                self._send(CLIENT, b"N")
            elif code == messages.CANCEL_REQUEST:
                self._cancel(packet)
                return
            else:
                self._begin(messages.parse_startup(packet))

    def _client_hello(self) -> None:
        """Direct TLS: nothing of it can be read, and nothing can be answered."""
        if self._refused is not None or self.context.judge_connect("opaque").action is Action.DENY:
            self._close(CloseReason.DENIED, "the client begins with TLS, which cannot be inspected")
            return
        if self._upstream not in ("connecting", "connected"):
            raise ProtocolError("TLS begins where the start-up message has to stand")
        self._client_speaks_tls = True
        self._phase = "raw"
        self._gap(GapReason.CLIENT_REQUIRES_TLS, "the client begins with TLS")
        if self._upstream == "connected":
            self._ask_server()

    def _cancel(self, packet: bytes) -> None:
        record_id = self.context.ids.new(self._now)
        self._record(
            Record(
                id=record_id,
                ts_ns=self._now,
                kind="request",
                flow=self.facts.flow,
                origin=self.context.origin_summary,
                principal=self.context.principal_summary,
                target=self.context.target_part("postgres"),
                operation=OperationPart(kind="cancel"),
            )
        )
        if self._refused is not None:
            self._close(CloseReason.DENIED)
            return
        self._phase = "raw"
        self._early_client[:0] = _LENGTH.pack(len(packet) + 4) + packet
        if self._upstream == "open":
            self._flush_raw()

    def _begin(self, startup: Startup) -> None:
        self._startup_seen = True
        judge = self.judge
        user = startup.get(b"user")
        judge.user = user.decode("utf-8", "replace") if user else None
        database = startup.get(b"database")
        judge.database = database.decode("utf-8", "replace") if database else judge.user
        judge.replication = (startup.get(b"replication") or b"").lower() not in (
            b"",
            b"false",
            b"off",
            b"no",
            b"0",
        )
        judge.target = msgspec.Raw(
            msgspec.msgpack.encode(
                self.context.target_part("postgres", database=judge.database, user=judge.user, tls=self._tls)
            )
        )
        attachment = self.facts.attachment
        reserved = attachment.reserved_setting
        options = (startup.get(b"options") or b"").decode("utf-8", "replace")
        if self._refused is None and reserved and option_sets(options, reserved):
            self._refused = (
                "42501",
                denial_message(ATTACH_RULE, f"only the inspector sets {reserved}"),
                ATTACH_RULE,
            )
        if self._refused is not None:
            sqlstate, text, rule = self._refused
            self._send(CLIENT, self._error(sqlstate, text, self.facts.flow, severity="FATAL"))
            identity = rule == IDENTITY_RULE
            self._close(CloseReason.IDENTITY_REQUIRED if identity else CloseReason.DENIED, text)
            return
        parameters = [
            pair
            for pair in startup.parameters
            if not reserved or pair[0].decode("utf-8", "replace").lower() != reserved.lower()
        ]
        if attachment.postgres_application_name is not None:
            parameters = [pair for pair in parameters if pair[0] != b"application_name"]
            parameters.append((b"application_name", attachment.postgres_application_name.encode()))
        self._startup = Startup(startup.version, tuple(parameters))
        self._phase = "auth"
        if self._upstream == "open":
            self._send(SERVER, self._startup.encode())

    def _auth_answers(self) -> None:
        """Only password messages pass before the first ReadyForQuery; whatever is sent ahead waits to be judged."""
        buffer = self._early_client
        while len(buffer) >= 5 and buffer[0] == 0x70:  # p: PasswordMessage, SASL and GSS responses
            (length,) = _LENGTH.unpack_from(buffer, 1)
            if not 4 <= length <= PASSWORD_MAX_BYTES:
                raise ProtocolError(f"a password message of {length} bytes (limit {PASSWORD_MAX_BYTES})")
            if len(buffer) < length + 1:
                return
            self._send(SERVER, bytes(buffer[: length + 1]))
            del buffer[: length + 1]


def option_sets(options: str, name: str) -> bool:
    """Whether `options` (backend command-line switches) sets `name`, in any spelling: `-c name=`, `-cname=`, `--name=`."""
    wanted = name.lower().replace("-", "_")
    text = re.sub(r"\\(.)", r"\1", options).lower().replace("-", "_")
    return wanted in text
