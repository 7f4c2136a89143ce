"""The names that a statement gives to others, and those it uses: PREPARE and EXECUTE, DECLARE and FETCH. Pure; reads one tree."""

from __future__ import annotations

from typing import Any, Final

from sidecar.model.verdict import NameUse
from sidecar.policy.sql_tree import unwrap

NAMED_TEXT_MAX_BYTES: Final = 16_384
"""Longer statements are not remembered under their names: what they return is then masked as far as anything may be."""
RETURNS_NAMED: Final = frozenset({"fetch", "execute", "run"})
"""Acts that answer with what the named statement says."""
_HOLD: Final = 0x0020
"""CURSOR_OPT_HOLD (parsenodes.h)."""
_DISCARD_ALL: Final = 0


def names_of(statement: Any, text: bytes) -> tuple[NameUse, ...]:
    """`text`: the statement's own, without its neighbours'."""
    name = statement.DESCRIPTOR.name
    kept = text.decode("utf-8", "replace") if len(text) <= NAMED_TEXT_MAX_BYTES else None
    if name == "PrepareStmt":
        return (NameUse("prepare", statement.name, kept),)
    if name == "DeclareCursorStmt":
        return (NameUse("declare", statement.portalname, kept, lasting=bool(statement.options & _HOLD)),)
    if name == "DeallocateStmt":
        return (NameUse("deallocate", statement.name or None),)
    if name == "ClosePortalStmt":
        return (NameUse("close", statement.portalname or None),)
    if name == "DiscardStmt":
        everything = int(statement.target) == _DISCARD_ALL
        return (NameUse("deallocate", None), NameUse("close", None)) if everything else ()
    if name == "FetchStmt":
        return (NameUse("fetch", statement.portalname),)
    if name in ("ExplainStmt", "CreateTableAsStmt"):
        query = unwrap(statement.query)
        return (NameUse("run", query.name),) if query.DESCRIPTOR.name == "ExecuteStmt" else ()
    if name == "ExecuteStmt":
        return (NameUse("execute", statement.name),)
    return ()
