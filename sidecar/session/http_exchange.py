"""What both directions of an HTTP connection share: the commands under way, and the requests that are not answered yet, in order.

Owns the upstream connection, the order of answers and the end of the flow; knows nothing of how requests are judged or responses are
read.
"""

from __future__ import annotations

from collections import deque

from sidecar.codecs.http1 import Head
from sidecar.model.flow import Side
from sidecar.model.operation import HttpOperation
from sidecar.model.reasons import CloseReason
from sidecar.model.record import Record, VerdictPart
from sidecar.model.verdict import Verdict
from sidecar.session.commands import (
    CloseFlow,
    Command,
    HalfClose,
    OpenUpstream,
    Send,
    WithdrawHold,
    WriteRecord,
)
from sidecar.session.context import SessionContext
from sidecar.session.http_pending import Passed, Pending
from sidecar.session.http_problem import problem
from sidecar.session.http_records import request_record, response_record


class Exchange:
    """The flow's state that requests and responses have in common. The upstream connection is opened for the first request that is
    let through: one that is held, or refused, leaves the server alone."""

    def __init__(self, context: SessionContext) -> None:
        self.context = context
        self.now_ns = 0
        self.out: list[Command] = []
        self.pending: deque[Pending] = deque()
        self.response: Head | None = None
        """The response under way: our own answers wait for its end."""
        self.answer = Passed()
        self.raw = False
        """Upgraded: bytes are relayed."""
        self.switching = False
        """An upgrade was asked for, and the next bytes of the client mean what the answer says."""
        self.closed = False
        self.last_request = False
        """No request after this one is read."""
        self.hold_id: str | None = None
        self.bytes = {Side.CLIENT: 0, Side.SERVER: 0}
        self._opened = False
        self._connected = False
        self._early: list[bytes | memoryview] = []
        self._half_close = False
        self._continue_due = False

    def take(self) -> list[Command]:
        out, self.out = self.out, []
        return out

    def connected(self) -> None:
        self._connected = True
        self.out += [Send(Side.SERVER, data) for data in self._early]
        self._early.clear()
        if self._half_close:
            self.out.append(HalfClose(Side.SERVER))

    def to_client(self, data: bytes | memoryview) -> None:
        self.out.append(Send(Side.CLIENT, data))

    def to_server(self, data: bytes | memoryview) -> None:
        if self._connected:
            self.out.append(Send(Side.SERVER, data))
            return
        if not self._opened:
            self._opened = True
            self.out.append(OpenUpstream())
        self._early.append(data)

    def half_close_server(self) -> None:
        """The client sent its last byte, and all of it went on."""
        if self._half_close:
            return
        self._half_close = True
        if self._connected:
            self.out.append(HalfClose(Side.SERVER))

    def send_continue(self) -> None:
        """Ask for a body that is read before the verdict, once earlier requests are answered."""
        if self.pending:
            self._continue_due = True
        else:
            self.to_client(b"HTTP/1.1 100 Continue\r\n\r\n")

    def write(self, record: Record) -> str:
        """The record's id."""
        self.out.append(WriteRecord(record))
        return record.id

    def write_request(
        self,
        operation: HttpOperation,
        whole: bytes | None,
        part: VerdictPart,
        verdict: Verdict | None = None,
    ) -> str:
        return self.write(request_record(self.context, operation, whole, part, verdict, self.now_ns))

    def write_response(self, pending: Pending, head: Head | None, error: str | None = None) -> None:
        self.write(response_record(self.context, pending, head, self.answer, self.now_ns, error))

    def answer_ourselves(
        self,
        method: str,
        record_id: str,
        status: int,
        detail: str,
        rule: str,
        *,
        close: CloseReason | None,
        close_detail: str | None = None,
    ) -> None:
        """A response of ours, in its turn; `close`: the flow ends with it."""
        pending = Pending(method, record_id, self.now_ns)
        pending.answer = problem(
            status, detail, rule, record_id, close=close is not None, head_only=method == "HEAD"
        )
        pending.close, pending.close_detail = close, close_detail
        self.pending.append(pending)
        if close:
            self.last_request = True
        self.advance()

    def advance(self) -> None:
        """An answer ended, or one of ours came up: those of ours whose turn it is are sent."""
        while self.pending and self.pending[0].answer is not None and self.response is None:
            pending = self.pending.popleft()
            assert pending.answer is not None
            self.to_client(pending.answer)
            if pending.close:
                self.close(pending.close, pending.close_detail)
                return
        if self._continue_due and not self.pending:
            self._continue_due = False
            self.to_client(b"HTTP/1.1 100 Continue\r\n\r\n")

    def close(self, reason: CloseReason, detail: str | None = None) -> None:
        if self.closed:
            return
        self.closed = True
        if self.hold_id is not None:
            self.out.append(WithdrawHold(self.hold_id))
        for pending in self.pending:
            if pending.answer is None:
                self.write_response(
                    pending, self.response, "the connection ended before the answer was whole"
                )
                self.response, self.answer = None, Passed()
        self.pending.clear()
        self.write(
            self.context.close_record(
                reason,
                self.now_ns,
                detail=detail,
                bytes_client=self.bytes[Side.CLIENT],
                bytes_server=self.bytes[Side.SERVER],
            )
        )
        self.out.append(CloseFlow(reason))
