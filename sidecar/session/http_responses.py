"""Responses, matched to their requests in order. Bodies leave as slices of what came in, but for those that a mask has to understand."""

from __future__ import annotations

from typing import Final

from sidecar.codecs import http1
from sidecar.codecs.http1 import Body, Head, Headers
from sidecar.errors import ProtocolError
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.model.verdict import MaskPlan
from sidecar.session.context import denial_message
from sidecar.session.http_exchange import Exchange
from sidecar.session.http_masked_body import Unmaskable, mask_body, must_be_whole, replace_body_fields
from sidecar.session.http_pending import Passed
from sidecar.session.http_problem import problem

_STATUS: Final = b"HTTP/1."


class Responses:
    """The server's direction."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._buffer = bytearray()
        self._body: Body | None = None
        self._collected: bytearray | None = None

    def receive(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange.raw:
            exchange.to_client(data)
            return
        if self._buffer:
            self._buffer += data
            data = bytes(self._buffer)
            self._buffer.clear()
        offset = 0
        while offset < len(data) and not exchange.closed:
            if exchange.raw:
                exchange.to_client(memoryview(data)[offset:])
                return
            if self._body is not None:
                offset = self._part(self._body, data, offset)
                continue
            if not exchange.pending:
                # Often a time-out that the server announces (408). As an answer it would belong to a request yet to come.
                exchange.close(CloseReason.SERVER_CLOSED, "the server sent a response that nobody asked for")
                return
            end = data.find(b"\r\n\r\n", offset)
            limit = exchange.context.limits.head_max_bytes
            if (len(data) if end < 0 else end + 4) - offset > limit:
                raise ProtocolError(f"a response head over {limit} bytes")
            if end < 0:
                if not _STATUS.startswith(data[offset : offset + len(_STATUS)]):
                    raise ProtocolError("what came is no HTTP")
                self._buffer += memoryview(data)[offset:]
                return
            raw = data[offset : end + 4]
            offset = end + 4
            self._head(http1.parse_head(raw, request=False), raw)

    def eof(self) -> None:
        """The server sent its last byte: a body without a length ends here, any other is cut short."""
        exchange = self.exchange
        if self._body is None or exchange.raw:
            return
        if self._body.kind == "close":
            self._body.done = True
            self._end()
        elif self._collected is not None:
            exchange.to_client(problem(503, "Sidecar: the server's answer was cut short", "", "", close=True))

    def _head(self, head: Head, raw: bytes) -> None:
        exchange = self.exchange
        pending = exchange.pending[0]
        plan = pending.plan
        fields = _masked_fields(head.headers, plan)
        if fields != head.headers:
            head.headers = fields
            raw = head.encode()
        if 100 <= head.status < 200 and head.status != 101:
            exchange.to_client(raw)
            return
        if head.status == 101 and not pending.may_switch:
            raise ProtocolError("an upgrade that nobody asked for")
        body = http1.framing(head, request=False, method=pending.method)
        exchange.response, exchange.answer, exchange.switching = head, Passed(), False
        try:
            if head.status == 101 or (pending.method == "CONNECT" and 200 <= head.status < 300):
                if plan is not None and (plan.has_json or plan.has_detectors):
                    raise Unmaskable("an upgraded connection cannot be looked into")
                self._upgraded(head, raw)
                return
            self._body = body
            if not body.done and must_be_whole(head, plan):
                self._collected = bytearray()
                return
        except Unmaskable as why:
            self._cannot_mask(str(why))
            return
        exchange.to_client(raw)
        if body.done:
            self._end()

    def _upgraded(self, head: Head, raw: bytes) -> None:
        exchange = self.exchange
        exchange.to_client(raw)
        exchange.write_response(exchange.pending.popleft(), head)
        exchange.raw = True
        exchange.response = None
        exchange.write(
            exchange.context.gap_record(
                GapReason.UNKNOWN_PROTOCOL,
                exchange.now_ns,
                detail="the connection was upgraded and is relayed",
            )
        )

    def _part(self, body: Body, data: bytes, offset: int) -> int:
        exchange = self.exchange
        limits = exchange.context.limits
        end = body.feed(data, offset)
        if self._collected is not None:
            for part in body.payload:
                self._collected += part
            if len(self._collected) > limits.masked_body_max_bytes:
                self._cannot_mask(f"the body is over {limits.masked_body_max_bytes} bytes")
                return end
        else:
            if len(body.relay):
                exchange.to_client(body.relay)
            for part in body.payload:
                exchange.answer.note(part, limits.response_max_bytes)
            if body.done and body.kind == "chunked":
                trailers = _masked_fields(body.trailers, exchange.pending[0].plan)
                exchange.to_client(http1.encode_headers(trailers))
        if body.done:
            self._end()
        return end

    def _end(self) -> None:
        exchange, body = self.exchange, self._body
        pending, head = exchange.pending[0], exchange.response
        assert head is not None
        assert body is not None
        if self._collected is not None:
            assert pending.plan is not None
            limits = exchange.context.limits
            try:
                masked = mask_body(head, pending.plan, bytes(self._collected), limits.masked_body_max_bytes)
            except Unmaskable as why:
                self._cannot_mask(str(why))
                return
            replace_body_fields(head, len(masked))
            exchange.to_client(head.encode() + masked)
            exchange.answer.note(masked, limits.response_max_bytes)
            self._collected = None
        exchange.write_response(pending, head)
        self._ended(body, keep_alive=head.keep_alive and body.kind != "close")

    def _ended(self, body: Body, *, keep_alive: bool) -> None:
        exchange = self.exchange
        pending = exchange.pending.popleft()
        exchange.response = self._body = None
        if pending.close is not None:
            exchange.close(pending.close, pending.close_detail)
        elif not keep_alive:
            exchange.close(CloseReason.SERVER_CLOSED)
        else:
            exchange.advance()

    def _cannot_mask(self, why: str) -> None:
        """A body that a mask applies to and that cannot be masked is refused, never passed on. An error or a redirect of the server's
        stays one: its status and headers are kept."""
        exchange, body = self.exchange, self._body
        pending, head = exchange.pending[0], exchange.response
        assert head is not None
        plan = pending.plan
        rule = plan.rules[0] if plan is not None and plan.rules else "mask"
        detail = denial_message(rule, f"the response cannot be masked: {why}")
        whole = body is not None and body.done and body.kind != "close" and head.keep_alive
        close = not whole or pending.close is not None
        answer = problem(403, detail, rule, pending.record_id, close=close)
        if head.status >= 300:
            text = answer.partition(b"\r\n\r\n")[2]
            replace_body_fields(head, len(text))
            head.without(b"content-type", b"connection", b"keep-alive")
            head.headers.append((b"Content-Type", b"application/problem+json"))
            if close:
                head.headers.append((b"Connection", b"close"))
            answer = head.encode() + text
        exchange.to_client(answer)
        exchange.write_response(pending, head, f"not passed on: {why}")
        self._collected = None
        if whole and body is not None:
            self._ended(body, keep_alive=True)
        else:
            exchange.pending.popleft()
            exchange.close(CloseReason.DENIED, why)


def _masked_fields(fields: Headers, plan: MaskPlan | None) -> Headers:
    """Headers, or trailers, with their masks applied; those whose mask is null are gone."""
    if plan is None:
        return fields
    found: Headers = []
    for key, value in fields:
        mask = plan.header(key.decode("latin-1").lower())
        text = mask.apply_str(value.decode("latin-1")) if mask is not None else None
        if mask is None:
            found.append((key, value))
        elif text is not None:
            found.append((key, text.encode("latin-1", "replace")))
    return found
