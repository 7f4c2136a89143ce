"""What an SQL text does, from its syntax tree (postgast: libpg_query, the server's own grammar).

`analyse` is a pure function of the text. What the tree cannot show (a DO block's body, CALL) makes the text `opaque`: selectors on it
are then unknown, and deny, approve and mask rules fire on unknown. The parser is sql_parser's, the lexer sql_secrets'.
"""

from __future__ import annotations

import re
from typing import Any, Final

import postgast

from sidecar.model.verdict import SyntaxIssue
from sidecar.policy.lineage import trace
from sidecar.policy.lineage_values import Work
from sidecar.policy.reach import UNKNOWN, Flows, Relations
from sidecar.policy.sql_changes import changes_of
from sidecar.policy.sql_facts import SECRET, Analysis, Table, together
from sidecar.policy.sql_names import names_of
from sidecar.policy.sql_parser import normalise, parse
from sidecar.policy.sql_secrets import find_passwords, literal_span, may_hold_secrets, string_spans
from sidecar.policy.sql_tree import TooDeep, unwrap
from sidecar.policy.sql_vocabulary import STATEMENT_KINDS
from sidecar.policy.sql_walker import Walker

_PARAMETER: Final = re.compile(r"\$\d+")
_CONSTANT: Final = re.compile(r"'|(?<![\w$])\d")


def constants_differ_only(text: str) -> bool:
    """Whether `normalise` takes every number and every string out of a text. It leaves those of `ORDER BY 2` and `GROUP BY 1`, which
    are columns, and of type modifiers: texts that differ in such ones are different statements."""
    shape = normalise(text)
    return shape is not None and _CONSTANT.search(_PARAMETER.sub("", shape)) is None


def analyse(text: str) -> Analysis:
    """Never raises: what the grammar rejects comes back as `error`."""
    found = Analysis()
    if "\0" in text:
        found.error = SyntaxIssue("invalid byte sequence: NUL", 0)
        return found
    try:
        tree = parse(text)
    except TooDeep:
        found.too_deep = True
        return found
    except postgast.PgQueryError as error:
        if "stack depth" in str(error.message):
            found.too_deep = True
            return found
        found.error = SyntaxIssue(str(error.message), int(error.cursorpos or 0))
        return found
    except (UnicodeEncodeError, ValueError, RecursionError) as error:
        found.unjudged = f"it cannot be parsed ({type(error).__name__})"
        return found
    encoded = text.encode()
    parts = [
        _analyse_one(unwrap(raw.stmt), encoded[raw.stmt_location :][: raw.stmt_len or len(encoded)])
        for raw in tree.stmts
    ]
    found = parts[0] if len(parts) == 1 else together(parts)
    found.size = len(text)
    if may_hold_secrets(text) or found.secret_options:
        find_passwords(text, found)
    for column, offset in found.bound_literals:
        if SECRET.search(column) and (span := literal_span(encoded, offset)):
            found.password_spans.append(span)
            found.constant_sensitive = True
    return found


def _analyse_one(statement: Any, text: bytes) -> Analysis:
    found = Analysis(tree=statement, changes=changes_of(statement), names=names_of(statement, text))
    # Texts that differ in a literal are remembered, and recorded, each as it is.
    found.constant_sensitive = any(use.act not in ("deallocate", "close", "fetch") for use in found.names)
    try:
        Walker(found).statement(statement)
    except (TooDeep, RecursionError):
        found.too_deep = True
    return found


def flows(text: str, relations: Relations, *, executed: bool = False) -> list[Flows]:
    """The lineage of every statement in a text that was judged before. `executed`: a PREPARE or DECLARE as what it names. FETCH and
    EXECUTE return what others say, and have no outputs here."""
    try:
        tree = parse(text)
    except (postgast.PgQueryError, TooDeep, ValueError, RecursionError):
        return [UNKNOWN]
    work = Work(len(text))
    return [trace(unwrap(raw.stmt), relations, executed=executed, work=work) for raw in tree.stmts]


__all__ = [
    "STATEMENT_KINDS",
    "Analysis",
    "Table",
    "analyse",
    "constants_differ_only",
    "flows",
    "literal_span",
    "may_hold_secrets",
    "normalise",
    "string_spans",
]
