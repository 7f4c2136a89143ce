"""One PostgreSQL connection: judging, holding, masking, recording. Sans-io; see session.commands.

Theory of operation
-------------------
    startup   the client's first packets (postgres_startup)
    auth      the server asks, the client answers
    inject    after the first ReadyForQuery, which the client does not see yet: assertion and catalog, under names of ours
    ready     client messages are judged (here), server messages matched to what they answer (postgres_results)
    raw       opaque relay: TLS that we cannot open, cancel requests

A refused message is replaced by one that the server itself rejects, and its ErrorResponse is rewritten: transaction status,
skipping until Sync and COMMIT's answers are then the server's own. What the server would skip is not sent at all, so that no
parameter of a refused statement leaves. Untouched bytes leave as slices of what came in.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import msgspec

from sidecar.codecs.postgres import messages
from sidecar.errors import LimitExceeded, ProtocolError
from sidecar.model.flow import Side
from sidecar.model.ids import short_id
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.model.record import HoldPart, Record
from sidecar.model.verdict import Action, Engine
from sidecar.session.commands import (
    Command,
    HalfClose,
    OpenHold,
    PauseReading,
    Send,
    SignAssertion,
    WithdrawHold,
    WriteRecord,
)
from sidecar.session.context import SessionContext, denial_message
from sidecar.session.postgres_catalog import SNAPSHOT_QUERY
from sidecar.session.postgres_cycle import Cycles
from sidecar.session.postgres_exchange import Decision, Exchange, Held, Portal, Prepared, candidates
from sidecar.session.postgres_startup import CLIENT, REQUIRES_TLS_DETAIL, SERVER

if TYPE_CHECKING:
    from sidecar.session.postgres_lane import Lane

REJECTED_TEXT: Final = b"sidecar: refused before it was sent"
"""Stands in for a refused statement: no grammar accepts it, whatever the transaction's state."""
INJECTED: Final = b"_sidecar"
REJECTED_PARSE: Final = messages.parse(INJECTED + b"_refused", REJECTED_TEXT)
REJECTED_QUERY: Final = messages.query(REJECTED_TEXT)
UNPARSED: Final = INJECTED + b"_unparsed"
CLOSE_UNPARSED: Final = messages.message(b"C", b"S" + UNPARSED + b"\0")
PREPARED_MAX: Final = 65_536
"""Names of statements, and of portals, that one connection may have at once."""

_head = struct.Struct("!cI").unpack_from
_WHOLE: Final = b"QPBFDEC"
"""Types that have to be whole to be judged."""


class PostgresSession(Cycles):
    """Implements session.commands.Session."""

    def __init__(self, context: SessionContext) -> None:
        super().__init__(context)
        self._copy_run: Exchange | None = None
        self._passing_client = 0
        self._held: Held | None = None
        self._paused = False
        self._assertion: str | None = None
        self._reassert = False
        self._held_ready: list[bytes] = []
        self._injections: deque[tuple[str, bytes]] = deque()
        self._injected_rows: list[list[bytes | None]] = []
        self._injected_failed = ""
        self._view: Any = None
        self._from = 0

    @property
    def lane(self) -> Lane | None:
        """The short way, which a driver may ask by itself as long as it is armed (see postgres_lane)."""
        return self._lane

    # -- events

    def start(self, now_ns: int) -> list[Command]:
        self._at(now_ns)
        self._open()
        return self._take()

    def upstream_connected(self, now_ns: int) -> list[Command]:
        self._now = now_ns
        self._connected()
        return self._take()

    def tls_started(self, now_ns: int) -> list[Command]:
        self._now = now_ns
        self._tls = "tls"
        self._upstream_open()
        return self._take()

    def receive(self, side: Side, data: bytes, now_ns: int) -> list[Command]:
        from_client = side is CLIENT
        lane = self._lane
        if lane is not None and lane.armed:
            record = lane.client(data, now_ns) if from_client else lane.server(data, now_ns)
            if record is not None:
                return [WriteRecord(record), Send(SERVER if from_client else CLIENT, data)]
        self._bytes[0 if from_client else 1] += len(data)
        self._at(now_ns)
        try:
            if from_client:
                self._from_client(data)
            else:
                self._from_server(data)
                if not self._pending:
                    self._arm()
        except (LimitExceeded, ProtocolError) as error:
            self._broken(side, error)
        return self._take()

    def _at(self, now_ns: int) -> None:
        """Every event but those that the lane takes begins here."""
        self._now = now_ns
        if self._lane is not None and self._lane.armed:
            self._leave()

    def _quiet(self) -> bool:
        return (
            self._phase == "ready"
            and self._injecting is None
            and self._held is None
            and not (self._pending or self._open_segment or self._skipping or self._copying or self._reassert)
            and not (self._passing_client or self._passing_server or self._notices or self._held_ready)
            and not (len(self._client) or len(self._server) or self._early_client)
            and not (self._closed or self._client_eof)
        )

    def _broken(self, side: Side, error: LimitExceeded | ProtocolError) -> None:
        if isinstance(error, LimitExceeded):
            self._fail("54000", error.message, CloseReason.LIMIT, f"{error.limit}: {error.message}")
        else:
            self._fail("08P01", error.message, CloseReason.PROTOCOL_ERROR, f"{side.value}: {error.message}")

    def eof(self, side: Side, now_ns: int) -> list[Command]:
        self._at(now_ns)
        if side is SERVER:
            self._close(CloseReason.SERVER_CLOSED)
            return self._take()
        self._client_eof = True
        if self._phase == "startup" and self._answered_n and not self._startup_seen:
            self.client_requires_tls = True
            self._gap(GapReason.CLIENT_REQUIRES_TLS, REQUIRES_TLS_DETAIL)
            self._close(CloseReason.CLIENT_CLOSED, REQUIRES_TLS_DETAIL)
        elif self._phase == "raw" and self._upstream == "open":
            self._out.append(HalfClose(SERVER))
        elif self._phase == "raw" and self._early_client and self._refused is None:
            pass  # a cancel request whose upstream is still being opened: it is sent, then the server closes
        else:
            self._close(CloseReason.CLIENT_CLOSED)
        return self._take()

    def assertion_signed(self, assertion: str | None, now_ns: int) -> list[Command]:
        self._at(now_ns)
        if self._phase != "inject" or self._injecting is not None:
            return self._take()
        if assertion is None:
            self._gap(GapReason.UNKNOWN_PROTOCOL, "the identity assertion could not be signed")
        else:
            self._assertion = assertion
            self._injections.append(("setting", self._setting()))
        shown = self._inject_next()
        if shown:
            self._send(CLIENT, shown)
        self._resume_client()
        return self._take()

    def hold_decided(
        self, hold_id: str, outcome: str, by: str | None, reason: str, now_ns: int
    ) -> list[Command]:
        self._at(now_ns)
        held = self._held
        if held is None or held.hold_id != hold_id:
            return self._take()
        self._held = None
        rule = held.decision.verdict.rule or ""
        if outcome == "approved":
            self._judge_again(held)
        else:
            who = f" by {by}" if by else ""
            why = f"{outcome}{who}" + (f": {reason}" if reason else "")
            self._refuse(held.kind, held.record_id, ("42501", denial_message(rule, why), rule))
        if self._paused:
            self._paused = False
            self._out.append(PauseReading(CLIENT, False))
        if held.rest and not self._closed:
            try:
                self._from_client(bytes(held.rest))
            except (LimitExceeded, ProtocolError) as error:
                self._broken(CLIENT, error)
        return self._take()

    def _judge_again(self, held: Held) -> None:
        """An approval satisfies the rule that held, once; every other rule of the policy that is in force now is judged."""
        portal = held.portal
        judge = self.judge
        decision = judge.strictest(portal.statements) if portal else judge.decide(held.data[5:-1])
        verdict = decision.verdict
        if decision.passes or (
            decision.denial is None
            and verdict.action is Action.HOLD
            and verdict.rule == held.decision.verdict.rule
        ):
            if held.kind == "Q":
                exchange = self._expect_query(decision, held.record_id)
            else:
                assert portal is not None
                exchange = self._expect_execute(decision, portal, held.record_id)
            exchange.held_ns = self._now - held.since_ns
            self._send(SERVER, held.data)
        else:
            denial = decision.denial or ("42501", denial_message(verdict.rule, verdict.reason), "")
            self._refuse(held.kind, held.record_id, denial)

    def engine_changed(self, engine: Engine, now_ns: int) -> list[Command]:
        self._at(now_ns)
        self.context.engine = engine
        self.judge.changed(engine)
        if self.judge.wants_catalog and not self._catalog.known:
            self._stale = True
        return self._take()

    def abort(self, reason: CloseReason, detail: str, now_ns: int) -> list[Command]:
        self._at(now_ns)
        silent = (CloseReason.UPSTREAM_UNREACHABLE, CloseReason.CLIENT_CLOSED, CloseReason.SERVER_CLOSED)
        if reason not in silent and self._phase != "raw" and not self._passing_server and not self._closed:
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

    def _before_close(self) -> None:
        if self._held is not None:
            self._out.append(WithdrawHold(self._held.hold_id))
            self._held = None
        if self._lane is not None:
            self._lane.owner = None
        super()._before_close()

    # -- client messages

    def _client_messages(self, data: bytes) -> None:
        if self._held is not None:
            self._read_ahead(data)
            return
        if self._passing_client:
            take = min(self._passing_client, len(data))
            self._send(SERVER, memoryview(data)[:take])
            self._passing_client -= take
            data = data[take:]
            if not data:
                return
        if self._injecting is not None:
            self._client.keep(data, len(self._client) + len(data))
            if len(self._client) > self.limits.statement_max_bytes:
                raise LimitExceeded(
                    "too much was sent ahead",
                    limit="statement_max_bytes",
                    value=self.limits.statement_max_bytes,
                )
            return
        joined = self._client.join(data)
        if joined is not None:
            self._scan(joined)

    def _scan(self, data: bytes) -> None:
        self._view = memoryview(data)
        self._from = offset = 0
        end = len(data)
        while offset + 5 <= end:
            kind, length = _head(data, offset)
            if length < 4:
                raise ProtocolError(f"a client message of length {length}")
            after = offset + 1 + length
            if after > end:
                if kind in _WHOLE or (self._skipping and kind in b"dcf"):
                    if length > self.limits.statement_max_bytes:
                        raise LimitExceeded(
                            f"a message of {length} bytes",
                            limit="statement_max_bytes",
                            value=self.limits.statement_max_bytes,
                        )
                    break
                self._other_message(kind)
                self._flush(end)
                self._passing_client = after - end
                return
            if self._skipping and kind in b"QPBFDECdcf":
                self._flush(offset)  # the server would ignore it
                self._from = after
            elif kind == b"S":
                self._sync(offset, after)
            elif kind in _WHOLE:
                if self._copying:
                    raise ProtocolError("a message other than copy data in COPY FROM STDIN")
                self._copy_run = None
                if self._has_to_inject(kind, data, offset, after):
                    self._flush(offset)
                    self._client.keep(data[offset:], end - offset)
                    shown = self._inject_next()
                    if shown:
                        self._to_client(shown)
                    return
                self._message(kind, data, offset, after)
                if self._held is not None:
                    self._read_ahead(data[after:])
                    return
            else:
                self._other_message(kind)
            offset = after
        self._flush(offset)
        if offset < end:
            rest = end - offset
            need = 5 if rest < 5 else 1 + int.from_bytes(data[offset + 1 : offset + 5])
            self._client.keep(data[offset:] if offset else data, need)

    def _flush(self, upto: int) -> None:
        """Send what has been scanned and is allowed, before anything of ours goes upstream."""
        if self._from < upto:
            view = self._view
            whole = self._from == 0 and upto == len(view)
            self._out.append(Send(SERVER, view if whole else view[self._from : upto]))
            self._from = upto

    def _expect(self, kind: str) -> Exchange:
        self._order += 1
        exchange = Exchange(kind, self._now, self._order)
        self._pending.append(exchange)
        return exchange

    def _sync(self, offset: int, after: int) -> None:
        self._segment += 1
        self._open_segment = self._skipping = False
        run = self._copy_run
        if run is not None and not run.ended:
            raise ProtocolError("Sync inside copy data")
        self._copy_run = None
        if not self._copying:  # there the server ignores it
            self._expect("S")

    def _other_message(self, kind: bytes) -> None:
        """Copy data, Flush, Terminate, and what is not known: byte for byte."""
        if kind in b"dcf":
            run = self._copy_run
            if run is None or run.ended:
                self._copy_run = run = self._expect("d")
            if kind != b"d":
                run.ended = True
                self._copying = False
        elif kind == b"H":
            self._open_segment = True

    def _read_ahead(self, data: bytes) -> None:
        held = self._held
        assert held is not None
        held.rest += data
        if len(held.rest) > self.limits.held_max_bytes and not self._paused:
            self._paused = True
            self._out.append(PauseReading(CLIENT, True))

    def _idle(self) -> bool:
        """The server waits for a query, outside any transaction, also an implicit one of extended messages."""
        return (
            not self._pending
            and self._status == b"I"
            and not self._open_segment
            and not self._passing_server
            and not self._skipping
        )

    def _message(self, kind: bytes, data: bytes, offset: int, after: int) -> None:
        body = offset + 5
        if kind == b"Q":
            self._simple(data, offset, after)
            return
        if kind == b"F":
            self._function_call(offset, after)
            return
        self._open_segment = True
        if kind == b"B":
            self._bind(messages.parse_bind(data[body:after]))
        elif kind == b"E":
            self._execute(data, offset, after)
        elif kind == b"P":
            self._parse(data, offset, after)
        else:
            if after < body + 2 or data[body] not in b"SP" or data[after - 1] != 0:
                raise ProtocolError("a Describe or Close is malformed")
            name = data[body + 1 : after - 1]
            if kind == b"D":
                self._describe(data[body] == 0x53, name)
            else:
                self._close_name(data[body] == 0x53, name)

    def _certain(self) -> bool:
        """No message that is still to be answered can change how a text is read."""
        return all(exchange.decision is None or exchange.decision.steady for exchange in self._pending)

    def _simple(self, data: bytes, offset: int, after: int) -> None:
        if data[after - 1] != 0:
            raise ProtocolError("a Query is not terminated")
        decision = self.judge.decide(data[offset + 5 : after - 1])
        if decision.ambiguous and not self._certain():
            decision = self.judge.decide(data[offset + 5 : after - 1], certain=False)
        record_id = self.context.ids.new(self._now)
        self._record(self.judge.request(decision, "query", None, record_id, self._now))
        if decision.passes:
            self._expect_query(decision, record_id)
            return
        self._flush(offset)
        self._from = after
        if decision.denial is not None:
            self._refuse("Q", record_id, decision.denial, data[offset + 5 : after - 1])
        else:
            self._hold("Q", data[offset:after], decision, None, None, record_id)

    def _expect_query(self, decision: Decision, record_id: str) -> Exchange:
        exchange = self._expect("Q")
        exchange.record_id, exchange.decision = record_id, decision
        self._note(decision)
        return exchange

    def _note(self, decision: Decision) -> None:
        if decision.ddl and self.judge.wants_catalog:
            self._stale = True
            self.judge.definitions_changed(decision)
        if decision.resets and self._assertion is not None:
            self._reassert = True

    def _parse(self, data: bytes, offset: int, after: int) -> None:
        body = offset + 5
        end = data.find(b"\0", body, after)
        stop = data.find(b"\0", end + 1, after) if end >= 0 else -1
        if stop < 0:
            raise ProtocolError("a Parse is not terminated")
        name, raw = data[body:end], data[end + 1 : stop]
        decision = self.judge.decide(raw)
        if decision.ambiguous and not self._certain():
            decision = self.judge.decide(raw, certain=False)
        if decision.denial is not None:
            record_id = self.context.ids.new(self._now)
            self._record(self.judge.request(decision, "parse", None, record_id, self._now))
            self._flush(offset)
            self._from = after
            self._refuse("P", record_id, decision.denial, raw)
            return
        older = self._statements.get(name)
        if older is None and len(self._statements) >= PREPARED_MAX:
            raise LimitExceeded(
                f"{PREPARED_MAX} prepared statements", limit="prepared_statements", value=PREPARED_MAX
            )
        exchange = self._expect("P")
        exchange.name = name
        exchange.version = self._statements[name] = Prepared(raw, self._segment, older=older)

    def _bind(self, bind: messages.Bind) -> None:
        statements = candidates(self._statements.get(bind.statement), self._segment)
        older = self._portals.get(bind.portal)
        if older is None and len(self._portals) >= PREPARED_MAX:
            raise LimitExceeded(f"{PREPARED_MAX} portals", limit="portals", value=PREPARED_MAX)
        exchange = self._expect("B")
        exchange.name = bind.portal
        exchange.version = self._portals[bind.portal] = Portal(
            tuple(statements) or (Prepared(None),), bind, self._segment, older=older, order=exchange.order
        )

    def _describe(self, statement: bool, name: bytes) -> None:
        exchange = self._expect("D")
        if statement:
            found = candidates(self._statements.get(name), self._segment)
            exchange.prepared = found[0] if len(found) == 1 else None
        else:
            portals = candidates(self._portals.get(name), self._segment)
            if len(portals) == 1:
                exchange.portal = portals[0]
                portals[0].described = True

    def _close_name(self, statement: bool, name: bytes) -> None:
        exchange = self._expect("C")
        exchange.name = name
        if statement:
            older = self._statements.get(name)
            if older is not None:
                exchange.version = self._statements[name] = Prepared(
                    None, self._segment, closed=True, older=older
                )
        else:
            portal = self._portals.get(name)
            if portal is not None:
                exchange.version = self._portals[name] = Portal(
                    (), None, self._segment, closed=True, older=portal, order=exchange.order
                )

    def _execute(self, data: bytes, offset: int, after: int) -> None:
        end = data.find(b"\0", offset + 5, after)
        if end < 0:
            raise ProtocolError("an Execute is not terminated")
        portals = candidates(self._portals.get(data[offset + 5 : end]), self._segment)
        if len(portals) == 1:
            portal = portals[0]
            decision = self.judge.strictest(portal.statements)
        else:
            # None: made in SQL (a cursor), or not there at all. Several: as strict as the strictest.
            statements = tuple(item for found in portals for item in found.statements) or (Prepared(None),)
            portal = Portal(statements, portals[0].bind if portals else None)
            decision = self.judge.strictest(statements)
        parameters = portal.bind.parameters if portal.bind is not None else None
        record_id = self.context.ids.new(self._now)
        self._record(self.judge.request(decision, "execute", parameters, record_id, self._now))
        if decision.passes:
            self._expect_execute(decision, portal, record_id, data[offset + 5 : end], offset)
            return
        self._flush(offset)
        self._from = after
        if decision.denial is not None:
            self._refuse("E", record_id, decision.denial)
        else:
            self._hold("E", data[offset:after], decision, parameters, portal, record_id)

    def _expect_execute(
        self,
        decision: Decision,
        portal: Portal,
        record_id: str,
        name: bytes | None = None,
        offset: int = 0,
    ) -> Exchange:
        if (
            (decision.plan is not None or decision.record_plan is not None)
            and decision.rows
            and not portal.described
            and (decision.masks_columns or all(item.columns is None for item in portal.statements))
        ):
            # Rows without a description cannot be masked: ask for it, unseen by the client. What was said of the statement
            # earlier does not count: search_path may have changed since.
            self._flush(offset)
            if name is None:
                name = portal.bind.portal if portal.bind is not None else b""
            self._send(SERVER, messages.describe_portal(name))
            hidden = self._expect("D")
            hidden.hidden, hidden.portal = True, portal
            portal.described = True
        exchange = self._expect("E")
        exchange.record_id, exchange.decision, exchange.portal = record_id, decision, portal
        self._note(decision)
        return exchange

    def _function_call(self, offset: int, after: int) -> None:
        """Fast-path calls say nothing that a rule could look at: judged as an opaque statement."""
        decision = self.judge.opaque()
        record_id = self.context.ids.new(self._now)
        self._record(self.judge.request(decision, "function_call", None, record_id, self._now))
        if decision.passes and decision.plan is None:
            exchange = self._expect("F")
            exchange.record_id = record_id
            return
        self._flush(offset)
        self._from = after
        rule = decision.verdict.rule or "default"
        text = denial_message(rule, "function calls by fast path cannot be judged")
        self._refuse("Q", record_id, ("42501", text, rule))

    # -- refusing and holding

    def _refuse(self, kind: str, record_id: str, denial: tuple[str, str, str], raw: bytes = b"") -> None:
        """What was scanned before it has been flushed. `raw`: the text, where it is at hand."""
        sqlstate, text, _ = denial
        syntax = sqlstate == "42601"
        if syntax and not (kind == "Q" and self._open_segment):
            self._let_server_reject(kind, record_id, text, raw)
            return
        shown = messages.error(sqlstate, text) if syntax else self._error(sqlstate, text, record_id)
        if kind == "Q":
            if self._idle():
                self._to_client(shown + messages.ready_for_query(b"I"))
                return
            self._send(SERVER, REJECTED_QUERY)
            self._expect("Q").rewrite = shown
            return
        self._send(SERVER, REJECTED_PARSE)
        self._expect("P").rewrite = shown
        self._skipping = True

    def _let_server_reject(self, kind: str, record_id: str, text: str, raw: bytes) -> None:
        """A text outside the grammar at hand: the server is asked to parse it under a name of ours, never to run it, and its error is
        the client's. Another version may accept it; then the message behind it is refused, and that is what the client sees."""
        self._send(SERVER, CLOSE_UNPARSED + messages.parse(UNPARSED, raw) + REJECTED_PARSE)
        self._expect("C").hidden = True
        self._expect("P").hidden = True
        short = short_id(record_id)
        self._expect("P").rewrite = messages.error(
            "42501",
            denial_message(None, f"the statement cannot be understood: {text}"),
            detail=f"the server was asked to parse it and not to run it; record {short}",
            hint=f"sidecar why {short}",
        )
        if kind == "Q":
            self._send(SERVER, messages.SYNC)
            self._segment += 1
            self._expect("S")
        else:
            self._skipping = True

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
        principal, judge = self.facts.principal, self.judge
        digest = hashlib.sha256(
            msgspec.msgpack.encode(
                [data, decision.text, parameters, str(self.facts.target.address), judge.database, judge.user,
                 [principal.issuer, principal.subject] if principal else None]
            )
        ).hexdigest()  # fmt: skip
        self._held = Held(hold_id, kind, data, decision, parameters, portal, record_id, self._now)
        self._record(
            Record(
                id=self.context.ids.new(self._now),
                ts_ns=self._now,
                kind="hold",
                flow=self.facts.flow,
                request=record_id,
                hold=HoldPart(
                    id=hold_id,
                    expires_ns=self._now + int(verdict.approve.within_s * 1e9),
                    digest=digest,
                    reason=verdict.reason,
                ),
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
                parameters=judge.shown(decision, parameters),
                digest=digest,
            )
        )

    # -- injected statements

    def _has_to_inject(self, kind: bytes, data: bytes, offset: int, after: int) -> bool:
        """Queues our own statements where they are needed before this message, and possible."""
        if kind not in b"QP" or not (self._stale or self._reassert) or not self._idle():
            return False
        if self._reassert:
            self._reassert = False
            self._injections.append(("setting", self._setting()))
        if self._stale and self.judge.wants_catalog:
            if kind == b"Q":
                raw = data[offset + 5 : after - 1]
            else:
                raw = data[data.find(b"\0", offset + 5, after) + 1 : after].partition(b"\0")[0]
            decision = self.judge.decide(raw)
            if (decision.masks_columns and decision.rows) or "BEGIN" in decision.verdict.statements:
                self._injections.append(("catalog", SNAPSHOT_QUERY))
        return bool(self._injections)

    def _setting(self) -> bytes:
        # Both are ours and of a small alphabet; quoted all the same.
        name = (self.facts.attachment.postgres_setting or "").replace("'", "''")
        value = (self._assertion or "").replace("'", "''")
        return f"SELECT pg_catalog.set_config('{name}', '{value}', false)".encode()

    def _inject_next(self) -> bytes:
        """The next one; after the last, what the client was not shown yet."""
        if self._injections:
            self._injecting, text = self._injections.popleft()
            self._injected_rows, self._injected_failed = [], ""
            self._send(SERVER, messages.run_named(INJECTED, text))
            return b""
        self._injecting = None
        if self._phase == "inject":
            self._phase = "ready"
            if self._early_client:
                early = bytes(self._early_client)
                self._early_client.clear()
                self._client.keep(early, len(early))
        shown = b"".join(self._held_ready)
        self._held_ready.clear()
        return shown

    def _injected(self, kind: bytes, body: bytes, whole: bytes) -> bytes:
        if kind == b"D":
            self._injected_rows.append(messages.parse_row(body))
        elif kind == b"E":
            values = messages.parse_fields(body)
            if values.get("V") in ("FATAL", "PANIC"):
                return whole
            self._injected_failed = values.get("M", "?")
        elif kind in b"SAN":
            at = len(self._held_ready) - (self._phase == "inject")
            self._held_ready.insert(at, whole)
            if kind == b"S":
                self._parameter(body)
        elif kind == b"Z":
            if self._injected_failed:
                self._gap(
                    GapReason.UNKNOWN_PROTOCOL,
                    f"the injected statement ({self._injecting}) failed: {self._injected_failed}",
                )
            if self._injecting == "catalog":
                self._stale = False
                if not self._injected_failed:
                    try:
                        self.judge.catalog_loaded(self._injected_rows)
                    except ValueError as error:
                        raise ProtocolError(
                            "the server answers the question for its catalog with something else"
                        ) from error
            self._injected_rows = []
            return self._inject_next()
        return b""

    def _first_ready(self, whole: bytes) -> bytes:
        self._phase = "inject"
        self._status = b"I"
        self._held_ready = [whole]
        self._stale = self.judge.wants_catalog
        if self._stale:
            self._injections.append(("catalog", SNAPSHOT_QUERY))
        if self.facts.attachment.postgres_setting is not None:
            self._out.append(SignAssertion(self._backend_pid))
            return b""
        return self._inject_next()

    def _resume_client(self) -> None:
        """What the client sent while a statement of ours ran."""
        if self._phase == "ready" and self._injecting is None and self._held is None and len(self._client):
            waiting = self._client.joined()
            if waiting is not None:
                self._scan(waiting)
