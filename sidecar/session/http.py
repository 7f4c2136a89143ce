"""One HTTP/1.1 connection: requests are judged head by head, responses matched in order, masked where a rule says so.

Nothing buffers a stream: bodies leave as slices of what came in, except a body that a JSON mask has to understand, or a request
body that a rule looks at or a hold has to cover; those are bounded, and beyond the bound they are refused, never passed on.

`http_requests` owns the client's direction, `http_responses` the server's, `http_exchange` what they share.
"""

from __future__ import annotations

from sidecar.errors import LimitExceeded, ProtocolError
from sidecar.model.flow import Side
from sidecar.model.reasons import CloseReason
from sidecar.model.verdict import Action, Engine
from sidecar.session.commands import Command, HalfClose, OpenUpstream
from sidecar.session.context import IDENTITY_RULE, SessionContext, identity_verdict_part, verdict_part
from sidecar.session.http_exchange import Exchange
from sidecar.session.http_problem import problem
from sidecar.session.http_requests import Requests
from sidecar.session.http_responses import Responses

CLIENT, SERVER = Side.CLIENT, Side.SERVER
GONE = (CloseReason.UPSTREAM_UNREACHABLE, CloseReason.CLIENT_CLOSED, CloseReason.SERVER_CLOSED)
"""Ends of which the client is told by its connection's end alone."""


class HttpSession:
    """Implements session.commands.Session."""

    def __init__(self, context: SessionContext, *, opened: bool = False) -> None:
        self.context = context
        self.exchange = Exchange(context, connected=opened)
        self.requests = Requests(self.exchange)
        self.responses = Responses(self.exchange)
        self._opened = opened

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
        if not self._opened:
            exchange.write(context.open_record("http", part, now_ns))
            if self.requests.refused is None:
                exchange.out.append(OpenUpstream())
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
                if exchange.raw:
                    self.requests.upgraded()
        except LimitExceeded as error:
            self._bad(431 if error.limit in ("head_max_bytes", "headers") else 413, error.message, side)
        except ProtocolError as error:
            self._bad(400, error.message, side)
        return exchange.take()

    def eof(self, side: Side, now_ns: int) -> list[Command]:
        exchange = self.exchange
        exchange.now_ns = now_ns
        if side is CLIENT:
            if not exchange.raw and (self.requests.held or not exchange.pending):
                exchange.close(CloseReason.CLIENT_CLOSED)
            else:
                exchange.out.append(HalfClose(SERVER))
            return exchange.take()
        self.responses.eof()
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
            self._bad(400, error.message, CLIENT)
        return self.exchange.take()

    def engine_changed(self, engine: Engine, now_ns: int) -> list[Command]:
        self.context.engine = engine
        return []

    def abort(self, reason: CloseReason, detail: str, now_ns: int) -> list[Command]:
        exchange = self.exchange
        exchange.now_ns = now_ns
        if reason not in GONE and not exchange.raw and exchange.response is None:
            exchange.to_client(problem(503, f"Sidecar: {detail or reason.value}", "", "", close=True))
        exchange.close(reason, detail)
        return exchange.take()

    def _bad(self, status: int, message: str, side: Side) -> None:
        """The peer broke the protocol: said in HTTP where that can still be said, and the flow ends."""
        exchange = self.exchange
        if side is CLIENT and not exchange.pending:
            why = f"Sidecar: the request was not understood: {message}"
            exchange.to_client(problem(status, why, "", "", close=True))
        elif side is SERVER and exchange.response is None:
            why = f"Sidecar: the server's answer was not understood: {message}"
            exchange.to_client(problem(503, why, "", "", close=True))
        exchange.close(CloseReason.PROTOCOL_ERROR, f"{side.value}: {message}")
