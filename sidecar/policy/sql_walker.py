"""One walk over a statement's tree, generic, so that a node that this module has no opinion on still has its tables, functions and
columns seen."""

from __future__ import annotations

from typing import Any

from sidecar.policy.builtin_functions import builtin_functions
from sidecar.policy.sql_facts import Analysis, Table
from sidecar.policy.sql_tree import (
    MAX_DEPTH,
    TooDeep,
    column_name,
    filters,
    find_constants,
    has_bare_constants,
    holds,
    repeated,
    strings,
    unwrap,
)
from sidecar.policy.sql_vocabulary import (
    COMPARES,
    DEFINED,
    KINDS,
    MERGE_KINDS,
    NOT_FLOWING,
    ONLY_WRITTEN,
    OPAQUE,
    ROW_FUNCTIONS,
    SAFE_TABLE_FUNCTIONS,
    SINKS,
    TABLE_BY_NAME,
    TRANSACTION,
)


class Walker:
    def __init__(self, found: Analysis) -> None:
        self.found = found
        self.ctes: list[set[str]] = []
        self.rows: set[str] = set()
        """Plain columns of the outermost result: a whole row where a range has that name."""
        self.comparing = False
        self.renamed = False
        """Some alias renames columns."""

    # -- statements

    def statement(self, node: Any, *, top: bool = False, depth: int = 0) -> None:
        name = node.DESCRIPTOR.name
        found = self.found
        kind = self._kind(node, name)
        if kind:
            found.statements.append(kind)
            if kind in OPAQUE:
                found.opaque = True
        scope: set[str] = set()
        self.ctes.append(scope)
        try:
            with_clause = getattr(node, "with_clause", None)
            if with_clause is not None and node.HasField("with_clause"):
                for cte in with_clause.ctes:
                    expression = unwrap(cte)
                    if with_clause.recursive:
                        scope.add(expression.ctename)
                    self.statement(unwrap(expression.ctequery), depth=depth + 1)
                    scope.add(expression.ctename)
            special = getattr(self, "_" + name, None)
            if special is not None:
                special(node, depth)
            skip: tuple[str, ...] = (
                ("with_clause", "relation", "relations")
                if name in ONLY_WRITTEN
                else ("with_clause", *DEFINED)
            )
            if name not in ONLY_WRITTEN and name != "CopyStmt":
                self._defined(node)
            if "returning_clause" in node.DESCRIPTOR.fields_by_name:
                # Values of RETURNING are a result like a SELECT's. OLD and NEW are rows, under whatever names.
                skip += ("returning_clause",)
                found.ranges |= {"old", "new", node.relation.alias.aliasname or node.relation.relname}
                found.ranges |= {unwrap(option).value for option in node.returning_clause.options}
                self._targets(node.returning_clause.exprs, depth, top)
            before = set(self.found.flowing)
            self._children(node, depth, flowing=name == "SelectStmt", skip=skip, top=top)
            if name == "ExplainStmt":
                self.found.flowing = before  # a plan is shown, no value
        finally:
            self.ctes.pop()

    def _defined(self, node: Any) -> None:
        """What SELECT INTO, CREATE … AS, CREATE VIEW and other DDL name as their object is written, not read."""
        for name in DEFINED:
            descriptor = node.DESCRIPTOR.fields_by_name.get(name)
            if descriptor is None or descriptor.type != descriptor.TYPE_MESSAGE or descriptor.is_repeated:
                continue
            if node.HasField(name):
                target = unwrap(getattr(node, name))
                if target.DESCRIPTOR.name == "IntoClause":
                    target = target.rel
                if target.DESCRIPTOR.name == "RangeVar":
                    self._written(target)

    def _targets(self, targets: Any, depth: int, top: bool) -> None:
        for item in targets:
            part = unwrap(item)
            value = unwrap(part.val) if part.DESCRIPTOR.name == "ResTarget" else part
            if top and value.DESCRIPTOR.name == "ColumnRef":
                self._plain(value)
            else:
                self.visit(part, depth + 1, flowing=True)

    def _plain(self, column: Any) -> None:
        """A plain column of the outermost result keeps its table's OID and is masked by that; a whole row, or a function
        called as if it were a column (`c.to_json`), does not."""
        name = column_name(column)
        if len(column.fields) > 1 and name in ROW_FUNCTIONS:
            self.found.flowing.add("*")
        elif name != "*":
            self.rows.add(name)

    @staticmethod
    def _kind(node: Any, name: str) -> str | None:
        if name == "SelectStmt" and len(node.values_lists):
            return None  # VALUES, as in INSERT
        if name in KINDS:
            return KINDS[name]
        if name == "TransactionStmt":
            return TRANSACTION[node.kind] if 0 <= node.kind < len(TRANSACTION) else "TRANSACTION"
        if name == "VariableSetStmt":
            return "SET"
        if name == "VacuumStmt":
            return "VACUUM" if node.is_vacuumcmd else "ANALYZE"
        if name in ("GrantStmt", "GrantRoleStmt"):
            return "GRANT" if node.is_grant else "REVOKE"
        if name.startswith("Drop"):
            return "DROP"
        if name.startswith("Alter"):
            return "ALTER"
        if name.startswith("Create"):
            return "CREATE"
        return name.removesuffix("Stmt").upper() if name.endswith("Stmt") and name != "RawStmt" else None

    def _TransactionStmt(self, node: Any, depth: int) -> None:
        self.found.transaction = True

    def _SelectStmt(self, node: Any, depth: int) -> None:
        if node.HasField("into_clause"):
            self.found.statements.append("CREATE")
            self._store(node)

    def _CreateTableAsStmt(self, node: Any, depth: int) -> None:
        self._store(unwrap(node.query))

    def _InsertStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)
        columns = [unwrap(target).name for target in node.cols]
        if node.HasField("select_stmt"):
            for row in unwrap(node.select_stmt).values_lists:
                for index, value in enumerate(unwrap(row).items):
                    self._bind(columns[index] if index < len(columns) else "*", unwrap(value))
            self._store(unwrap(node.select_stmt))
        if node.HasField("with_clause"):
            self._store(node.with_clause)
        if node.HasField("on_conflict_clause"):
            self._set(node.on_conflict_clause.target_list, alone=False)

    def _UpdateStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)
        self._check_where(node)
        alone = not len(node.from_clause) and not node.HasField("with_clause")
        self._set(node.target_list, alone=alone)
        if not alone:
            for source in node.from_clause:
                self._store(unwrap(source))
            if node.HasField("with_clause"):
                self._store(node.with_clause)

    def _set(self, targets: Any, *, alone: bool) -> None:
        """`SET column = value`. A value made from the same column of the same row stays under its mask."""
        for target in targets:
            part = unwrap(target)
            value = unwrap(part.val)
            if value.DESCRIPTOR.name == "MultiAssignRef":
                source = unwrap(value.source)
                if source.DESCRIPTOR.name == "RowExpr" and value.colno <= len(source.args):
                    value = unwrap(source.args[value.colno - 1])
            self._bind(part.name, value)
            collected: set[str] = set()
            self._collect(value, collected, 0)
            if not (alone and collected <= {part.name} and not holds(value, "SubLink")):
                self.found.stored |= collected

    def _DeleteStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)
        self._check_where(node)

    def _MergeStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)
        if not filters(unwrap(node.join_condition)):
            self.found.without_where = True
        if has_bare_constants(unwrap(node.join_condition)):
            self.found.constant_sensitive = True
        for item in node.merge_when_clauses:
            clause = unwrap(item)
            kind = MERGE_KINDS.get(int(clause.command_type))
            if kind and kind not in self.found.statements:
                self.found.statements.append(kind)
            if kind == "UPDATE":
                self._set(clause.target_list, alone=False)
            for index, value in enumerate(clause.values):
                column = unwrap(clause.target_list[index]).name if index < len(clause.target_list) else "*"
                self._bind(column, unwrap(value))
            self._store(clause)
        self._store(unwrap(node.source_relation))
        if node.HasField("with_clause"):
            self._store(node.with_clause)

    def _TruncateStmt(self, node: Any, depth: int) -> None:
        for relation in node.relations:
            self._written(unwrap(relation))

    def _CopyStmt(self, node: Any, depth: int) -> None:
        found = self.found
        if node.is_from:
            if node.HasField("relation"):
                self._written(node.relation)
            return
        found.copy_out = True
        if node.HasField("relation"):
            self._relation(node.relation)
            names = strings(node.attlist)
            found.copied |= set(names) if names else {"*"}
        else:
            self._collect(unwrap(node.query), found.copied, 0)

    def _CreateUserMappingStmt(self, node: Any, depth: int) -> None:
        self.found.secret_options = self.found.constant_sensitive = True

    _AlterUserMappingStmt = _CreateForeignServerStmt = _AlterForeignServerStmt = _CreateUserMappingStmt

    def _DropStmt(self, node: Any, depth: int) -> None:
        for item in node.objects:
            part = unwrap(item)
            names = strings(part.items) if part.DESCRIPTOR.name == "List" else strings([item])
            if names:
                self.found.writes.add(Table(names[-2] if len(names) > 1 else "", names[-1]))

    def _AlterTableStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)

        for item in node.cmds:
            command = unwrap(item)
            definition = unwrap(getattr(command, "def"))
            collected: set[str] = set()
            self._collect(definition, collected, 0)
            self.found.stored |= collected - {command.name}

    def _RenameStmt(self, node: Any, depth: int) -> None:
        if node.HasField("relation"):
            self._written(node.relation)
            # Under another name no pattern would know it.
            self.found.stored.add(node.subname or "*")

    def _AlterObjectSchemaStmt(self, node: Any, depth: int) -> None:
        if node.HasField("relation"):
            self._written(node.relation)
            self.found.stored.add("*")

    def _CreateStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)

    def _VariableSetStmt(self, node: Any, depth: int) -> None:
        self.found.settings.add(node.name.lower() or "*")
        self.found.constant_sensitive = True

    def _DiscardStmt(self, node: Any, depth: int) -> None:
        self.found.settings.add("*")

    def _DoStmt(self, node: Any, depth: int) -> None:
        self.found.constant_sensitive = True
        for item in node.args:
            argument = unwrap(unwrap(item).arg)
            if argument.DESCRIPTOR.name == "String":
                self.found.do_bodies.append(argument.sval)

    def _CallStmt(self, node: Any, depth: int) -> None:
        self.found.row_functions = True

    def _FetchStmt(self, node: Any, depth: int) -> None:
        self.found.row_functions = True

    def _ExecuteStmt(self, node: Any, depth: int) -> None:
        self.found.row_functions = True

    # -- parts

    def _written(self, relation: Any) -> None:
        if relation.relname:
            self.found.writes.add(Table(relation.schemaname, relation.relname))

    def _check_where(self, node: Any) -> None:
        if not node.HasField("where_clause"):
            self.found.without_where = True
            return
        condition = unwrap(node.where_clause)
        if not filters(condition):
            self.found.without_where = True
        if has_bare_constants(condition):
            self.found.constant_sensitive = True

    def _store(self, node: Any) -> None:
        """Every column that is a value anywhere below may be stored; so may whole rows under other names."""
        self._collect(node, self.found.stored, 0)

    def _collect(self, node: Any, collected: set[str], depth: int) -> None:
        """All columns referenced below, values only."""
        if depth > MAX_DEPTH:
            raise TooDeep
        name = node.DESCRIPTOR.name
        if name == "ColumnRef":
            collected.add(column_name(node))
            return
        if name == "Alias" and len(node.colnames):
            collected.add("*")
        if name == "SelectStmt" and not len(node.target_list) and len(node.from_clause):
            collected.add("*")
        for descriptor, value in node.ListFields():
            if descriptor.name in NOT_FLOWING or descriptor.type != descriptor.TYPE_MESSAGE:
                continue
            for child in value if repeated(value) else (value,):
                self._collect(unwrap(child), collected, depth + 1)

    def _bind(self, column: str, value: Any) -> None:
        """Every constant and parameter in `value` belongs to `column`."""
        constants: list[int] = []
        parameters: list[int] = []
        find_constants(value, constants, parameters, 0)
        self.found.bound_literals += [(column, offset) for offset in constants]
        self.found.bound_parameters += [(column, number) for number in parameters]

    def _children(
        self, node: Any, depth: int, *, flowing: bool, skip: tuple[str, ...] = (), top: bool = False
    ) -> None:
        for descriptor, value in node.ListFields():
            if descriptor.name in skip or descriptor.type != descriptor.TYPE_MESSAGE:
                continue
            flows = flowing and descriptor.name not in NOT_FLOWING
            for child in value if repeated(value) else (value,):
                inner = unwrap(child)
                if top and descriptor.name == "target_list" and inner.DESCRIPTOR.name == "ResTarget":
                    direct = unwrap(inner.val)
                    if direct.DESCRIPTOR.name == "ColumnRef" and not node.DESCRIPTOR.name.startswith(
                        "Update"
                    ):
                        self._plain(direct)
                        continue
                self.visit(inner, depth + 1, flowing=flows)

    def visit(self, node: Any, depth: int, *, flowing: bool) -> None:
        if depth > MAX_DEPTH:
            raise TooDeep
        name = node.DESCRIPTOR.name
        if name.endswith("Stmt"):
            self.statement(node, depth=depth)
            return
        found = self.found
        if name == "RangeVar":
            self._relation(node)
            return
        if name == "ColumnRef":
            if flowing:
                found.flowing.add(column_name(node))
            return
        if name == "FuncCall":
            self._function(node)
            flowing = flowing and len(node.args) != 0
        elif name == "RangeFunction":
            self._range_function(node)
        elif name == "JoinExpr":
            # A merged column may be COALESCE or a cast of two, without a table's OID.
            found.flowing |= {"*"} if node.is_natural else set(strings(node.using_clause))
        elif name == "Alias":
            found.ranges.add(node.aliasname)
            if len(node.colnames):
                found.flowing.add("*")  # columns under names that no pattern knows
                self.renamed = True
        if name in COMPARES and not self.comparing:
            self.comparing = True
            self._comparison(node)
            self._children(node, depth, flowing=flowing)
            self.comparing = False
            return
        self._children(node, depth, flowing=flowing)

    def _relation(self, node: Any) -> None:
        self.found.ranges.add(node.alias.aliasname or node.relname)
        if len(node.alias.colnames):
            self.found.flowing.add("*")
            self.renamed = True
        if not node.schemaname and any(node.relname in scope for scope in self.ctes):
            return
        if node.relname:
            self.found.reads.add(Table(node.schemaname, node.relname))

    def _function(self, node: Any) -> None:
        names = strings(node.funcname)
        if not names:
            return
        found = self.found
        found.functions.add(names[-1])
        found.functions.add(".".join(names))
        if names[-1] == "set_config":
            first = unwrap(node.args[0]) if len(node.args) else None
            known = first is not None and first.DESCRIPTOR.name == "A_Const" and first.HasField("sval")
            found.settings.add(first.sval.sval.lower() if known and first is not None else "*")
            found.constant_sensitive = True
        if names[-1] in SINKS or names[-1] in TABLE_BY_NAME:
            for argument in node.args:
                self._store(unwrap(argument))
        if names[-1] not in builtin_functions() or (len(names) > 1 and names[0] != "pg_catalog"):
            found.row_functions = True  # of the user's own: it may read anything
        if names[-1] in TABLE_BY_NAME:
            found.flowing.add("*")
            found.row_functions = True
            found.constant_sensitive = True

    def _range_function(self, node: Any) -> None:
        for item in node.functions:
            part = unwrap(item)
            call = unwrap(part.items[0]) if part.DESCRIPTOR.name == "List" and len(part.items) else part
            names = strings(call.funcname) if call.DESCRIPTOR.name == "FuncCall" else []
            if (
                not names
                or names[-1] not in SAFE_TABLE_FUNCTIONS
                or (len(names) > 1 and names[0] != "pg_catalog")
            ):
                self.found.row_functions = True

    def _comparison(self, node: Any) -> None:
        """Constants in one expression with a column may be that column's values: `lower(ssn) LIKE '12%'`."""
        columns: set[str] = set()
        self._collect(node, columns, 0)
        for column in columns:
            self._bind(column, node)
