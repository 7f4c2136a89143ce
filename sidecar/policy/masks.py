"""Masks: strategies on values, and the plan that says which value gets which.

What a type cannot hold becomes NULL, never an error in the client: only text-like PostgreSQL types take a masked text.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.model.verdict import ValueMask
from sidecar.policy.detectors import Detector
from sidecar.policy.json_text import JsonPattern, mask_json_text
from sidecar.policy.reach import CLEAN, MASKED
from sidecar.policy.sql_facts import Table

REDACTED: Final = "[redacted]"
TEXT_OIDS: Final = frozenset({0, 18, 19, 25, 705, 1042, 1043})
"""unknown-to-us, "char" (too short: see below), name, text, unknown, bpchar, varchar (pg_type.dat)."""
_TAKES_TEXT: Final = frozenset({19, 25, 705, 1042, 1043})
HASH_CHARS: Final = 32


@dataclass(frozen=True, slots=True)
class StrategyMask:
    """One strategy under the name of its rule. `transform` None: NULL."""

    rule: str
    name: str
    transform: Callable[[str], str] | None

    def apply_text(self, value: bytes, type_oid: int) -> bytes | None:
        if self.transform is None or type_oid not in _TAKES_TEXT:
            return None
        return self.transform(value.decode("utf-8", "replace")).encode()

    def apply_str(self, value: str) -> str | None:
        return None if self.transform is None else self.transform(value)


def strategy(rule: str, spec: Any, hash_key: bytes | None) -> StrategyMask:
    """From the document's form: `redact`, null, `hash`, `{keep_last: n}`, `{constant: v}`. Raises ValueError."""
    if spec is None or spec == "null":
        return StrategyMask(rule, "null", None)
    if spec == "redact":
        return StrategyMask(rule, "redact", lambda value: REDACTED)
    if spec == "hash":
        if hash_key is None:
            raise ValueError("`hash` needs masks.hash_key in the configuration")
        key = hash_key
        return StrategyMask(
            rule, "hash", lambda value: hmac.new(key, value.encode(), hashlib.sha256).hexdigest()[:HASH_CHARS]
        )
    if isinstance(spec, dict) and len(spec) == 1:
        ((name, argument),) = spec.items()
        if (
            name == "keep_last"
            and isinstance(argument, int)
            and not isinstance(argument, bool)
            and 0 <= argument <= 1000
        ):
            count = argument
            return StrategyMask(rule, "keep_last", lambda value: _keep_last(value, count))
        if name == "constant" and isinstance(argument, str | int):
            text = str(argument)
            return StrategyMask(rule, "constant", lambda value: text)
    raise ValueError(f"{spec!r} is no mask; valid: redact, null, hash, {{keep_last: n}}, {{constant: v}}")


def _keep_last(value: str, count: int) -> str:
    """A value no longer than what is kept is hidden whole."""
    if count == 0 or len(value) <= count:
        return "*" * max(len(value), 1)
    return "*" * (len(value) - count) + value[-count:]


@dataclass(frozen=True, slots=True)
class ColumnPattern:
    """`[schema.]table.column` or `column`, right-aligned; `*` in each part."""

    schema: str
    table: str
    column: str
    mask: StrategyMask

    def matches(self, schema: str | None, table: str | None, column: str) -> bool:
        return (
            _part(self.column, column)
            and (table is None or _part(self.table, table))
            and (schema is None or _part(self.schema, schema))
        )


def _part(pattern: str, value: str) -> bool:
    return pattern == "*" or pattern == value or fnmatch.fnmatchcase(value.lower(), pattern.lower())


def column_pattern(text: str, mask: StrategyMask) -> ColumnPattern:
    """Raises ValueError."""
    parts = text.split(".")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise ValueError(f"{text!r} is no column pattern; write column, table.column or schema.table.column")
    padded = ["*"] * (3 - len(parts)) + parts
    return ColumnPattern(padded[0], padded[1], padded[2], mask)


_STEP: Final = re.compile(r"\.\.([\w-]+|\*)|\.([\w-]+|\*)|\[\*\]|\[(\d+)\]|\['([^']+)'\]")


def json_pattern(text: str, mask: StrategyMask) -> JsonPattern:
    """`$.a.b[*].c`, `$..name`, `$['a b'][0]`. Raises ValueError."""
    if not text.startswith("$"):
        raise ValueError(f"{text!r} is no JSON path: it begins with $")
    steps: list[tuple[str, Any]] = []
    offset = 1
    while offset < len(text):
        match = _STEP.match(text, offset)
        if not match:
            raise ValueError(
                f"{text!r} is no JSON path that is supported: names, [*], [n], ['name'] and ..name are"
            )
        deep, name, index, quoted = match.groups()
        if deep:
            steps.append(("deep", deep))
        elif name:
            steps.append(("any", None) if name == "*" else ("name", name))
        elif index is not None:
            steps.append(("index", int(index)))
        elif quoted is not None:
            steps.append(("name", quoted))
        else:
            steps.append(("any", None))
        offset = match.end()
    if not steps:
        raise ValueError("`$` alone masks nothing")
    return JsonPattern(tuple(steps), mask)


@dataclass(frozen=True, slots=True)
class Plan:
    """model.verdict.MaskPlan: the masks of all matching rules, in their order."""

    columns: tuple[ColumnPattern, ...] = ()
    json: tuple[JsonPattern, ...] = ()
    headers: tuple[tuple[str, StrategyMask], ...] = ()
    detectors: tuple[Detector, ...] = ()
    rules: tuple[str, ...] = ()
    _names: frozenset[str] = field(default=frozenset())

    def __bool__(self) -> bool:
        return bool(self.columns or self.json or self.headers or self.detectors)

    @property
    def has_columns(self) -> bool:
        return bool(self.columns)

    @property
    def has_detectors(self) -> bool:
        return bool(self.detectors)

    @property
    def has_json(self) -> bool:
        return bool(self.json)

    def column(self, schema: str | None, table: str | None, column: str) -> ValueMask | None:
        for pattern in self.columns:
            if pattern.matches(schema, table, column):
                return pattern.mask
        return None

    def column_names(self) -> frozenset[str]:
        return self._names

    def may_mask_table(self, schema: str, table: str) -> bool:
        """`schema` empty: unqualified, so that it may be any."""
        return any(
            _part(pattern.table, table) and (not schema or _part(pattern.schema, schema))
            for pattern in self.columns
        )

    def names_schema(self, schema: str) -> bool:
        """Whether a pattern masks in this schema and not in every other."""
        return any(pattern.schema != "*" and _part(pattern.schema, schema) for pattern in self.columns)

    def may_mask_column(self, column: str) -> bool:
        return column == "*" or any(_part(pattern.column, column) for pattern in self.columns)

    def may_name_masked(self, code: str) -> bool:
        """Whether procedural code, which is not judged, may reach a masked column: it names its table (its column where the
        table is a wildcard), or makes statements out of strings."""
        lowered = code.lower()
        if self.columns and ("execute" in lowered or "u&" in lowered):
            return True
        if "rename" in lowered and any(
            pattern.schema != "*" and pattern.schema.lower() in lowered for pattern in self.columns
        ):
            return True
        for pattern in self.columns:
            name = pattern.table if "*" not in pattern.table else pattern.column
            if "*" in name or "?" in name or "[" in name or name.lower() in lowered:
                return True
        return False

    def derived(self) -> ValueMask:
        return StrategyMask(self.rules[0] if self.rules else "mask", "redact", lambda value: REDACTED)

    def detect_text(self, value: bytes) -> bytes:
        masked = value
        for item in self.detectors:
            masked = item.apply(masked)
        return value if masked == value else masked

    def mask_json(self, body: bytes) -> bytes:
        return mask_json_text(body, self.json, self._detect if self.detectors else None)

    def _detect(self, text: str) -> str:
        return self.detect_text(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")

    def header(self, name: str) -> ValueMask | None:
        for pattern, mask in self.headers:
            if fnmatch.fnmatchcase(name, pattern):
                return mask
        return None


EMPTY: Final = Plan()


def merge(plans: Iterable[Plan]) -> Plan:
    """All masks in order; for one column the first wins by that order."""
    rows = [plan for plan in plans if plan]
    if not rows:
        return EMPTY
    if len(rows) == 1:
        return rows[0]
    columns = tuple(item for plan in rows for item in plan.columns)
    return Plan(
        columns=columns,
        json=tuple(item for plan in rows for item in plan.json),
        headers=tuple(item for plan in rows for item in plan.headers),
        detectors=tuple(item for plan in rows for item in plan.detectors),
        rules=tuple(name for plan in rows for name in plan.rules),
        _names=frozenset(item.column.lower() for item in columns),
    )


@dataclass(frozen=True, slots=True)
class NamedRelations:
    """policy.reach.Relations without a catalog: a table is what its name says, and its columns are not known."""

    plan: Plan
    functions: bool = True
    """Whether functions that are not PostgreSQL's may read what is masked; the catalog, which has their bodies, knows better."""

    def columns(self, table: Table) -> tuple[str, ...] | None:
        return None

    def may_have(self, table: Table, column: str) -> bool:
        return True

    def reach(self, table: Table, column: str) -> int:
        if column == "*":
            return MASKED if self.plan.may_mask_table(table.schema, table.name) else CLEAN
        found = self.plan.column(table.schema or None, table.name, column)
        return MASKED if found is not None else CLEAN

    def is_own(self, function: str) -> bool:
        return False

    def may_read(self, function: str) -> bool:
        return self.functions

    def casts_by_own(self, type_name: tuple[str, ...]) -> bool:
        return False

    def may_call(self, field: str) -> bool:
        return False
