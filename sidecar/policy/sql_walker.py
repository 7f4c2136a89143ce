"""One walk over a statement's tree, generic, so that a node that this module has no opinion on still has its tables, functions and
columns seen."""

from __future__ import annotations

from typing import Any, Final

from sidecar.policy.builtin_functions import builtin_functions
from sidecar.policy.sql_bindings import Bindings
from sidecar.policy.sql_facts import ARGUMENT, SECRET, Analysis, Table
from sidecar.policy.sql_tree import (
    MAX_DEPTH,
    TooDeep,
    column_name,
    filters,
    has_bare_constants,
    holds,
    names_in,
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
    TABLE_BY_NAME,
    TRANSACTION,
)

_WRITES: Final = {"insert": "InsertStmt", "update": "UpdateStmt", "merge": "MergeStmt"}
_OBJECT_SCHEMA: Final = 37
COMPARED_MAX: Final = 16
"""Columns in one expression with constants; of more, the constants are taken to be any column's."""


class Walker(Bindings):
    def __init__(self, found: Analysis) -> None:
        self.found = found
        self.ctes: list[set[str]] = []
        self.comparing = False
        self.inserted = False
        """The next SELECT is the source of an INSERT, and was looked at with it."""

    # -- statements

    def statement(self, node: Any, *, depth: int = 0) -> None:
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
                    query = unwrap(expression.ctequery)
                    if query.DESCRIPTOR.name == "SelectStmt":
                        self._bind_handed_on(query)
                    self.statement(query, depth=depth + 1)
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
            self._children(node, depth, skip=skip)
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

    def _InsertStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)
        self._bind_inserted(node)
        self.inserted = bool(node.HasField("select_stmt"))
        if node.HasField("on_conflict_clause"):
            self._set(node.on_conflict_clause.target_list)

    def _UpdateStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)
        self._check_where(node)
        self._set(node.target_list)

    def _set(self, targets: Any) -> None:
        """`SET column = value`."""
        for target in targets:
            part = unwrap(target)
            value = unwrap(part.val)
            if value.DESCRIPTOR.name == "MultiAssignRef":
                source = unwrap(value.source)
                if source.DESCRIPTOR.name == "RowExpr" and value.colno <= len(source.args):
                    value = unwrap(source.args[value.colno - 1])
            self._bind(part.name, value)

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
                self._set(clause.target_list)
            for index, value in enumerate(clause.values):
                column = unwrap(clause.target_list[index]).name if index < len(clause.target_list) else "*"
                self._bind(column, unwrap(value))

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
        for item in node.options:
            option = unwrap(item)
            binary = option.defname == "format" and unwrap(option.arg).sval.lower() == "binary"
            found.copy_unread = found.copy_unread or binary
        found.copy_unread = found.copy_unread or bool(node.filename) or bool(node.is_program)
        if node.HasField("relation"):
            self._relation(node.relation)

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
            if command.name:
                self._bind(command.name, definition)

    def _RenameStmt(self, node: Any, depth: int) -> None:
        if node.HasField("relation"):
            self._written(node.relation)
            # Under another name no pattern would know it.
            self.found.stored.add(node.subname or "*")
        elif int(node.rename_type) == _OBJECT_SCHEMA:
            self.found.renamed_schemas.add(node.subname)

    def _AlterObjectSchemaStmt(self, node: Any, depth: int) -> None:
        if node.HasField("relation"):
            self._written(node.relation)
            self.found.stored.add("*")

    def _CreateStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)

    def _ExecuteStmt(self, node: Any, depth: int) -> None:
        for argument in node.params:
            self._bind(ARGUMENT, unwrap(argument))

    def _VariableSetStmt(self, node: Any, depth: int) -> None:
        if SECRET.search(node.name):
            for value in node.args:
                self._bind("password", unwrap(value))
        self.found.settings.add(node.name.lower() or "*")
        self.found.constant_sensitive = True

    def _DiscardStmt(self, node: Any, depth: int) -> None:
        self.found.settings.add("*")

    def _DoStmt(self, node: Any, depth: int) -> None:
        self._body(node.args)

    def _CreateFunctionStmt(self, node: Any, depth: int) -> None:
        """Whoever may make a function may call it: its body is as good as a DO block's."""
        self._body(node.options)
        if strings(node.return_type.names)[-1:] == ["trigger"]:
            self.found.do_bodies = [
                body + " new" for body in self.found.do_bodies
            ]  # whatever it calls its row
        if node.HasField("sql_body"):
            body = unwrap(node.sql_body)
            words = names_in(body, 0) | {word for word, kind in _WRITES.items() if holds(body, kind)}
            self.found.do_bodies.append(" ".join(sorted(words)))

    def _body(self, options: Any) -> None:
        self.found.constant_sensitive = True
        for item in options:
            argument = unwrap(unwrap(item).arg)
            parts = argument.items if argument.DESCRIPTOR.name == "List" else [argument]
            self.found.do_bodies += strings(parts)

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

    def _children(self, node: Any, depth: int, *, skip: tuple[str, ...] = ()) -> None:
        for descriptor, value in node.ListFields():
            if descriptor.name in skip or descriptor.type != descriptor.TYPE_MESSAGE:
                continue
            for child in value if repeated(value) else (value,):
                self.visit(unwrap(child), depth + 1)

    def visit(self, node: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise TooDeep
        name = node.DESCRIPTOR.name
        if name.endswith("Stmt"):
            if name == "SelectStmt" and not self.inserted:
                self._bind_handed_on(node)
            self.inserted = False
            self.statement(node, depth=depth)
            return
        if name == "ColumnDef":
            self._ColumnDef(node)
        if name == "RangeVar":
            self._relation(node)
            return
        if name == "FuncCall":
            self._function(node)
        elif name == "A_Indirection":
            self.found.value_fields.update(strings(node.indirection))
        elif name == "ColumnRef" and len(node.fields) > 1:
            self._row_field(column_name(node))
        if name in COMPARES and not self.comparing:
            self.comparing = True
            self._comparison(node)
            self._children(node, depth)
            self.comparing = False
            return
        self._children(node, depth)

    def _relation(self, node: Any) -> None:
        if not node.schemaname and any(node.relname in scope for scope in self.ctes):
            return
        if node.relname:
            self.found.reads.add(Table(node.schemaname, node.relname))

    def _row_field(self, name: str) -> None:
        if name in ROW_FUNCTIONS or name not in builtin_functions():
            self.found.row_fields.add(name)

    def _function(self, node: Any) -> None:
        names = strings(node.funcname)
        if not names:
            return
        found = self.found
        found.functions.add(names[-1])
        found.functions.add(".".join(names))
        self._bind_secrets(names, node)
        if names[-1] == "set_config":
            first = unwrap(node.args[0]) if len(node.args) else None
            known = first is not None and first.DESCRIPTOR.name == "A_Const" and first.HasField("sval")
            found.settings.add(first.sval.sval.lower() if known and first is not None else "*")
            found.constant_sensitive = True
        if names[-1] in TABLE_BY_NAME:
            found.constant_sensitive = True

    def _comparison(self, node: Any) -> None:
        """Constants in one expression with a column may be that column's values: `lower(ssn) LIKE '12%'`."""
        columns: set[str] = set()
        self._collect(node, columns, 0)
        for column in columns if len(columns) <= COMPARED_MAX else ("*",):
            self._bind(column, node)
