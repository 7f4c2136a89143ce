"""Requests: read head by head, judged, then forwarded, refused, or parked until somebody decides."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import orjson

from sidecar.codecs import http1
from sidecar.codecs.http1 import Body, Head
from sidecar.errors import LimitExceeded, ProtocolError
from sidecar.model.flow import Side
from sidecar.model.operation import HttpOperation
from sidecar.model.reasons import CloseReason
from sidecar.model.record import HoldPart, Record
from sidecar.model.verdict import Action, Verdict
from sidecar.session.commands import OpenHold, PauseReading
from sidecar.session.context import IDENTITY_RULE, denial_message, identity_verdict_part, verdict_part
from sidecar.session.http_exchange import Exchange
from sidecar.session.http_pending import Pending
from sidecar.session.http_records import safe_target

MAX_PIPELINED: Final = 256
DISCARD_MAX_BYTES: Final = 64 * 1024 * 1024
"""How much of a refused request's body is read off to keep the connection."""


@dataclass(slots=True)
class _Awaited:
    """A request whose body is awaited before it is judged."""

    head: Head
    body: Body
    operation: HttpOperation
    collected: bytearray


@dataclass(slots=True)
class _Held:
    """A request that waits for somebody's decision."""

    head: Head
    body: bytes
    operation: HttpOperation
    verdict: Verdict
    record_id: str
    since_ns: int


class Requests:
    """The client's direction. `refused` is (rule, reason) where the flow itself may not be."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.facts = exchange.context.facts
        self.refused: tuple[str, str] | None = None
        self._buffer = bytearray()
        self._body: Body | None = None
        self._discarding = False
        self._discarded = 0
        self._streaming: Pending | None = None
        self._awaited: _Awaited | None = None
        self._held: _Held | None = None
        self._paused = False

    @property
    def held(self) -> bool:
        return self._held is not None

    def receive(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange.raw:
            exchange.to_server(data)
            return
        if self._held is not None or exchange.last_request:
            self._buffer += data
            limit = exchange.context.limits.held_max_bytes
            if len(self._buffer) > limit and not self._paused:
                self._paused = True
                exchange.out.append(PauseReading(Side.CLIENT, True))
            return
        if self._buffer:
            self._buffer += data
            data = bytes(self._buffer)
            self._buffer.clear()
        view = memoryview(data)
        offset = 0
        while offset < len(data) and not exchange.closed and not exchange.raw:
            if self._awaited is not None:
                offset += self._await_body(self._awaited, view[offset:])
                continue
            if self._held is not None or exchange.last_request:
                break
            if self._body is not None:
                offset += self._stream(self._body, view[offset:])
                continue
            end = data.find(b"\r\n\r\n", offset)
            limit = exchange.context.limits.head_max_bytes
            if end < 0:
                while (
                    data[offset : offset + 2] == b"\r\n"
                ):  # RFC 9112 section 2.2: empty lines before a request
                    offset += 2
                if len(data) - offset > limit:
                    raise LimitExceeded(
                        f"a request head over {limit} bytes", limit="head_max_bytes", value=limit
                    )
                break
            if end + 4 - offset > limit:
                raise LimitExceeded(f"a request head over {limit} bytes", limit="head_max_bytes", value=limit)
            raw = bytes(data[offset : end + 4]).lstrip(b"\r\n")
            offset = end + 4
            self._request(http1.parse_head(raw, request=True))
        if offset < len(data):
            if exchange.raw:
                exchange.to_server(bytes(view[offset:]))
            else:
                self._buffer += view[offset:]

    def upgraded(self) -> None:
        """What was read ahead belongs to the other protocol."""
        if self._buffer:
            self.exchange.to_server(bytes(self._buffer))
            self._buffer.clear()

    def _stream(self, body: Body, view: memoryview) -> int:
        take = body.feed(view)
        if self._discarding:
            self._discarded += take
            if self._discarded > DISCARD_MAX_BYTES:
                self.exchange.close(CloseReason.LIMIT, "a refused request's body is too long to read off")
        else:
            part = view[:take]
            if self._streaming is not None:
                self._streaming.body_bytes += take
                if self._streaming.body_digest is None:
                    self._streaming.body_digest = hashlib.sha256()
                self._streaming.body_digest.update(part)
            self.exchange.to_server(part)
        if body.done:
            self._body = self._streaming = None
            self._discarding = False
        return take

    def _request(self, head: Head) -> None:
        exchange, context = self.exchange, self.exchange.context
        if len(exchange.pending) >= MAX_PIPELINED:
            raise LimitExceeded("too many pipelined requests", limit="pipelined", value=MAX_PIPELINED)
        hosts = head.get_all(b"host")
        if len(hosts) > 1 or (head.version == "1.1" and not hosts):
            raise ProtocolError("an HTTP/1.1 request has exactly one Host")
        body = http1.framing(head, request=True)
        self._remove_reserved(head)
        operation = _operation(head, hosts[0] if hosts else None)
        if self.refused is not None:
            rule, reason = self.refused
            record_id = exchange.write_request(
                operation, None, identity_verdict_part(reason, context.engine.revision)
            )
            exchange.answer_ourselves(
                head.method, record_id, 403, denial_message(rule, reason), rule, close=True
            )
            exchange.close(
                CloseReason.IDENTITY_REQUIRED if rule == IDENTITY_RULE else CloseReason.DENIED, reason
            )
            return
        wants_json = (
            context.engine.wants_request_json and b"json" in (head.get(b"content-type") or b"").lower()
        )
        verdict = context.engine.evaluate(operation, self.facts)
        if (wants_json or verdict.action is Action.HOLD) and not body.done:
            if (head.get(b"expect") or b"").lower() == b"100-continue":
                exchange.to_client(b"HTTP/1.1 100 Continue\r\n\r\n")
                head.without(b"expect")
            self._awaited = _Awaited(head, body, operation, bytearray())
            return
        if context.engine.wants_request_json:
            operation = replace(operation, body_json=None, body_known=True)
            verdict = context.engine.evaluate(operation, self.facts)
        self._judged(head, body, operation, verdict, b"")

    def _remove_reserved(self, head: Head) -> None:
        """A client's own header of the name that only we may set, also in spellings that servers fold into it (CGI: - to _)."""
        reserved = (self.facts.attachment.reserved_header or "").lower().replace("_", "-")
        if reserved:
            head.headers = [
                (key, value)
                for key, value in head.headers
                if key.decode("latin-1").lower().replace("_", "-") != reserved
            ]

    def _await_body(self, awaited: _Awaited, view: memoryview) -> int:
        exchange, context = self.exchange, self.exchange.context
        head, operation, collected = awaited.head, awaited.operation, awaited.collected
        take = awaited.body.feed(view, collected)
        limit = context.limits.held_max_bytes
        if len(collected) > limit:
            self._awaited = None
            record_id = exchange.write_request(
                operation, None, verdict_part(context.engine.evaluate(operation, self.facts))
            )
            why = denial_message("limit", f"a rule needs the whole body, and it is over {limit} bytes")
            exchange.answer_ourselves(head.method, record_id, 403, why, "limit", close=True)
            exchange.close(CloseReason.LIMIT, "a body over the limit that a rule needs whole")
            return take
        if awaited.body.done:
            self._awaited = None
            try:
                parsed = orjson.loads(bytes(collected)) if context.engine.wants_request_json else None
            except orjson.JSONDecodeError:
                parsed = None
            operation = replace(operation, body_json=parsed, body_known=True)
            verdict = context.engine.evaluate(operation, self.facts)
            head.without(b"transfer-encoding", b"content-length")
            head.headers.append((b"Content-Length", str(len(collected)).encode()))
            self._judged(head, Body("none", done=True), operation, verdict, bytes(collected))
        return take

    def _judged(
        self, head: Head, body: Body, operation: HttpOperation, verdict: Verdict, whole: bytes
    ) -> None:
        exchange = self.exchange
        record_id = exchange.write_request(operation, whole or None, verdict_part(verdict))
        if verdict.action is Action.DENY:
            rule = verdict.rule or "default"
            expects = (head.get(b"expect") or b"").lower() == b"100-continue" and not body.done
            close = not head.keep_alive or expects
            exchange.answer_ourselves(
                head.method, record_id, 403, denial_message(rule, verdict.reason), rule, close=close
            )
            if not body.done:
                self._body, self._discarding, self._discarded = body, True, 0
            return
        if verdict.action is Action.HOLD and verdict.approve is not None:
            self._hold(_Held(head, whole, operation, verdict, record_id, exchange.now_ns))
            return
        pending = self._forward(head, verdict, record_id, whole)
        if not body.done:
            self._body, self._streaming = body, pending

    def _forward(self, head: Head, verdict: Verdict, record_id: str, whole: bytes) -> Pending:
        exchange = self.exchange
        pending = Pending(head.method, record_id, exchange.now_ns)
        plan = verdict.masks
        pending.plan = plan if plan else None
        pending.verdict = verdict
        pending.close = not head.keep_alive
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
        if pending.close:
            exchange.last_request = True
        return pending

    # -- holds

    def _hold(self, held: _Held) -> None:
        exchange, context, verdict = self.exchange, self.exchange.context, held.verdict
        assert verdict.approve is not None
        hold_id = context.ids.new(exchange.now_ns)
        self._held, exchange.hold_id = held, hold_id
        digest = self._covered(held)
        expires_ns = exchange.now_ns + int(verdict.approve.within_s * 1e9)
        exchange.write(
            Record(
                id=context.ids.new(exchange.now_ns),
                ts_ns=exchange.now_ns,
                kind="hold",
                flow=self.facts.flow,
                request=held.record_id,
                hold=HoldPart(id=hold_id, expires_ns=expires_ns, digest=digest, reason=verdict.reason),
            )
        )
        host = held.operation.host or self.facts.target.host
        exchange.out.append(
            OpenHold(
                hold_id=hold_id,
                request_id=held.record_id,
                rule=verdict.rule or "",
                reason=verdict.reason,
                terms=verdict.approve,
                summary=f"{held.head.method} {host}{safe_target(held.operation)}",
                parameters=None,
                digest=digest,
            )
        )

    def _covered(self, held: _Held) -> str:
        """What an approval covers: the exact request, its target and its principal."""
        principal = self.facts.principal
        return hashlib.sha256(
            msgspec.msgpack.encode(
                [
                    held.head.start,
                    held.operation.host,
                    held.operation.headers,
                    held.body,
                    str(self.facts.target.address),
                    [principal.issuer, principal.subject] if principal else None,
                ]
            )
        ).hexdigest()

    def decided(self, hold_id: str, outcome: str, by: str | None, reason: str) -> None:
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
        else:
            why = (
                f"{outcome}{f' by {by}' if by else ''}{f': {reason}' if reason else ''}"
                if outcome != "approved"
                else again.reason
            )
            rule = (held.verdict if outcome != "approved" else again).rule or "default"
            exchange.answer_ourselves(
                held.head.method,
                held.record_id,
                403,
                denial_message(rule, why),
                rule,
                close=not held.head.keep_alive,
            )
        if self._paused:
            self._paused = False
            exchange.out.append(PauseReading(Side.CLIENT, False))
        rest = bytes(self._buffer)
        self._buffer.clear()
        if rest and not exchange.closed:
            self.receive(rest)


def _operation(head: Head, host_header: bytes | None) -> HttpOperation:
    host, path, raw_path, query = http1.split_target(
        head.target, host_header.decode("latin-1") if host_header is not None else None
    )
    return HttpOperation(
        method=head.method,
        host=host,
        path=path,
        raw_path=raw_path,
        query=query,
        headers=tuple(
            (key.decode("latin-1").lower(), value.decode("latin-1")) for key, value in head.headers
        ),
    )
