"""The short way: what nearly every driver sends for one prepared statement, and what nearly every server answers, in one step.

    client   [Parse] Bind [Describe] Execute Sync, of the unnamed portal, in one chunk of its own
    server   [ParseComplete] BindComplete [RowDescription | NoData] DataRow… CommandComplete ReadyForQuery, in one chunk

Decides nothing that the long way would not: where any part is not just so, the cycle is taken apart into its messages
(`_expand_cycle`) before anything was counted, and goes the long way.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final

from sidecar.codecs.postgres import messages
from sidecar.session.commands import Send, WriteRecord
from sidecar.session.postgres_exchange import Decision, Exchange, Portal, Prepared, confirm
from sidecar.session.postgres_results import Results
from sidecar.session.postgres_startup import CLIENT, SERVER

CYCLE_ANSWER_MAX_BYTES: Final = 8192
"""Longer answers are walked once, not twice."""
_DESCRIBED: Final = b"D\0\0\0\x06P\0" + b"E\0\0\0\x09\0\0\0\0\0" + b"S\0\0\0\x04"
_EXECUTED: Final = b"E\0\0\0\x09\0\0\0\0\0" + b"S\0\0\0\x04"
_BOUND: Final = b"2\0\0\0\x04"
_PARSED: Final = b"1\0\0\0\x04" + _BOUND
_READY: Final = b"Z\0\0\0\x05"

_length = struct.Struct("!I").unpack_from


class Cycles(Results):
    def _note(self, decision: Decision) -> None:
        raise NotImplementedError

    def _send_cycle(self, data: bytes, order: int, segment: int) -> Exchange | None:
        """Send a chunk that is exactly one cycle and may pass; None (and nothing is done) where it is anything else. The caller has
        seen to it that nothing is held, injected, skipped, copied, or left over from an earlier chunk, and that no segment is open."""
        judge = self.judge
        parsed: Prepared | None = None
        begin = 0
        if data[0] == 0x50:  # P
            begin = 1 + int.from_bytes(data[1:5])
            if begin >= len(data) or data[5] or data[begin] != 0x42:
                return None
            stop = data.find(b"\0", 6, begin)
            if stop < 0:
                return None
            parsed = Prepared(data[6:stop], segment, older=self._statements.get(b""))
            decision = judge.decide(data[6:stop])
            if decision.ambiguous:
                return None
        bound = begin + 1 + int.from_bytes(data[begin + 1 : begin + 5])
        rest = data[bound:]
        described = rest == _DESCRIBED
        if not described and rest != _EXECUTED:
            return None
        bind = messages.parse_bind(data[begin + 5 : bound])
        if bind.portal:
            return None
        if parsed is not None:
            if bind.statement:
                return None
            prepared: Prepared | None = parsed
        else:
            prepared = self._statements.get(bind.statement)
            if prepared is None or prepared.raw is None or not prepared.confirmed:
                return None
            decision = judge.decide(prepared.raw)
        assert prepared is not None
        if not decision.passes or not (
            described or (decision.plan is None and decision.record_plan is None) or not decision.rows
        ):
            return None
        record_id = self.context.ids.new(self._now)
        self._out.append(
            WriteRecord(judge.request(decision, "execute", bind.parameters, record_id, self._now))
        )
        self._out.append(Send(SERVER, data))
        portal = Portal((prepared,), bind, segment, older=self._portals.get(b""), order=order)
        portal.described = described
        self._portals[b""] = portal
        exchange = Exchange("U", self._now, order)
        exchange.record_id, exchange.decision, exchange.portal = record_id, decision, portal
        if parsed is not None:
            self._statements[b""] = parsed
            exchange.prepared = parsed
        self._pending.append(exchange)
        self._note(decision)
        return exchange

    def _answer_cycle(self, data: bytes) -> bool:
        """Finish the oldest cycle by a chunk that is exactly its answer; False (and nothing is done) where it is anything else."""
        end = len(data) - 6
        if not 0 < end <= CYCLE_ANSWER_MAX_BYTES or not data.startswith(_READY, end):
            return False
        current = self._pending[0]
        decision, portal, parsed = current.decision, current.portal, current.prepared
        assert decision is not None
        assert portal is not None
        prefix = _BOUND if parsed is None else _PARSED
        if not data.startswith(prefix):
            return False
        offset = len(prefix)
        row_plan = None
        if portal.described:
            (length,) = _length(data, offset + 1)
            after = offset + 1 + length
            if data[offset] == 0x54:  # T
                row_plan = decision.row_plans.get(data[offset + 5 : after])
                if row_plan is None or not row_plan.plain or row_plan.catalog != self._catalog.version:
                    return False
                if self._stale and decision.masks_columns:
                    return False
            elif data[offset] != 0x6E:  # n
                return False
            offset = after
        elif portal.statements[0].columns:
            row_plan = self._row_plan_of_portal(current)
        first = offset
        rows = 0
        while offset < end and data[offset] == 0x44:  # D
            (length,) = _length(data, offset + 1)
            offset += 1 + length
            rows += 1
        if offset >= end or data[offset] != 0x43:  # C
            return False
        (length,) = _length(data, offset + 1)
        if offset + 1 + length != end or (rows and row_plan is None and decision.plan is not None):
            return False
        limits = self.limits
        current.row_plan = row_plan
        current.rows = rows
        if rows:
            current.bytes = offset - first
            view = memoryview(data)
            current.digest = hashlib.sha256(view[first:offset])
            at = first
            for _ in range(min(rows, limits.response_max_rows)):
                after = at + 1 + _length(data, at + 1)[0]
                self._sample(current, messages.parse_row(view[at + 5 : after]))
                at = after
                if current.sample_bytes >= limits.response_max_bytes:
                    break
        current.status = data[offset + 5 : end - 1].decode("utf-8", "replace")
        if parsed is not None:
            confirm(self._statements, b"", parsed)
        confirm(self._portals, b"", portal)
        current.kind = "S"
        self._ready(data[end + 5 : end + 6])
        self._out.append(Send(CLIENT, data))
        return True

    def _expand_cycle(self) -> None:
        """Take the oldest cycle apart into the messages that it is."""
        cycle = self._pending.popleft()
        portal, now, order = cycle.portal, cycle.started_ns, cycle.order
        assert portal is not None
        parts: list[Exchange] = []
        if cycle.prepared is not None:
            parts.append(Exchange("P", now, order))
            parts[-1].version = cycle.prepared
        parts.append(Exchange("B", now, order))
        parts[-1].version = portal
        if portal.described:
            parts.append(Exchange("D", now, order))
            parts[-1].portal = portal
        execute = Exchange("E", now, order)
        execute.record_id, execute.decision, execute.portal = cycle.record_id, cycle.decision, portal
        self._pending.extendleft((Exchange("S", now, order), execute, *reversed(parts)))
