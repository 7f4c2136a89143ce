"""One HTTP/1.1 connection: requests are judged head by head, responses matched in order, masked where a rule says so.

Nothing buffers a stream: bodies leave as slices of what came in, except a body that a JSON mask has to understand, or a request
body that a rule looks at or a hold has to cover; those are bounded, and beyond the bound they are refused, never passed on.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from typing import Any, Final

import msgspec
import orjson

from sidecar.codecs import http1
from sidecar.codecs.http1 import Body, Head
from sidecar.errors import LimitExceeded, ProtocolError
from sidecar.model.flow import Side
from sidecar.model.ids import short_id
from sidecar.model.operation import HttpOperation
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.model.record import HoldPart, OperationPart, Record, ResponsePart, TimingPart
from sidecar.model.verdict import Action, Engine, MaskPlan, Verdict
from sidecar.session.commands import (
    CloseFlow,
    Command,
    HalfClose,
    OpenHold,
    OpenUpstream,
    PauseReading,
    Send,
    WithdrawHold,
    WriteRecord,
)
from sidecar.session.context import (
    IDENTITY_RULE,
    SessionContext,
    denial_message,
    identity_verdict_part,
    verdict_part,
)

CLIENT, SERVER = Side.CLIENT, Side.SERVER
MAX_PIPELINED: Final = 256
DISCARD_MAX_BYTES: Final = 64 * 1024 * 1024
"""How much of a refused request's body is read off to keep the connection."""
CREDENTIAL_HEADERS: Final = frozenset(
    {
        "authorization",
        "proxy-authorization",
        "cookie",
        "set-cookie",
        "x-api-key",
        "x-auth-token",
        "x-amz-security-token",
        "private-token",
        "x-vault-token",
    }
)
SECRET_QUERY: Final = ("token", "key", "secret", "password", "sig", "signature", "credential", "auth")
REMOVED: Final = "[removed]"


class Pending:
    """A request that was forwarded and is not answered yet (or one that we answer in its turn)."""

    __slots__ = (
        "answer",
        "body_bytes",
        "body_digest",
        "close",
        "held_ns",
        "method",
        "plan",
        "record_id",
        "started_ns",
        "verdict",
    )

    def __init__(self, method: str, record_id: str, started_ns: int) -> None:
        self.method = method
        self.record_id = record_id
        self.started_ns = started_ns
        self.plan: MaskPlan | None = None
        self.verdict: Verdict | None = None
        self.answer: bytes | None = None
        self.close = False
        self.held_ns = 0
        self.body_bytes = 0
        self.body_digest: Any = None


class HttpSession:
    """Implements session.commands.Session."""

    def __init__(self, context: SessionContext, *, opened: bool = False) -> None:
        self.context = context
        self.facts = context.facts
        self._opened = opened
        self._refused: tuple[str, str] | None = None
        self._out: list[Command] = []
        self._now = 0
        self._bytes = [0, 0]
        self._closed = False
        self._raw = False
        self._connected = opened
        self._early: list[Any] = []
        self._client = bytearray()
        self._server = bytearray()
        self._request_body: Body | None = None
        self._discarding = False
        self._discarded = 0
        self._current: Pending | None = None
        self._pending: deque[Pending] = deque()
        self._response: Head | None = None
        self._response_body: Body | None = None
        self._collected: bytearray | None = None
        self._stored = bytearray()
        self._response_bytes = 0
        self._digest: Any = None
        self._waiting: tuple[Head, Body, bytearray, HttpOperation] | None = None
        """A request whose body is awaited before it is judged."""
        self._held: tuple[str, Head, bytes, HttpOperation, Verdict, str, int] | None = None
        self._paused = False
        self._client_eof = False
        self._last_request = False

    # -- events

    def start(self, now_ns: int) -> list[Command]:
        self._now = now_ns
        context = self.context
        denial = context.identity_denial()
        verdict = context.judge_connect("http")
        part = identity_verdict_part(denial, context.engine.revision) if denial else verdict_part(verdict)
        if denial:
            self._refused = (IDENTITY_RULE, denial)
        elif verdict.action is Action.DENY:
            self._refused = (verdict.rule or "default", verdict.reason)
        if not self._opened:
            self._out.append(WriteRecord(context.open_record("http", part, now_ns)))
            if self._refused is None:
                self._out.append(OpenUpstream())
        return self._take()

    def upstream_connected(self, now_ns: int) -> list[Command]:
        self._now = now_ns
        self._connected = True
        for data in self._early:
            self._out.append(Send(SERVER, data))
        self._early.clear()
        return self._take()

    def receive(self, side: Side, data: bytes, now_ns: int) -> list[Command]:
        self._now = now_ns
        self._bytes[0 if side is CLIENT else 1] += len(data)
        if self._closed:
            return self._take()
        try:
            if side is CLIENT:
                self._from_client(data)
            else:
                self._from_server(data)
        except LimitExceeded as error:
            self._bad(431 if error.limit in ("head_max_bytes", "headers") else 413, error.message, side)
        except ProtocolError as error:
            self._bad(400, error.message, side)
        return self._take()

    def eof(self, side: Side, now_ns: int) -> list[Command]:
        self._now = now_ns
        if side is CLIENT:
            self._client_eof = True
            if self._raw:
                self._out.append(HalfClose(SERVER))
            elif self._held is not None or not self._pending:
                self._close(CloseReason.CLIENT_CLOSED)
            else:
                self._out.append(HalfClose(SERVER))
            return self._take()
        if self._response_body is not None and self._response_body.kind == "close" and not self._raw:
            self._response_body.done = True
            self._response_end()
        self._close(CloseReason.SERVER_CLOSED)
        return self._take()

    def tls_started(self, now_ns: int) -> list[Command]:
        return []

    def assertion_signed(self, assertion: str | None, now_ns: int) -> list[Command]:
        return []

    def hold_decided(
        self, hold_id: str, outcome: str, by: str | None, reason: str, now_ns: int
    ) -> list[Command]:
        self._now = now_ns
        held = self._held
        if held is None or held[0] != hold_id:
            return []
        self._held = None
        _, head, body, operation, verdict, record_id, since = held
        again = self.context.engine.evaluate(operation, self.facts)
        allowed = again.action in (Action.ALLOW, Action.MASK) or (
            again.action is Action.HOLD and again.rule == verdict.rule
        )
        if outcome == "approved" and allowed:
            pending = self._forward(head, again, record_id, whole=body)
            pending.held_ns = now_ns - since
        else:
            why = (
                f"{outcome}{f' by {by}' if by else ''}{f': {reason}' if reason else ''}"
                if outcome != "approved"
                else again.reason
            )
            rule = (verdict if outcome != "approved" else again).rule or "default"
            self._answer(
                head.method, record_id, 403, denial_message(rule, why), rule, close=not head.keep_alive
            )
        if self._paused:
            self._paused = False
            self._out.append(PauseReading(CLIENT, False))
        rest = bytes(self._client)
        self._client.clear()
        if rest and not self._closed:
            try:
                self._from_client(rest)
            except (ProtocolError, LimitExceeded) as error:
                self._bad(400, error.message, CLIENT)
        return self._take()

    def engine_changed(self, engine: Engine, now_ns: int) -> list[Command]:
        self.context.engine = engine
        return []

    def abort(self, reason: CloseReason, detail: str, now_ns: int) -> list[Command]:
        self._now = now_ns
        gone = (CloseReason.UPSTREAM_UNREACHABLE, CloseReason.CLIENT_CLOSED, CloseReason.SERVER_CLOSED)
        if reason not in gone and not self._raw and self._response is None:
            self._out.append(
                Send(CLIENT, _problem(503, f"Sidecar: {detail or reason.value}", "", "", close=True))
            )
        self._close(reason, detail)
        return self._take()

    # -- tools

    def _take(self) -> list[Command]:
        out, self._out = self._out, []
        return out

    def _upstream(self, data: Any) -> None:
        if self._connected:
            self._out.append(Send(SERVER, data))
        else:
            self._early.append(data)

    def _close(self, reason: CloseReason, detail: str | None = None) -> None:
        if self._closed:
            return
        self._closed = True
        if self._held is not None:
            self._out.append(WithdrawHold(self._held[0]))
        for pending in self._pending:
            if pending.answer is None:
                self._record_response(pending, None, error="the connection ended before the answer was whole")
        self._pending.clear()
        self._out.append(
            WriteRecord(
                self.context.close_record(
                    reason, self._now, detail=detail, bytes_client=self._bytes[0], bytes_server=self._bytes[1]
                )
            )
        )
        self._out.append(CloseFlow(reason))

    def _bad(self, status: int, message: str, side: Side) -> None:
        if side is CLIENT and not self._pending:
            self._out.append(
                Send(
                    CLIENT,
                    _problem(
                        status, f"Sidecar: the request was not understood: {message}", "", "", close=True
                    ),
                )
            )
        elif side is SERVER and self._response is None:
            self._out.append(
                Send(
                    CLIENT,
                    _problem(
                        503, f"Sidecar: the server's answer was not understood: {message}", "", "", close=True
                    ),
                )
            )
        self._close(CloseReason.PROTOCOL_ERROR, f"{side.value}: {message}")

    # -- requests

    def _from_client(self, data: bytes) -> None:
        if self._raw:
            self._upstream(data)
            return
        if self._held is not None or self._last_request:
            self._client += data
            limit = self.context.limits.held_max_bytes
            if len(self._client) > limit and not self._paused:
                self._paused = True
                self._out.append(PauseReading(CLIENT, True))
            return
        if self._client:
            self._client += data
            data = bytes(self._client)
            self._client.clear()
        view = memoryview(data)
        offset = 0
        while offset < len(data) and not self._closed and not self._raw:
            if self._waiting is not None:
                offset += self._await_body(view[offset:])
                continue
            if self._held is not None or self._last_request:
                break
            if self._request_body is not None:
                offset += self._body(view[offset:])
                continue
            end = data.find(b"\r\n\r\n", offset)
            limit = self.context.limits.head_max_bytes
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
            if self._raw:
                self._upstream(bytes(view[offset:]))
            else:
                self._client += view[offset:]

    def _body(self, view: memoryview) -> int:
        body = self._request_body
        assert body is not None
        take = body.feed(view)
        if self._discarding:
            self._discarded += take
            if self._discarded > DISCARD_MAX_BYTES:
                self._close(CloseReason.LIMIT, "a refused request's body is too long to read off")
        else:
            part = view[:take]
            if self._current is not None:
                self._current.body_bytes += take
                if self._current.body_digest is None:
                    self._current.body_digest = hashlib.sha256()
                self._current.body_digest.update(part)
            self._upstream(part)
        if body.done:
            self._request_body = None
            self._discarding = False
            self._current = None
        return take

    def _request(self, head: Head) -> None:
        if len(self._pending) >= MAX_PIPELINED:
            raise LimitExceeded("too many pipelined requests", limit="pipelined", value=MAX_PIPELINED)
        hosts = head.get_all(b"host")
        if len(hosts) > 1 or (head.version == "1.1" and not hosts):
            raise ProtocolError("an HTTP/1.1 request has exactly one Host")
        body = http1.framing(head, request=True)
        host, path, raw_path, query = http1.split_target(
            head.target, hosts[0].decode("latin-1") if hosts else None
        )
        reserved = (self.facts.attachment.reserved_header or "").lower()
        if reserved:
            # Also the spellings that servers fold into it (CGI turns - into _).
            head.headers = [
                (key, value)
                for key, value in head.headers
                if key.decode("latin-1").lower().replace("_", "-") != reserved.replace("_", "-")
            ]
        operation = HttpOperation(
            method=head.method,
            host=host,
            path=path,
            raw_path=raw_path,
            query=query,
            headers=tuple(
                (key.decode("latin-1").lower(), value.decode("latin-1")) for key, value in head.headers
            ),
        )
        if self._refused is not None:
            rule, reason = self._refused
            record_id = self._record(
                head, operation, None, identity_verdict_part(reason, self.context.engine.revision)
            )
            self._answer(head.method, record_id, 403, denial_message(rule, reason), rule, close=True)
            self._close(
                CloseReason.IDENTITY_REQUIRED if rule == IDENTITY_RULE else CloseReason.DENIED, reason
            )
            return
        wants_json = (
            self.context.engine.wants_request_json and b"json" in (head.get(b"content-type") or b"").lower()
        )
        verdict = self.context.engine.evaluate(operation, self.facts)
        if (wants_json or verdict.action is Action.HOLD) and not body.done:
            if (head.get(b"expect") or b"").lower() == b"100-continue":
                self._out.append(Send(CLIENT, b"HTTP/1.1 100 Continue\r\n\r\n"))
                head.without(b"expect")
            self._waiting = (head, body, bytearray(), operation)
            return
        if self.context.engine.wants_request_json:
            operation = _known(operation, None)
            verdict = self.context.engine.evaluate(operation, self.facts)
        self._judged(head, body, operation, verdict, b"")

    def _await_body(self, view: memoryview) -> int:
        assert self._waiting is not None
        head, body, collected, operation = self._waiting
        payload = bytearray()
        take = body.feed(view, payload)
        collected += payload
        limit = self.context.limits.held_max_bytes
        if len(collected) > limit:
            self._waiting = None
            record_id = self._record(
                head, operation, None, verdict_part(self.context.engine.evaluate(operation, self.facts))
            )
            self._answer(
                head.method,
                record_id,
                403,
                denial_message("limit", f"a rule needs the whole body, and it is over {limit} bytes"),
                "limit",
                close=True,
            )
            self._close(CloseReason.LIMIT, "a body over the limit that a rule needs whole")
            return take
        if body.done:
            self._waiting = None
            try:
                parsed = orjson.loads(bytes(collected)) if self.context.engine.wants_request_json else None
            except orjson.JSONDecodeError:
                parsed = None
            operation = _known(operation, parsed)
            verdict = self.context.engine.evaluate(operation, self.facts)
            head.without(b"transfer-encoding", b"content-length")
            head.headers.append((b"Content-Length", str(len(collected)).encode()))
            self._judged(head, Body("none", done=True), operation, verdict, bytes(collected))
        return take

    def _judged(
        self, head: Head, body: Body, operation: HttpOperation, verdict: Verdict, whole: bytes
    ) -> None:
        part = verdict_part(verdict)
        record_id = self._record(head, operation, whole or None, part)
        if verdict.action is Action.DENY:
            rule = verdict.rule or "default"
            expects = (head.get(b"expect") or b"").lower() == b"100-continue" and not body.done
            close = not head.keep_alive or expects
            self._answer(head.method, record_id, 403, denial_message(rule, verdict.reason), rule, close=close)
            if not body.done:
                self._request_body, self._discarding, self._discarded = body, True, 0
            return
        if verdict.action is Action.HOLD and verdict.approve is not None:
            self._hold(head, whole, operation, verdict, record_id)
            return
        pending = self._forward(head, verdict, record_id, whole=whole)
        if not body.done:
            self._request_body, self._current = body, pending

    def _forward(self, head: Head, verdict: Verdict, record_id: str, *, whole: bytes = b"") -> Pending:
        pending = Pending(head.method, record_id, self._now)
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
        self._pending.append(pending)
        self._upstream(head.encode() + whole)
        if pending.close:
            self._last_request = True
        return pending

    def _hold(
        self, head: Head, whole: bytes, operation: HttpOperation, verdict: Verdict, record_id: str
    ) -> None:
        assert verdict.approve is not None
        hold_id = self.context.ids.new(self._now)
        principal = self.facts.principal
        subject = [principal.issuer, principal.subject] if principal else None
        digest = hashlib.sha256(
            msgspec.msgpack.encode(
                [
                    head.start,
                    operation.host,
                    operation.headers,
                    whole,
                    str(self.facts.target.address),
                    subject,
                ]
            )
        ).hexdigest()
        self._held = (hold_id, head, whole, operation, verdict, record_id, self._now)
        expires = self._now + int(verdict.approve.within_s * 1e9)
        self._out.append(
            WriteRecord(
                Record(
                    id=self.context.ids.new(self._now),
                    ts_ns=self._now,
                    kind="hold",
                    flow=self.facts.flow,
                    request=record_id,
                    hold=HoldPart(id=hold_id, expires_ns=expires, digest=digest, reason=verdict.reason),
                )
            )
        )
        self._out.append(
            OpenHold(
                hold_id=hold_id,
                request_id=record_id,
                rule=verdict.rule or "",
                reason=verdict.reason,
                terms=verdict.approve,
                summary=f"{head.method} {operation.host or self.facts.target.host}{_safe_target(operation)}",
                parameters=None,
                digest=digest,
            )
        )

    def _record(self, head: Head, operation: HttpOperation, whole: bytes | None, part: Any) -> str:
        record_id = self.context.ids.new(self._now)
        limit = self.context.limits.record_body_max_bytes
        hidden = CREDENTIAL_HEADERS | {(self.facts.attachment.reserved_header or "").lower()}
        self._out.append(
            WriteRecord(
                Record(
                    id=record_id,
                    ts_ns=self._now,
                    kind="request",
                    flow=self.facts.flow,
                    origin=self.context.origin_summary,
                    principal=self.context.principal_summary,
                    target=self.context.target_part("http"),
                    operation=OperationPart(
                        kind="request",
                        method=operation.method,
                        path=_safe_target(operation),
                        headers=tuple(
                            (name, REMOVED if name in hidden else value) for name, value in operation.headers
                        ),
                        body=_text(whole[:limit]) if whole else None,
                        body_bytes=len(whole) if whole else None,
                        body_digest=hashlib.sha256(whole).hexdigest() if whole else None,
                        truncated=whole is not None and len(whole) > limit,
                    ),
                    verdict=part,
                )
            )
        )
        return record_id

    def _answer(
        self, method: str, record_id: str, status: int, detail: str, rule: str, *, close: bool
    ) -> None:
        """A response of ours, in its turn."""
        data = _problem(status, detail, rule, record_id, close=close, head_only=method == "HEAD")
        pending = Pending(method, record_id, self._now)
        pending.answer, pending.close = data, close
        self._pending.append(pending)
        if close:
            self._last_request = True
        self._answers()

    def _answers(self) -> None:
        while self._pending and self._pending[0].answer is not None and self._response is None:
            pending = self._pending.popleft()
            assert pending.answer is not None
            self._out.append(Send(CLIENT, pending.answer))
            if pending.close:
                self._close(CloseReason.DENIED)
                return

    # -- responses

    def _from_server(self, data: bytes) -> None:
        if self._raw:
            self._out.append(Send(CLIENT, data))
            return
        if self._server:
            self._server += data
            data = bytes(self._server)
            self._server.clear()
        view = memoryview(data)
        offset = 0
        while offset < len(data) and not self._closed and not self._raw:
            if self._response_body is not None:
                offset += self._response_part(view[offset:])
                continue
            if not self._pending:
                raise ProtocolError("a response that nobody asked for")
            end = data.find(b"\r\n\r\n", offset)
            limit = self.context.limits.head_max_bytes
            if end < 0:
                if len(data) - offset > limit:
                    raise ProtocolError(f"a response head over {limit} bytes")
                self._server += view[offset:]
                return
            head = http1.parse_head(bytes(data[offset : end + 4]), request=False)
            raw = view[offset : end + 4]
            offset = end + 4
            self._response_head(head, raw)
        if self._raw and offset < len(data):
            self._out.append(Send(CLIENT, view[offset:]))

    def _response_head(self, head: Head, raw: memoryview) -> None:
        pending = self._pending[0]
        if 100 <= head.status < 200 and head.status != 101:
            self._out.append(Send(CLIENT, raw))
            return
        body = http1.framing(head, request=False, method=pending.method)
        self._response = head
        self._stored, self._response_bytes, self._digest = bytearray(), 0, hashlib.sha256()
        plan = pending.plan
        if head.status == 101 or (pending.method == "CONNECT" and 200 <= head.status < 300):
            self._out.append(Send(CLIENT, raw))
            self._record_response(pending, head)
            self._pending.popleft()
            self._raw = True
            self._response = None
            self._out.append(
                WriteRecord(
                    self.context.gap_record(
                        GapReason.UNKNOWN_PROTOCOL,
                        self._now,
                        detail="the connection was upgraded and is relayed",
                    )
                )
            )
            if self._client:
                self._upstream(bytes(self._client))
                self._client.clear()
            return
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
        needs = (
            plan is not None
            and not body.done
            and (
                (plan.has_json and is_json) or (plan.has_detectors and (is_json or kind.startswith(b"text/")))
            )
        )
        self._response_body = body
        if needs:
            self._collected = bytearray()
            return
        self._out.append(Send(CLIENT, head.encode() if changed else raw))
        if body.done:
            self._response_end()

    def _response_part(self, view: memoryview) -> int:
        body = self._response_body
        assert body is not None
        if self._collected is not None:
            take = body.feed(view, self._collected)
            limit = self.context.limits.masked_body_max_bytes
            if len(self._collected) > limit:
                self._cannot_mask(f"the body is over {limit} bytes")
                return take
        else:
            take = body.feed(view)
            part = view[:take]
            self._out.append(Send(CLIENT, part))
            self._note(part)
        if body.done:
            self._response_end()
        return take

    def _note(self, part: memoryview | bytes) -> None:
        self._response_bytes += len(part)
        self._digest.update(part)
        room = self.context.limits.response_max_bytes - len(self._stored)
        if room > 0:
            self._stored += part[:room]

    def _response_end(self) -> None:
        pending = self._pending[0]
        head = self._response
        assert head is not None
        if self._collected is not None:
            masked = self._masked(head, pending, bytes(self._collected))
            if masked is None:
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
            self._out.append(Send(CLIENT, head.encode() + masked))
            self._note(masked)
            self._collected = None
        self._record_response(pending, head)
        self._pending.popleft()
        until_close = self._response_body is not None and self._response_body.kind == "close"
        self._response = self._response_body = None
        if until_close or not head.keep_alive or pending.close:
            self._close(CloseReason.SERVER_CLOSED if not pending.close else CloseReason.CLIENT_CLOSED)
            return
        self._answers()

    def _masked(self, head: Head, pending: Pending, raw: bytes) -> bytes | None:
        """The body with its masks applied; None where it was refused instead."""
        plan = pending.plan
        assert plan is not None
        coding = (head.get(b"content-encoding") or b"identity").strip().lower()
        limit = self.context.limits.masked_body_max_bytes
        try:
            if coding in (b"gzip", b"x-gzip", b"deflate"):
                inflate = zlib.decompressobj(47)
                raw = inflate.decompress(raw, limit)
                if inflate.unconsumed_tail:
                    self._cannot_mask(f"the body inflates to over {limit} bytes")
                    return None
            elif coding != b"identity":
                self._cannot_mask("its content coding is not understood")
                return None
            if b"json" not in (head.get(b"content-type") or b"").lower():
                return plan.detect_text(raw)
            if b"ndjson" in (head.get(b"content-type") or b"").lower():
                return b"\n".join(
                    orjson.dumps(plan.apply_json(orjson.loads(line))[0]) if line.strip() else line
                    for line in raw.split(b"\n")
                )
            document, changed = plan.apply_json(orjson.loads(raw))
        except (zlib.error, orjson.JSONDecodeError, RecursionError) as error:
            self._cannot_mask(f"the body is not understood ({type(error).__name__})")
            return None
        return orjson.dumps(document) if changed else raw

    def _cannot_mask(self, why: str) -> None:
        """A body that a mask applies to and that cannot be masked is refused, never passed on."""
        pending = self._pending.popleft()
        rule = pending.plan.rules[0] if pending.plan else "mask"
        self._out.append(
            Send(
                CLIENT,
                _problem(
                    403,
                    denial_message(rule, f"the response cannot be masked: {why}"),
                    rule,
                    pending.record_id,
                    close=True,
                ),
            )
        )
        self._record_response(pending, self._response, error=f"not passed on: {why}")
        self._close(CloseReason.DENIED, why)

    def _without_token(self, stored: bytes) -> bytes:
        """A server that echoes its request must not bring the token into the record."""
        token = self.facts.attachment.http_token
        return stored.replace(token.reveal().encode("latin-1"), REMOVED.encode()) if token else stored

    def _record_response(self, pending: Pending, head: Head | None, error: str | None = None) -> None:
        limit = self.context.limits.response_max_bytes
        record_plan = pending.verdict.record_masks if pending.verdict else None
        body: str | bytes | None = _text(self._without_token(bytes(self._stored))) if self._stored else None
        if (
            body
            and record_plan
            and record_plan is not pending.plan
            and (record_plan.has_json or record_plan.has_detectors)
        ):
            try:
                body = orjson.dumps(record_plan.apply_json(orjson.loads(body))[0]).decode()
            except orjson.JSONDecodeError:
                body = "[not recorded: a trial mask applies and the stored part is not whole JSON]"
        self._out.append(
            WriteRecord(
                Record(
                    id=self.context.ids.new(self._now),
                    ts_ns=self._now,
                    kind="response",
                    flow=self.facts.flow,
                    request=pending.record_id,
                    operation=OperationPart(
                        kind="request_body",
                        body_bytes=pending.body_bytes,
                        body_digest=pending.body_digest.hexdigest(),
                    )
                    if pending.body_digest
                    else None,
                    response=ResponsePart(
                        status=head.status if head else None,
                        bytes=self._response_bytes,
                        body=body,
                        headers=tuple(
                            (name, REMOVED if name in CREDENTIAL_HEADERS else value.decode("latin-1"))
                            for key, value in head.headers
                            if (name := key.decode("latin-1").lower())
                        )
                        if head
                        else (),
                        truncated=self._response_bytes > limit,
                        digest=self._digest.hexdigest() if self._digest else None,
                        error={"message": error} if error else None,
                    ),
                    timing=TimingPart(held_ns=pending.held_ns, upstream_ns=self._now - pending.started_ns),
                )
            )
        )


def _known(operation: HttpOperation, parsed: object | None) -> HttpOperation:
    return HttpOperation(
        operation.method,
        operation.host,
        operation.path,
        operation.raw_path,
        operation.query,
        operation.headers,
        parsed,
        True,
    )


def _text(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _safe_target(operation: HttpOperation) -> str:
    """Path and query as sent, secrets of the query removed."""
    if not operation.query:
        return operation.raw_path
    parts = [
        f"{name}={REMOVED if any(word in name.lower() for word in SECRET_QUERY) else value}"
        for name, value in operation.query
    ]
    return operation.raw_path + "?" + "&".join(parts)


def _problem(
    status: int, detail: str, rule: str, record_id: str, *, close: bool, head_only: bool = False
) -> bytes:
    """RFC 9457 problem details."""
    reasons = {
        400: "Bad Request",
        403: "Forbidden",
        413: "Content Too Large",
        431: "Request Header Fields Too Large",
        503: "Service Unavailable",
    }
    document: dict[str, Any] = {
        "type": "about:blank",
        "title": reasons[status] if status != 503 else "Sidecar: Service Unavailable",
        "status": status,
        "detail": detail,
    }
    if record_id:
        short = short_id(record_id)
        document |= {
            "instance": f"urn:uuid:{record_id}",
            "rule": rule,
            "record": short,
            "hint": f"sidecar why {short}",
        }
    body = orjson.dumps(document)
    lines = [
        f"HTTP/1.1 {status} {reasons[status]}",
        "Content-Type: application/problem+json",
        f"Content-Length: {len(body)}",
        "Via: 1.1 sidecar",
    ]
    if close:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if head_only else body)
