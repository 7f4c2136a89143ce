"""What both directions of an HTTP connection share: the commands under way, and the requests that are not answered yet, in order.

Owns the order of answers and the end of the flow; knows nothing of how requests are judged or responses are read.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from sidecar.codecs.http1 import Head
from sidecar.model.flow import Side
from sidecar.model.operation import HttpOperation
from sidecar.model.reasons import CloseReason
from sidecar.model.record import Record, VerdictPart
from sidecar.session.commands import CloseFlow, Command, Send, WithdrawHold, WriteRecord
from sidecar.session.context import SessionContext
from sidecar.session.http_pending import Answer, Pending
from sidecar.session.http_problem import problem
from sidecar.session.http_records import request_record, response_record


class Exchange:
    """The flow's state that requests and responses have in common."""

    def __init__(self, context: SessionContext, *, connected: bool) -> None:
        self.context = context
        self.now_ns = 0
        self.out: list[Command] = []
        self.pending: deque[Pending] = deque()
        self.response: Head | None = None
        """The response under way: our own answers wait for its end."""
        self.answer = Answer()
        self.raw = False
        """Upgraded: bytes are relayed."""
        self.closed = False
        self.last_request = False
        """No request after this one is read."""
        self.hold_id: str | None = None
        self.bytes = {Side.CLIENT: 0, Side.SERVER: 0}
        self._connected = connected
        self._early: list[Any] = []

    def take(self) -> list[Command]:
        out, self.out = self.out, []
        return out

    def connected(self) -> None:
        self._connected = True
        self.out += [Send(Side.SERVER, data) for data in self._early]
        self._early.clear()

    def to_client(self, data: bytes | memoryview) -> None:
        self.out.append(Send(Side.CLIENT, data))

    def to_server(self, data: bytes | memoryview) -> None:
        if self._connected:
            self.out.append(Send(Side.SERVER, data))
        else:
            self._early.append(data)

    def write(self, record: Record) -> str:
        """The record's id."""
        self.out.append(WriteRecord(record))
        return record.id

    def write_request(self, operation: HttpOperation, whole: bytes | None, verdict: VerdictPart) -> str:
        return self.write(request_record(self.context, operation, whole, verdict, self.now_ns))

    def write_response(self, pending: Pending, head: Head | None, error: str | None = None) -> None:
        self.write(response_record(self.context, pending, head, self.answer, self.now_ns, error))

    def answer_ourselves(
        self, method: str, record_id: str, status: int, detail: str, rule: str, *, close: bool
    ) -> None:
        """A response of ours, in its turn."""
        pending = Pending(method, record_id, self.now_ns)
        pending.answer = problem(status, detail, rule, record_id, close=close, head_only=method == "HEAD")
        pending.close = close
        self.pending.append(pending)
        if close:
            self.last_request = True
        self.send_answers()

    def send_answers(self) -> None:
        """Those of ours whose turn has come."""
        while self.pending and self.pending[0].answer is not None and self.response is None:
            pending = self.pending.popleft()
            assert pending.answer is not None
            self.to_client(pending.answer)
            if pending.close:
                self.close(CloseReason.DENIED)
                return

    def close(self, reason: CloseReason, detail: str | None = None) -> None:
        if self.closed:
            return
        self.closed = True
        if self.hold_id is not None:
            self.out.append(WithdrawHold(self.hold_id))
        for pending in self.pending:
            if pending.answer is None:
                self.write_response(pending, None, "the connection ended before the answer was whole")
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
