"""What a statement does to definitions: which facts about the database it makes doubtful."""

from __future__ import annotations

import re
from typing import Any, Final

from sidecar.model.verdict import CatalogChanges, FunctionMade
from sidecar.policy.sql_tree import names_in, strings, unwrap

_HARMLESS: Final = frozenset(
    {"IndexStmt", "DropStmt", "TruncateStmt", "CommentStmt", "GrantStmt", "GrantRoleStmt", "CreateSeqStmt", "AlterSeqStmt",
     "CreateSchemaStmt", "CreateRoleStmt", "AlterRoleStmt", "AlterRoleSetStmt", "DropRoleStmt", "CreateEnumStmt", "AlterEnumStmt",
     "CompositeTypeStmt", "CreateStatsStmt", "CreatePolicyStmt", "AlterPolicyStmt", "AlterOwnerStmt",
     "CreateTableSpaceStmt", "RefreshMatViewStmt", "ReindexStmt", "AlterDatabaseSetStmt", "AlterDefaultPrivilegesStmt",
     "CreatePublicationStmt", "AlterPublicationStmt", "SecLabelStmt", "CreateDomainStmt"}
)  # fmt: skip
"""Do not change what a name shows."""
_INHERITS: Final = frozenset({50, 52, 60})
"""AT_AddInherit, AT_AddOf, AT_AttachPartition."""
_TABLE: Final = 42
"""OBJECT_TABLE."""
_WORD: Final = re.compile(r"[\w$]+")
_DEFINING: Final = frozenset({"create", "alter", "import", "execute", "call", "load", "into"})
"""Words without one of which a block of code defines nothing by itself. `into` may make a table."""
NOTHING: Final = CatalogChanges()


def changes_of(statement: Any) -> CatalogChanges:
    """Only definitions: what a statement writes into tables changes none."""
    name = statement.DESCRIPTOR.name
    if name == "ExplainStmt":
        return changes_of(unwrap(statement.query))
    if name in ("SelectStmt", "CreateTableAsStmt"):
        into = statement.into_clause if name == "SelectStmt" else statement.into
        if not into.rel.relname:
            return NOTHING
        return CatalogChanges(made=(into.rel.relname,), temporary=_temporary(into.rel))
    if name == "CreateStmt":
        made = (statement.relation.relname,)
        borrowed = len(statement.inh_relations) or statement.HasField("partbound")
        own = _temporary(statement.relation)
        if borrowed:
            return CatalogChanges(redefined=made, temporary=own)
        return CatalogChanges(made=made, temporary=own)
    if name == "AlterTableStmt":
        changed = (statement.relation.relname,)
        kinds = {int(unwrap(command).subtype) for command in statement.cmds}
        if int(statement.objtype) == _TABLE and kinds.isdisjoint(_INHERITS):
            return CatalogChanges(altered=changed)
        return CatalogChanges(redefined=(*changed, *_parents(statement)))
    if name == "ViewStmt":
        return CatalogChanges(redefined=(statement.view.relname,), temporary=_temporary(statement.view))
    if name in ("RuleStmt", "AlterObjectSchemaStmt", "RenameStmt"):
        return _renamed(statement, name)
    if name == "CreateFunctionStmt":
        return CatalogChanges(functions=(_function(statement),))
    if name == "DefineStmt":
        # Of an aggregate or an operator, the functions that it is made of are its body.
        words = " ".join(sorted(names_in(statement, 0)))
        return CatalogChanges(
            functions=tuple(
                FunctionMade(made, "internal", words) for made in strings(statement.defnames)[-1:]
            )
        )
    if name == "CreateTrigStmt":
        return CatalogChanges(triggers=(statement.relation.relname,))
    if name in _HARMLESS:
        return NOTHING
    if name == "DoStmt" and _DEFINING.isdisjoint(_WORD.findall(" ".join(names_in(statement, 0)).lower())):
        return NOTHING
    defines = name in ("DoStmt", "CallStmt", "LoadStmt", "ImportForeignSchemaStmt")
    unseen = defines or name in ("CreateEventTrigStmt", "AlterEventTrigStmt", "CreateExtensionStmt")
    return CatalogChanges(
        anything=defines or name.startswith(("Create", "Alter")), triggers=("",) if unseen else ()
    )


def _temporary(relation: Any) -> bool:
    return bool(relation.relpersistence == "t" or relation.schemaname == "pg_temp")


def _function(statement: Any) -> FunctionMade:
    name = (strings(statement.funcname) or [""])[-1]
    options = {unwrap(option).defname: unwrap(unwrap(option).arg) for option in statement.options}
    body, language = options.get("as"), options.get("language")
    if body is None or language is None or statement.HasField("sql_body"):
        return FunctionMade(name)
    return FunctionMade(name, language.sval.lower(), "".join(strings(body.items)[:1]))


def _parents(statement: Any) -> list[str]:
    """Tables that show the rows of the one that is altered from now on."""
    found = [unwrap(getattr(unwrap(command), "def")) for command in statement.cmds]
    return [part.relname for part in found if part.DESCRIPTOR.name == "RangeVar"]


def _renamed(statement: Any, name: str) -> CatalogChanges:
    if not statement.relation.relname:
        # A function, a type, a schema under another name.
        return CatalogChanges(anything=True)
    names = [statement.relation.relname]
    if name == "RenameStmt":
        names.append(statement.newname)
    return CatalogChanges(redefined=tuple(names))
