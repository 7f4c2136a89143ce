"""What may reach the value of an expression. Everything below it, but for what only chooses rows or counts them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from sidecar.policy.builtin_functions import builtin_functions
from sidecar.policy.lineage_scope import Found, Scope
from sidecar.policy.reach import (
    ANYTHING,
    CLEAN,
    FUNCTION,
    MASKED,
    Column,
    Item,
    Relations,
    Rest,
    reach_of_all,
    together,
)
from sidecar.policy.sql_tree import MAX_DEPTH, TooDeep, repeated, strings, unwrap
from sidecar.policy.sql_vocabulary import SET_RETURNING, SINKS, TABLE_BY_NAME

WORK_MAX: Final = 200_000
"""Nodes looked at for one text, and a visit more for every COLUMNS_A_VISIT columns that are copied or searched; a recursive query is
looked at several times. A text may have as many again as it has bytes. Beyond, anything may reach anything."""
COLUMNS_A_VISIT: Final = 32
_NO_VALUE: Final = frozenset(
    {"A_Const", "ParamRef", "SQLValueFunction", "SetToDefault", "CurrentOfExpr", "TypeName", "String", "GroupingFunc"}
)  # fmt: skip
_EXISTS: Final = 1
_CHECK: Final = 6


class Work:
    """What may still be done for one text of `size` bytes."""

    __slots__ = ("left",)

    def __init__(self, size: int = 0) -> None:
        self.left = WORK_MAX + size

    def spend(self, visits: int) -> None:
        """Raises TooDeep."""
        self.left -= visits
        if self.left < 0:
            raise TooDeep


class Values:
    """Follows expressions; `query` is the tracer's (lineage.py)."""

    def __init__(self, relations: Relations, work: Work) -> None:
        self.relations = relations
        self.work = work
        self.moved = CLEAN
        self.probed = CLEAN

    def query(self, node: Any, outer: Scope | None, ctes: dict[str, tuple[Item, ...]]) -> tuple[Item, ...]:
        raise NotImplementedError

    def visit(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise TooDeep
        self.work.spend(1)

    def columns(self, count: int) -> None:
        """So many columns are copied or searched."""
        self.work.spend(count // COLUMNS_A_VISIT)

    # `self.moved |= self.value(…)` would read the left side first and lose what the right side adds to it.

    def moves(self, reach: int) -> None:
        self.moved |= reach

    def probes(self, reach: int) -> None:
        self.probed |= reach

    def probe(self, node: Any, scope: Scope, ctes: dict[str, tuple[Item, ...]], depth: int = 0) -> None:
        """A condition, a group, an order: it chooses rows and carries no value."""
        self.probes(self.value(node, scope, ctes, depth))

    def value(self, node: Any, scope: Scope, ctes: dict[str, tuple[Item, ...]], depth: int = 0) -> int:
        self.visit(depth)
        name = node.DESCRIPTOR.name
        if name in _NO_VALUE:
            return CLEAN
        if name == "ColumnRef":
            return self.reference(node, scope).reach
        if name == "Constraint" and int(node.contype) == _CHECK:
            self.probe(unwrap(node.raw_expr), scope, ctes, depth + 1)
            return CLEAN
        if name == "FuncCall":
            return self._call(node, scope, ctes, depth)
        if name == "SubLink":
            return self._sublink(node, scope, ctes, depth)
        if name == "A_Indirection":
            field = self._field(node, scope)
            if field is not None:
                return field.reach
            return self._fields(node, scope, ctes, depth)
        elif name == "NullTest":
            argument = unwrap(node.arg)
            if argument.DESCRIPTOR.name == "ColumnRef":
                # That a value is NULL is no secret: a mask leaves it NULL.
                self.probe(argument, scope, ctes, depth + 1)
                return CLEAN
        elif name == "TypeCast":
            casts = self.relations.casts_by_own(tuple(strings(node.type_name.names)))
            return self.value(unwrap(node.arg), scope, ctes, depth + 1) | (FUNCTION if casts else CLEAN)
        elif name in ("SelectStmt", "InsertStmt", "UpdateStmt", "DeleteStmt", "MergeStmt"):
            return reach_of_all(self.query(node, scope, ctes))
        found = CLEAN
        if name == "A_Expr" and any(
            self.relations.is_own(part) and self.relations.may_read(part) for part in strings(node.name)
        ):
            found = FUNCTION
        return found | self.values(self.below(node), scope, ctes, depth + 1)

    def values(
        self, nodes: Iterable[Any], scope: Scope, ctes: dict[str, tuple[Item, ...]], depth: int = 0
    ) -> int:
        return together(self.value(node, scope, ctes, depth) for node in nodes)

    @staticmethod
    def below(node: Any) -> list[Any]:
        return [
            unwrap(child)
            for descriptor, part in node.ListFields()
            if descriptor.type == descriptor.TYPE_MESSAGE
            for child in (part if repeated(part) else (part,))
        ]

    def reference(self, node: Any, scope: Scope) -> Found:
        """A column by name; `t.*` and `*` are rows."""
        self.columns(scope.width())
        fields = [unwrap(field) for field in node.fields]
        names = [field.sval for field in fields if field.DESCRIPTOR.name == "String"]
        if len(names) != len(fields):
            return Found(reach_of_all(self.star(names, scope)))
        if len(names) == 1:
            return scope.column(names[0])
        if len(names) == 2:
            found = scope.qualified("", names[0], names[1])
            return found if found.reach != ANYTHING else self._row_of(names, scope, found)
        if len(names) in (3, 4):
            return scope.qualified(names[-3], names[-2], names[-1])
        return Found(ANYTHING)

    @staticmethod
    def _row_of(names: list[str], scope: Scope, otherwise: Found) -> Found:
        """`public.customers` as a value: the row of a table that stands with its schema in FROM."""
        rows = [part for part in scope.named(names[1], names[0]) if part.table is not None]
        if not rows or scope.named(names[0]):
            return otherwise
        return Found(together(reach_of_all(part.items) for part in rows))

    def star(self, names: list[str], scope: Scope) -> tuple[Item, ...]:
        """What `*`, `t.*` or `schema.t.*` stand for."""
        if not names:
            return tuple(scope.star)
        ranges = scope.named(names[-1], names[-2] if len(names) > 1 else "")
        if not ranges:
            return (Rest(ANYTHING),)
        if len(ranges) == 1:
            return ranges[0].items
        return (Rest(together(reach_of_all(part.items) for part in ranges)),)

    def _field(self, node: Any, scope: Scope) -> Found | None:
        """`(c).name`, where c is a range and not a column."""
        argument, steps = unwrap(node.arg), [unwrap(step) for step in node.indirection]
        if argument.DESCRIPTOR.name != "ColumnRef" or len(argument.fields) != 1:
            return None
        names = strings(argument.fields)
        if not names or steps[0].DESCRIPTOR.name != "String" or len(steps) != 1:
            return None
        if not scope.named(names[0]) or scope.column(names[0]).certain:
            return None
        return scope.qualified("", names[0], steps[0].sval)

    def _fields(self, node: Any, scope: Scope, ctes: dict[str, tuple[Item, ...]], depth: int) -> int:
        """`(x).f` is a field of x, or the function f(x)."""
        given = self.values(self.below(node), scope, ctes, depth + 1)
        for name in strings(node.indirection):
            if name in SINKS or name in TABLE_BY_NAME:
                self.moved |= given
            if name in TABLE_BY_NAME:
                given = ANYTHING
            elif self.relations.may_call(name):
                given |= FUNCTION
        return given

    def is_own(self, names: list[str]) -> bool:
        """Whether a function of this name may be the user's own, whose body is not in the text, and may read a masked column."""
        if not names:
            return True
        schema = names[-2] if len(names) > 1 else ""
        if schema == "pg_catalog" and names[-1] in builtin_functions():
            return False
        if not schema and names[-1] in builtin_functions() and not self.relations.is_own(names[-1]):
            return False
        return self.relations.may_read(names[-1])

    def _call(self, node: Any, scope: Scope, ctes: dict[str, tuple[Item, ...]], depth: int) -> int:
        names = strings(node.funcname)
        arguments = [unwrap(argument) for argument in node.args]
        orders = [unwrap(order) for order in node.agg_order]
        if node.HasField("over"):
            self.probe_window(node.over, scope, ctes, depth + 1)
        if node.agg_within_group:
            arguments += orders  # percentile_disc(0.5) WITHIN GROUP (ORDER BY x) is one of the x
        else:
            for order in orders:
                self.probe(order, scope, ctes, depth + 1)
        filtered = CLEAN
        if node.HasField("agg_filter"):
            # With OVER it is a question about each row, answered beside that row.
            filtered = self.value(unwrap(node.agg_filter), scope, ctes, depth + 1)
            self.probed |= filtered
        given = self.values(arguments, scope, ctes, depth + 1)
        name = names[-1] if names else ""
        if name in SINKS or name in TABLE_BY_NAME:
            self.moved |= given
        if name in SET_RETURNING or node.agg_distinct:
            self.probed |= given
        own = FUNCTION if self.is_own(names) else CLEAN
        if name in TABLE_BY_NAME:
            return ANYTHING
        if name == "count" and not own and all(item.DESCRIPTOR.name == "ColumnRef" for item in arguments):
            return filtered
        return given | filtered | own

    def probe_window(self, window: Any, scope: Scope, ctes: dict[str, tuple[Item, ...]], depth: int) -> None:
        for node in self.below(window):
            self.probe(node, scope, ctes, depth)

    def _sublink(self, node: Any, scope: Scope, ctes: dict[str, tuple[Item, ...]], depth: int) -> int:
        found = reach_of_all(self.query(unwrap(node.subselect), scope, ctes))
        if int(node.sub_link_type) == _EXISTS:
            return found & FUNCTION
        if node.HasField("testexpr"):
            found |= self.value(unwrap(node.testexpr), scope, ctes, depth + 1)
        return found


def label(node: Any) -> str:
    """The name that the server gives a result column (parse_target.c, FigureColname); where this errs, nothing is found
    under the name, and it is taken to be anything."""
    name = node.DESCRIPTOR.name
    if name == "ColumnRef":
        return (strings(node.fields) or ["?column?"])[-1]
    if name == "FuncCall":
        return (strings(node.funcname) or ["?column?"])[-1]
    if name == "A_Indirection":
        found = strings(node.indirection)
        return found[-1] if found else label(unwrap(node.arg))
    if name == "TypeCast":
        inner = label(unwrap(node.arg))
        return inner if inner not in ("?column?", "case") else strings(node.type_name.names)[-1]
    if name == "CaseExpr":
        inner = label(unwrap(node.defresult)) if node.HasField("defresult") else "?column?"
        return inner if inner != "?column?" else "case"
    if name == "CollateClause":
        return label(unwrap(node.arg))
    if name == "SubLink":
        kind, query = int(node.sub_link_type), unwrap(node.subselect)
        if kind == _EXISTS:
            return "exists"
        if kind == 7:
            return "array"
        if kind == 5 and query.DESCRIPTOR.name == "SelectStmt" and len(query.target_list):
            target = unwrap(query.target_list[0])
            return str(target.name) or label(unwrap(target.val))
        return "?column?"
    return {"CoalesceExpr": "coalesce", "A_ArrayExpr": "array", "RowExpr": "row"}.get(name, "?column?")


__all__ = ["MASKED", "Column", "Values", "label"]
