"""Lineage: for each column of a statement's result, whether a masked column may reach it; and what the statement moves or probes.

Theory of operation
-------------------
Every query becomes a list of columns with a reach (reach.py). A FROM clause makes ranges out of tables (by the facts that are passed
in), queries, CTEs and functions; names are looked up in them from the inside out (lineage_scope.py); an expression's reach is that of
everything in it (lineage_values.py). A condition chooses rows and carries no value: it is `probed`. What cannot be resolved may be
anything. Pure: no catalog, no session; the same tree and facts give the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sidecar.policy.lineage_scope import Range, Scope, range_items
from sidecar.policy.lineage_values import Values, Work, label
from sidecar.policy.reach import (
    ANYTHING,
    CLEAN,
    FUNCTION,
    OUTPUTS_MAX,
    UNKNOWN,
    Column,
    Flows,
    Item,
    Relations,
    Rest,
    bounded,
    combine,
    reach_of_all,
    renamed,
)
from sidecar.policy.sql_facts import Table
from sidecar.policy.sql_tree import TooDeep, strings, unwrap
from sidecar.policy.sql_vocabulary import SINKS, TABLE_BY_NAME

Ctes = dict[str, tuple[Item, ...]]

MAX_ROUNDS: Final = 8
"""Of a recursive query, until its columns' reach stands still; beyond, they may be anything."""
_SETOP_NONE: Final = 1
_SETOP_INTERSECT: Final = 3
_SETOP_EXCEPT: Final = 4
_ONE_COLUMN: Final = frozenset(
    {"generate_series", "generate_subscripts", "regexp_split_to_table", "string_to_table", "json_object_keys",
     "jsonb_object_keys", "json_array_elements", "jsonb_array_elements", "json_array_elements_text",
     "jsonb_array_elements_text", "now", "current_date"}
)  # fmt: skip
_ROWS: Final = frozenset({"SelectStmt", "InsertStmt", "UpdateStmt", "DeleteStmt", "MergeStmt"})
_KEEPS_EXPRESSIONS: Final = frozenset(
    {"CreateStmt", "AlterTableStmt", "CreateDomainStmt", "AlterDomainStmt", "CreateForeignTableStmt"}
)
"""Defaults, generated columns, bounds of partitions."""
_QUERIES: Final = frozenset({"PrepareStmt", "DeclareCursorStmt"})


def trace(statement: Any, relations: Relations, *, executed: bool = False, work: Work | None = None) -> Flows:
    """Never raises: what is too deep or too large may be anything. `executed`: of a PREPARE or DECLARE, the query inside it. `work` is
    shared by the statements of one text."""
    tracer = _Tracer(relations, work or Work())
    try:
        if executed and statement.DESCRIPTOR.name in _QUERIES:
            statement = unwrap(statement.query)
        return tracer.statement(statement)
    except (TooDeep, RecursionError):
        return UNKNOWN


def _more(item: Item, reach: int) -> Item:
    if isinstance(item, Column):
        return Column(item.name, item.reach | reach, item.direct)
    return Rest(item.reach | reach, item.table)


class _Tracer(Values):
    def statement(self, node: Any) -> Flows:
        name = node.DESCRIPTOR.name
        outputs: tuple[Item, ...] = ()
        returns = False
        if name in _ROWS:
            outputs = self.query(node, None, {})
            returns = name == "SelectStmt" or len(node.returning_clause.exprs) != 0
        elif name == "ExplainStmt":
            inner = self.statement(unwrap(node.query))
            # A plan holds no value but what the planner itself computed, by immutable functions.
            outputs, returns = (Rest(reach_of_all(inner.outputs) & FUNCTION),), True
        elif name in _QUERIES:
            # Nothing comes back yet; what will, is judged now.
            outputs = self.query(unwrap(node.query), None, {})
        elif name == "CopyStmt":
            self._copy(node)
        elif name == "CreateTableAsStmt":
            query = unwrap(node.query)
            self.moves(
                reach_of_all(self.query(query, None, {})) if query.DESCRIPTOR.name in _ROWS else ANYTHING
            )
        elif name in _KEEPS_EXPRESSIONS:
            # What a default makes of a column of the same row is not known, nor a secret of another's.
            kept = Scope(self.relations, None, [Range("", (Rest(CLEAN),))])
            self.moves(self.values(self.below(node), kept, {}, 1))
        elif name == "RuleStmt":
            self._rule(node)
        elif name == "CallStmt":
            outputs, returns = (Rest(self.value(node.funccall, Scope(self.relations), {})),), True
        elif name == "VariableShowStmt":
            outputs, returns = (Rest(CLEAN),), True
        if self.unwritten:
            outputs = tuple(
                item if isinstance(item, Column) and item.direct else _more(item, self.unwritten)
                for item in outputs
            )
        return Flows(outputs, returns, self.moved, self.probed)

    def _rule(self, node: Any) -> None:
        table = Table(node.relation.schemaname, node.relation.relname)
        items = range_items(table, self.relations)
        rows = Scope(self.relations, None, [Range(name, items, table) for name in ("old", "new")])
        if node.HasField("where_clause"):
            self.probe(unwrap(node.where_clause), rows, {})
        for action in node.actions:
            query = unwrap(action)
            if query.DESCRIPTOR.name in _ROWS:
                self.query(query, rows, {})

    def _copy(self, node: Any) -> None:
        if node.is_from:
            return
        if node.HasField("query"):
            self.moves(reach_of_all(self.query(unwrap(node.query), None, {})))
        else:
            table = Table(node.relation.schemaname, node.relation.relname)
            for column in strings(node.attlist) or ["*"]:
                self.moved |= self.relations.reach(table, column)

    # -- queries

    def query(self, node: Any, outer: Scope | None, ctes: Ctes) -> tuple[Item, ...]:
        self._nested += 1
        self.visit(4 * self._nested)
        try:
            if node.HasField("with_clause"):
                ctes = self._with(node.with_clause, outer, ctes)
            items = {
                "SelectStmt": self._select,
                "InsertStmt": self._insert,
                "UpdateStmt": self._update,
                "DeleteStmt": self._delete,
                "MergeStmt": self._merge,
            }[node.DESCRIPTOR.name](node, outer, ctes)
            return bounded(items)
        finally:
            self._nested -= 1

    def __init__(self, relations: Relations, work: Work) -> None:
        super().__init__(relations, work)
        self.unwritten = FUNCTION if relations.casts_by_own(()) else CLEAN
        """What casts may bring that nobody wrote."""
        self._nested = 0

    def _with(self, clause: Any, outer: Scope | None, ctes: Ctes) -> Ctes:
        self.columns(len(ctes))
        known = dict(ctes)
        parts = [unwrap(part) for part in clause.ctes]
        if clause.recursive:
            # One may name another that stands behind it.
            known |= {part.ctename: (Rest(ANYTHING),) for part in parts}
        for part in parts:
            known[part.ctename] = self._cte(part, outer, known, recursive=bool(clause.recursive))
        return known

    def _cte(self, part: Any, outer: Scope | None, known: Ctes, *, recursive: bool) -> tuple[Item, ...]:
        query, names = unwrap(part.ctequery), strings(part.aliascolnames)
        added = part.HasField("search_clause") or part.HasField("cycle_clause")

        def once(itself: tuple[Item, ...] | None) -> tuple[Item, ...]:
            self.columns(len(known))
            seen = known if itself is None else {**known, part.ctename: itself}
            items = renamed(self.query(query, outer, seen), names)
            return (*items, Rest(reach_of_all(items))) if added else items

        union = query.DESCRIPTOR.name == "SelectStmt" and int(query.op) > _SETOP_NONE
        if not (recursive and union):
            return once(None)
        # It begins as what its first arm gives; every round can only add to it.
        items = renamed(self.query(query.larg, outer, known | {part.ctename: ()}), names)
        if added:
            items = (*items, Rest(reach_of_all(items)))
        for _ in range(MAX_ROUNDS):
            after = once(items)
            if after == items:
                return items
            items = after
        return tuple(
            Column(item.name, ANYTHING) if isinstance(item, Column) else Rest(ANYTHING) for item in items
        )

    def _select(self, node: Any, outer: Scope | None, ctes: Ctes) -> tuple[Item, ...]:
        scope = Scope(self.relations, outer)
        if int(node.op) > _SETOP_NONE:
            left, right = self.query(node.larg, outer, ctes), self.query(node.rarg, outer, ctes)
            if int(node.op) == _SETOP_EXCEPT:
                # Its rows are the left side's, chosen by the right side's.
                self.probed |= reach_of_all(left) | reach_of_all(right)
                right = left
            elif int(node.op) == _SETOP_INTERSECT or not node.all:
                self.probed |= reach_of_all(left) | reach_of_all(right)
            items = combine(left, right)
        elif len(node.values_lists):
            items = self._values_lists(node.values_lists, scope, ctes)
        else:
            for part in node.from_clause:
                scope.star += self._from(unwrap(part), scope, ctes)
            items = self._targets(node.target_list, scope, ctes)
            for name in ("where_clause", "having_clause"):
                if node.HasField(name):
                    self.probe(unwrap(getattr(node, name)), scope, ctes)
            for window in node.window_clause:
                self.probe_window(unwrap(window), scope, ctes, 0)
        for name in ("group_clause", "distinct_clause", "sort_clause"):
            for part in getattr(node, name):
                self._arranged(unwrap(part), items, scope, ctes)
        for name in ("limit_count", "limit_offset"):
            if node.HasField(name):
                self.probe(unwrap(getattr(node, name)), scope, ctes)
        if node.HasField("into_clause"):
            self.moved |= reach_of_all(items)
        return items

    def _arranged(self, node: Any, items: Sequence[Item], scope: Scope, ctes: Ctes) -> None:
        """GROUP BY, DISTINCT ON, ORDER BY: by expression, by a result column's name, or by its number."""
        inner = unwrap(node.node) if node.DESCRIPTOR.name == "SortBy" else node
        kind = inner.DESCRIPTOR.name
        if kind == "ColumnRef" and len(inner.fields) == 1:
            named = [item for item in items if isinstance(item, Column) and item.name == label(inner)]
            if named:
                self.probed |= reach_of_all(named)
                return
        if kind == "A_Const":
            number = int(inner.ival.ival) if inner.HasField("ival") else 0
            if 0 < number <= len(items):
                exact = all(isinstance(item, Column) for item in items[:number])
                self.probed |= items[number - 1].reach if exact else reach_of_all(items)
            return
        if kind != "Node":
            self.probe(inner, scope, ctes)
        else:  # DISTINCT of the whole row
            self.probed |= reach_of_all(items)

    def _values_lists(self, rows: Any, scope: Scope, ctes: Ctes) -> tuple[Item, ...]:
        columns: list[int] = []
        for row in rows:
            for index, value in enumerate(unwrap(row).items):
                reach = self.value(unwrap(value), scope, ctes)
                if index < len(columns):
                    columns[index] |= reach
                else:
                    columns.append(reach)
        return tuple(Column(f"column{index}", reach) for index, reach in enumerate(columns, 1))

    def _targets(self, targets: Any, scope: Scope, ctes: Ctes) -> tuple[Item, ...]:
        items: list[Item] = []
        for part in targets:
            target = unwrap(part)
            node = unwrap(target.val) if target.DESCRIPTOR.name == "ResTarget" else target
            kind = node.DESCRIPTOR.name
            name = str(getattr(target, "name", "")) or label(node)
            if kind == "ColumnRef":
                fields = [unwrap(field) for field in node.fields]
                if fields[-1].DESCRIPTOR.name == "A_Star":
                    items += self.star([field.sval for field in fields[:-1]], scope)
                    self.columns(len(items))
                    if len(items) > OUTPUTS_MAX:
                        items = [Rest(reach_of_all(items))]
                    continue
                found = self.reference(node, scope)
                items.append(Column(name, found.reach, found.direct))
            elif kind == "A_Indirection" and unwrap(node.indirection[-1]).DESCRIPTOR.name == "A_Star":
                items.append(Rest(self.value(node, scope, ctes)))
            else:
                items.append(Column(name, self.value(node, scope, ctes)))
            if len(items) > OUTPUTS_MAX:
                items = [Rest(reach_of_all(items))]
        return tuple(items)

    # -- FROM

    def _from(self, node: Any, scope: Scope, ctes: Ctes) -> list[Item]:
        """Adds the ranges of one item of FROM to the scope; returns what it is to `*`."""
        self.visit(0)
        name = node.DESCRIPTOR.name
        if name == "RangeVar":
            return self._relation(node, scope, ctes)
        if name == "JoinExpr":
            return self._join(node, scope, ctes)
        if name == "RangeTableSample":
            for part in (*node.args, *([node.repeatable] if node.HasField("repeatable") else ())):
                self.probe(unwrap(part), scope, ctes)
            return self._from(unwrap(node.relation), scope, ctes)
        if name == "RangeSubselect":
            items = self.query(unwrap(node.subquery), scope if node.lateral else scope.outer, ctes)
            return self._add(scope, node.alias.aliasname, renamed(items, strings(node.alias.colnames)))
        if name == "RangeFunction":
            return self._function(node, scope, ctes)
        # XMLTABLE, JSON_TABLE, and what is not known: any of their columns may hold what they are made of.
        reach = self.values(self.below(node), scope, ctes, 1)
        alias = node.alias if "alias" in node.DESCRIPTOR.fields_by_name else None
        names = strings(alias.colnames) if alias is not None else []
        items = (*(Column(column, reach) for column in names), Rest(reach))
        return self._add(scope, alias.aliasname if alias is not None else "", items)

    def _add(self, scope: Scope, name: str, items: Sequence[Item], table: Table | None = None) -> list[Item]:
        self.columns(len(items))
        scope.ranges.append(Range(name, tuple(items), table))
        return list(items)

    def _relation(self, node: Any, scope: Scope, ctes: Ctes) -> list[Item]:
        name = node.alias.aliasname or node.relname
        if not node.schemaname and node.relname in ctes:
            return self._add(scope, name, renamed(ctes[node.relname], strings(node.alias.colnames)))
        table = Table(node.schemaname, node.relname)
        items = range_items(table, self.relations)
        names = strings(node.alias.colnames)
        return self._add(
            scope, name, renamed(items, names), None if node.alias.aliasname and names else table
        )

    def _join(self, node: Any, scope: Scope, ctes: Ctes) -> list[Item]:
        begin = len(scope.ranges)
        left = self._from(unwrap(node.larg), scope, ctes)
        right = self._from(unwrap(node.rarg), scope, ctes)
        self.columns(len(left) + len(right))
        inner = Scope(self.relations, scope.outer, scope.ranges[begin:])
        items = self._merged(node, left, right, inner)
        scope.merged |= {"*"} if node.is_natural else set(strings(node.using_clause))
        if node.HasField("quals"):
            self.probe(unwrap(node.quals), inner, ctes)
        if node.join_using_alias.aliasname:
            shared = tuple(Column(name, inner.column(name).reach) for name in strings(node.using_clause))
            scope.ranges.append(Range(node.join_using_alias.aliasname, shared))
        if node.HasField("alias"):
            # The join's name hides those inside it.
            del scope.ranges[begin:]
            items = list(renamed(items, strings(node.alias.colnames)))
            scope.ranges.append(Range(node.alias.aliasname, tuple(items)))
        return items

    def _merged(self, node: Any, left: list[Item], right: list[Item], inner: Scope) -> list[Item]:
        """USING and NATURAL: the shared columns come first, once, and hold either side's value."""
        names = strings(node.using_clause)
        known = all(isinstance(item, Column) for item in (*left, *right))
        if node.is_natural:
            if not known:
                reach = reach_of_all(left) | reach_of_all(right)
                self.probed |= reach
                return [Rest(reach)]
            behind = {item.name for item in right if isinstance(item, Column)}
            names = [item.name for item in left if isinstance(item, Column) and item.name in behind]
        if not names:
            return left + right
        shared: list[Item] = [Column(name, inner.column(name).reach) for name in names]
        self.probed |= reach_of_all(shared)
        if not known:
            return [*shared, Rest(reach_of_all(left) | reach_of_all(right))]
        return shared + [
            item for item in (*left, *right) if isinstance(item, Column) and item.name not in names
        ]

    def _function(self, node: Any, scope: Scope, ctes: Ctes) -> list[Item]:
        """Every column of a function's rows may hold any of its arguments. It sees the ranges on its left."""
        calls, definitions = [], list(node.coldeflist)
        for part in node.functions:
            pair = [unwrap(item) for item in unwrap(part).items]
            calls.append(pair[0])
            if len(pair) > 1 and pair[1].DESCRIPTOR.name == "List":
                definitions += list(pair[1].items)
        reach = self.values(calls, scope, ctes, 1)
        self.probed |= reach  # how many rows there are
        called = [strings(call.funcname) for call in calls if call.DESCRIPTOR.name == "FuncCall"]
        alias = node.alias.aliasname
        names = strings(node.alias.colnames) or [unwrap(item).colname for item in definitions]
        single = (
            len(calls) == len(called) == 1
            and called[0][-1:] != []
            and called[0][-1] in _ONE_COLUMN
            and not reach & FUNCTION
        )
        if single and not definitions:
            items: list[Item] = [Column((names or [alias or called[0][-1]])[0], reach)]
            if node.ordinality:
                items.append(Column(names[1] if len(names) > 1 else "ordinality", CLEAN))
        else:
            exact = bool(definitions) and len(calls) == 1 and not node.ordinality
            items = [Column(name, reach) for name in names] + ([] if exact else [Rest(reach)])
        return self._add(scope, alias or (called[0][-1] if called and called[0] else ""), items)

    # -- statements that write

    def _target(self, relation: Any, scope: Scope) -> Range:
        self.moved |= self.unwritten
        table = Table(relation.schemaname, relation.relname)
        name = relation.alias.aliasname or relation.relname
        part = Range(name, range_items(table, self.relations), table)
        scope.ranges.append(part)
        scope.star += part.items
        return part

    def _insert(self, node: Any, outer: Scope | None, ctes: Ctes) -> tuple[Item, ...]:
        source: tuple[Item, ...] = ()
        if node.HasField("select_stmt"):
            source = self.query(unwrap(node.select_stmt), outer, ctes)
            self.moved |= reach_of_all(source)
        scope = Scope(self.relations, outer)
        target = self._target(node.relation, scope)
        if node.HasField("on_conflict_clause"):
            clause = node.on_conflict_clause
            proposed = Range("excluded", (Rest(reach_of_all(source)),))
            seen = Scope(self.relations, None, [target, proposed])
            self._assign(clause.target_list, target.name, seen, ctes)
            for part in (clause.infer, clause):
                if part.HasField("where_clause"):
                    self.probe(unwrap(part.where_clause), seen, ctes)
        return self._returning(node, target, scope, ctes)

    def _update(self, node: Any, outer: Scope | None, ctes: Ctes) -> tuple[Item, ...]:
        scope = Scope(self.relations, outer)
        target = self._target(node.relation, scope)
        for part in node.from_clause:
            scope.star += self._from(unwrap(part), scope, ctes)
        self._assign(node.target_list, target.name, scope, ctes, alone=not len(node.from_clause))
        self._where(node, scope, ctes)
        return self._returning(node, target, scope, ctes)

    def _delete(self, node: Any, outer: Scope | None, ctes: Ctes) -> tuple[Item, ...]:
        scope = Scope(self.relations, outer)
        target = self._target(node.relation, scope)
        for part in node.using_clause:
            scope.star += self._from(unwrap(part), scope, ctes)
        self._where(node, scope, ctes)
        return self._returning(node, target, scope, ctes)

    def _merge(self, node: Any, outer: Scope | None, ctes: Ctes) -> tuple[Item, ...]:
        scope = Scope(self.relations, outer)
        star = self._from(unwrap(node.source_relation), scope, ctes)
        target = self._target(node.relation, scope)
        scope.star = [*star, *target.items]
        self.probe(unwrap(node.join_condition), scope, ctes)
        for part in node.merge_when_clauses:
            clause = unwrap(part)
            if clause.HasField("condition"):
                self.probe(unwrap(clause.condition), scope, ctes)
            if not len(clause.values):
                self._assign(clause.target_list, target.name, scope, ctes, alone=False)
            self.moves(self.values([unwrap(value) for value in clause.values], scope, ctes))
        return self._returning(node, target, scope, ctes)

    def _where(self, node: Any, scope: Scope, ctes: Ctes) -> None:
        if node.HasField("where_clause"):
            self.probe(unwrap(node.where_clause), scope, ctes)

    def _assign(self, targets: Any, name: str, scope: Scope, ctes: Ctes, *, alone: bool = True) -> None:
        """`SET column = value`. A value made from the same column of the same row stays under its mask."""
        for part in targets:
            target = unwrap(part)
            value = unwrap(target.val)
            if value.DESCRIPTOR.name == "MultiAssignRef":
                source = unwrap(value.source)
                if source.DESCRIPTOR.name == "RowExpr" and 0 < value.colno <= len(source.args):
                    value = unwrap(source.args[value.colno - 1])
                else:
                    value = source
            if not self._of_itself(value, name, target.name, alone=alone):
                self.moves(self.value(value, scope, ctes))

    def _of_itself(self, node: Any, table: str, column: str, *, alone: bool) -> bool:
        """Whether the only column in a value is `column` of the row that is changed."""
        kind = node.DESCRIPTOR.name
        if kind in ("SubLink", "FuncCall") and (kind == "SubLink" or self.is_own(strings(node.funcname))):
            return False
        if kind == "FuncCall" and strings(node.funcname)[-1] in (SINKS | TABLE_BY_NAME):
            return False
        if kind == "ColumnRef":
            names = strings(node.fields)
            if len(names) != len(node.fields):
                return False
            return names == [table, column] or (alone and names == [column])
        return all(self._of_itself(child, table, column, alone=alone) for child in self.below(node))

    def _returning(self, node: Any, target: Range, scope: Scope, ctes: Ctes) -> tuple[Item, ...]:
        clause = node.returning_clause
        rows = {"old", "new", *(unwrap(option).value for option in clause.options)}
        seen = Scope(
            self.relations,
            Scope(self.relations, None, [Range(name, target.items, target.table) for name in sorted(rows)]),
            scope.ranges,
            scope.star,
        )
        return self._targets(clause.exprs, seen, ctes)
