"""What an SQL text does, from its syntax tree (postgast: libpg_query, the server's own grammar). The only module that imports it.

`analyse` is a pure function of the text. It walks the tree once and generically, so that a node this module has no opinion on
still has its tables, functions and columns seen. What it cannot see (a DO block's body, CALL) makes the text `opaque`:
selectors on it are then unknown, and deny, approve and mask rules fire on unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

import postgast

from sidecar.model.verdict import SyntaxIssue
from sidecar.policy.builtin_functions import builtin_functions

MAX_DEPTH: Final = 400
"""Of the tree; deeper texts are not judged (`on_unparsed`)."""

_KINDS: Final = {
    "SelectStmt": "SELECT",
    "InsertStmt": "INSERT",
    "UpdateStmt": "UPDATE",
    "DeleteStmt": "DELETE",
    "MergeStmt": "MERGE",
    "TruncateStmt": "TRUNCATE",
    "CopyStmt": "COPY",
    "ExplainStmt": "EXPLAIN",
    "PrepareStmt": "PREPARE",
    "ExecuteStmt": "EXECUTE",
    "DeallocateStmt": "DEALLOCATE",
    "DoStmt": "DO",
    "CallStmt": "CALL",
    "LockStmt": "LOCK",
    "ListenStmt": "LISTEN",
    "UnlistenStmt": "UNLISTEN",
    "NotifyStmt": "NOTIFY",
    "DiscardStmt": "DISCARD",
    "VariableShowStmt": "SHOW",
    "FetchStmt": "FETCH",
    "DeclareCursorStmt": "DECLARE",
    "ClosePortalStmt": "CLOSE",
    "RenameStmt": "ALTER",
    "IndexStmt": "CREATE",
    "ViewStmt": "CREATE",
    "DefineStmt": "CREATE",
    "CompositeTypeStmt": "CREATE",
    "RuleStmt": "CREATE",
    "CommentStmt": "COMMENT",
    "ClusterStmt": "CLUSTER",
    "ReindexStmt": "REINDEX",
    "RefreshMatViewStmt": "REFRESH",
    "ReassignOwnedStmt": "REASSIGN",
    "LoadStmt": "LOAD",
    "CheckPointStmt": "CHECKPOINT",
    "SecLabelStmt": "SECURITY LABEL",
    "ImportForeignSchemaStmt": "IMPORT",
}
_DDL: Final = frozenset({"CREATE", "ALTER", "DROP", "COMMENT", "IMPORT", "REFRESH", "REASSIGN"})
_OPAQUE: Final = frozenset({"DO", "CALL", "LOAD"})
_TRANSACTION: Final = (
    "TRANSACTION",
    "BEGIN",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SAVEPOINT",
    "RELEASE",
    "ROLLBACK",
    "PREPARE TRANSACTION",
    "COMMIT",
    "ROLLBACK",
)
"""By TransactionStmtKind."""
STATEMENT_KINDS: Final = frozenset(
    {
        *_KINDS.values(),
        *_TRANSACTION,
        "DROP",
        "ALTER",
        "CREATE",
        "SET",
        "VACUUM",
        "ANALYZE",
        "GRANT",
        "REVOKE",
        "CONSTRAINTSSET",
    }
)
"""Every word that `statement` may ask for."""
_ONLY_WRITTEN: Final = frozenset(
    {"InsertStmt", "UpdateStmt", "DeleteStmt", "MergeStmt", "TruncateStmt", "CreateStmt", "AlterTableStmt"}
)
"""Their `relation` is written, not read."""
_SAFE_TABLE_FUNCTIONS: Final = frozenset(
    {
        "generate_series",
        "unnest",
        "regexp_split_to_table",
        "string_to_table",
        "json_array_elements",
        "jsonb_array_elements",
        "json_array_elements_text",
        "jsonb_array_elements_text",
        "json_each",
        "jsonb_each",
        "json_each_text",
        "jsonb_each_text",
        "json_to_recordset",
        "jsonb_to_recordset",
        "json_object_keys",
        "jsonb_object_keys",
        "generate_subscripts",
        "now",
    }
)
_TABLE_BY_NAME: Final = frozenset(
    {
        "query_to_xml",
        "table_to_xml",
        "schema_to_xml",
        "database_to_xml",
        "query_to_xml_and_xmlschema",
        "table_to_xml_and_xmlschema",
        "schema_to_xml_and_xmlschema",
        "database_to_xml_and_xmlschema",
        "cursor_to_xml",
        "dblink",
        "dblink_exec",
        "pg_read_file",
        "pg_read_binary_file",
        "lo_export",
        "lo_import",
    }
)
_ROW_FUNCTIONS: Final = frozenset(
    {
        "row_to_json", "to_json", "to_jsonb", "json_agg", "jsonb_agg", "json_build_array", "jsonb_build_array", "array_agg",
        "concat", "record_out", "record_send", "quote_literal", "quote_nullable", "hstore", "xmlagg", "any_value", "max", "min",
    }
)  # fmt: skip
"""May be called as if they were columns of a row: `c.to_json`."""
_SINKS: Final = frozenset(
    {
        "pg_notify", "set_config", "lo_from_bytea", "lo_put", "lowrite", "pg_logical_emit_message", "pg_file_write",
        "dblink_send_query", "dblink_open", "dblink_connect",
    }
)  # fmt: skip
"""Functions that put their arguments where no mask reaches."""
_COMPARES: Final = frozenset({"A_Expr", "FuncCall", "NullTest", "CaseExpr", "CoalesceExpr", "MinMaxExpr"})
_DEFINED: Final = ("into_clause", "into", "view", "relation", "rel", "table")
"""Fields that name what a statement defines or changes."""
_MERGE_KINDS: Final = {3: "UPDATE", 4: "INSERT", 5: "DELETE"}
_NOT_FLOWING: Final = frozenset(
    {
        "where_clause",
        "group_clause",
        "sort_clause",
        "having_clause",
        "quals",
        "join_using",
        "limit_count",
        "limit_offset",
        "distinct_clause",
    }
)
"""Parts whose columns decide about rows and do not become values of the result."""


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

    statements: list[str] = field(default_factory=list)
    """Kinds in order of appearance, nested ones included."""
    reads: set[Table] = field(default_factory=set)
    writes: set[Table] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)
    """Both `schema.name` and `name` where qualified."""
    without_where: bool = False
    opaque: bool = False
    settings: set[str] = field(default_factory=set)
    """Settings that are SET or RESET; `*` for all or for one that cannot be known."""
    flowing: set[str] = field(default_factory=set)
    """Column names that can flow into a derived result value; `*` for whole rows."""
    stored: set[str] = field(default_factory=set)
    """Column names that flow into another table (INSERT … SELECT, CREATE TABLE AS, UPDATE SET)."""
    copied: set[str] = field(default_factory=set)
    """Columns that COPY … TO takes; `*` for all."""
    row_functions: bool = False
    """A function in FROM whose rows cannot be known, a cursor, an EXECUTE."""
    copy_out: bool = False
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
    ranges: set[str] = field(default_factory=set)
    """Names and aliases in FROM: a column reference of that name is a whole row."""
    secret_options: bool = False
    """CREATE or ALTER of a user mapping or foreign server: its options are secrets."""
    do_bodies: list[str] = field(default_factory=list)
    parts: list[Analysis] = field(default_factory=list)
    """One a statement, where the text holds several: each is judged by itself, the strictest verdict wins."""

    @property
    def ddl(self) -> bool:
        return self.opaque or not _DDL.isdisjoint(self.statements)


def normalise(text: str) -> str | None:
    """The text with its constants replaced by $n; None where it cannot be parsed. For shape caching."""
    try:
        return str(postgast.normalize(text))
    except (postgast.PgQueryError, UnicodeEncodeError, ValueError):
        return None


def analyse(text: str) -> Analysis:
    """Never raises: what the grammar rejects comes back as `error`."""
    found = Analysis()
    if "\0" in text:
        found.error = SyntaxIssue("invalid byte sequence: NUL", 0)
        return found
    try:
        tree = postgast.parse(text)
    except postgast.PgQueryError as error:
        if "stack depth" in str(error.message):
            found.too_deep = True
            return found
        found.error = SyntaxIssue(str(error.message), int(error.cursorpos or 0))
        return found
    except (UnicodeEncodeError, ValueError, RecursionError) as error:
        found.unjudged = f"it cannot be parsed ({type(error).__name__})"
        return found
    parts = [_analyse_one(_unwrap(raw.stmt)) for raw in tree.stmts]
    found = parts[0] if len(parts) == 1 else _together(parts)
    if may_hold_secrets(text) or found.secret_options:
        _passwords(text, found)
    return found


def may_hold_secrets(text: str) -> bool:
    """A word that goes before a secret stands anywhere in the text, literals and comments included."""
    return _SECRET_WORD.search(text) is not None


def _analyse_one(statement: Any) -> Analysis:
    found = Analysis()
    try:
        walker = _Walker(found)
        walker.statement(statement, top=True)
        if not walker.rows.isdisjoint(found.ranges):
            found.flowing.add("*")
    except (_TooDeep, RecursionError):
        found.too_deep = True
    for columns in (found.flowing, found.stored, found.copied):
        if not columns.isdisjoint(found.ranges):
            columns.add("*")
    return found


def _together(parts: list[Analysis]) -> Analysis:
    found = Analysis(parts=parts)
    for part in parts:
        found.statements += part.statements
        found.bound_literals += part.bound_literals
        found.bound_parameters += part.bound_parameters
        found.do_bodies += part.do_bodies
        for name in ("reads", "writes", "functions", "settings", "flowing", "stored", "copied", "ranges"):
            getattr(found, name).update(getattr(part, name))
        for name in (
            "without_where", "opaque", "row_functions", "copy_out", "transaction", "constant_sensitive", "too_deep",
            "secret_options",
        ):  # fmt: skip
            setattr(found, name, getattr(found, name) or getattr(part, name))
    return found


class _TooDeep(Exception):
    pass


def _unwrap(node: Any) -> Any:
    """The message inside a Node's oneof."""
    if node.DESCRIPTOR.name != "Node":
        return node
    which = node.WhichOneof("node")
    return getattr(node, which) if which else node


def _strings(nodes: Any) -> list[str]:
    return [_unwrap(node).sval for node in nodes if _unwrap(node).DESCRIPTOR.name == "String"]


class _Walker:
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
            if kind in _OPAQUE:
                found.opaque = True
        scope: set[str] = set()
        self.ctes.append(scope)
        try:
            with_clause = getattr(node, "with_clause", None)
            if with_clause is not None and node.HasField("with_clause"):
                for cte in with_clause.ctes:
                    expression = _unwrap(cte)
                    if with_clause.recursive:
                        scope.add(expression.ctename)
                    self.statement(_unwrap(expression.ctequery), depth=depth + 1)
                    scope.add(expression.ctename)
            special = getattr(self, "_" + name, None)
            if special is not None:
                special(node, depth)
            skip: tuple[str, ...] = (
                ("with_clause", "relation", "relations")
                if name in _ONLY_WRITTEN
                else ("with_clause", *_DEFINED)
            )
            if name not in _ONLY_WRITTEN and name != "CopyStmt":
                self._defined(node)
            if "returning_clause" in node.DESCRIPTOR.fields_by_name:
                # Values of RETURNING are a result like a SELECT's. OLD and NEW are rows, under whatever names.
                skip += ("returning_clause",)
                found.ranges |= {"old", "new", node.relation.alias.aliasname or node.relation.relname}
                found.ranges |= {_unwrap(option).value for option in node.returning_clause.options}
                self._targets(node.returning_clause.exprs, depth, top)
            before = set(self.found.flowing)
            self._children(node, depth, flowing=name == "SelectStmt", skip=skip, top=top)
            if name == "ExplainStmt":
                self.found.flowing = before  # a plan is shown, no value
        finally:
            self.ctes.pop()

    def _defined(self, node: Any) -> None:
        """What SELECT INTO, CREATE … AS, CREATE VIEW and other DDL name as their object is written, not read."""
        for name in _DEFINED:
            descriptor = node.DESCRIPTOR.fields_by_name.get(name)
            if descriptor is None or descriptor.type != descriptor.TYPE_MESSAGE or descriptor.is_repeated:
                continue
            if node.HasField(name):
                target = _unwrap(getattr(node, name))
                if target.DESCRIPTOR.name == "IntoClause":
                    target = target.rel
                if target.DESCRIPTOR.name == "RangeVar":
                    self._written(target)

    def _targets(self, targets: Any, depth: int, top: bool) -> None:
        for item in targets:
            part = _unwrap(item)
            value = _unwrap(part.val) if part.DESCRIPTOR.name == "ResTarget" else part
            if top and value.DESCRIPTOR.name == "ColumnRef":
                self._plain(value)
            else:
                self.visit(part, depth + 1, flowing=True)

    def _plain(self, column: Any) -> None:
        """A plain column of the outermost result keeps its table's OID and is masked by that; a whole row, or a function
        called as if it were a column (`c.to_json`), does not."""
        name = _column(column)
        if len(column.fields) > 1 and name in _ROW_FUNCTIONS:
            self.found.flowing.add("*")
        elif name != "*":
            self.rows.add(name)

    @staticmethod
    def _kind(node: Any, name: str) -> str | None:
        if name == "SelectStmt" and len(node.values_lists):
            return None  # VALUES, as in INSERT
        if name in _KINDS:
            return _KINDS[name]
        if name == "TransactionStmt":
            return _TRANSACTION[node.kind] if 0 <= node.kind < len(_TRANSACTION) else "TRANSACTION"
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
        self._store(_unwrap(node.query))

    def _InsertStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)
        columns = [_unwrap(target).name for target in node.cols]
        if node.HasField("select_stmt"):
            for row in _unwrap(node.select_stmt).values_lists:
                for index, value in enumerate(_unwrap(row).items):
                    self._bind(columns[index] if index < len(columns) else "*", _unwrap(value))
            self._store(_unwrap(node.select_stmt))
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
                self._store(_unwrap(source))
            if node.HasField("with_clause"):
                self._store(node.with_clause)

    def _set(self, targets: Any, *, alone: bool) -> None:
        """`SET column = value`. A value made from the same column of the same row stays under its mask."""
        for target in targets:
            part = _unwrap(target)
            value = _unwrap(part.val)
            if value.DESCRIPTOR.name == "MultiAssignRef":
                source = _unwrap(value.source)
                if source.DESCRIPTOR.name == "RowExpr" and value.colno <= len(source.args):
                    value = _unwrap(source.args[value.colno - 1])
            self._bind(part.name, value)
            collected: set[str] = set()
            self._collect(value, collected, 0)
            if not (alone and collected <= {part.name} and not _holds(value, "SubLink")):
                self.found.stored |= collected

    def _DeleteStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)
        self._check_where(node)

    def _MergeStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)
        if not _filters(_unwrap(node.join_condition)):
            self.found.without_where = True
        if _has_bare_constants(_unwrap(node.join_condition)):
            self.found.constant_sensitive = True
        for item in node.merge_when_clauses:
            clause = _unwrap(item)
            kind = _MERGE_KINDS.get(int(clause.command_type))
            if kind and kind not in self.found.statements:
                self.found.statements.append(kind)
            if kind == "UPDATE":
                self._set(clause.target_list, alone=False)
            for index, value in enumerate(clause.values):
                column = _unwrap(clause.target_list[index]).name if index < len(clause.target_list) else "*"
                self._bind(column, _unwrap(value))
            self._store(clause)
        self._store(_unwrap(node.source_relation))
        if node.HasField("with_clause"):
            self._store(node.with_clause)

    def _TruncateStmt(self, node: Any, depth: int) -> None:
        for relation in node.relations:
            self._written(_unwrap(relation))

    def _CopyStmt(self, node: Any, depth: int) -> None:
        found = self.found
        if node.is_from:
            if node.HasField("relation"):
                self._written(node.relation)
            return
        found.copy_out = True
        if node.HasField("relation"):
            self._relation(node.relation)
            names = _strings(node.attlist)
            found.copied |= set(names) if names else {"*"}
        else:
            self._collect(_unwrap(node.query), found.copied, 0)

    def _CreateUserMappingStmt(self, node: Any, depth: int) -> None:
        self.found.secret_options = self.found.constant_sensitive = True

    _AlterUserMappingStmt = _CreateForeignServerStmt = _AlterForeignServerStmt = _CreateUserMappingStmt

    def _DropStmt(self, node: Any, depth: int) -> None:
        for item in node.objects:
            part = _unwrap(item)
            names = _strings(part.items) if part.DESCRIPTOR.name == "List" else _strings([item])
            if names:
                self.found.writes.add(Table(names[-2] if len(names) > 1 else "", names[-1]))

    def _AlterTableStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)

        for item in node.cmds:
            command = _unwrap(item)
            definition = _unwrap(getattr(command, "def"))
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
            argument = _unwrap(_unwrap(item).arg)
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
        condition = _unwrap(node.where_clause)
        if not _filters(condition):
            self.found.without_where = True
        if _has_bare_constants(condition):
            self.found.constant_sensitive = True

    def _store(self, node: Any) -> None:
        """Every column that is a value anywhere below may be stored; so may whole rows under other names."""
        self._collect(node, self.found.stored, 0)

    def _collect(self, node: Any, collected: set[str], depth: int) -> None:
        """All columns referenced below, values only."""
        if depth > MAX_DEPTH:
            raise _TooDeep
        name = node.DESCRIPTOR.name
        if name == "ColumnRef":
            collected.add(_column(node))
            return
        if name == "Alias" and len(node.colnames):
            collected.add("*")
        if name == "SelectStmt" and not len(node.target_list) and len(node.from_clause):
            collected.add("*")
        for descriptor, value in node.ListFields():
            if descriptor.name in _NOT_FLOWING or descriptor.type != descriptor.TYPE_MESSAGE:
                continue
            for child in value if _repeated(value) else (value,):
                self._collect(_unwrap(child), collected, depth + 1)

    def _bind(self, column: str, value: Any) -> None:
        """Every constant and parameter in `value` belongs to `column`."""
        constants: list[int] = []
        parameters: list[int] = []
        _constants(value, constants, parameters, 0)
        self.found.bound_literals += [(column, offset) for offset in constants]
        self.found.bound_parameters += [(column, number) for number in parameters]

    def _children(
        self, node: Any, depth: int, *, flowing: bool, skip: tuple[str, ...] = (), top: bool = False
    ) -> None:
        for descriptor, value in node.ListFields():
            if descriptor.name in skip or descriptor.type != descriptor.TYPE_MESSAGE:
                continue
            flows = flowing and descriptor.name not in _NOT_FLOWING
            for child in value if _repeated(value) else (value,):
                inner = _unwrap(child)
                if top and descriptor.name == "target_list" and inner.DESCRIPTOR.name == "ResTarget":
                    direct = _unwrap(inner.val)
                    if direct.DESCRIPTOR.name == "ColumnRef" and not node.DESCRIPTOR.name.startswith(
                        "Update"
                    ):
                        self._plain(direct)
                        continue
                self.visit(inner, depth + 1, flowing=flows)

    def visit(self, node: Any, depth: int, *, flowing: bool) -> None:
        if depth > MAX_DEPTH:
            raise _TooDeep
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
                found.flowing.add(_column(node))
            return
        if name == "FuncCall":
            self._function(node)
            flowing = flowing and len(node.args) != 0
        elif name == "RangeFunction":
            self._range_function(node)
        elif name == "JoinExpr":
            # A merged column may be COALESCE or a cast of two, without a table's OID.
            found.flowing |= {"*"} if node.is_natural else set(_strings(node.using_clause))
        elif name == "Alias":
            found.ranges.add(node.aliasname)
            if len(node.colnames):
                found.flowing.add("*")  # columns under names that no pattern knows
                self.renamed = True
        if name in _COMPARES and not self.comparing:
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
        names = _strings(node.funcname)
        if not names:
            return
        found = self.found
        found.functions.add(names[-1])
        found.functions.add(".".join(names))
        if names[-1] == "set_config":
            first = _unwrap(node.args[0]) if len(node.args) else None
            known = first is not None and first.DESCRIPTOR.name == "A_Const" and first.HasField("sval")
            found.settings.add(first.sval.sval.lower() if known and first is not None else "*")
            found.constant_sensitive = True
        if names[-1] in _SINKS or names[-1] in _TABLE_BY_NAME:
            for argument in node.args:
                self._store(_unwrap(argument))
        if names[-1] not in builtin_functions() or (len(names) > 1 and names[0] != "pg_catalog"):
            found.row_functions = True  # of the user's own: it may read anything
        if names[-1] in _TABLE_BY_NAME:
            found.flowing.add("*")
            found.row_functions = True
            found.constant_sensitive = True

    def _range_function(self, node: Any) -> None:
        for item in node.functions:
            part = _unwrap(item)
            call = _unwrap(part.items[0]) if part.DESCRIPTOR.name == "List" and len(part.items) else part
            names = _strings(call.funcname) if call.DESCRIPTOR.name == "FuncCall" else []
            if (
                not names
                or names[-1] not in _SAFE_TABLE_FUNCTIONS
                or (len(names) > 1 and names[0] != "pg_catalog")
            ):
                self.found.row_functions = True

    def _comparison(self, node: Any) -> None:
        """Constants in one expression with a column may be that column's values: `lower(ssn) LIKE '12%'`."""
        columns: set[str] = set()
        self._collect(node, columns, 0)
        for column in columns:
            self._bind(column, node)


def _constants(node: Any, constants: list[int], parameters: list[int], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _TooDeep
    name = node.DESCRIPTOR.name
    if name == "A_Const":
        constants.append(node.location)
        return
    if name == "ParamRef":
        parameters.append(node.number - 1)
        return
    if name in ("TypeName", "String"):
        return
    for descriptor, value in node.ListFields():
        if descriptor.type == descriptor.TYPE_MESSAGE:
            for child in value if _repeated(value) else (value,):
                _constants(_unwrap(child), constants, parameters, depth + 1)


def _holds(node: Any, kind: str, depth: int = 0) -> bool:
    """Whether a node of that kind stands at or below `node`."""
    if depth > MAX_DEPTH:
        raise _TooDeep
    if node.DESCRIPTOR.name == kind:
        return True
    return any(
        _holds(_unwrap(child), kind, depth + 1)
        for descriptor, value in node.ListFields()
        if descriptor.type == descriptor.TYPE_MESSAGE
        for child in (value if _repeated(value) else (value,))
    )


def _repeated(value: Any) -> bool:
    return not hasattr(value, "DESCRIPTOR")


def _column(node: Any) -> str:
    last = _unwrap(node.fields[len(node.fields) - 1])
    return str(last.sval) if last.DESCRIPTOR.name == "String" else "*"


def _filters(node: Any) -> bool:
    """Whether a condition can leave rows out: it looks at a column. `true`, `1=1`, `now() > '2000-01-01'`, `x = x` do not."""
    name = node.DESCRIPTOR.name
    if name == "BoolExpr":
        parts = [_filters(_unwrap(part)) for part in node.args]
        return all(parts) if int(node.boolop) == 2 else any(parts)  # 1 AND, 2 OR, 3 NOT
    if name == "CurrentOfExpr":
        return True
    if name == "A_Expr" and node.HasField("lexpr") and node.HasField("rexpr"):
        left, right = _unwrap(node.lexpr), _unwrap(node.rexpr)
        if left.DESCRIPTOR.name == right.DESCRIPTOR.name == "ColumnRef" and left.fields == right.fields:
            return False
    return _holds(node, "ColumnRef")


def _is_constant(node: Any) -> bool:
    name = node.DESCRIPTOR.name
    if name == "A_Const":
        return True
    if name == "TypeCast":
        return _is_constant(_unwrap(node.arg))
    if name == "A_Expr":
        sides = [_unwrap(getattr(node, side)) for side in ("lexpr", "rexpr") if node.HasField(side)]
        return all(_is_constant(side) for side in sides)
    return False


def _has_bare_constants(node: Any) -> bool:
    """Whether a condition holds a part that is only a constant: then its truth, not its shape, decides `without_where`."""
    if _is_constant(node):
        return True
    return node.DESCRIPTOR.name == "BoolExpr" and any(
        _has_bare_constants(_unwrap(part)) for part in node.args
    )


_SECRET_WORD: Final = re.compile(r"(?i)passw|pwd|secret|connection|conninfo|://")
_SECRET_KEYWORDS: Final = frozenset(
    {b"password", b"passwd", b"pwd", b"secret", b"connection", b"primary_conninfo"}
)
_SECRET_IN_LITERAL: Final = re.compile(rb"(?i)passw|pwd|secret|://[^/@\s]*:[^/@\s]*@")
_LITERAL_TOKENS: Final = frozenset({"SCONST", "USCONST", "BCONST", "XCONST"})
_COMMENT_TOKENS: Final = frozenset({"SQL_COMMENT", "C_COMMENT"})


def _passwords(text: str, found: Analysis) -> None:
    """By the server's own lexer, so that comments, dollar quotes and escapes cannot hide a literal: the literal after a word
    such as PASSWORD, any literal that itself speaks of one, and every option of a user mapping or foreign server."""
    raw = text.encode("utf-8", "surrogateescape")
    all_literals = found.secret_options
    before = b""
    for token in postgast.scan(text).tokens:
        kind = token.DESCRIPTOR.fields_by_name["token"].enum_type.values_by_number[token.token].name
        if kind in _COMMENT_TOKENS:
            continue
        word = raw[token.start : token.end]
        if kind in _LITERAL_TOKENS and (
            all_literals or before in _SECRET_KEYWORDS or _SECRET_IN_LITERAL.search(word)
        ):
            found.password_spans.append((token.start, token.end))
            found.constant_sensitive = True
        if word != b"=" and kind != "TYPECAST":
            before = word.strip(b'"').lower()


def literal_span(raw: bytes, start: int) -> tuple[int, int] | None:
    """[start, end) of the constant at byte offset `start`."""
    match = re.compile(
        rb"[eE]'(?:[^'\\]|''|\\.)*'|(?:[bBxXnN]|[uU]&)?'(?:[^']|'')*'|\$([a-zA-Z_]\w*)?\$.*?\$\1\$|[-+]?[\w.]+",
        re.DOTALL,
    ).match(raw, start)
    return match.span() if match else None
