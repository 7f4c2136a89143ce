"""What may reach what: the answers of the lineage (lineage.py), and the facts that it is given. Pure data.

A reach is a set of two bits. It grows with every value that may flow in, and nothing takes a bit away, so that a doubt stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from sidecar.policy.sql_facts import Table

CLEAN: Final = 0
MASKED: Final = 1
"""A masked column may be in it, or nobody can tell."""
FUNCTION: Final = 2
"""A function may have made it that PostgreSQL does not bring: it may read any table (`on_opaque`)."""
ANYTHING: Final = MASKED | FUNCTION


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a result. `direct`: a table's own column, so that its description names the table."""

    name: str
    reach: int
    direct: bool = False


@dataclass(frozen=True, slots=True)
class Rest:
    """Columns whose number and names are not known. With `table`: all of that table's."""

    reach: int
    table: Table | None = None


Item = Column | Rest


class Relations(Protocol):
    """What is known of the database."""

    def columns(self, table: Table) -> tuple[str, ...] | None:
        """In their order; None: not known (then they are taken to be anything)."""
        ...

    def may_have(self, table: Table, column: str) -> bool:
        """False: whichever table is meant, it has no such column."""
        ...

    def reach(self, table: Table, column: str) -> int:
        """MASKED where a mask may apply to this column (`*`: to any of the table's), or where the table is not known."""
        ...

    def is_own(self, function: str) -> bool:
        """Whether a user's own function or operator may stand under this name, although PostgreSQL brings one too."""
        ...

    def may_read(self, function: str) -> bool:
        """Whether what a user's own function or operator of this name returns may hold a masked column."""
        ...

    def casts_by_own(self, type_name: tuple[str, ...]) -> bool:
        """Whether a cast to this type (empty: one that nobody wrote) may run a function of the users' own that may read a masked column."""
        ...

    def may_call(self, field: str) -> bool:
        """Whether `(x).field` may be a call of a function that PostgreSQL does not bring, and that may read a masked column."""
        ...


@dataclass(frozen=True, slots=True)
class Flows:
    """Of one statement."""

    outputs: tuple[Item, ...] = ()
    returns: bool = False
    """It may return rows, described by `outputs`."""
    moved: int = CLEAN
    """What it puts into another table, a file, a notification or a setting."""
    probed: int = CLEAN
    """What its conditions, groups and orders look at."""

    @property
    def derived(self) -> int:
        """What reaches result columns that no table's column stands for."""
        return together(
            item.reach
            for item in self.outputs
            if not (item.direct if isinstance(item, Column) else item.table is not None)
        )


OUTPUTS_MAX: Final = 1664
"""PostgreSQL's own limit for a query's columns (htup_details.h, MaxTupleAttributeNumber)."""
UNKNOWN: Final = Flows((Rest(ANYTHING),), True, ANYTHING, ANYTHING)


def together(reaches: Iterable[int]) -> int:
    found = CLEAN
    for reach in reaches:
        found |= reach
    return found


def reach_of_all(items: Iterable[Item]) -> int:
    return together(item.reach for item in items)


def bounded(items: Sequence[Item]) -> tuple[Item, ...]:
    """No more columns than a query may have: beyond, all may be all."""
    return tuple(items) if len(items) <= OUTPUTS_MAX else (Rest(reach_of_all(items)),)


def combine(left: Sequence[Item], right: Sequence[Item]) -> tuple[Item, ...]:
    """UNION and its like: by position, where both sides' columns are known."""
    if len(left) == len(right) and all(isinstance(item, Column) for item in (*left, *right)):
        return tuple(
            Column(one.name, one.reach | other.reach)
            for one, other in zip(left, right, strict=True)
            if isinstance(one, Column)
        )
    return (Rest(reach_of_all(left) | reach_of_all(right)),)


def renamed(items: Sequence[Item], names: Sequence[str]) -> tuple[Item, ...]:
    """`AS q(a, b)`: the first columns under other names. Behind columns of unknown number all may be all."""
    found: list[Item] = []
    for index, item in enumerate(items):
        if isinstance(item, Rest) and index < len(names):
            reach = reach_of_all(items[index:])
            found += [Column(name, reach) for name in names[index:]]
            return (*found, Rest(reach))
        if isinstance(item, Column) and index < len(names):
            found.append(Column(names[index], item.reach, item.direct))
        else:
            found.append(item)
    return tuple(found)


def described(flows: Iterable[Flows], count: int) -> list[int]:
    """The reach of each of a result's `count` columns, whichever of the statements it belongs to."""
    candidates = [
        aligned for flow in flows if flow.returns and (aligned := _aligned(flow.outputs, count)) is not None
    ]
    if not candidates:
        return [ANYTHING] * count
    return [together(row[index] for row in candidates) for index in range(count)]


def _aligned(outputs: Sequence[Item], count: int) -> list[int] | None:
    rests = [index for index, item in enumerate(outputs) if isinstance(item, Rest)]
    if not rests:
        return [item.reach for item in outputs] if len(outputs) == count else None
    width = count - (len(outputs) - len(rests))
    if width < 0:
        return None
    first, last = rests[0], rests[-1]
    behind = [item.reach for item in outputs[last + 1 :]]
    middle = reach_of_all(outputs[first : last + 1])
    return [
        *(item.reach for item in outputs[:first]),
        *([middle] * (count - first - len(behind))),
        *behind,
    ]
