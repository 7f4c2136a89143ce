"""One HTTP/1.1 connection: requests are judged head by head, responses matched in order, masked where a rule says so.

Nothing buffers a stream: bodies leave as slices of what came in, except a body that a mask has to understand, or a request body that a
rule looks at or a hold has to cover; those are bounded, and beyond the bound they are refused, never passed on.

`http_requests` owns the client's direction, `http_responses` the server's, `http_exchange` what they share.
"""

from __future__ import annotations

from sidecar.errors import LimitExceeded, ProtocolError
from sidecar.model.flow import Side
from sidecar.model.reasons import CloseReason
from sidecar.model.verdict import Action, Engine
from sidecar.session.commands import Command, HalfClose
from sidecar.session.context import IDENTITY_RULE, SessionContext, identity_verdict_part, verdict_part
from sidecar.session.http_exchange import Exchange
from sidecar.session.http_pending import Pending
from sidecar.session.http_problem import problem
from sidecar.session.http_requests import Requests
from sidecar.session.http_responses import Responses

CLIENT, SERVER = Side.CLIENT, Side.SERVER
GONE = (CloseReason.UPSTREAM_UNREACHABLE, CloseReason.CLIENT_CLOSED, CloseReason.SERVER_CLOSED)
"""Ends of which the client is told by its connection's end alone."""


class HttpSession:
    """Implements session.commands.Session."""

    def __init__(self, context: SessionContext) -> None:
        self.context = context
        self.exchange = Exchange(context)
        self.requests = Requests(self.exchange)
        self.responses = Responses(self.exchange)
        self._ended: set[Side] = set()

    def start(self, now_ns: int) -> list[Command]:
        exchange, context = self.exchange, self.context
        exchange.now_ns = now_ns
        denial = context.identity_denial()
        verdict = context.judge_connect("http")
        part = identity_verdict_part(denial, context.engine.revision) if denial else verdict_part(verdict)
        if denial:
            self.requests.refused = (IDENTITY_RULE, denial)
        elif verdict.action is Action.DENY:
            self.requests.refused = (verdict.rule or "default", verdict.reason)
        exchange.write(context.open_record("http", part, now_ns))
        return exchange.take()

    def upstream_connected(self, now_ns: int) -> list[Command]:
        self.exchange.now_ns = now_ns
        self.exchange.connected()
        return self.exchange.take()

    def receive(self, side: Side, data: bytes, now_ns: int) -> list[Command]:
        exchange = self.exchange
        exchange.now_ns = now_ns
        exchange.bytes[side] += len(data)
        if exchange.closed:
            return exchange.take()
        try:
            if side is CLIENT:
                self.requests.receive(data)
            else:
                self.responses.receive(data)
        except (LimitExceeded, ProtocolError) as error:
            self._bad(error, side)
        if side is SERVER:
            self._turn()
        return exchange.take()

    def eof(self, side: Side, now_ns: int) -> list[Command]:
        exchange = self.exchange
        exchange.now_ns = now_ns
        self._ended.add(side)
        if exchange.closed:
            return exchange.take()
        if exchange.raw:
            self._raw_end(side)
        elif side is CLIENT:
            self._client_end()
        else:
            self.responses.eof()
            if self.requests.held and not exchange.pending:
                why = "Sidecar: the server closed the connection while the request was held; send it again"
                exchange.to_client(problem(503, why, "", "", close=True))
            exchange.close(CloseReason.SERVER_CLOSED)
        return exchange.take()

    def tls_started(self, now_ns: int) -> list[Command]:
        return []

    def assertion_signed(self, assertion: str | None, now_ns: int) -> list[Command]:
        return []

    def hold_decided(
        self, hold_id: str, outcome: str, by: str | None, reason: str, now_ns: int
    ) -> list[Command]:
        self.exchange.now_ns = now_ns
        try:
            self.requests.decided(hold_id, outcome, by, reason)
        except (ProtocolError, LimitExceeded) as error:
            self._bad(error, CLIENT)
        return self.exchange.take()

    def engine_changed(self, engine: Engine, now_ns: int) -> list[Command]:
        self.context.engine = engine
        return []

    def abort(self, reason: CloseReason, detail: str, now_ns: int) -> list[Command]:
        exchange = self.exchange
        exchange.now_ns = now_ns
        waiting = bool(exchange.pending) or not self.requests.idle
        if reason not in GONE and not exchange.raw and exchange.response is None and waiting:
            exchange.to_client(problem(503, f"Sidecar: {detail or reason.value}", "", "", close=True))
        exchange.close(reason, detail)
        return exchange.take()

    # -- turns and ends

    def _turn(self) -> None:
        """The server said something: what was read ahead may go on, and a client that sent its last byte may be done."""
        try:
            self.requests.resume()
        except (ProtocolError, LimitExceeded) as error:
            self._bad(error, CLIENT)
        if CLIENT in self._ended and not self.exchange.closed:
            self._client_end()

    def _client_end(self) -> None:
        exchange = self.exchange
        if exchange.raw:
            exchange.half_close_server()
        elif self.requests.held or not exchange.pending:
            exchange.close(CloseReason.CLIENT_CLOSED)
        elif self.requests.idle:
            exchange.half_close_server()

    def _raw_end(self, side: Side) -> None:
        exchange = self.exchange
        if self._ended == {CLIENT, SERVER}:
            exchange.close(CloseReason.CLIENT_CLOSED if side is CLIENT else CloseReason.SERVER_CLOSED)
        elif side is CLIENT:
            exchange.half_close_server()
        else:
            exchange.out.append(HalfClose(CLIENT))

    def _bad(self, error: ProtocolError | LimitExceeded, side: Side) -> None:
        """The peer broke the protocol: said in HTTP, in its turn, where that can still be said, and the flow ends."""
        exchange, message = self.exchange, error.message
        detail = f"{side.value}: {message}"
        if side is SERVER:
            if exchange.response is None and exchange.pending:
                why = f"Sidecar: the server's answer was not understood: {message}"
                exchange.to_client(problem(503, why, "", "", close=True))
            exchange.close(CloseReason.PROTOCOL_ERROR, detail)
            return
        status = 400
        if isinstance(error, LimitExceeded):
            status = 431 if error.limit in ("head_max_bytes", "headers") else 413
        refused = problem(status, f"Sidecar: the request was not understood: {message}", "", "", close=True)
        if self.requests.in_body:
            # The server waits for the rest of a body that will not come.
            if len(exchange.pending) == 1 and exchange.response is None:
                exchange.to_client(refused)
            exchange.close(CloseReason.PROTOCOL_ERROR, detail)
            return
        pending = Pending("", "", exchange.now_ns)
        pending.answer, pending.close, pending.close_detail = refused, CloseReason.PROTOCOL_ERROR, detail
        exchange.pending.append(pending)
        exchange.last_request = True
        exchange.advance()
