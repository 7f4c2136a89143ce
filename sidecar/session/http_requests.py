"""Requests: read head by head, judged, then forwarded, refused, or parked until somebody decides."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from sidecar.codecs import http1
from sidecar.codecs.http1 import Body, Head
from sidecar.errors import LimitExceeded, ProtocolError
from sidecar.model.flow import Side
from sidecar.model.operation import HttpOperation
from sidecar.model.reasons import CloseReason
from sidecar.model.record import VerdictPart
from sidecar.model.verdict import Action, Verdict
from sidecar.session.commands import PauseReading
from sidecar.session.context import IDENTITY_RULE, denial_message, identity_verdict_part, verdict_part
from sidecar.session.http_exchange import Exchange
from sidecar.session.http_hold import HeldRequest, open_hold
from sidecar.session.http_pending import Pending
from sidecar.session.http_request_json import request_json
from sidecar.session.http_rules import clean, without_reserved

MISDIRECTED: Final = "tls.host"
"""Stands as the rule where a request is for another host than its TLS."""
MAX_PIPELINED: Final = 256
"""Requests under way on one connection; more are not read before answers come."""
DISCARD_MAX_BYTES: Final = 64 * 1024 * 1024
"""How much of a refused request's body is read off to keep the connection."""
_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")


@dataclass(slots=True)
class _Awaited:
    """A request whose body is awaited before it is judged."""

    head: Head
    body: Body
    operation: HttpOperation
    collected: bytearray
    raw: bytearray
    """The same as it came, for a body that turns out too long to look at."""


class Requests:
    """The client's direction. `refused` is (rule, reason) where the flow itself may not be."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.facts = exchange.context.facts
        self.refused: tuple[str, str] | None = None
        self._buffer = bytearray()
        """A head that is not whole yet, or what was read ahead."""
        self._searched = 0
        """How much of the buffer holds no end of a head."""
        self._body: Body | None = None
        self._discarding = False
        self._discarded = 0
        self._streaming: Pending | None = None
        self._awaited: _Awaited | None = None
        self._held: HeldRequest | None = None
        self._paused = False

    @property
    def idle(self) -> bool:
        """Nothing that the client sent waits here for its turn."""
        return self._held is None and self._awaited is None and (not self._buffer or self._searched > 0)

    @property
    def held(self) -> bool:
        return self._held is not None

    @property
    def in_body(self) -> bool:
        """The server, or we, have the head of the request under way, and not all of its body."""
        return self._body is not None

    def receive(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange.raw:
            exchange.to_server(data)
            return
        fresh = not self._buffer
        if not fresh:
            self._buffer += data
        if self._blocked:
            if fresh:
                self._buffer += data
            self._bound()
            return
        if not fresh:
            if self._searched and _HEAD_END.search(self._buffer, max(self._searched - 3, 0)) is None:
                self._incomplete(len(self._buffer))
                return
            data = bytes(self._buffer)
            self._buffer.clear()
        self._searched = 0
        self._read(data)

    def resume(self) -> None:
        """A turn has come, or an answer made room: what was read ahead goes on."""
        if self._paused:
            self._paused = False
            self.exchange.out.append(PauseReading(Side.CLIENT, False))
        if not self._buffer or self._searched or self.exchange.closed:
            return
        rest = bytes(self._buffer)
        self._buffer.clear()
        if self.exchange.raw:
            self.exchange.to_server(rest)
        else:
            self.receive(rest)

    @property
    def _blocked(self) -> bool:
        """No new request is read for now."""
        if self._body is not None or self._awaited is not None:
            return False
        return (
            self._held is not None
            or self.exchange.last_request
            or self.exchange.switching
            or len(self.exchange.pending) >= MAX_PIPELINED
        )

    def _bound(self) -> None:
        """What is read ahead is bounded: then the client is not read."""
        if self.exchange.last_request and not self._held:
            self._buffer.clear()  # nothing after a last request is read (RFC 9112 section 9.6)
        elif len(self._buffer) > self.exchange.context.limits.held_max_bytes and not self._paused:
            self._paused = True
            self.exchange.out.append(PauseReading(Side.CLIENT, True))

    def _read(self, data: bytes) -> None:
        exchange = self.exchange
        offset = 0
        while offset < len(data) and not exchange.closed:
            if self._awaited is not None:
                offset = self._await_body(self._awaited, data, offset)
            elif self._body is not None:
                offset = self._stream(self._body, data, offset)
            elif self._blocked:
                self._buffer += memoryview(data)[offset:]
                self._bound()
                return
            else:
                while offset < len(data) and data[offset] in b"\r\n":  # RFC 9112 section 2.2: empty lines
                    offset += 1
                end = _HEAD_END.search(data, offset)
                if end is None:
                    if offset < len(data) and not http1.may_begin(data[offset : offset + 1]):
                        raise ProtocolError(
                            "what came is no HTTP"
                        )  # it would wait for an answer (TLS, for one)
                    self._buffer += memoryview(data)[offset:]
                    self._incomplete(len(data) - offset)
                    return
                if end[0] != b"\r\n\r\n":
                    raise ProtocolError("a bare LF in a head")
                self._check_size(end.end() - offset)
                head = http1.parse_head(data[offset : end.end()], request=True)
                offset = end.end()
                self._request(head)

    def _incomplete(self, size: int) -> None:
        self._check_size(size)
        self._searched = size

    def _check_size(self, size: int) -> None:
        limit = self.exchange.context.limits.head_max_bytes
        if size > limit:
            raise LimitExceeded(f"a request head over {limit} bytes", limit="head_max_bytes", value=limit)

    def _stream(self, body: Body, data: bytes, offset: int) -> int:
        end = body.feed(data, offset)
        if self._discarding:
            self._discarded += end - offset
            if self._discarded > DISCARD_MAX_BYTES:
                self.exchange.close(CloseReason.LIMIT, "a refused request's body is too long to read off")
        else:
            assert self._streaming is not None
            for part in body.payload:
                self._streaming.body.note(part, self.exchange.context.limits.record_body_max_bytes)
            if len(body.relay):
                self.exchange.to_server(body.relay)
            if body.done and body.kind == "chunked":
                trailers = without_reserved(body.trailers, self.facts.attachment.reserved_header)
                self.exchange.to_server(http1.encode_headers(trailers))
        if body.done:
            if self._streaming is not None:
                self._streaming.body_whole = True
            self._body = self._streaming = None
            self._discarding = False
        return end

    def _request(self, head: Head) -> None:
        exchange, context = self.exchange, self.exchange.context
        hosts = head.get_all(b"host")
        if len(hosts) > 1 or (head.version == "1.1" and not hosts):
            raise ProtocolError("an HTTP/1.1 request has exactly one Host")
        body = http1.framing(head, request=True)
        clean(head, self.facts.attachment.reserved_header)
        operation = _operation(head, hosts[0] if hosts else None)
        named = self.facts.target.tls_name
        if named is not None and operation.host is not None and operation.host.lower() != named:
            why = f"the request is for {operation.host}, and TLS was opened for {named}"
            self._misdirected(head, operation, why)
            return
        if self.refused is not None:
            rule, reason = self.refused
            record_id = exchange.write_request(
                operation, None, identity_verdict_part(reason, context.engine.revision)
            )
            exchange.answer_ourselves(
                head.method,
                record_id,
                403,
                denial_message(rule, reason),
                rule,
                close=CloseReason.IDENTITY_REQUIRED if rule == IDENTITY_RULE else CloseReason.DENIED,
                close_detail=reason,
            )
            return
        verdict = context.engine.evaluate(operation, self.facts)
        if (context.engine.wants_request_json or verdict.action is Action.HOLD) and not body.done:
            if b"100-continue" in head.words(b"expect"):
                exchange.send_continue()
                head.without(b"expect")
            self._awaited = _Awaited(head, body, operation, bytearray(), bytearray())
            return
        if context.engine.wants_request_json:
            operation = replace(operation, body_json=None, body_known=True)
            verdict = context.engine.evaluate(operation, self.facts)
        self._judged(head, body, operation, verdict, b"")

    def _misdirected(self, head: Head, operation: HttpOperation, why: str) -> None:
        """What is verified for one name is not asked for another (RFC 9110, section 15.5.20)."""
        exchange = self.exchange
        part = VerdictPart(Action.DENY.value, MISDIRECTED, why, exchange.context.engine.revision)
        record_id = exchange.write_request(operation, None, part)
        exchange.answer_ourselves(
            head.method,
            record_id,
            421,
            f"Sidecar: {why}",
            MISDIRECTED,
            close=CloseReason.DENIED,
            close_detail=why,
        )

    def _await_body(self, awaited: _Awaited, data: bytes, offset: int) -> int:
        exchange, context = self.exchange, self.exchange.context
        head, operation, collected = awaited.head, awaited.operation, awaited.collected
        end = awaited.body.feed(data, offset)
        for part in awaited.body.payload:
            collected += part
        awaited.raw += awaited.body.relay
        limit = context.limits.held_max_bytes
        if len(collected) > limit:
            self._awaited = None
            verdict = context.engine.evaluate(operation, self.facts)
            if verdict.action not in (Action.DENY, Action.HOLD):  # they fire on what is unknown
                self._stream_late(awaited, operation, verdict, bytes(collected))
                return end
            record_id = exchange.write_request(operation, None, verdict_part(verdict))
            rule = verdict.rule or "default"
            why = denial_message(rule, f"the rule needs the whole body, and it is over {limit} bytes")
            exchange.answer_ourselves(
                head.method, record_id, 403, why, rule,
                close=CloseReason.LIMIT, close_detail="a body over the limit that a rule needs whole",
            )  # fmt: skip
        elif awaited.body.done:
            self._awaited = None
            whole = bytes(collected)
            known, parsed = request_json(head, whole)
            operation = replace(operation, body_json=parsed, body_known=known)
            verdict = context.engine.evaluate(operation, self.facts)
            head.without(b"transfer-encoding", b"content-length", b"trailer")
            head.headers.append((b"Content-Length", str(len(whole)).encode()))
            self._judged(head, Body("none", done=True), operation, verdict, whole)
        return end

    def _stream_late(
        self, awaited: _Awaited, operation: HttpOperation, verdict: Verdict, data: bytes
    ) -> None:
        """The body is too long to look at, and no rule minds: what was read of it goes on, and the rest as it comes."""
        record_id = self.exchange.write_request(operation, None, verdict_part(verdict))
        pending = self._forward(awaited.head, verdict, record_id, bytes(awaited.raw))
        pending.body.note(data, self.exchange.context.limits.record_body_max_bytes)
        if not awaited.body.done:
            self._body, self._streaming = awaited.body, pending
        elif awaited.body.kind == "chunked":
            trailers = without_reserved(awaited.body.trailers, self.facts.attachment.reserved_header)
            self.exchange.to_server(http1.encode_headers(trailers))

    def _judged(
        self, head: Head, body: Body, operation: HttpOperation, verdict: Verdict, whole: bytes
    ) -> None:
        exchange = self.exchange
        record_id = exchange.write_request(operation, whole or None, verdict_part(verdict), verdict)
        if verdict.action is Action.DENY:
            rule = verdict.rule or "default"
            expects = b"100-continue" in head.words(b"expect") and not body.done
            exchange.answer_ourselves(
                head.method, record_id, 403, denial_message(rule, verdict.reason), rule,
                close=CloseReason.DENIED if expects or not head.keep_alive else None,
            )  # fmt: skip
            if not body.done:
                self._body, self._discarding, self._discarded = body, True, 0
        elif verdict.action is Action.HOLD and verdict.approve is not None:
            self._held = HeldRequest(head, whole, operation, verdict, record_id, exchange.now_ns)
            exchange.hold_id = open_hold(exchange, self._held)
        else:
            pending = self._forward(head, verdict, record_id, whole)
            if not body.done:
                self._body, self._streaming = body, pending

    def _forward(self, head: Head, verdict: Verdict, record_id: str, whole: bytes) -> Pending:
        exchange = self.exchange
        pending = Pending(head.method, record_id, exchange.now_ns)
        plan = verdict.masks
        pending.plan = plan if plan else None
        pending.verdict = verdict
        pending.may_switch = head.method == "CONNECT" or head.get(b"upgrade") is not None
        if not head.keep_alive:
            pending.close = CloseReason.CLIENT_CLOSED
            exchange.last_request = True
        exchange.switching = pending.may_switch
        attachment = self.facts.attachment
        if attachment.http_header and attachment.http_token is not None:
            head.headers.append(
                (attachment.http_header.encode("latin-1"), attachment.http_token.reveal().encode("latin-1"))
            )
        if plan and (plan.has_json or plan.has_detectors):
            head.without(b"accept-encoding", b"range", b"if-range")
            head.headers.append((b"Accept-Encoding", b"identity"))
        exchange.pending.append(pending)
        exchange.to_server(head.encode() + whole)
        return pending

    def decided(self, hold_id: str, outcome: str, by: str | None, reason: str) -> None:
        """What somebody, or the clock, said of the request that is held. It is judged again by the policy in force."""
        exchange, held = self.exchange, self._held
        if held is None or exchange.hold_id != hold_id:
            return
        self._held = exchange.hold_id = None
        again = exchange.context.engine.evaluate(held.operation, self.facts)
        allowed = again.action in (Action.ALLOW, Action.MASK) or (
            again.action is Action.HOLD and again.rule == held.verdict.rule
        )
        if outcome == "approved" and allowed:
            pending = self._forward(held.head, again, held.record_id, held.body)
            pending.held_ns = exchange.now_ns - held.since_ns
        elif outcome == "approved":
            self._refuse_held(held, again.rule or "default", again.reason)
        else:
            why = f"{outcome}{f' by {by}' if by else ''}{f': {reason}' if reason else ''}"
            self._refuse_held(held, held.verdict.rule or "default", why)
        self.resume()

    def _refuse_held(self, held: HeldRequest, rule: str, why: str) -> None:
        self.exchange.answer_ourselves(
            held.head.method, held.record_id, 403, denial_message(rule, why), rule,
            close=None if held.head.keep_alive else CloseReason.DENIED,
        )  # fmt: skip


def _operation(head: Head, host_header: bytes | None) -> HttpOperation:
    host, path, raw_path, query = http1.split_target(
        head.method, head.target, host_header.decode("latin-1") if host_header is not None else None
    )
    return HttpOperation(
        method=head.method,
        host=host,
        path=path,
        raw_path=raw_path,
        path_readings=http1.path_readings(raw_path),
        query=query,
        headers=tuple(
            (key.decode("latin-1").lower(), value.decode("latin-1")) for key, value in head.headers
        ),
    )
