"""What a PostgreSQL session remembers: statements and portals by name, and answers that are still to come.

A name's newest version is not yet the server's: a Parse may fail, or be skipped after an earlier error, and then the old statement
lives on under the name. Versions therefore form a chain until the server has answered. Within one segment (up to a Sync) only the
newest counts, because the server skips the rest of a segment after any failure; in a later one, every version that may be the
server's is judged, and the strictest verdict holds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from sidecar.codecs.postgres.messages import Bind, Column
from sidecar.model.record import ColumnPart, OperationPart, Record, ResponsePart, TimingPart, VerdictPart
from sidecar.model.verdict import MaskPlan, NameUse, ValueMask, Verdict


@dataclass(slots=True, eq=False)
class RowPlan:
    """How the rows of one description are treated. A list of masks is as long as the columns; None: no column is masked."""

    columns: tuple[Column, ...]
    catalog: int
    """The catalog's version it was made with."""
    masks: list[ValueMask | None] | None
    record_masks: list[ValueMask | None] | None
    parts: tuple[ColumnPart, ...]
    plain: bool
    """Rows pass as they are, and are recorded as they are."""


@dataclass(slots=True, eq=False)
class Decision:
    """A text's verdict, with the parts of its record made ready. One per text and policy revision."""

    text: str
    verdict: Verdict
    operation: OperationPart
    part: VerdictPart
    passes: bool
    denial: tuple[str, str, str] | None = None
    """(SQLSTATE, message, rule) where it is refused."""
    plan: MaskPlan | None = None
    """For the client; None where it masks nothing of PostgreSQL's."""
    record_plan: MaskPlan | None = None
    reached: bool = False
    """Masked columns may reach derived ones."""
    rows: bool = True
    """May return rows."""
    ddl: bool = False
    steady: bool = True
    """Cannot change how later texts are read (settings, transactions, functions), but for what a trigger, rule or view does."""
    ambiguous: bool = False
    """Read differently under other settings: judged only where these are certain."""
    resets: bool = False
    """RESET ALL or DISCARD ALL: our setting has to be set again."""
    unseen: bool = False
    """May change the client's encoding, or run what does not stand in its text."""
    row_plans: dict[bytes, RowPlan] = field(default_factory=dict)
    executed: bool = False
    """`text` is a PREPARE or DECLARE, and this is about the statement in it."""
    base: Decision | None = None
    """Of what returns rows of named statements: the decision on its own text alone, before any of theirs."""
    stands_for: tuple[Decision, ...] = ()
    """On the statements whose rows it returns."""

    @property
    def settled(self) -> bool:
        """Changes nothing of how later texts are read: no relation is in it, behind which a trigger, a rule or a view could stand."""
        return self.steady and not self.verdict.objects and all(item.settled for item in self.stands_for)

    @property
    def several(self) -> bool:
        """Whether the text may hold more than one statement that names something."""
        return len(self.verdict.statements) != 1 and ";" in self.text.rstrip("; \t\r\n")

    @property
    def names(self) -> tuple[NameUse, ...]:
        return self.verdict.sql.names if self.verdict.sql is not None else ()

    @property
    def masks_columns(self) -> bool:
        return bool(
            (self.plan is not None and self.plan.has_columns)
            or (self.record_plan is not None and self.record_plan.has_columns)
        )


@dataclass(slots=True, eq=False)
class Prepared:
    """`raw` is the text as the client sent it; None: made where we could not look (a function). `closed`: a Close was sent."""

    raw: bytes | None
    segment: int = 0
    closed: bool = False
    confirmed: bool = False
    older: Prepared | None = None
    columns: tuple[Column, ...] | None = None
    description: bytes = b""
    reading: str = ""
    """The encoding in which the server read it (Judge.reading)."""
    order: int = 0
    executed: bool = False
    """Made by SQL: `raw` is the PREPARE or DECLARE."""


@dataclass(slots=True, eq=False)
class Portal:
    statements: tuple[Prepared, ...]
    bind: Bind | None
    segment: int = 0
    closed: bool = False
    confirmed: bool = False
    older: Portal | None = None
    order: int = 0
    columns: tuple[Column, ...] | None = None
    description: bytes = b""
    in_doubt: bool = False
    """SQL may have ended it, so that a function could open another under its name."""
    described: bool = False
    """A Describe of it is on its way, so that its columns will be known before its rows."""
    lasting: bool = False
    """Outlives the transaction (WITH HOLD)."""


Version = TypeVar("Version", Prepared, Portal)
NAME_MAX_BYTES: Final = 62
"""The server keeps the first 63 bytes of a name (NAMEDATALEN less one), in its own encoding: of longer names, and of those that are
not ASCII, two may be one."""


def own_name(name: bytes) -> bool:
    """Whether no other name is the same for the server."""
    return len(name) <= NAME_MAX_BYTES and name.isascii()


def candidates(newest: Version | None, segment: int) -> list[Version]:
    """Every version that may be the server's when a message of `segment` reaches it; newest first."""
    found: list[Version] = []
    version = newest
    while version is not None:
        if not version.closed:
            found.append(version)
        if version.confirmed or version.segment == segment:
            break
        version = version.older
    return found


def confirm(table: dict[bytes, Version], name: bytes, version: Version) -> None:
    """The server did it: nothing older is left."""
    version.confirmed, version.older = True, None
    if version.closed and table.get(name) is version:
        del table[name]


def older_than(version: Prepared | Portal) -> int:
    """How many versions there may be behind this one."""
    count = 0
    while version.older is not None:
        version = version.older
        count += 1
    return count


def discard(table: dict[bytes, Version], name: bytes, version: Version) -> None:
    """The server did not do it: what was there before lives on."""
    newest = table.get(name)
    if newest is version:
        if version.older is not None:
            table[name] = version.older
        else:
            del table[name]
        return
    while newest is not None:
        if newest.older is version:
            newest.older = version.older
            return
        newest = newest.older


class Exchange:
    """One message of the client's whose answer is awaited. `kind` is its type byte (`d`: a run of copy data, never
    answered).

    `hidden`: the answer is ours and the client does not see it. `rewrite`: the server will refuse what stands in for the client's
    message, and this is what the client sees instead. `version` is what a Parse, Bind or Close made under `name`.
    """

    __slots__ = (
        "bytes",
        "decision",
        "digest",
        "ended",
        "error",
        "held_ns",
        "hidden",
        "kind",
        "name",
        "named",
        "order",
        "portal",
        "prepared",
        "record_id",
        "rewrite",
        "row_plan",
        "rows",
        "sample",
        "sample_bytes",
        "started_ns",
        "status",
        "version",
    )  # fmt: skip

    def __init__(self, kind: str, started_ns: int, order: int) -> None:
        self.kind = kind
        self.started_ns = started_ns
        self.order = order
        self.hidden = False
        self.ended = False
        self.rewrite: bytes | None = None
        self.record_id: str | None = None
        self.decision: Decision | None = None
        self.name = b""
        self.named: list[tuple[dict[bytes, Any], bytes, Prepared | Portal]] = []
        """What SQL in it does to names: the table, the name, the version made."""
        self.version: Prepared | Portal | None = None
        self.prepared: Prepared | None = None
        self.portal: Portal | None = None
        self.row_plan: RowPlan | None = None
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
            self.digest = hashlib.sha256(data)
        else:
            self.digest.update(data)


def response_record(exchange: Exchange, record_id: str, flow: str, now_ns: int) -> Record:
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
            columns=exchange.row_plan.parts if exchange.row_plan is not None else (),
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
