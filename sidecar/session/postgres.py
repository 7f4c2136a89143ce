"""One PostgreSQL connection: start-up, judging, masking, recording. Sans-io; see session.commands.

Theory of operation
-------------------
    startup   the client's first packets: SSLRequest and GSSENCRequest are answered `N`, the StartupMessage waits for upstream
    upstream  our SSLRequest, TLS where the server offers it; then the StartupMessage, with our application_name
    auth      the server asks, the client answers; anything else of the client waits
    inject    after the first ReadyForQuery, which the client does not see yet: assertion and catalog, under names of ours
    ready     client messages are judged, server messages matched to what they answer
    raw       opaque relay: TLS that we cannot open, cancel requests

A refused message is replaced by one that the server itself rejects, and its ErrorResponse is rewritten: transaction status,
skipping until Sync and COMMIT's answers are then the server's own. Untouched bytes leave as slices of what came in.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections import deque
from typing import Any, Final

import msgspec

from sidecar.codecs.postgres import messages
from sidecar.codecs.postgres.messages import Column, Startup
from sidecar.errors import LimitExceeded, ProtocolError
from sidecar.model.flow import Side
from sidecar.model.ids import short_id
from sidecar.model.operation import SqlOperation
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.model.record import HoldPart, OperationPart, Record, ResponsePart
from sidecar.model.verdict import Action, Engine, MaskPlan, ValueMask
from sidecar.session.commands import (
    CloseFlow,
    Command,
    HalfClose,
    OpenHold,
    OpenUpstream,
    PauseReading,
    Send,
    SignAssertion,
    StartTls,
    WithdrawHold,
    WriteRecord,
)
from sidecar.session.context import (
    IDENTITY_RULE,
    SessionContext,
    denial_message,
    identity_verdict_part,
    verdict_part,
)
from sidecar.session.postgres_catalog import SNAPSHOT_QUERY, Catalog
from sidecar.session.postgres_exchange import Decision, Exchange, Held, Portal, Prepared, response_record

CLIENT, SERVER = Side.CLIENT, Side.SERVER
REJECTED_TEXT: Final = b"sidecar: refused before it was sent"
"""Stands in for a refused statement: no grammar accepts it, whatever the transaction's state."""
INJECTED: Final = b"_sidecar"
DECISIONS_MAX: Final = 4096
PREPARED_MAX: Final = 65_536
REQUIRES_TLS_DETAIL: Final = "the client left after our answer N: it requires TLS"
DETECT_TYPES: Final = frozenset({18, 19, 25, 114, 142, 705, 1042, 1043, 3802})
"""Text-like types in which detectors look: char, name, text, json, xml, unknown, bpchar, varchar, jsonb."""

_HEAD = struct.Struct("!cI")
_head = _HEAD.unpack_from
_LENGTH = struct.Struct("!I")


class PostgresSession:
    """Implements session.commands.Session."""

    def __init__(self, context: SessionContext) -> None:
        self.context = context
        self.facts = context.facts
        self.engine: Engine = context.engine
        self.client_requires_tls = False
        self._phase = "startup"
        self._upstream = "none"
        self._tls = "none"
        self._client = bytearray()
        self._server = bytearray()
        self._startup: Startup | None = None
        self._startup_seen = False
        self._refused: tuple[str, str, str] | None = None
        self._answered_n = False
        self._out: list[Command] = []
        self._now = 0
        self._bytes = [0, 0]
        self._closed = False
        self._client_eof = False
        self._database: str | None = None
        self._user: str | None = None
        self._target: Any = None
        self._strings = True
        self._utf8 = True
        self._status = b"I"
        self._pending: deque[Exchange] = deque()
        self._statements: dict[bytes, Prepared] = {}
        self._portals: dict[bytes, Portal] = {}
        self._decisions: dict[bytes, Decision] = {}
        self._backend_pid = 0
        self._held_ready: list[bytes] = []
        self._injections: deque[tuple[str, bytes]] = deque()
        self._injecting: str | None = None
        self._injected_rows: list[list[bytes | None]] = []
        self._injected_failed = ""
        self._catalog = Catalog()
        self._stale = True
        self._passing_client = 0
        self._passing_server = 0
        self._notices: list[bytes] = []
        self._held: Held | None = None
        self._paused = False
        self._discard_until_sync = False

    # -- events

    def start(self, now_ns: int) -> list[Command]:
        self._now = now_ns
        out = self._out
        context = self.context
        denial = context.identity_denial()
        verdict = context.judge_connect("opaque" if self.facts.client_wants_tls else "postgres")
        if denial is not None:
            self._refused = ("42501", denial_message(IDENTITY_RULE, denial), IDENTITY_RULE)
            part = identity_verdict_part(denial, self.engine.revision)
        else:
            part = verdict_part(verdict)
            if verdict.action is Action.DENY:
                self._refused = (
                    "42501",
                    denial_message(verdict.rule, verdict.reason),
                    verdict.rule or "default",
                )
        out.append(WriteRecord(context.open_record("postgres", part, now_ns)))
        if self._refused is None:
            self._upstream = "connecting"
            out.append(OpenUpstream())
            if self.facts.client_wants_tls or self.facts.target.tls_mode == "passthrough":
                self._go_raw(
                    GapReason.CLIENT_REQUIRES_TLS, "the client demands TLS, which this version does not open"
                )
        return self._take()

    def upstream_connected(self, now_ns: int) -> list[Command]:
        self._now = now_ns
        if self._phase == "raw":
            self._upstream = "open"
            self._flush_raw()
        elif self.facts.target.tls_mode == "disable":
            self._upstream_open()
        else:
            self._upstream = "ssl"
            self._send(SERVER, struct.pack("!ii", 8, messages.SSL_REQUEST))
        return self._take()

    def tls_started(self, now_ns: int) -> list[Command]:
        self._now = now_ns
        self._tls = "tls"
        self._upstream_open()
        return self._take()

    def receive(self, side: Side, data: bytes, now_ns: int) -> list[Command]:
        self._now = now_ns
        try:
            if side is CLIENT:
                self._bytes[0] += len(data)
                self._from_client(data)
            else:
                self._bytes[1] += len(data)
                self._from_server(data)
        except LimitExceeded as error:
            self._fail("54000", f"sidecar: {error.message}", CloseReason.LIMIT, error.message)
        except ProtocolError as error:
            self._fail(
                "08P01",
                f"sidecar: {error.message}",
                CloseReason.PROTOCOL_ERROR,
                f"{side.value}: {error.message}",
            )
        return self._take()

    def eof(self, side: Side, now_ns: int) -> list[Command]:
        self._now = now_ns
        if side is CLIENT:
            self._client_eof = True
            if self._phase == "startup" and self._answered_n and not self._startup_seen:
                self.client_requires_tls = True
                self._out.append(
                    WriteRecord(
                        self.context.gap_record(
                            GapReason.CLIENT_REQUIRES_TLS, now_ns, detail=REQUIRES_TLS_DETAIL
                        )
                    )
                )
                self._close(CloseReason.CLIENT_CLOSED, REQUIRES_TLS_DETAIL)
            elif self._phase == "raw" and self._upstream == "open":
                self._out.append(HalfClose(SERVER))
            else:
                self._close(CloseReason.CLIENT_CLOSED)
        elif self._phase == "raw" and not self._client_eof:
            self._close(CloseReason.SERVER_CLOSED)
        else:
            self._close(CloseReason.SERVER_CLOSED)
        return self._take()

    def assertion_signed(self, assertion: str | None, now_ns: int) -> list[Command]:
        self._now = now_ns
        if self._phase != "inject":
            return self._take()
        setting = self.facts.attachment.postgres_setting
        if assertion is None or setting is None:
            self._gap("the identity assertion could not be signed")
        else:
            # Both are ours and of a small alphabet; quoted all the same.
            name, value = setting.replace("'", "''"), assertion.replace("'", "''")
            text = f"SELECT pg_catalog.set_config('{name}', '{value}', false)".encode()
            self._injections.append(("setting", text))
        self._inject_next()
        return self._take()

    def hold_decided(
        self, hold_id: str, outcome: str, by: str | None, reason: str, now_ns: int
    ) -> list[Command]:
        self._now = now_ns
        held = self._held
        if held is None or held.hold_id != hold_id:
            return self._take()
        self._held = None
        if outcome == "approved":
            decision = self._decide(
                held.portal.prepared.raw
                if held.portal
                else held.decision.text.encode("utf-8", "surrogateescape")
            )
            again = decision.verdict
            if decision.passes or (again.action is Action.HOLD and again.rule == held.decision.verdict.rule):
                self._release(held, decision)
            else:
                self._refuse(
                    held.kind,
                    held.record_id,
                    decision.denial or ("42501", denial_message(again.rule, again.reason), again.rule or ""),
                    held.portal,
                )
        else:
            who = f" by {by}" if by else ""
            why = f"{outcome}{who}" + (f": {reason}" if reason else "")
            rule = held.decision.verdict.rule or ""
            self._refuse(held.kind, held.record_id, ("42501", denial_message(rule, why), rule), held.portal)
        rest = bytes(held.rest)
        if self._paused:
            self._paused = False
            self._out.append(PauseReading(CLIENT, False))
        if rest and not self._closed:
            try:
                self._from_client(rest)
            except (ProtocolError, LimitExceeded) as error:
                self._fail("08P01", f"sidecar: {error.message}", CloseReason.PROTOCOL_ERROR, error.message)
        return self._take()

    def engine_changed(self, engine: Engine, now_ns: int) -> list[Command]:
        self._now = now_ns
        self.engine = self.context.engine = engine
        self._decisions.clear()
        if not self._catalog.known:
            self._stale = True
        return self._take()

    def abort(self, reason: CloseReason, detail: str, now_ns: int) -> list[Command]:
        self._now = now_ns
        if (
            reason
            not in (CloseReason.UPSTREAM_UNREACHABLE, CloseReason.CLIENT_CLOSED, CloseReason.SERVER_CLOSED)
            and self._phase != "raw"
        ):
            self._send(
                CLIENT,
                messages.error(
                    "58000",
                    f"sidecar: {detail or reason.value}",
                    severity="FATAL",
                    hint="this is a failure of the inspector's, not of the server; sidecar status",
                ),
            )
        self._close(reason, detail)
        return self._take()

    # -- small tools

    def _take(self) -> list[Command]:
        out, self._out = self._out, []
        return out

    def _send(self, side: Side, data: Any) -> None:
        self._out.append(Send(side, data))

    def _to_client(self, data: bytes) -> None:
        """Something of ours for the client: at a message boundary of the server's stream."""
        if self._passing_server:
            self._notices.append(data)
        else:
            self._send(CLIENT, data)

    def _gap(self, detail: str) -> None:
        self._out.append(
            WriteRecord(self.context.gap_record(GapReason.UNKNOWN_PROTOCOL, self._now, detail=detail))
        )

    def _close(self, reason: CloseReason, detail: str | None = None) -> None:
        if self._closed:
            return
        self._closed = True
        if self._held is not None:
            self._out.append(WithdrawHold(self._held.hold_id))
            self._held = None
        for exchange in self._pending:
            if exchange.record_id and exchange.rewrite is None:
                exchange.error = {"message": "the connection ended before the answer"}
                self._record_response(exchange)
        self._pending.clear()
        self._out.append(
            WriteRecord(
                self.context.close_record(
                    reason, self._now, detail=detail, bytes_client=self._bytes[0], bytes_server=self._bytes[1]
                )
            )
        )
        self._out.append(CloseFlow(reason))

    def _fail(self, sqlstate: str, text: str, reason: CloseReason, detail: str) -> None:
        if self._phase != "raw" and not self._passing_server:
            self._send(CLIENT, messages.error(sqlstate, text, severity="FATAL"))
        self._close(reason, detail)

    # -- raw relay

    def _go_raw(self, reason: GapReason, detail: str) -> None:
        self._phase = "raw"
        self._out.append(WriteRecord(self.context.gap_record(reason, self._now, detail=detail)))

    def _flush_raw(self) -> None:
        if self._client:
            self._send(SERVER, bytes(self._client))
            self._client.clear()

    # -- start-up

    def _from_client(self, data: bytes) -> None:
        if self._closed:
            return
        if self._phase == "raw":
            if self._upstream == "open":
                self._send(SERVER, data)
            else:
                self._client += data
        elif self._phase == "ready":
            self._client_messages(data)
        else:
            self._client += data
            if self._phase == "startup":
                self._startup_packets()
            elif self._phase == "auth":
                self._auth_answers()
            elif len(self._client) > self.context.limits.statement_max_bytes:
                raise LimitExceeded(
                    "too much was sent ahead",
                    limit="statement_max_bytes",
                    value=self.context.limits.statement_max_bytes,
                )

    def _startup_packets(self) -> None:
        limit = self.context.limits.startup_max_bytes
        buffer = self._client
        while not self._closed and self._phase == "startup" and buffer:
            if buffer[0] == 0x16 and not self._startup_seen:
                if self._refused is not None:
                    self._close(CloseReason.DENIED, "TLS without the possibility to answer")
                    return
                if self.context.judge_connect("opaque").action is Action.DENY:
                    self._close(
                        CloseReason.DENIED, "TLS cannot be inspected, and the policy's default denies"
                    )
                    return
                self._go_raw(GapReason.CLIENT_REQUIRES_TLS, "the client begins with TLS")
                if self._upstream == "open":
                    self._flush_raw()
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
            if code in (messages.SSL_REQUEST, messages.GSSENC_REQUEST):
                if self._startup_seen:
                    raise ProtocolError("an encryption request after the start-up message")
                self._answered_n = self._answered_n or code == messages.SSL_REQUEST
                self._send(CLIENT, b"N")
            elif code == messages.CANCEL_REQUEST:
                self._cancel(packet)
                return
            else:
                self._begin(messages.parse_startup(packet))
                return

    def _cancel(self, packet: bytes) -> None:
        record = Record(
            id=self.context.ids.new(self._now),
            ts_ns=self._now,
            kind="request",
            flow=self.facts.flow,
            origin=self.context.origin_summary,
            principal=self.context.principal_summary,
            target=self.context.target_part("postgres"),
            operation=OperationPart(kind="cancel"),
        )
        self._out.append(WriteRecord(record))
        if self._refused is not None:
            self._close(CloseReason.DENIED)
            return
        self._phase = "raw"
        self._client[:0] = _LENGTH.pack(len(packet) + 4) + packet
        if self._upstream == "open":
            self._flush_raw()

    def _begin(self, startup: Startup) -> None:
        self._startup_seen = True
        user = startup.get(b"user")
        self._user = user.decode("utf-8", "replace") if user else None
        database = startup.get(b"database")
        self._database = database.decode("utf-8", "replace") if database else self._user
        self._target = msgspec.Raw(
            msgspec.msgpack.encode(
                self.context.target_part("postgres", database=self._database, user=self._user, tls=self._tls)
            )
        )
        attachment = self.facts.attachment
        reserved = attachment.reserved_setting
        options = (startup.get(b"options") or b"").decode("utf-8", "replace")
        if reserved and _option_sets(options, reserved):
            self._refused = (
                "42501",
                denial_message("identity.attach", f"only the inspector sets {reserved}"),
                "identity.attach",
            )
        if self._refused is not None:
            sqlstate, text, rule = self._refused
            record_id = self.facts.flow
            self._send(CLIENT, self._error(sqlstate, text, record_id, severity="FATAL"))
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

    def _upstream_open(self) -> None:
        self._upstream = "open"
        if self._phase == "raw":
            self._flush_raw()
        elif self._startup is not None:
            self._send(SERVER, self._startup.encode())

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
                text = (
                    f"the server offers no TLS, and the target {target.name} has tls.mode {target.tls_mode}"
                )
                self._fail("58000", f"sidecar: {text}", CloseReason.UPSTREAM_TLS, text)
                return
            self._upstream_open()
            if len(data) > 1:
                self._from_server(data[1:])
        else:
            raise ProtocolError("the server does not answer SSLRequest as PostgreSQL does")

    def _auth_answers(self) -> None:
        """Only password messages pass before the first ReadyForQuery; whatever is sent ahead waits to be judged."""
        buffer = self._client
        while len(buffer) >= 5 and buffer[0] == 0x70:  # p
            (length,) = _LENGTH.unpack_from(buffer, 1)
            if not 4 <= length <= 65_536:
                raise ProtocolError("a password message of that size")
            if len(buffer) < length + 1:
                return
            self._send(SERVER, bytes(buffer[: length + 1]))
            del buffer[: length + 1]
        if len(buffer) > self.context.limits.statement_max_bytes:
            raise LimitExceeded(
                "too much was sent ahead",
                limit="statement_max_bytes",
                value=self.context.limits.statement_max_bytes,
            )

    # -- client messages

    def _client_messages(self, data: bytes) -> None:
        if self._held is not None:
            self._read_ahead(data)
            return
        if self._injecting is not None:
            self._client += data
            return
        if self._passing_client:
            take = min(self._passing_client, len(data))
            self._send(SERVER, memoryview(data)[:take])
            self._passing_client -= take
            data = data[take:]
            if not data:
                return
        if self._client:
            self._client += data
            data = bytes(self._client)
            self._client.clear()
        view = memoryview(data)
        end = len(data)
        start = offset = 0
        limits = self.context.limits
        while offset + 5 <= end:
            kind, length = _head(data, offset)
            if length < 4:
                raise ProtocolError(f"a client message of length {length}")
            after = offset + 1 + length
            if after > end:
                if kind in b"QPBFDEC" and length > limits.statement_max_bytes:
                    raise LimitExceeded(
                        f"a message of {length} bytes",
                        limit="statement_max_bytes",
                        value=limits.statement_max_bytes,
                    )
                if kind in b"QPBFDEC":
                    break
                self._send(SERVER, view[start:end])
                self._passing_client = after - end
                return
            if kind == b"S":
                self._pending.append(Exchange("S", self._now))
            elif kind in b"QPBEDCF":
                if self._stale and kind in b"QP" and self._idle() and self._wants_catalog():
                    if start < offset:
                        self._send(SERVER, view[start:offset])
                    self._client += view[offset:]
                    self._injections.append(("catalog", SNAPSHOT_QUERY))
                    self._inject_next()
                    return
                # `handle` returns None to let the message pass as it is, else it has dealt with it.
                mark = len(self._out)
                if self._handle(kind, data, offset, after) is not None:
                    if start < offset:
                        self._out.insert(mark, Send(SERVER, view[start:offset]))
                    start = after
                    if self._closed:
                        return
                    if self._held is not None:
                        self._read_ahead(bytes(view[after:]))
                        return
            offset = after
        if start < offset:
            self._send(SERVER, view if start == 0 and offset == end else view[start:offset])
        if offset < end:
            self._client += view[offset:]

    def _read_ahead(self, data: bytes) -> None:
        held = self._held
        assert held is not None
        held.rest += data
        if len(held.rest) > self.context.limits.held_max_bytes and not self._paused:
            self._paused = True
            self._out.append(PauseReading(CLIENT, True))

    def _idle(self) -> bool:
        return not self._pending and self._status == b"I" and not self._passing_server

    def _wants_catalog(self) -> bool:
        return self._decide(b"SELECT 1").verdict.record_masks.has_columns

    def _handle(self, kind: bytes, data: bytes, offset: int, after: int) -> bool | None:
        body = offset + 5
        if kind == b"Q":
            return self._simple(data, offset, after)
        if kind == b"P":
            return self._parse(data, body, after)
        if kind == b"B":
            bind = messages.parse_bind(data[body:after])
            prepared = self._statements.get(bind.statement)
            if prepared is not None:
                if len(self._portals) >= PREPARED_MAX:
                    raise LimitExceeded("too many portals", limit="portals", value=PREPARED_MAX)
                self._portals[bind.portal] = Portal(prepared, bind)
            self._pending.append(Exchange("B", self._now))
            return None
        if kind == b"E":
            return self._execute(data, offset, body, after)
        if kind == b"D":
            exchange = Exchange("D", self._now)
            name = data[body + 1 : after - 1]
            if data[body] == 0x53:  # S
                exchange.prepared = self._statements.get(name)
            else:
                exchange.portal = self._portals.get(name)
                if exchange.portal is not None:
                    exchange.portal.described = True
            self._pending.append(exchange)
            return None
        if kind == b"C":
            name = data[body + 1 : after - 1]
            (self._statements if data[body] == 0x53 else self._portals).pop(name, None)
            self._pending.append(Exchange("C", self._now))
            return None
        return self._function_call(data, offset, after)

    def _decide(self, raw: bytes) -> Decision:
        decision = self._decisions.get(raw)
        if decision is not None:
            return decision
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        verdict = self.engine.evaluate(
            SqlOperation("query", text, self._database, self._user, None, self._strings), self.facts
        )
        denial = None
        reserved = self.facts.attachment.reserved_setting
        facts = verdict.sql
        part = verdict_part(verdict)
        if verdict.action is Action.DENY:
            denial = ("42501", denial_message(verdict.rule, verdict.reason), verdict.rule or "default")
        elif verdict.action is Action.INVALID:
            denial = ("42601", verdict.reason, "")
        if denial is None and reserved and facts is not None and facts.settings:
            attached = self.facts.attachment.postgres_setting is not None
            if reserved.lower() in facts.settings or (attached and "*" in facts.settings):
                denial = (
                    "42501",
                    denial_message("identity.attach", f"only the inspector sets {reserved}"),
                    "identity.attach",
                )
                part.action, part.rule, part.reason = (
                    "deny",
                    "identity.attach",
                    f"only the inspector sets {reserved}",
                )
        decision = Decision(
            text=text,
            verdict=verdict,
            operation=self._operation(raw, text, verdict),
            part=part,
            passes=denial is None and verdict.action is not Action.HOLD,
            denial=denial,
        )
        if len(raw) <= 16_384:
            if len(self._decisions) >= DECISIONS_MAX:
                self._decisions.clear()
            self._decisions[raw] = decision
        return decision

    def _operation(self, raw: bytes, text: str, verdict: Any) -> OperationPart:
        """The record's form of a text: masked literals and passwords replaced by their place, cut to the limit."""
        facts = verdict.sql
        shown: str | bytes = text
        if facts is not None and (facts.password_spans or facts.masked_literal_spans):
            encoded = bytearray(text.encode("utf-8", "surrogateescape"))
            for start, end in sorted({*facts.password_spans, *facts.masked_literal_spans}, reverse=True):
                encoded[start:end] = f"'[masked at {start}]'".encode()
            shown = encoded.decode("utf-8", "replace")
        elif verdict.action is Action.INVALID and "password" in text.lower():
            shown = "[not recorded: a text that cannot be parsed and speaks of a password]"
        limit = self.context.limits.record_text_max_bytes
        size = len(raw)
        cut = size > limit
        return OperationPart(
            kind="query",
            text=shown[:limit] if cut else shown,
            text_bytes=size if cut else None,
            text_digest=hashlib.sha256(raw).hexdigest() if cut else None,
            truncated=cut,
            objects=verdict.objects,
            statements=verdict.statements,
        )

    def _request(
        self, decision: Decision, kind: str, parameters: tuple[Any, ...] | None, *, verdict: Any = None
    ) -> str:
        """Write a request record; returns its id."""
        operation = decision.operation
        if kind != "query" or parameters is not None:
            operation = msgspec.structs.replace(
                operation, kind=kind, parameters=self._shown(decision, parameters)
            )
        record_id = self.context.ids.new(self._now)
        self._out.append(
            WriteRecord(
                Record(
                    id=record_id,
                    ts_ns=self._now,
                    kind="request",
                    flow=self.facts.flow,
                    origin=self.context.origin_summary,
                    principal=self.context.principal_summary,
                    target=self._target,
                    operation=operation,
                    verdict=verdict or decision.part,
                )
            )
        )
        return record_id

    def _shown(self, decision: Decision, parameters: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        facts = decision.verdict.sql
        limit = self.context.limits.record_text_max_bytes
        if parameters is None:
            return None
        hidden = facts.masked_parameters if facts is not None else ()
        if not hidden and all(value is None or len(value) <= limit for value in parameters):
            return parameters
        return tuple(
            f"[masked parameter ${index + 1}]"
            if index in hidden
            else value
            if value is None
            else value[:limit]
            for index, value in enumerate(parameters)
        )

    def _simple(self, data: bytes, offset: int, after: int) -> bool | None:
        if data[after - 1] != 0:
            raise ProtocolError("a Query is not terminated")
        raw = data[offset + 5 : after - 1]
        decision = self._decide(raw)
        record_id = self._request(decision, "query", None)
        if decision.passes:
            self._expect_query(decision, record_id)
            return None
        if decision.verdict.action is Action.HOLD and decision.denial is None:
            self._hold("Q", data[offset:after], decision, None, None, record_id)
        else:
            assert decision.denial is not None
            self._refuse("Q", record_id, decision.denial, None, decision)
        return True

    def _expect_query(self, decision: Decision, record_id: str) -> Exchange:
        exchange = Exchange("Q", self._now)
        exchange.record_id = record_id
        exchange.plan = decision.verdict.record_masks if decision.verdict.record_masks else None
        exchange.prepared = (
            Prepared(decision.text.encode("utf-8", "surrogateescape")) if exchange.plan else None
        )
        self._pending.append(exchange)
        self._note_ddl(decision)
        return exchange

    def _note_ddl(self, decision: Decision) -> None:
        facts = decision.verdict.sql
        if facts is not None and facts.may_change_catalog:
            self._stale = True

    def _parse(self, data: bytes, body: int, after: int) -> bool | None:
        try:
            end = data.index(b"\0", body, after)
            stop = data.index(b"\0", end + 1, after)
        except ValueError as error:
            raise ProtocolError("a Parse is not terminated") from error
        name, raw = data[body:end], data[end + 1 : stop]
        decision = self._decide(raw)
        if decision.denial is not None:
            record_id = self._request(decision, "parse", None)
            self._send(SERVER, messages.parse(name, REJECTED_TEXT))
            self._statements.pop(name, None)
            self._expect_rejection("P", record_id, decision.denial, decision)
            return True
        if len(self._statements) >= PREPARED_MAX:
            raise LimitExceeded(
                "too many prepared statements", limit="prepared_statements", value=PREPARED_MAX
            )
        self._statements[name] = Prepared(raw)
        self._pending.append(Exchange("P", self._now))
        return None

    def _execute(self, data: bytes, offset: int, body: int, after: int) -> bool | None:
        end = data.index(b"\0", body, after) if b"\0" in data[body:after] else -1
        if end < 0:
            raise ProtocolError("an Execute is not terminated")
        portal = self._portals.get(data[body:end])
        if portal is None:
            # Unknown to us, so unknown to the server, or made where we could not look: the server says which.
            exchange = Exchange("E", self._now)
            decision = self._decide(b"SELECT 1")
            if decision.verdict.record_masks.has_columns or not decision.passes:
                self._refuse(
                    "E",
                    self._request(decision, "execute", None),
                    ("34000", "sidecar: this portal is not known", ""),
                    None,
                )
                return True
            self._pending.append(exchange)
            return None
        decision = self._decide(portal.prepared.raw)
        parameters = portal.bind.parameters
        record_id = self._request(decision, "execute", parameters)
        if decision.passes:
            plan = decision.verdict.record_masks
            if plan and not portal.described and portal.columns is None and portal.prepared.columns is None:
                # Rows without a description cannot be masked: ask for it, unseen by the client.
                self._send(SERVER, messages.describe_portal(data[body:end]))
                hidden = Exchange("D", self._now)
                hidden.hidden = True
                hidden.portal = portal
                self._pending.append(hidden)
                self._send(SERVER, data[offset:after])
                self._expect_execute(decision, portal, record_id)
                return True
            self._expect_execute(decision, portal, record_id)
            return None
        if decision.denial is not None:
            self._refuse("E", record_id, decision.denial, portal, decision)
        else:
            self._hold("E", data[offset:after], decision, parameters, portal, record_id)
        return True

    def _expect_execute(self, decision: Decision, portal: Portal, record_id: str) -> Exchange:
        exchange = Exchange("E", self._now)
        exchange.record_id = record_id
        exchange.portal = portal
        exchange.plan = decision.verdict.record_masks if decision.verdict.record_masks else None
        self._pending.append(exchange)
        self._note_ddl(decision)
        return exchange

    def _function_call(self, data: bytes, offset: int, after: int) -> bool | None:
        """Fast-path calls say nothing that a rule could look at: judged as an opaque statement."""
        decision = self._decide(b"DO $$ fast-path function call $$")
        record_id = self._request(decision, "function_call", None)
        if decision.passes and not decision.verdict.masks:
            exchange = Exchange("F", self._now)
            exchange.record_id = record_id
            self._pending.append(exchange)
            return None
        rule = decision.verdict.rule or "default"
        self._refuse(
            "Q",
            record_id,
            ("42501", denial_message(rule, "function calls by fast path cannot be judged"), rule),
            None,
        )
        return True

    # -- refusing and holding

    def _error(
        self, sqlstate: str, text: str, record_id: str, *, severity: str = "ERROR", position: int = 0
    ) -> bytes:
        if sqlstate == "42601":
            return messages.error(sqlstate, text, severity=severity, position=position)
        short = short_id(record_id)
        target = self.facts.target
        return messages.error(
            sqlstate,
            text,
            severity=severity,
            detail=f"not sent to {target.name or target.host}; record {short}",
            hint=f"sidecar why {short}",
        )

    def _refuse(
        self,
        kind: str,
        record_id: str,
        denial: tuple[str, str, str],
        portal: Portal | None,
        decision: Decision | None = None,
    ) -> None:
        sqlstate, text, _ = denial
        position = decision.verdict.syntax.position if decision is not None and decision.verdict.syntax else 0
        if kind == "Q":
            if self._idle():
                self._to_client(
                    self._error(sqlstate, text, record_id, position=position) + messages.ready_for_query(b"I")
                )
                return
            self._send(SERVER, messages.query(REJECTED_TEXT))
        else:
            self._send(SERVER, messages.parse(INJECTED + b"_refused", REJECTED_TEXT))
        self._expect_rejection("Q" if kind == "Q" else "P", record_id, denial, decision)

    def _expect_rejection(
        self, kind: str, record_id: str, denial: tuple[str, str, str], decision: Decision | None
    ) -> None:
        sqlstate, text, _ = denial
        position = decision.verdict.syntax.position if decision is not None and decision.verdict.syntax else 0
        exchange = Exchange(kind, self._now)
        exchange.rewrite = self._error(sqlstate, text, record_id, position=position)
        self._pending.append(exchange)

    def _hold(
        self,
        kind: str,
        data: bytes,
        decision: Decision,
        parameters: tuple[Any, ...] | None,
        portal: Portal | None,
        record_id: str,
    ) -> None:
        verdict = decision.verdict
        assert verdict.approve is not None
        hold_id = self.context.ids.new(self._now)
        principal = self.facts.principal
        digest = hashlib.sha256(
            msgspec.msgpack.encode(
                [data, decision.text, parameters, str(self.facts.target.address), self._database, self._user,
                 [principal.issuer, principal.subject] if principal else None]
            )
        ).hexdigest()  # fmt: skip
        self._held = Held(hold_id, kind, data, decision, parameters, portal, record_id, self._now)
        expires_ns = self._now + int(verdict.approve.within_s * 1e9)
        self._out.append(
            WriteRecord(
                Record(
                    id=self.context.ids.new(self._now),
                    ts_ns=self._now,
                    kind="hold",
                    flow=self.facts.flow,
                    request=record_id,
                    hold=HoldPart(id=hold_id, expires_ns=expires_ns, digest=digest, reason=verdict.reason),
                )
            )
        )
        short = short_id(hold_id)
        self._to_client(
            messages.notice(
                f"held by policy: {verdict.rule}: {verdict.reason}; hold {short}",
                hint=f"sidecar approvals approve {short}",
            )
        )
        if kind == "E":
            self._send(SERVER, messages.FLUSH)
        shown = decision.operation.text
        self._out.append(
            OpenHold(
                hold_id=hold_id,
                request_id=record_id,
                rule=verdict.rule or "",
                reason=verdict.reason,
                terms=verdict.approve,
                summary=shown if isinstance(shown, str) else (shown or b"").decode("utf-8", "replace"),
                parameters=self._shown(decision, parameters),
                digest=digest,
            )
        )

    def _release(self, held: Held, decision: Decision) -> None:
        self._send(SERVER, held.data)
        if held.kind == "Q":
            exchange = self._expect_query(decision, held.record_id)
        else:
            assert held.portal is not None
            plan = decision.verdict.record_masks
            if plan and held.portal.columns is None and held.portal.prepared.columns is None:
                self._out.pop()
                self._send(SERVER, messages.describe_portal(held.portal.bind.portal))
                hidden = Exchange("D", self._now)
                hidden.hidden, hidden.portal = True, held.portal
                self._pending.append(hidden)
                self._send(SERVER, held.data)
            exchange = self._expect_execute(decision, held.portal, held.record_id)
        exchange.held_ns = self._now - held.since_ns

    # -- injected statements

    def _inject_next(self) -> None:
        if self._injections:
            self._injecting, text = self._injections.popleft()
            self._injected_rows, self._injected_failed = [], ""
            self._send(SERVER, messages.run_named(INJECTED, text))
            return
        self._injecting = None
        if self._phase == "inject":
            self._phase = "ready"
        for data in self._held_ready:
            self._send(CLIENT, data)
        self._held_ready.clear()
        if self._client:
            waiting = bytes(self._client)
            self._client.clear()
            self._client_messages(waiting)

    def _injected(self, kind: bytes, body: bytes, whole: bytes) -> None:
        if kind == b"D":
            self._injected_rows.append(messages.parse_row(body))
        elif kind == b"E":
            self._injected_failed = messages.parse_fields(body).get("M", "?")
        elif kind in b"SAN":
            self._held_ready.insert(0, whole)
            if kind == b"S":
                self._parameter(body)
        elif kind == b"Z":
            name = self._injecting
            if self._injected_failed:
                self._gap(f"the injected statement ({name}) failed: {self._injected_failed}")
            if name == "catalog":
                self._stale = False
                if not self._injected_failed:
                    self._catalog.load(self._injected_rows)
            self._injected_rows = []
            self._inject_next()

    def _first_ready(self, whole: bytes) -> None:
        self._phase = "inject"
        self._status = b"I"
        self._held_ready = [whole]
        if self._wants_catalog():
            self._injections.append(("catalog", SNAPSHOT_QUERY))
        if self.facts.attachment.postgres_setting is not None:
            self._out.append(SignAssertion(self._backend_pid))
        else:
            self._inject_next()

    # -- server messages

    def _from_server(self, data: bytes) -> None:
        if self._closed:
            return
        if self._phase == "raw":
            self._send(CLIENT, data)
            return
        if self._upstream == "ssl":
            self._ssl_answer(data)
            return
        view: Any
        start = 0
        if self._passing_server:
            take = min(self._passing_server, len(data))
            self._passing_server -= take
            current = self._pending[0] if self._pending else None
            if current is not None and current.record_id:
                current.count(memoryview(data)[:take])
            self._send(CLIENT, memoryview(data)[:take])
            if self._passing_server:
                return
            for waiting in self._notices:
                self._send(CLIENT, waiting)
            self._notices.clear()
            data = data[take:]
        if self._server:
            self._server += data
            data = bytes(self._server)
            self._server.clear()
        view = memoryview(data)
        end = len(data)
        offset = 0
        while offset + 5 <= end:
            kind, length = _head(data, offset)
            if length < 4:
                raise ProtocolError(f"a server message of length {length}")
            after = offset + 1 + length
            if after > end:
                if self._may_stream(kind) and offset + 5 <= end:
                    self._count_partial(kind, view[offset:end])
                    self._send(CLIENT, view[start:end])
                    self._passing_server = after - end
                    return
                if length > self.context.limits.masked_row_max_bytes:
                    raise LimitExceeded(
                        f"a row of {length} bytes to mask",
                        limit="masked_row_max_bytes",
                        value=self.context.limits.masked_row_max_bytes,
                    )
                break
            replacement = self._server_message(kind, data, offset, after, view)
            if self._closed:
                return
            if replacement is not None:
                if start < offset:
                    self._send(CLIENT, view[start:offset])
                if replacement:
                    self._send(CLIENT, replacement)
                start = after
            offset = after
        if start < offset:
            self._send(CLIENT, view if start == 0 and offset == end else view[start:offset])
        if offset < end:
            self._server += view[offset:]

    def _may_stream(self, kind: bytes) -> bool:
        """Whether a large message may go through before it is whole."""
        if self._phase != "ready" or self._injecting is not None:
            return False
        if kind == b"d":
            return True
        if kind != b"D" or not self._pending:
            return False
        current = self._pending[0]
        return (
            not current.hidden
            and current.masks is None
            and not current.detect
            and (current.plan is None or current.columns is not None)
        )

    def _count_partial(self, kind: bytes, part: Any) -> None:
        if self._pending:
            current = self._pending[0]
            if kind == b"D":
                current.rows += 1
            if current.record_id:
                current.count(part)

    def _server_message(self, kind: bytes, data: bytes, offset: int, after: int, view: Any) -> bytes | None:
        """None: pass as it is. Bytes: send these instead (empty: nothing)."""
        if self._phase != "ready":
            return self._early(kind, data[offset + 5 : after], data[offset:after])
        if self._injecting is not None:
            self._injected(kind, data[offset + 5 : after], data[offset:after])
            return b""
        pending = self._pending
        current = pending[0] if pending else None
        if kind == b"D":
            if current is None:
                raise ProtocolError("a DataRow that nothing asked for")
            return self._row(current, data, offset, after, view)
        if kind == b"Z":
            return self._ready(data[offset + 5 : offset + 6])
        if kind in b"NAS":
            if kind == b"S":
                self._parameter(data[offset + 5 : after])
            return None
        if current is None:
            return None
        if kind == b"T":
            return self._described(current, messages.parse_row_description(data[offset + 5 : after]))
        if kind == b"E":
            return self._failed(current, messages.parse_fields(data[offset + 5 : after]))
        if kind == b"C":
            current.status = data[offset + 5 : after - 1].decode("utf-8", "replace")
            if current.kind == "E":
                self._finish(pending.popleft())
            return None
        if kind in b"Is":
            current.status = "EMPTY" if kind == b"I" else "SUSPENDED"
            if current.kind == "E":
                self._finish(pending.popleft())
            return None
        if kind in b"123":
            expected = {b"1": "P", b"2": "B", b"3": "C"}[kind]
            if current.kind == expected:
                if current.rewrite is not None:
                    raise ProtocolError("the server accepted what no server accepts")
                pending.popleft()
            return None
        if kind == b"n":
            if current.kind == "D":
                return self._described(current, ())
            return None
        if kind == b"d":
            current.rows += 1
            if current.record_id:
                current.count(view[offset:after])
            return None
        return None  # t, G, H, W, c, V and what is not known: byte for byte

    def _early(self, kind: bytes, body: bytes, whole: bytes) -> bytes | None:
        """Before the client has seen the first ReadyForQuery."""
        if self._phase == "inject":
            self._injected(kind, body, whole)
            return b""
        if kind == b"R" and len(body) >= 4:
            (code,) = struct.unpack_from("!i", body)
            if code == messages.AUTH_SASL and self._tls == "tls":
                return messages.message(b"R", messages.strip_channel_binding(body))
        elif kind == b"K" and len(body) >= 8:
            (self._backend_pid,) = struct.unpack_from("!i", body)
        elif kind == b"S":
            self._parameter(body)
        elif kind == b"Z":
            self._first_ready(whole)
            return b""
        elif kind == b"E":
            self._out.append(
                WriteRecord(
                    Record(
                        id=self.context.ids.new(self._now),
                        ts_ns=self._now,
                        kind="response",
                        flow=self.facts.flow,
                        request=self.facts.flow,
                        response=_error_response(messages.parse_fields(body)),
                    )
                )
            )
        return None

    def _parameter(self, body: bytes) -> None:
        name, _, value = body.rstrip(b"\0").partition(b"\0")
        if name == b"standard_conforming_strings":
            self._strings = value == b"on"
            self._decisions.clear()

    def _described(self, current: Exchange, columns: tuple[Column, ...]) -> bytes | None:
        if current.kind == "D":
            if current.prepared is not None:
                current.prepared.columns = columns
            if current.portal is not None:
                current.portal.columns = columns
            hidden = current.hidden
            self._pending.popleft()
            return b"" if hidden else None
        self._prepare_rows(current, columns)
        return None

    def _prepare_rows(self, current: Exchange, columns: tuple[Column, ...]) -> None:
        current.columns = columns
        current.masks, current.detect = None, False
        plan = current.plan
        if plan is None:
            return
        current.detect = plan.has_detectors
        if plan.has_columns:
            raw = (
                current.prepared.raw
                if current.prepared
                else current.portal.prepared.raw
                if current.portal
                else b""
            )
            facts = self._decide(raw).verdict.sql
            reached = facts is None or facts.masked_reach
            found: list[ValueMask | None] = [
                self._catalog.mask(plan, column, derived_reached=reached) for column in columns
            ]
            if any(not self._catalog.is_known(column.table_oid) for column in columns):
                self._stale = True
            if any(mask is not None for mask in found):
                current.masks = found

    def _row(self, current: Exchange, data: bytes, offset: int, after: int, view: Any) -> bytes | None:
        current.rows += 1
        if current.columns is None:
            portal = current.portal
            columns = (portal.columns or portal.prepared.columns) if portal is not None else None
            if columns is not None and portal is not None:
                self._prepare_rows(current, columns)
            elif current.plan is not None:
                raise ProtocolError("rows without a description, while masks are in force")
        if current.masks is None and not current.detect:
            current.bytes += after - offset
            digest = current.digest
            if digest is None:
                digest = current.digest = hashlib.sha256()
            digest.update(view[offset:after])
            if (
                current.rows <= self.context.limits.response_max_rows
                and current.sample_bytes < self.context.limits.response_max_bytes
            ):
                self._sample(current, messages.parse_row(view[offset + 5 : after]))
            return None
        values = messages.parse_row(view[offset + 5 : after])
        plan = current.plan
        assert plan is not None
        masked = self._mask(current, plan, values)
        row = messages.row(masked)
        observing = not self._enforced(current)
        shown = data[offset:after] if observing else row
        current.count(shown)
        if (
            current.rows <= self.context.limits.response_max_rows
            and current.sample_bytes < self.context.limits.response_max_bytes
        ):
            self._sample(current, masked)
        return None if observing else row

    def _enforced(self, current: Exchange) -> bool:
        """False where only observing rules mask: then the record is masked, and the client's row is not."""
        raw = (
            current.prepared.raw
            if current.prepared
            else current.portal.prepared.raw
            if current.portal
            else b""
        )
        return bool(self._decide(raw).verdict.masks)

    def _mask(self, current: Exchange, plan: MaskPlan, values: list[bytes | None]) -> list[bytes | None]:
        columns, masks = current.columns or (), current.masks
        if len(columns) != len(values):
            raise ProtocolError("a row has other columns than were described")
        portal = current.portal
        found: list[bytes | None] = []
        for index, value in enumerate(values):
            column = columns[index]
            mask = masks[index] if masks is not None else None
            form = portal.bind.format_of(index) if portal is not None else column.format
            if value is None:
                found.append(None)
            elif mask is not None:
                found.append(None if form else mask.apply_text(value, column.type_oid))
            elif current.detect and not form and column.type_oid in DETECT_TYPES:
                found.append(plan.detect_text(value))
            else:
                found.append(value)
        return found

    def _sample(self, current: Exchange, values: list[bytes | None]) -> None:
        shown: list[str | bytes | None] = []
        room = self.context.limits.response_max_bytes - current.sample_bytes
        for value in values:
            if value is None:
                shown.append(None)
                continue
            part = value[: max(room, 0)]
            room -= len(part)
            current.sample_bytes += len(part)
            try:
                shown.append(part.decode())
            except UnicodeDecodeError:
                shown.append(part)
        current.sample.append(tuple(shown))

    def _failed(self, current: Exchange, values: dict[str, str]) -> bytes | None:
        """ErrorResponse: for a simple query the answer goes on to ReadyForQuery; an extended one skips to Sync."""
        pending = self._pending
        if current.rewrite is not None:
            text = current.rewrite
            if current.kind == "Q":
                current.rewrite = b""
            else:
                self._skip_to_sync()
            return text
        current.error = {
            "severity": values.get("V", values.get("S", "")),
            "sqlstate": values.get("C", ""),
            "message": values.get("M", ""),
        }
        if current.kind in ("Q", "F"):
            return None
        if current.kind in ("P", "B", "D", "C", "E"):
            if current.kind == "E":
                self._finish(pending.popleft())
            self._skip_to_sync()
        return None

    def _skip_to_sync(self) -> None:
        pending = self._pending
        while pending and pending[0].kind not in ("S", "Q", "F"):
            skipped = pending.popleft()
            if skipped.record_id:
                skipped.error = skipped.error or {
                    "message": "skipped by the server after an earlier error in the pipeline"
                }
                self._finish(skipped)

    def _ready(self, status: bytes) -> bytes | None:
        self._status = status
        pending = self._pending
        if pending:
            current = pending[0]
            if current.kind in ("Q", "F", "S"):
                pending.popleft()
                if current.record_id:
                    self._finish(current)
        if status == b"I":
            self._portals.clear()
        return None

    def _finish(self, exchange: Exchange) -> None:
        if exchange.record_id:
            self._record_response(exchange)

    def _record_response(self, exchange: Exchange) -> None:
        self._out.append(
            WriteRecord(
                response_record(
                    exchange,
                    self.context.ids.new(self._now),
                    self.facts.flow,
                    self._now,
                    max_rows=self.context.limits.response_max_rows,
                )
            )
        )


def _option_sets(options: str, name: str) -> bool:
    """Whether `options` (backend command-line switches) sets `name`, in any spelling: `-c name=`, `-cname=`, `--name=`."""
    wanted = name.lower().replace("-", "_")
    text = re.sub(r"\\(.)", r"\1", options).lower().replace("-", "_")
    return wanted in text


def _error_response(values: dict[str, str]) -> Any:
    return ResponsePart(
        status="ERROR",
        error={
            "severity": values.get("V", ""),
            "sqlstate": values.get("C", ""),
            "message": values.get("M", ""),
        },
    )
