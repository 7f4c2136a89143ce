"""The engine's answer to one operation, and the interface by which sessions ask for it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

from sidecar.model.flow import FlowFacts
from sidecar.model.operation import Operation
from sidecar.model.record import ObjectPart


class Action(enum.StrEnum):
    ALLOW = "allow"
    DENY = "deny"
    MASK = "mask"
    """Allowed, and at least one mask rule matched."""
    HOLD = "hold"
    INVALID = "invalid"
    """SQL that the server's own grammar rejects: answered as the server would (42601), not a denial."""


@dataclass(frozen=True, slots=True)
class ApproveTerms:
    by: tuple[str, ...] = ()
    within_s: float = 900.0


class ValueMask(Protocol):
    """One strategy, applied to one value. Implementations live in `policy.masks`."""

    @property
    def rule(self) -> str: ...

    def apply_text(self, value: bytes, type_oid: int) -> bytes | None:
        """Mask a value in PostgreSQL text format. None (NULL) where the type cannot hold the masked form."""
        ...

    def apply_str(self, value: str) -> str | None:
        """Mask a JSON string, header or form value. None: becomes JSON null, or the header is removed."""
        ...


class MaskPlan(Protocol):
    """All masks that matched, merged: for one column the first rule wins. Falsy when it holds nothing."""

    def __bool__(self) -> bool: ...

    @property
    def rules(self) -> tuple[str, ...]: ...

    @property
    def has_columns(self) -> bool:
        """True where any column pattern is in the plan."""
        ...

    def column(self, schema: str | None, table: str | None, column: str) -> ValueMask | None:
        """The mask for a column. None for schema or table means unknown, which matches every pattern's schema or table."""
        ...

    def may_mask_table(self, schema: str, table: str) -> bool:
        """Whether a pattern is about a table of this name; `schema` empty: any."""
        ...

    def column_names(self) -> frozenset[str]:
        """Last components of all column patterns, lower case; `*` where a pattern ends in one."""
        ...

    def derived(self) -> ValueMask:
        """The strongest mask (redact) for a value that may be derived from a masked column."""
        ...

    def detect_text(self, value: bytes) -> bytes:
        """Apply content detectors to a text value; the same object where nothing was found."""
        ...

    @property
    def has_detectors(self) -> bool: ...

    @property
    def has_json(self) -> bool: ...

    def mask_json(self, body: bytes) -> bytes:
        """The text of a JSON document with its masked values replaced and every other byte as it was; the same object where nothing
        was masked. Raises ValueError where it is no JSON."""
        ...

    def header(self, name: str) -> ValueMask | None:
        """The mask for an HTTP response header; `name` lower case."""
        ...


@dataclass(frozen=True, slots=True)
class SyntaxIssue:
    """Why the grammar rejects a text: the server's own message and the 1-based character position (0: unknown)."""

    message: str
    position: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    action: Action
    rule: str | None
    """Name of the deciding rule; None where the document's default decided."""
    reason: str
    policy: str
    """Revision of the document (first 16 hex digits of its SHA-256)."""
    masks: MaskPlan
    """What to mask for the client (and in the record)."""
    record_masks: MaskPlan
    """What to mask in the record: `masks` and those of observing rules."""
    enforced: bool = True
    """False where the verdict stems from an observing document, which let through what `would` names."""
    would: str | None = None
    """`deny` or `hold` and the rule's name (`deny:no-drops`), where an observing rule would have decided so."""
    approve: ApproveTerms | None = None
    severity: str | None = None
    owner: str | None = None
    tags: tuple[str, ...] = ()
    syntax: SyntaxIssue | None = None
    statements: tuple[str, ...] = ()
    """Statement kinds in order (`SELECT`, `DROP TABLE` as `DROP`, …); SQL only."""
    objects: tuple[ObjectPart, ...] = ()
    sql: SqlFacts | None = None
    cacheable: bool = True
    """False where the answer depended on something outside (text, parameters-free facts): parameters, or a body."""


@dataclass(frozen=True, slots=True)
class FunctionMade:
    """A new function or operator. `language` empty: its body is not at hand."""

    name: str
    language: str = ""
    body: str = ""


@dataclass(frozen=True, slots=True)
class CatalogChanges:
    """What a statement does to definitions, so that facts about the database can be doubted until they are read anew."""

    made: tuple[str, ...] = ()
    """New tables, which hold only what was judged."""
    redefined: tuple[str, ...] = ()
    """Names of relations that may show other columns than before."""
    altered: tuple[str, ...] = ()
    """Tables with new columns, types or constraints."""
    functions: tuple[FunctionMade, ...] = ()
    triggers: tuple[str, ...] = ()
    """Tables with new triggers; empty: an event trigger, or code that may have made one."""
    anything: bool = False
    temporary: bool = False
    """All of it is the session's own, which no other sees."""


@dataclass(frozen=True, slots=True)
class NameUse:
    """What a statement does to the name of a prepared statement or a cursor. `act`: prepare, deallocate, declare, close, fetch,
    execute, or run (EXPLAIN and CREATE TABLE AS of an EXECUTE). `name` None: all names. `text`: the whole PREPARE or DECLARE; None
    where it is too long to be remembered."""

    act: str
    name: str | None
    text: str | None = None
    lasting: bool = False
    """WITH HOLD: it lives on after the transaction."""


@dataclass(frozen=True, slots=True)
class SqlFacts:
    """What the tree says that a session needs."""

    statements: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    """Settings that are SET, RESET or given to set_config, lower case; `*` for all, or for one that cannot be known."""
    may_change_catalog: bool = False
    """DDL, or something opaque that may hold DDL: catalog facts have to be refreshed."""
    transaction_control: bool = False
    is_copy: bool = False
    copy_unread: bool = False
    """COPY … TO a file, a program, or in binary: no detector can read and rewrite its rows."""
    copy_source: str | None = None
    """`schema.table`, `table` or None where COPY reads a query."""
    masked_reach: bool = False
    """A masked column (by name, whole-row, star in a subquery, or unknown function over a masked table) can reach a derived
    result column; derived columns (table OID 0) are then masked."""
    refusal: str | None = None
    """Why the masks refuse the statement, for what its own text says."""
    may_move: bool = False
    """Writes, copies or calls what could move a masked column, or is judged more strictly: to be judged by the catalog too."""
    changes: CatalogChanges | None = None
    looks_at_no_row: bool = False
    """Definitions, settings and the like: no row of a table is looked at, so that no message can quote one."""
    names: tuple[NameUse, ...] = ()
    """In their order in the text."""
    bodies: tuple[str, ...] = ()
    """Code of DO blocks and functions, where it may not move masked columns."""
    fields: tuple[str, ...] = ()
    """`f` of `(x).f` and of `t.f`: it may be a function's name."""
    password_spans: tuple[tuple[int, int], ...] = ()
    """Byte offsets [start, end) of password literals in the text, to be replaced before recording."""
    masked_literal_spans: tuple[tuple[int, int], ...] = field(default=())
    """Byte offsets of literals bound to masked columns."""
    masked_parameters: tuple[int, ...] = ()
    """0-based numbers of parameters bound to masked columns."""


class Engine(Protocol):
    """A compiled policy. Pure and safe to share by all flows of a worker."""

    @property
    def revision(self) -> str: ...

    @property
    def wants_request_json(self) -> bool:
        """True where a rule looks at a request's JSON body."""
        ...

    def names_host(self, names: tuple[str, ...]) -> bool:
        """Whether a rule that may be about HTTP names one of these hosts, exactly or by a wildcard below a name."""
        ...

    def moment(self, now_ns: int) -> int:
        """Grows whenever an `until` passes: verdicts that were kept since an earlier moment are void."""
        ...

    def column_masks(
        self, facts: FlowFacts, database: str | None, user: str | None, *, observing: bool
    ) -> MaskPlan:
        """All column masks that any statement of this connection could come under, whatever its text: for rows of statements
        whose text is not at hand (FETCH, EXECUTE). `observing`: those of observing rules too."""
        ...

    def masks_reach(self, reach: int) -> bool:
        """Whether a derived value of that reach (policy.reach) is masked."""
        ...

    def refuses_reach(self, *, moved: int, probed: int, derived: int, copies: bool) -> str | None:
        """Why a statement under column masks is refused for what it moves, looks at and derives. `copies`: it is a COPY … TO."""
        ...

    def evaluate(self, operation: Operation, facts: FlowFacts) -> Verdict:
        """Judge one operation. Never raises for bad input: what cannot be understood follows `on_unparsed`. Caches by statement
        and the deciding facts (design, section 2), so that calling it for every statement is cheap."""
        ...
