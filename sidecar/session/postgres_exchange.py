"""What a PostgreSQL session remembers of statements, portals and of answers that are still to come."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from sidecar.codecs.postgres.messages import Bind, Column
from sidecar.model.record import ColumnPart, OperationPart, Record, ResponsePart, TimingPart, VerdictPart
from sidecar.model.verdict import MaskPlan, ValueMask, Verdict


@dataclass(slots=True)
class Decision:
    """A text's verdict, with the parts of its record made ready. One per text and policy revision."""

    text: str
    verdict: Verdict
    operation: OperationPart
    part: VerdictPart
    passes: bool
    denial: tuple[str, str, str] | None = None
    """(SQLSTATE, message, rule) where it is refused."""


@dataclass(slots=True)
class Prepared:
    """`columns` once the server has described it; `raw` is the text as the client sent it."""

    raw: bytes
    columns: tuple[Column, ...] | None = None


@dataclass(slots=True)
class Portal:
    prepared: Prepared
    bind: Bind
    columns: tuple[Column, ...] | None = None
    described: bool = False
    """A Describe of it is on its way, so that its columns will be known before its rows."""


class Exchange:
    """One message of the client's whose answer is awaited. `kind` is its type byte.

    `hidden`: the answer is ours and the client does not see it. `rewrite`: the server will refuse what stands in for the client's
    message, and this is what the client sees instead.
    """

    __slots__ = (
        "bytes",
        "columns",
        "detect",
        "digest",
        "error",
        "held_ns",
        "hidden",
        "kind",
        "masks",
        "plan",
        "portal",
        "prepared",
        "record_id",
        "rewrite",
        "rows",
        "sample",
        "sample_bytes",
        "started_ns",
        "status",
    )  # fmt: skip

    def __init__(self, kind: str, started_ns: int) -> None:
        self.kind = kind
        self.started_ns = started_ns
        self.hidden = False
        self.rewrite: bytes | None = None
        self.record_id: str | None = None
        self.plan: MaskPlan | None = None
        self.prepared: Prepared | None = None
        self.portal: Portal | None = None
        self.columns: tuple[Column, ...] | None = None
        self.masks: list[ValueMask | None] | None = None
        self.detect = False
        self.rows = 0
        self.bytes = 0
        self.sample: list[tuple[str | bytes | None, ...]] = []
        self.sample_bytes = 0
        self.digest: Any = None
        self.status: str | None = None
        self.error: dict[str, str] | None = None
        self.held_ns = 0

    def count(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes of the answer as the client gets them."""
        self.bytes += len(data)
        if self.digest is None:
            self.digest = hashlib.sha256()
        self.digest.update(data)


def response_record(exchange: Exchange, record_id: str, flow: str, now_ns: int, *, max_rows: int) -> Record:
    masks = exchange.masks
    columns: tuple[ColumnPart, ...] = ()
    if exchange.columns:
        columns = tuple(
            ColumnPart(column.name, column.type_oid, mask.rule if masks and (mask := masks[index]) else None)
            for index, column in enumerate(exchange.columns)
        )
    return Record(
        id=record_id,
        ts_ns=now_ns,
        kind="response",
        flow=flow,
        request=exchange.record_id,
        response=ResponsePart(
            status=exchange.status,
            rows=exchange.rows,
            bytes=exchange.bytes,
            columns=columns,
            sample=tuple(exchange.sample),
            truncated=exchange.rows > len(exchange.sample),
            digest=exchange.digest.hexdigest() if exchange.digest else None,
            error=exchange.error,
        ),
        timing=TimingPart(held_ns=exchange.held_ns, upstream_ns=now_ns - exchange.started_ns),
    )


@dataclass(slots=True)
class Held:
    """A statement that waits for a decision: what to send once released, and who asked for what."""

    hold_id: str
    kind: str
    data: bytes
    decision: Decision
    parameters: tuple[Any, ...] | None
    portal: Portal | None
    record_id: str
    since_ns: int
    rest: bytearray = field(default_factory=bytearray)
