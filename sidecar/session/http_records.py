"""What the audit keeps of a request and its response. Credentials never enter: named headers and query members are removed."""

from __future__ import annotations

import hashlib
from typing import Final

import orjson

from sidecar.codecs.http1 import Head
from sidecar.model.operation import HttpOperation
from sidecar.model.record import OperationPart, Record, ResponsePart, TimingPart, VerdictPart
from sidecar.session.context import SessionContext
from sidecar.session.http_pending import Answer, Pending

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


def safe_target(operation: HttpOperation) -> str:
    """Path and query as sent, secrets of the query removed."""
    if not operation.query:
        return operation.raw_path
    parts = [
        f"{name}={REMOVED if any(word in name.lower() for word in SECRET_QUERY) else value}"
        for name, value in operation.query
    ]
    return operation.raw_path + "?" + "&".join(parts)


def request_record(
    context: SessionContext, operation: HttpOperation, whole: bytes | None, verdict: VerdictPart, now_ns: int
) -> Record:
    """The `request` record; `whole` is the body where it was read before the verdict."""
    limit = context.limits.record_body_max_bytes
    hidden = CREDENTIAL_HEADERS | {(context.facts.attachment.reserved_header or "").lower()}
    return Record(
        id=context.ids.new(now_ns),
        ts_ns=now_ns,
        kind="request",
        flow=context.facts.flow,
        origin=context.origin_summary,
        principal=context.principal_summary,
        target=context.target_part("http"),
        operation=OperationPart(
            kind="request",
            method=operation.method,
            path=safe_target(operation),
            headers=tuple((name, REMOVED if name in hidden else value) for name, value in operation.headers),
            body=_text(whole[:limit]) if whole else None,
            body_bytes=len(whole) if whole else None,
            body_digest=hashlib.sha256(whole).hexdigest() if whole else None,
            truncated=whole is not None and len(whole) > limit,
        ),
        verdict=verdict,
    )


def response_record(
    context: SessionContext,
    pending: Pending,
    head: Head | None,
    answer: Answer,
    now_ns: int,
    error: str | None = None,
) -> Record:
    """The `response` record, with what streamed of the request's body."""
    return Record(
        id=context.ids.new(now_ns),
        ts_ns=now_ns,
        kind="response",
        flow=context.facts.flow,
        request=pending.record_id,
        operation=OperationPart(
            kind="request_body", body_bytes=pending.body_bytes, body_digest=pending.body_digest.hexdigest()
        )
        if pending.body_digest
        else None,
        response=ResponsePart(
            status=head.status if head else None,
            bytes=answer.size,
            body=_stored(context, pending, bytes(answer.stored)),
            headers=tuple(
                (name, REMOVED if name in CREDENTIAL_HEADERS else value.decode("latin-1"))
                for key, value in head.headers
                if (name := key.decode("latin-1").lower())
            )
            if head
            else (),
            truncated=answer.size > context.limits.response_max_bytes,
            digest=answer.digest.hexdigest() if answer.digest else None,
            error={"message": error} if error else None,
        ),
        timing=TimingPart(held_ns=pending.held_ns, upstream_ns=now_ns - pending.started_ns),
    )


def _stored(context: SessionContext, pending: Pending, stored: bytes) -> str | bytes | None:
    """What is kept of a response's body: without our own token, and under the masks of observing rules too."""
    if not stored:
        return None
    body = _text(_without_token(context, stored))
    plan = pending.verdict.record_masks if pending.verdict else None
    if plan and plan is not pending.plan and (plan.has_json or plan.has_detectors):
        try:
            return orjson.dumps(plan.apply_json(orjson.loads(body))[0]).decode()
        except orjson.JSONDecodeError:
            return "[not recorded: a trial mask applies and the stored part is not whole JSON]"
    return body


def _without_token(context: SessionContext, stored: bytes) -> bytes:
    """A server that echoes its request must not bring the token into the record."""
    token = context.facts.attachment.http_token
    return stored.replace(token.reveal().encode("latin-1"), REMOVED.encode()) if token else stored


def _text(raw: bytes) -> str | bytes:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw
