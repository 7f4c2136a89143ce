"""One PostgreSQL connection: judging, holding, masking, recording. Sans-io; see session.commands.

Theory of operation
-------------------
    startup   the client's first packets (postgres_startup)
    auth      the server asks, the client answers
    inject    after the first ReadyForQuery, which the client does not see yet: assertion and catalog, under names of ours
    ready     client messages are judged (postgres_requests), server messages matched to what they answer (postgres_results)
    raw       opaque relay: TLS that we cannot open, cancel requests

Each part is a class that knows the one before it: Opening, Rows, Results, Cycles (the lane), Names, Injections, Refusals, Requests, and
here the events that a driver reports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar.codecs.postgres import messages
from sidecar.errors import LimitExceeded, ProtocolError
from sidecar.model.flow import Side
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.model.verdict import Action, Engine
from sidecar.session.commands import Command, HalfClose, PauseReading, Send, WithdrawHold, WriteRecord
from sidecar.session.context import denial_message
from sidecar.session.postgres_exchange import Held
from sidecar.session.postgres_requests import Requests
from sidecar.session.postgres_startup import CLIENT, REQUIRES_TLS_DETAIL, SERVER

if TYPE_CHECKING:
    from sidecar.session.postgres_lane import Lane


class PostgresSession(Requests):
    """Implements session.commands.Session."""

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
        if portal is not None:
            decision = judge.strictest(portal.statements, self._resolved)
        else:
            decision = self._resolved(judge.decide(held.data[5:-1]))
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
                name = held.data[5 : held.data.index(b"\0", 5)]
                exchange = self._expect_execute(decision, portal, held.record_id, name)
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
