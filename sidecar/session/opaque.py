"""What cannot be understood: relayed byte for byte, counted, recorded as a gap. Half-close is kept."""

from __future__ import annotations

from sidecar.model.flow import Side
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.model.verdict import Action, Engine
from sidecar.session.commands import CloseFlow, Command, HalfClose, OpenUpstream, Send, WriteRecord
from sidecar.session.context import SessionContext, identity_verdict_part, verdict_part

EARLY_MAX_BYTES = 1024 * 1024
"""What a client may send before the upstream connection stands."""


class OpaqueSession:
    """Implements session.commands.Session. `gap` names why the bytes are not inspected."""

    def __init__(
        self,
        context: SessionContext,
        gap: GapReason | None = None,
        detail: str | None = None,
    ) -> None:
        self.context = context
        self._gap = gap
        self._detail = detail
        self._connected = False
        self._early = bytearray()
        self._eof = {Side.CLIENT: False, Side.SERVER: False}
        self._bytes = {Side.CLIENT: 0, Side.SERVER: 0}
        self._closed = False

    def start(self, now_ns: int) -> list[Command]:
        context = self.context
        out: list[Command] = []
        denial = context.identity_denial()
        verdict = context.judge_connect("opaque")
        part = identity_verdict_part(denial, context.engine.revision) if denial else verdict_part(verdict)
        out.append(WriteRecord(context.open_record("opaque", part, now_ns)))
        if denial is not None or verdict.action is Action.DENY:
            reason = CloseReason.IDENTITY_REQUIRED if denial else CloseReason.DENIED
            return out + self._close(reason, now_ns, denial or verdict.reason)
        if self._gap is not None:
            out.append(WriteRecord(context.gap_record(self._gap, now_ns, detail=self._detail)))
        out.append(OpenUpstream())
        return out

    def upstream_connected(self, now_ns: int) -> list[Command]:
        self._connected = True
        out: list[Command] = []
        if self._early:
            out.append(Send(Side.SERVER, bytes(self._early)))
            self._early.clear()
        if self._eof[Side.CLIENT]:
            out.append(HalfClose(Side.SERVER))
        return out

    def receive(self, side: Side, data: bytes, now_ns: int) -> list[Command]:
        self._bytes[side] += len(data)
        if side is Side.SERVER:
            return [Send(Side.CLIENT, data)]
        if self._connected:
            return [Send(Side.SERVER, data)]
        self._early += data
        if len(self._early) > EARLY_MAX_BYTES:
            return self._close(CloseReason.LIMIT, now_ns, "too much was sent before the server was reached")
        return []

    def eof(self, side: Side, now_ns: int) -> list[Command]:
        self._eof[side] = True
        if all(self._eof.values()):
            return self._close(
                CloseReason.CLIENT_CLOSED if side is Side.CLIENT else CloseReason.SERVER_CLOSED, now_ns
            )
        if side is Side.CLIENT and not self._connected:
            return []
        return [HalfClose(Side.SERVER if side is Side.CLIENT else Side.CLIENT)]

    def tls_started(self, now_ns: int) -> list[Command]:
        return []

    def assertion_signed(self, assertion: str | None, now_ns: int) -> list[Command]:
        return []

    def hold_decided(
        self, hold_id: str, outcome: str, by: str | None, reason: str, now_ns: int
    ) -> list[Command]:
        return []

    def engine_changed(self, engine: Engine, now_ns: int) -> list[Command]:
        self.context.engine = engine
        return []

    def abort(self, reason: CloseReason, detail: str, now_ns: int) -> list[Command]:
        return self._close(reason, now_ns, detail)

    def _close(self, reason: CloseReason, now_ns: int, detail: str | None = None) -> list[Command]:
        if self._closed:
            return []
        self._closed = True
        record = self.context.close_record(
            reason,
            now_ns,
            detail=detail,
            bytes_client=self._bytes[Side.CLIENT],
            bytes_server=self._bytes[Side.SERVER],
        )
        return [WriteRecord(record), CloseFlow(reason)]
