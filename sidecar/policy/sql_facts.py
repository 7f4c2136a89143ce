"""What one SQL text was found to do: the walker fills it, selectors and the engine read it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.model.verdict import CatalogChanges, NameUse, SyntaxIssue
from sidecar.policy.sql_vocabulary import DDL

ANY_COLUMN: Final = "*"
"""Of the tables that the statement names."""
ARGUMENT: Final = "(argument)"
"""Of a prepared statement, which may put it into any column."""
SECRET: Final = re.compile(r"(?i)passw|pwd|secret|token|api_?key|private_?key|credential|conninfo")
"""Names of columns and settings that hold secrets."""


@dataclass(frozen=True, slots=True)
class Table:
    """`schema` is empty for an unqualified name. Names as the server folds them."""

    schema: str
    name: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}" if self.schema else self.name


@dataclass(slots=True)
class Analysis:
    """Facts of one text (all its statements together). Names are folded as the server folds them."""

    size: int = 0
    """Of the text, in characters."""
    statements: list[str] = field(default_factory=list)
    """Kinds in order of appearance, nested ones included."""
    reads: set[Table] = field(default_factory=set)
    writes: set[Table] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)
    """Both `schema.name` and `name` where qualified."""
    value_fields: set[str] = field(default_factory=set)
    """`f` of `(x).f`: a field, or the function f(x)."""
    row_fields: set[str] = field(default_factory=set)
    """`f` of `t.f`: a column, or a function of t's row. Only names that could be such a function's."""
    without_where: bool = False
    opaque: bool = False
    settings: set[str] = field(default_factory=set)
    """Settings that are SET or RESET; `*` for all or for one that cannot be known."""
    stored: set[str] = field(default_factory=set)
    """Column names that a definition puts under another name, or under another column; `*` for all."""
    renamed_schemas: set[str] = field(default_factory=set)
    copy_out: bool = False
    copy_unread: bool = False
    """COPY … TO a file, a program, or in binary: no detector can read and rewrite its rows."""
    password_spans: list[tuple[int, int]] = field(default_factory=list)
    bound_literals: list[tuple[str, int]] = field(default_factory=list)
    """(column name, byte offset) of constants compared with or stored into a column."""
    bound_parameters: list[tuple[str, int]] = field(default_factory=list)
    """(column name, 0-based parameter)."""
    transaction: bool = False
    constant_sensitive: bool = False
    """Some fact depends on a literal: not to be shared between texts that differ in literals."""
    error: SyntaxIssue | None = None
    too_deep: bool = False
    unjudged: str = ""
    """Why the text cannot be judged, although the server may well accept it."""
    secret_options: bool = False
    """CREATE or ALTER of a user mapping or foreign server: its options are secrets."""
    do_bodies: list[str] = field(default_factory=list)
    changes: CatalogChanges = field(default_factory=CatalogChanges)
    names: tuple[NameUse, ...] = ()
    tree: Any = None
    """The statement, for its lineage (lineage.py); None where `parts` has several."""
    parts: list[Analysis] = field(default_factory=list)
    """One a statement, where the text holds several: each is judged by itself, the strictest verdict wins."""

    @property
    def ddl(self) -> bool:
        return self.opaque or not DDL.isdisjoint(self.statements)


def together(parts: list[Analysis]) -> Analysis:
    found = Analysis(parts=parts)
    for part in parts:
        found.statements += part.statements
        found.bound_literals += part.bound_literals
        found.bound_parameters += part.bound_parameters
        found.do_bodies += part.do_bodies
        for name in (
            "reads",
            "writes",
            "functions",
            "settings",
            "stored",
            "renamed_schemas",
            "value_fields",
            "row_fields",
        ):
            getattr(found, name).update(getattr(part, name))
        for name in (
            "without_where", "opaque", "copy_out", "copy_unread", "transaction", "constant_sensitive", "too_deep",
            "secret_options",
        ):  # fmt: skip
            setattr(found, name, getattr(found, name) or getattr(part, name))
    found.names = tuple(use for part in parts for use in part.names)
    changes = [part.changes for part in parts]
    found.changes = CatalogChanges(
        made=tuple(name for change in changes for name in change.made),
        redefined=tuple(name for change in changes for name in change.redefined),
        altered=tuple(name for change in changes for name in change.altered),
        functions=tuple(made for change in changes for made in change.functions),
        triggers=tuple(name for change in changes for name in change.triggers),
        anything=any(change.anything for change in changes),
        temporary=all(change.temporary or change == CatalogChanges() for change in changes),
    )
    return found
