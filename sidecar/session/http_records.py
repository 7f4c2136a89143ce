"""What the audit keeps of a request and its response."""

from __future__ import annotations

import hashlib

from sidecar.codecs.http1 import Head
from sidecar.model.operation import HttpOperation
from sidecar.model.record import OperationPart, Record, ResponsePart, TimingPart, VerdictPart
from sidecar.model.verdict import MaskPlan, Verdict
from sidecar.session.context import SessionContext
from sidecar.session.http_credentials import CREDENTIAL_HEADERS, REMOVED, safe_target, without_credentials
from sidecar.session.http_pending import Passed, Pending


def request_record(
    context: SessionContext,
    operation: HttpOperation,
    whole: bytes | None,
    part: VerdictPart,
    verdict: Verdict | None,
    now_ns: int,
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
            body=recorded_body(context, whole[:limit], verdict.record_masks if verdict else None)
            if whole
            else None,
            body_bytes=len(whole) if whole else None,
            body_digest=hashlib.sha256(whole).hexdigest() if whole else None,
            truncated=whole is not None and len(whole) > limit,
        ),
        verdict=part,
    )


def response_record(
    context: SessionContext,
    pending: Pending,
    head: Head | None,
    answer: Passed,
    now_ns: int,
    error: str | None = None,
) -> Record:
    """The `response` record, with what streamed of the request's body. Sizes and digests are of bodies without their framing."""
    return Record(
        id=context.ids.new(now_ns),
        ts_ns=now_ns,
        kind="response",
        flow=context.facts.flow,
        request=pending.record_id,
        operation=_request_body(context, pending) if pending.body.size else None,
        response=ResponsePart(
            status=head.status if head else None,
            bytes=answer.size,
            body=_response_body(context, pending, bytes(answer.stored)),
            headers=tuple(
                (name, REMOVED if name in CREDENTIAL_HEADERS else value.decode("latin-1"))
                for key, value in head.headers
                if (name := key.decode("latin-1").lower())
            )
            if head
            else (),
            truncated=answer.size > len(answer.stored),
            digest=answer.digest() if head else None,
            error={"message": error} if error else None,
        ),
        timing=TimingPart(held_ns=pending.held_ns, upstream_ns=now_ns - pending.started_ns),
    )


def _request_body(context: SessionContext, pending: Pending) -> OperationPart:
    body = pending.body
    masks = pending.verdict.record_masks if pending.verdict else None
    return OperationPart(
        kind="request_body",
        body=recorded_body(context, bytes(body.stored), masks),
        body_bytes=body.size,
        body_digest=body.digest(),
        truncated=body.size > len(body.stored) or not pending.body_whole,
    )


def recorded_body(context: SessionContext, stored: bytes, masks: MaskPlan | None) -> str | bytes | None:
    """A request's body as records and approvers may have it. Paths are those of responses: where a value may be one that they hide
    there, nothing of it is kept here."""
    if not stored:
        return None
    if masks and (masks.has_json or masks.has_detectors):
        return "[not recorded: a mask applies to this exchange]"
    return _readable(context, stored)


def _response_body(context: SessionContext, pending: Pending, stored: bytes) -> str | bytes | None:
    """What is kept of a response's body: what the client saw, and under the masks of observing rules too."""
    if not stored:
        return None
    plan = pending.verdict.record_masks if pending.verdict else None
    if plan and plan is not pending.plan and (plan.has_json or plan.has_detectors):
        try:
            stored = plan.mask_json(stored)
        except ValueError:
            return "[not recorded: a trial mask applies and the stored part is not whole JSON]"
    return _readable(context, stored)


def _readable(context: SessionContext, stored: bytes) -> str | bytes:
    """Without our own token, which a server may echo, and without credentials by the name of their member or field."""
    token = context.facts.attachment.http_token
    if token is not None:
        stored = stored.replace(token.reveal().encode("latin-1"), REMOVED.encode())
    try:
        text = stored.decode()
    except UnicodeDecodeError as error:
        if error.start < len(stored) - 4 or error.reason != "unexpected end of data":
            return stored
        text = stored[: error.start].decode()  # the bound cut a character
    return without_credentials(text)
