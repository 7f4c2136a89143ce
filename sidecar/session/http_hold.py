"""A request that waits for somebody's decision: what an approval of it covers, and what approvers are shown."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec

from sidecar.codecs.http1 import Head
from sidecar.model.operation import HttpOperation
from sidecar.model.record import HoldPart, Record
from sidecar.model.verdict import Verdict
from sidecar.session.commands import OpenHold
from sidecar.session.http_credentials import safe_target
from sidecar.session.http_exchange import Exchange
from sidecar.session.http_records import recorded_body

SHOWN_BODY_BYTES = 4096
"""How much of a body approvers are shown."""


@dataclass(slots=True)
class HeldRequest:
    """Whole: head as it will be sent (but for what we attach), and body."""

    head: Head
    body: bytes
    operation: HttpOperation
    verdict: Verdict
    record_id: str
    since_ns: int


def open_hold(exchange: Exchange, held: HeldRequest) -> str:
    """Park it; the hold's id."""
    context, verdict = exchange.context, held.verdict
    assert verdict.approve is not None
    facts = context.facts
    hold_id = context.ids.new(exchange.now_ns)
    digest = _covered(exchange, held)
    exchange.write(
        Record(
            id=context.ids.new(exchange.now_ns),
            ts_ns=exchange.now_ns,
            kind="hold",
            flow=facts.flow,
            request=held.record_id,
            hold=HoldPart(
                id=hold_id,
                expires_ns=exchange.now_ns + int(verdict.approve.within_s * 1e9),
                digest=digest,
                reason=verdict.reason,
            ),
        )
    )
    shown = recorded_body(context, held.body, verdict.record_masks)
    exchange.out.append(
        OpenHold(
            hold_id=hold_id,
            request_id=held.record_id,
            rule=verdict.rule or "",
            reason=verdict.reason,
            terms=verdict.approve,
            summary=f"{held.head.method} {held.operation.host or facts.target.host}{safe_target(held.operation)}",
            parameters=(_shortened(shown),) if shown is not None else None,
            digest=digest,
        )
    )
    return hold_id


def _shortened(shown: str | bytes) -> str | bytes:
    if isinstance(shown, bytes) or len(shown) <= SHOWN_BODY_BYTES:
        return shown
    return f"{shown[:SHOWN_BODY_BYTES]}… ({len(shown)} characters)"


def _covered(exchange: Exchange, held: HeldRequest) -> str:
    """SHA-256 over the exact request, its target and its principal."""
    facts = exchange.context.facts
    subject = [facts.principal.issuer, facts.principal.subject] if facts.principal else None
    return hashlib.sha256(
        msgspec.msgpack.encode(
            [
                held.head.start,
                held.operation.host,
                held.operation.headers,
                held.body,
                str(facts.target.address),
                subject,
            ]
        )
    ).hexdigest()
