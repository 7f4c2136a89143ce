"""What the server answers, matched to what was asked, counted, recorded (rows: postgres_rows). Untouched bytes leave as they came."""

from __future__ import annotations

import struct
from collections import deque
from typing import Any, Final

from sidecar.codecs.postgres import messages
from sidecar.errors import LimitExceeded, ProtocolError
from sidecar.model.record import Record, ResponsePart
from sidecar.session.context import SessionContext
from sidecar.session.postgres_errors import scrubbed
from sidecar.session.postgres_exchange import (
    Exchange,
    Portal,
    Prepared,
    confirm,
    discard,
    response_record,
)
from sidecar.session.postgres_reach import touches_masked
from sidecar.session.postgres_rows import NO_COLUMNS, Rows
from sidecar.session.postgres_startup import CLIENT

ANSWER_MAX_BYTES: Final = 64 * 1024 * 1024
"""Of a server message that is no row and no copy data; the largest that exist are notices and function results."""

_head = struct.Struct("!cI").unpack_from


class Results(Rows):
    def __init__(self, context: SessionContext) -> None:
        super().__init__(context)
        self._status = b"I"
        self._statements: dict[bytes, Prepared] = {}
        self._portals: dict[bytes, Portal] = {}
        self._skipping = False
        """The server ignores what the client sends, up to its next Sync: nothing of it is sent."""
        self._copying = False
        """The server is in COPY FROM STDIN."""
        self._copy_out_text = False
        self._backend_pid = 0
        self._notices: list[bytes] = []
        self._streamed: Exchange | None = None
        self._defining = 0
        """The last message with a definition that is not known to be over."""
        self._injecting: str | None = None

    # -- what the first ReadyForQuery and injected statements need (see postgres_injection.py)

    def _first_ready(self, whole: bytes) -> bytes:
        raise NotImplementedError

    def _injected(self, kind: bytes, body: bytes, whole: bytes) -> bytes:
        raise NotImplementedError

    def _resume_client(self) -> None:
        raise NotImplementedError

    # -- framing

    def _server_messages(self, data: bytes) -> None:
        if self._passing_server:
            data = self._pass_on(data)
            if not data:
                return
        joined = self._server.join(data)
        if joined is None:
            return
        data = joined
        view = memoryview(data)
        end = len(data)
        start = offset = 0
        need = 5
        while offset + 5 <= end:
            kind, length = _head(data, offset)
            if length < 4:
                raise ProtocolError(f"a server message of length {length}")
            after = offset + 1 + length
            if after > end:
                need = 1 + length
                if self._may_stream(kind):
                    beginning = 5 + self.limits.response_max_bytes
                    if (
                        kind == b"D"
                        and end - offset < min(need, beginning)
                        and self._samples(self._pending[0])
                    ):
                        need = min(need, beginning)
                        break
                    self._count_partial(kind, view[offset:end])
                    self._send(CLIENT, view[start:end])
                    self._passing_server = after - end
                    self._resume_client()
                    return
                self._bound(kind, length)
                break
            if kind == b"D" and self._pending and self._plain(self._pending[0]):
                after = self._plain_rows(self._pending[0], data, view, offset, end)
                replacement = None
            else:
                replacement = self._server_message(kind, data, offset, after, view)
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
            self._server.keep(data[offset:] if offset else data, need)
        self._resume_client()

    def _pass_on(self, data: bytes) -> bytes:
        """The rest of a message that streams through; returns what follows it."""
        take = min(self._passing_server, len(data))
        self._passing_server -= take
        part = memoryview(data)[:take]
        if self._streamed is not None:
            self._streamed.count(part)
        self._send(CLIENT, part)
        if self._passing_server:
            return b""
        self._streamed = None
        for waiting in self._notices:
            self._send(CLIENT, waiting)
        self._notices.clear()
        return data[take:]

    def _bound(self, kind: bytes, length: int) -> None:
        name = "masked_row_max_bytes" if kind in b"Dd" else "answer_max_bytes"
        limit = self.limits.masked_row_max_bytes if kind in b"Dd" else ANSWER_MAX_BYTES
        if length > limit:
            raise LimitExceeded(
                f"a server message of {length} bytes that has to be whole", limit=name, value=limit
            )

    def _may_stream(self, kind: bytes) -> bool:
        """Whether a large message may go through before it is whole."""
        if self._phase != "ready" or self._injecting is not None or kind not in b"Dd" or not self._pending:
            return False
        current = self._pending[0]
        if kind == b"d":
            return not self._detects_copy(current)
        return self._plain(current)

    def _count_partial(self, kind: bytes, part: Any) -> None:
        current = self._pending[0]
        if kind == b"D" and self._samples(current):
            self._sample_row(current, part[5:], streams=True)
        current.rows += 1
        if current.record_id:
            self._streamed = current
            current.count(part)

    def _to_client(self, data: bytes) -> None:
        """Something of ours for the client, while no server message is being scanned: at a message boundary."""
        if self._passing_server:
            self._notices.append(data)
        else:
            self._send(CLIENT, data)

    # -- messages

    def _server_message(self, kind: bytes, data: bytes, offset: int, after: int, view: Any) -> bytes | None:
        """None: pass as it is. Bytes: send these instead (empty: nothing)."""
        if self._phase != "ready":
            return self._early(kind, data[offset + 5 : after], data[offset:after])
        if self._injecting is not None:
            return self._injected(kind, data[offset + 5 : after], data[offset:after])
        pending = self._pending
        while pending and pending[0].kind == "d":
            pending.popleft()
        current = pending[0] if pending else None
        if kind == b"D":
            if current is None or current.kind not in "QE":
                raise ProtocolError("a DataRow that nothing asked for")
            return self._row(current, data, offset, after, view)
        if kind == b"Z":
            self._ready(data[offset + 5 : offset + 6])
            return None
        if kind in b"NAS":
            if kind == b"S":
                self._parameter(data[offset + 5 : after])
            elif kind == b"N" and current is not None:
                return self._withheld(current, b"N", messages.parse_fields(data[offset + 5 : after]))
            return None
        if current is None:
            return None
        if kind == b"C":
            current.status = data[offset + 5 : after - 1].decode("utf-8", "replace")
            self._copying = False
            if current.kind == "E":
                self._finish(pending.popleft())
            return None
        if kind == b"T":
            return self._described(current, data[offset + 5 : after])
        if kind == b"E":
            return self._failed(current, messages.parse_fields(data[offset + 5 : after]))
        if kind in b"Is":
            current.status = "EMPTY" if kind == b"I" else "SUSPENDED"
            if current.kind == "E":
                self._finish(pending.popleft())
            return None
        if kind in b"123":
            self._acknowledged(kind, current)
            return b"" if current.hidden else None
        if kind == b"n":
            return self._described(current, NO_COLUMNS) if current.kind == "D" else None
        if kind in b"GW":
            self._copy_in(pending)
            return None
        if kind == b"H":
            self._copy_out_text = data[offset + 5] == 0
            return None
        if kind == b"d":
            return self._copy_row(current, data, offset, after, view)
        return None  # t, c, V and what is not known: byte for byte

    def _acknowledged(self, kind: bytes, current: Exchange) -> None:
        """ParseComplete, BindComplete, CloseComplete."""
        if current.kind != {b"1": "P", b"2": "B", b"3": "C"}[kind]:
            raise ProtocolError(f"the server answers {kind.decode()} to a message of type {current.kind}")
        if current.rewrite is not None:
            raise ProtocolError("the server accepted what no server accepts")
        self._pending.popleft()
        version = current.version
        if type(version) is Prepared:
            confirm(self._statements, current.name, version)
        elif type(version) is Portal:
            confirm(self._portals, current.name, version)

    def _early(self, kind: bytes, body: bytes, whole: bytes) -> bytes | None:
        """Before the client has seen the first ReadyForQuery."""
        if self._phase == "inject":
            return self._injected(kind, body, whole)
        if kind == b"R" and len(body) >= 4:
            (code,) = struct.unpack_from("!i", body)
            if code == messages.AUTH_SASL and self._tls == "tls":
                return messages.message(b"R", messages.strip_channel_binding(body))
        elif kind == b"K" and len(body) >= 8:
            (self._backend_pid,) = struct.unpack_from("!i", body)
        elif kind == b"S":
            self._parameter(body)
        elif kind == b"Z":
            return self._first_ready(whole)
        elif kind == b"E":
            self._record(
                Record(
                    id=self.context.ids.new(self._now),
                    ts_ns=self._now,
                    kind="response",
                    flow=self.facts.flow,
                    request=self.facts.flow,
                    response=ResponsePart(status="ERROR", error=_error_part(messages.parse_fields(body))),
                )
            )
        return None

    def _parameter(self, body: bytes) -> None:
        name, _, value = body.rstrip(b"\0").partition(b"\0")
        self.judge.parameter(name, value)

    # -- copying

    def _copy_in(self, pending: deque[Exchange]) -> None:
        """CopyInResponse: the server ignores a Sync that was sent before the copy's data."""
        while len(pending) > 1 and pending[1].kind == "S":
            del pending[1]
        behind = pending[1] if len(pending) > 1 else None
        if behind is not None and behind.kind != "d":
            raise ProtocolError("messages other than copy data follow COPY FROM STDIN")
        self._copying = behind is None or not behind.ended

    def _detects_copy(self, current: Exchange) -> bool:
        decision = current.decision
        if decision is None or not self._copy_out_text:
            return False
        return any(plan is not None and plan.has_detectors for plan in (decision.plan, decision.record_plan))

    def _copy_row(self, current: Exchange, data: bytes, offset: int, after: int, view: Any) -> bytes | None:
        """CopyData of COPY TO STDOUT: one row in each, and no columns to tell apart."""
        current.rows += 1
        shown: bytes | None = None
        if self._detects_copy(current):
            assert current.decision is not None
            plan = current.decision.plan
            body = data[offset + 5 : after]
            masked = plan.detect_text(body) if plan is not None else body
            if masked is not body:
                shown = messages.message(b"d", masked)
        if current.record_id:
            current.count(shown if shown is not None else view[offset:after])
        return shown

    # -- ends

    def _failed(self, current: Exchange, values: dict[str, str]) -> bytes | None:
        """ErrorResponse: for a simple query the answer goes on to ReadyForQuery; an extended one skips to Sync."""
        self._copying = False
        shown = current.rewrite
        if shown is not None:
            current.rewrite = b""
        else:
            shown = self._withheld(current, b"E", values)
            current.error = _error_part(messages.parse_fields(shown[5:]) if shown is not None else values)
        if current.kind in "QFS":
            return shown
        self._skip_to_sync()
        return shown

    def _withheld(self, current: Exchange, kind: bytes, values: dict[str, str]) -> bytes | None:
        """An error or notice without what could quote a masked column; None: as it is."""
        version, decision = current.version, current.decision
        if decision is None and version is not None:
            statements = version.statements if isinstance(version, Portal) else (version,)
            decision = self.judge.strictest(statements)
        plan = decision.plan or decision.record_plan if decision is not None else None
        if decision is None or plan is None or not plan.has_columns:
            return None
        shown = scrubbed(values)
        if shown is None or not touches_masked(self._catalog, plan, decision):
            return None
        return messages.fields(kind, shown)

    def _skip_to_sync(self) -> None:
        """The server ignores all that was sent after the failure, simple queries too, up to the next Sync."""
        pending = self._pending
        while pending and pending[0].kind != "S":
            skipped = pending.popleft()
            version = skipped.version
            if type(version) is Prepared:
                discard(self._statements, skipped.name, version)
            elif type(version) is Portal:
                discard(self._portals, skipped.name, version)
            if skipped.record_id:
                skipped.error = skipped.error or {
                    "message": "skipped by the server after an earlier error in the pipeline"
                }
                self._finish(skipped)
        if not pending:
            self._skipping = True

    def _ready(self, status: bytes) -> None:
        self._status = status
        pending = self._pending
        order = 0
        if pending:
            current = pending[0]
            if current.kind not in "QFS":
                raise ProtocolError(
                    f"the server is ready before it has answered a message of type {current.kind}"
                )
            order = current.order
            pending.popleft()
            self._finish(current)
        if status == b"I" and 0 < self._defining <= order:
            self._defining = 0
            self.judge.defined()
        if status == b"I" and self._portals:
            self._end_portals(order if pending else None)

    def _end_portals(self, order: int | None = None) -> None:
        """With their transaction, but for those that last, and those that messages after `order` made."""
        for name, portal in list(self._portals.items()):
            if not (portal.lasting or (order is not None and portal.order > order)):
                del self._portals[name]

    def _confirm_names(self, exchange: Exchange) -> None:
        """Names that SQL gave or took. Of several statements nobody can tell how far a failure let them come."""
        if exchange.error is None:
            for table, name, version in exchange.named:
                confirm(table, name, version)
        elif exchange.decision is not None and not exchange.decision.several:
            for table, name, version in reversed(exchange.named):
                discard(table, name, version)

    def _finish(self, exchange: Exchange) -> None:
        if exchange.named:
            self._confirm_names(exchange)
        if exchange.record_id:
            if self._pending and self._pending[0].kind == "d" and not exchange.bytes:
                exchange.bytes = self._pending[0].bytes  # of COPY FROM STDIN: what the client sent
            if exchange.row_plan is None and exchange.kind == "E" and exchange.error is None:
                exchange.row_plan = self._row_plan_of_portal(
                    exchange
                )  # no row came: the columns are known all the same
            self._record(
                response_record(exchange, self.context.ids.new(self._now), self.facts.flow, self._now)
            )

    def _before_close(self) -> None:
        self.judge.leave()
        for exchange in self._pending:
            if exchange.record_id:
                exchange.error = exchange.error or {"message": "the connection ended before the answer"}
                self._finish(exchange)
        self._pending.clear()


def _error_part(values: dict[str, str]) -> dict[str, str]:
    return {
        "severity": values.get("V", values.get("S", "")),
        "sqlstate": values.get("C", ""),
        "message": values.get("M", ""),
    }
