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
        found.error = SyntaxIssue(str(error.message), int(error.cursorpos or 0))
        return found
    except (UnicodeEncodeError, ValueError, RecursionError) as error:
        found.error = SyntaxIssue(f"the text cannot be parsed: {type(error).__name__}", 0)
        return found
    walker = _Walker(found)
    try:
        for raw in tree.stmts:
            walker.statement(_unwrap(raw.stmt), top=True)
    except (_TooDeep, RecursionError):
        found.too_deep = True
    if (
        any(kind in ("CREATE", "ALTER") for kind in found.statements)
        or "dblink" in text
        or "password" in text.lower()
    ):
        _passwords(text, found)
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
        self.aliases: list[set[str]] = []

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
        self.aliases.append(set())
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
            skip = ("with_clause", "relation", "relations") if name in _ONLY_WRITTEN else ("with_clause",)
            self._children(node, depth, flowing=name == "SelectStmt", skip=skip, top=top)
        finally:
            self.ctes.pop()
            self.aliases.pop()

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
        select = _unwrap(node.select_stmt) if node.HasField("select_stmt") else None
        if select is None:
            return
        columns = [_unwrap(target).name for target in node.cols]
        if len(select.values_lists):
            for row in select.values_lists:
                for index, value in enumerate(_unwrap(row).items):
                    self._bind(columns[index] if index < len(columns) else "*", _unwrap(value))
        else:
            self._store(select)

    def _UpdateStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)
        self._check_where(node)
        for target in node.target_list:
            part = _unwrap(target)
            value = _unwrap(part.val)
            self._bind(part.name, value)
            collected: set[str] = set()
            self._collect(value, collected, 0)
            self.found.stored |= collected

    def _DeleteStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)
        self._check_where(node)

    def _MergeStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)
        collected: set[str] = set()
        for clause in node.merge_when_clauses:
            self._collect(_unwrap(clause), collected, 0)
        self.found.stored |= collected

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
            names = _strings(node.attlist)
            found.copied |= set(names) if names else {"*"}
        else:
            collected: set[str] = set()
            query = _unwrap(node.query)
            self._outputs(query, collected)
            found.copied |= collected

    def _DropStmt(self, node: Any, depth: int) -> None:
        for item in node.objects:
            part = _unwrap(item)
            names = _strings(part.items) if part.DESCRIPTOR.name == "List" else _strings([item])
            if names:
                self.found.writes.add(Table(names[-2] if len(names) > 1 else "", names[-1]))

    def _AlterTableStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)

    def _RenameStmt(self, node: Any, depth: int) -> None:
        if node.HasField("relation"):
            self._written(node.relation)

    def _CreateStmt(self, node: Any, depth: int) -> None:
        self._written(node.relation)

    def _VariableSetStmt(self, node: Any, depth: int) -> None:
        self.found.settings.add(node.name.lower() or "*")
        self.found.constant_sensitive = True

    def _DiscardStmt(self, node: Any, depth: int) -> None:
        self.found.settings.add("*")

    def _DoStmt(self, node: Any, depth: int) -> None:
        self.found.constant_sensitive = True

    def _FetchStmt(self, node: Any, depth: int) -> None:
        self.found.row_functions = True

    def _ExecuteStmt(self, node: Any, depth: int) -> None:
        self.found.row_functions = True

    # -- parts

    def _written(self, relation: Any) -> None:
        if relation.relname:
            self.found.writes.add(Table(relation.schemaname, relation.relname))

    def _check_where(self, node: Any) -> None:
        if not node.HasField("where_clause") or _always_true(_unwrap(node.where_clause)):
            self.found.without_where = True
        if node.HasField("where_clause") and _has_bare_constants(_unwrap(node.where_clause)):
            self.found.constant_sensitive = True

    def _store(self, select: Any) -> None:
        collected: set[str] = set()
        self._outputs(select, collected)
        self.found.stored |= collected

    def _outputs(self, select: Any, collected: set[str]) -> None:
        """Column names that a query's output can hold; `*` for all."""
        if select.DESCRIPTOR.name != "SelectStmt":
            collected.add("*")
            return
        for side in ("larg", "rarg"):
            if select.HasField(side):
                self._outputs(getattr(select, side), collected)
        for target in select.target_list:
            self._collect(_unwrap(target), collected, 0)
        for source in select.from_clause:
            part = _unwrap(source)
            if part.DESCRIPTOR.name == "RangeSubselect":
                self._outputs(_unwrap(part.subquery), collected)
        if select.HasField("with_clause"):
            for cte in select.with_clause.ctes:
                self._outputs(_unwrap(_unwrap(cte).ctequery), collected)

    def _collect(self, node: Any, collected: set[str], depth: int) -> None:
        """All columns referenced below, values only."""
        if depth > MAX_DEPTH:
            raise _TooDeep
        if node.DESCRIPTOR.name == "ColumnRef":
            collected.add(_column(node))
            return
        for descriptor, value in node.ListFields():
            if descriptor.name in _NOT_FLOWING or descriptor.type != descriptor.TYPE_MESSAGE:
                continue
            for child in value if _repeated(value) else (value,):
                self._collect(_unwrap(child), collected, depth + 1)

    def _bind(self, column: str, value: Any) -> None:
        name = value.DESCRIPTOR.name
        if name == "TypeCast":
            self._bind(column, _unwrap(value.arg))
        elif name == "A_Const":
            self.found.bound_literals.append((column, value.location))
        elif name == "ParamRef":
            self.found.bound_parameters.append((column, value.number - 1))

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
                        if _column(direct) != "*" and len(direct.fields) == 1:
                            # May be a whole row: `SELECT c FROM customers c`.
                            self._maybe_row(direct, node)
                        continue  # a plain column keeps its table's OID: the session masks it by that
                self.visit(inner, depth + 1, flowing=flows)

    def _maybe_row(self, column: Any, select: Any) -> None:
        name = _column(column)
        for source in getattr(select, "from_clause", ()):
            if name in _names_of(_unwrap(source)):
                self.found.flowing.add("*")

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
        elif name == "A_Expr":
            self._comparison(node)
        elif name == "JoinExpr" and node.is_natural:
            pass
        self._children(node, depth, flowing=flowing)

    def _relation(self, node: Any) -> None:
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
        if not (node.HasField("lexpr") and node.HasField("rexpr")):
            return
        left, right = _unwrap(node.lexpr), _unwrap(node.rexpr)
        for one, other in ((left, right), (right, left)):
            if one.DESCRIPTOR.name != "ColumnRef":
                continue
            for value in other.items if other.DESCRIPTOR.name == "List" else (other,):
                self._bind(_column(one), _unwrap(value))


def _repeated(value: Any) -> bool:
    return not hasattr(value, "DESCRIPTOR")


def _column(node: Any) -> str:
    last = _unwrap(node.fields[len(node.fields) - 1])
    return str(last.sval) if last.DESCRIPTOR.name == "String" else "*"


def _names_of(source: Any) -> set[str]:
    name = source.DESCRIPTOR.name
    if name == "RangeVar":
        return {source.alias.aliasname or source.relname}
    if name == "JoinExpr":
        return _names_of(_unwrap(source.larg)) | _names_of(_unwrap(source.rarg))
    if source.HasField("alias") if "alias" in source.DESCRIPTOR.fields_by_name else False:
        return {source.alias.aliasname}
    return set()


def _always_true(node: Any) -> bool:
    """`WHERE true`, `1=1`, `NOT false`, `x = x` is not folded: it is false for NULL."""
    name = node.DESCRIPTOR.name
    if name == "A_Const":
        return bool(node.HasField("boolval") and node.boolval.boolval)
    if name == "TypeCast":
        inner = _unwrap(node.arg)
        return (
            inner.DESCRIPTOR.name == "A_Const"
            and inner.HasField("sval")
            and inner.sval.sval.lower() in ("t", "true", "on", "yes", "1")
        )
    if name == "A_Expr":
        left = _unwrap(node.lexpr) if node.HasField("lexpr") else None
        right = _unwrap(node.rexpr) if node.HasField("rexpr") else None
        return left is not None and right is not None and _is_constant(left) and _is_constant(right)
    if name == "BoolExpr":
        parts = [_unwrap(part) for part in node.args]
        operator = int(node.boolop)  # 1 AND, 2 OR, 3 NOT
        if operator == 1:
            return all(_always_true(part) for part in parts)
        if operator == 2:
            return any(_always_true(part) for part in parts)
        return all(_is_constant(part) for part in parts)
    return False


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


_PASSWORD: Final = re.compile(
    rb"(?i)\b(?:password\s*=?\s*|passwd\s+)(?:E|U&)?('(?:[^'\\]|''|\\.)*'|\$([a-zA-Z_]*)\$.*?\$\2\$|[^\s',;)]+)",
    re.DOTALL,
)


def _passwords(text: str, found: Analysis) -> None:
    raw = text.encode("utf-8", "surrogateescape")
    for match in _PASSWORD.finditer(raw):
        found.password_spans.append(match.span(1))
        found.constant_sensitive = True


def literal_span(raw: bytes, start: int) -> tuple[int, int] | None:
    """[start, end) of the constant at byte offset `start`."""
    match = re.compile(
        rb"[eE]'(?:[^'\\]|''|\\.)*'|(?:[bBxXnN]|[uU]&)?'(?:[^']|'')*'|\$([a-zA-Z_]\w*)?\$.*?\$\1\$|[-+]?[\w.]+",
        re.DOTALL,
    ).match(raw, start)
    return match.span() if match else None
