"""Responses, matched to their requests in order. Bodies leave as slices of what came in, but for those that a mask has to understand."""

from __future__ import annotations

import hashlib

from sidecar.codecs import http1
from sidecar.codecs.http1 import Body, Head
from sidecar.errors import ProtocolError
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.session.context import denial_message
from sidecar.session.http_exchange import Exchange
from sidecar.session.http_masked_body import Unmaskable, mask_body
from sidecar.session.http_pending import Answer
from sidecar.session.http_problem import problem


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
        view = memoryview(data)
        offset = 0
        while offset < len(data) and not exchange.closed and not exchange.raw:
            if self._body is not None:
                offset += self._part(view[offset:])
                continue
            if not exchange.pending:
                raise ProtocolError("a response that nobody asked for")
            end = data.find(b"\r\n\r\n", offset)
            limit = exchange.context.limits.head_max_bytes
            if end < 0:
                if len(data) - offset > limit:
                    raise ProtocolError(f"a response head over {limit} bytes")
                self._buffer += view[offset:]
                return
            head = http1.parse_head(bytes(data[offset : end + 4]), request=False)
            raw = view[offset : end + 4]
            offset = end + 4
            self._head(head, raw)
        if exchange.raw and offset < len(data):
            exchange.to_client(view[offset:])

    def eof(self) -> None:
        """The server sent its last byte: a body without a length ends here."""
        if self._body is not None and self._body.kind == "close" and not self.exchange.raw:
            self._body.done = True
            self._end()

    def _head(self, head: Head, raw: memoryview) -> None:
        exchange = self.exchange
        pending = exchange.pending[0]
        if 100 <= head.status < 200 and head.status != 101:
            exchange.to_client(raw)
            return
        body = http1.framing(head, request=False, method=pending.method)
        exchange.response = head
        exchange.answer = Answer(hashlib.sha256())
        if head.status == 101 or (pending.method == "CONNECT" and 200 <= head.status < 300):
            self._upgraded(head, raw)
            return
        plan = pending.plan
        changed = False
        if plan is not None:
            masked: list[tuple[bytes, bytes]] = []
            for key, value in head.headers:
                mask = plan.header(key.decode("latin-1").lower())
                if mask is None:
                    masked.append((key, value))
                    continue
                changed = True
                text = mask.apply_str(value.decode("latin-1"))
                if text is not None:
                    masked.append((key, text.encode("latin-1", "replace")))
            head.headers = masked
        kind = (head.get(b"content-type") or b"").lower()
        is_json = b"json" in kind
        self._body = body
        if (
            plan is not None
            and not body.done
            and (
                (plan.has_json and is_json) or (plan.has_detectors and (is_json or kind.startswith(b"text/")))
            )
        ):
            self._collected = bytearray()
            return
        exchange.to_client(head.encode() if changed else raw)
        if body.done:
            self._end()

    def _upgraded(self, head: Head, raw: memoryview) -> None:
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

    def _part(self, view: memoryview) -> int:
        exchange, body = self.exchange, self._body
        assert body is not None
        if self._collected is not None:
            take = body.feed(view, self._collected)
            limit = exchange.context.limits.masked_body_max_bytes
            if len(self._collected) > limit:
                self._cannot_mask(f"the body is over {limit} bytes")
                return take
        else:
            take = body.feed(view)
            part = view[:take]
            exchange.to_client(part)
            exchange.answer.note(part, exchange.context.limits.response_max_bytes)
        if body.done:
            self._end()
        return take

    def _end(self) -> None:
        exchange = self.exchange
        pending, head = exchange.pending[0], exchange.response
        assert head is not None
        if self._collected is not None:
            assert pending.plan is not None
            try:
                masked = mask_body(
                    head,
                    pending.plan,
                    bytes(self._collected),
                    exchange.context.limits.masked_body_max_bytes,
                )
            except Unmaskable as why:
                self._cannot_mask(str(why))
                return
            head.without(
                b"content-length",
                b"transfer-encoding",
                b"content-encoding",
                b"etag",
                b"digest",
                b"content-md5",
                b"repr-digest",
            )
            head.headers.append((b"Content-Length", str(len(masked)).encode()))
            exchange.to_client(head.encode() + masked)
            exchange.answer.note(masked, exchange.context.limits.response_max_bytes)
            self._collected = None
        exchange.write_response(pending, head)
        exchange.pending.popleft()
        until_close = self._body is not None and self._body.kind == "close"
        exchange.response = self._body = None
        if until_close or not head.keep_alive or pending.close:
            exchange.close(CloseReason.SERVER_CLOSED if not pending.close else CloseReason.CLIENT_CLOSED)
            return
        exchange.send_answers()

    def _cannot_mask(self, why: str) -> None:
        """A body that a mask applies to and that cannot be masked is refused, never passed on."""
        exchange = self.exchange
        pending = exchange.pending.popleft()
        rule = pending.plan.rules[0] if pending.plan else "mask"
        detail = denial_message(rule, f"the response cannot be masked: {why}")
        exchange.to_client(problem(403, detail, rule, pending.record_id, close=True))
        exchange.write_response(pending, exchange.response, f"not passed on: {why}")
        exchange.close(CloseReason.DENIED, why)
