"""Which column a name means: the ranges of a FROM clause, and those of the queries around it.

PostgreSQL looks from the inside out and stops at the first level that has the name (parse_relation.c, colNameToVar). Where a
level holds a table whose columns are not known, the name may be its own or an outer one: both are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from sidecar.policy.reach import ANYTHING, CLEAN, Column, Item, Relations, Rest, reach_of_all, together
from sidecar.policy.sql_facts import Table
from sidecar.policy.sql_vocabulary import ROW_FUNCTIONS

SYSTEM_COLUMNS: Final = frozenset({"ctid", "xmin", "xmax", "cmin", "cmax", "tableoid"})


@dataclass(frozen=True, slots=True)
class Range:
    """One name in FROM. `table`: where it is a table of the database, not a query."""

    name: str
    items: tuple[Item, ...]
    table: Table | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """`certain`: the level has this column. `possible`: a table may have it whose columns are not known. `direct`: it is exactly
    one table's own."""

    reach: int = CLEAN
    certain: bool = False
    direct: bool = False
    possible: bool = False


def range_items(table: Table, relations: Relations) -> tuple[Item, ...]:
    names = relations.columns(table)
    if names is None:
        return (Rest(relations.reach(table, "*"), table),)
    return tuple(Column(name, relations.reach(table, name), direct=True) for name in names)


@dataclass(slots=True)
class Scope:
    """One query's FROM; `outer` is what a correlated or lateral query sees around it."""

    relations: Relations
    outer: Scope | None = None
    ranges: list[Range] = field(default_factory=list)
    star: list[Item] = field(default_factory=list)
    """What `*` stands for."""
    merged: set[str] = field(default_factory=set)
    """Columns that USING made of two, so that no table's description is theirs; `*`: any may be."""

    def width(self) -> int:
        """How many columns a name may have to be looked for in."""
        return sum(len(part.items) for level in self.levels() for part in level.ranges)

    def levels(self) -> Iterator[Scope]:
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.outer

    def column(self, name: str) -> Found:
        """An unqualified name."""
        reach, possible, merged = CLEAN, False, False
        for level in self.levels():
            found = self._among(level.ranges, name)
            reach |= found.reach
            merged = merged or not level.merged.isdisjoint({name, "*"})
            if found.certain:
                return Found(reach, True, found.direct and not possible and not merged)
            possible = possible or found.possible
        rows = self.named(name)
        if rows:
            for part in rows:
                reach |= reach_of_all(part.items)
            return Found(reach)
        return Found(reach, direct=not merged) if possible else Found(ANYTHING)

    def qualified(self, schema: str, name: str, column: str) -> Found:
        """`name.column`; a name that is no column of a table may be a function of its row (`c.to_json`)."""
        ranges = self.named(name, schema)
        if not ranges:
            return Found(ANYTHING)
        found = self._among(ranges, column)
        if found.certain:
            return found
        if not found.possible or self.relations.may_call(column):
            return Found(ANYTHING)
        if column in ROW_FUNCTIONS:
            return Found(found.reach | together(reach_of_all(part.items) for part in ranges))
        return Found(found.reach, direct=any(part.table is not None for part in ranges))

    def named(self, name: str, schema: str = "") -> list[Range]:
        """The ranges that a qualifier may mean: of the innermost level that has one. With a schema, of every level."""
        found: list[Range] = []
        for level in self.levels():
            for part in level.ranges:
                if part.name != name:
                    continue
                if schema and (part.table is None or part.table.schema not in ("", schema)):
                    continue
                found.append(part)
            if found and not schema:
                break
        return found

    def _among(self, ranges: Sequence[Range], name: str) -> Found:
        reach, certain, possible, own = CLEAN, False, False, 0
        for part in ranges:
            for item in part.items:
                if isinstance(item, Column):
                    if item.name == name:
                        reach, certain = reach | item.reach, True
                        own += 1 if item.direct else 2
                elif item.table is None:
                    reach, possible = reach | item.reach, True
                elif name not in SYSTEM_COLUMNS and self.relations.may_have(item.table, name):
                    reach, possible = reach | self.relations.reach(item.table, name), True
            if part.table is not None and name in SYSTEM_COLUMNS:
                certain = True
        return Found(reach, certain, own == 1, possible)
