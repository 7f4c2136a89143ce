"""Refusing and holding: what takes the place of a client's message that does not pass.

A refused message is replaced by one that the server itself rejects, and its ErrorResponse is rewritten: transaction status,
skipping until Sync and COMMIT's answers are then the server's own. What the server would skip is not sent at all, so that no
parameter of a refused statement leaves.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec

from sidecar.codecs.postgres import messages
from sidecar.model.ids import short_id
from sidecar.model.record import HoldPart, Record
from sidecar.session.commands import OpenHold, PauseReading, Send
from sidecar.session.context import SessionContext, denial_message
from sidecar.session.postgres_exchange import Decision, Exchange, Held, Portal
from sidecar.session.postgres_injection import INJECTED, Injections
from sidecar.session.postgres_startup import CLIENT, SERVER

REJECTED_TEXT: Final = b"sidecar: refused before it was sent"
"""Stands in for a refused statement: no grammar accepts it, whatever the transaction's state."""
REJECTED_PARSE: Final = messages.parse(INJECTED + b"_refused", REJECTED_TEXT)
REJECTED_QUERY: Final = messages.query(REJECTED_TEXT)
UNPARSED: Final = INJECTED + b"_unparsed"
CLOSE_UNPARSED: Final = messages.message(b"C", b"S" + UNPARSED + b"\0")


class Refusals(Injections):
    def __init__(self, context: SessionContext) -> None:
        super().__init__(context)
        self._held: Held | None = None
        self._paused = False
        self._view: Any = None
        """The client's bytes that are being scanned; `_from`: what of them has not been sent."""
        self._from = 0

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

    def _read_ahead(self, data: bytes) -> None:
        held = self._held
        assert held is not None
        held.rest += data
        if len(held.rest) > self.limits.held_max_bytes and not self._paused:
            self._paused = True
            self._out.append(PauseReading(CLIENT, True))
