"""Texts to trees, by libpg_query (postgast), and what protects this process from texts that nest without end.

libpg_query turns its tree into protobuf by recursion, on the thread's stack and without a bound: 50,000 terms of `1+1+…` end the process.
The grammar's own stack (10,000) bounds what nests to the right, not what grows to the left. So a long text's tokens are counted first:
an upper bound of its levels, from what separates siblings.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, Final

import postgast
from google.protobuf.internal import api_implementation
from google.protobuf.message import DecodeError

from sidecar.policy.sql_tree import TooDeep

COUNTED_FROM: Final = 16_384
"""Characters. A level takes at least two, so that a shorter text has no more levels than LEVELS_MAX."""
LEVELS_MAX: Final = 8_192
"""Twice as many pass on a stack of 8 MiB."""

Token: Final = importlib.import_module("postgast.pg_query_pb2").Token  # its stubs are not valid Python
RUNS_MAX: Final = 16 * 1024 * 1024
"""Where `/*/*/*…` opens comments in comments, the lexer reads the rest of the operator characters anew at each: so many at most."""

_OPERATORS: Final = re.compile(r"[~!@#^&|`?+\-*/%<>=]{2048,}")
_COMMA, _SEMICOLON = ord(","), ord(";")
_OPENS: Final = frozenset({ord("("), ord("["), Token.Value("CASE")})
_CLOSES: Final = frozenset({ord(")"), ord("]"), Token.Value("END_P")})
_COMMENTS: Final = frozenset({Token.Value("SQL_COMMENT"), Token.Value("C_COMMENT")})
_CHAINS: Final = frozenset(Token.Value(name) for name in ("UNION", "INTERSECT", "EXCEPT", "JOIN"))
"""Grow to the left over commas and conditions."""
_BRANCHES: Final = frozenset(Token.Value(name) for name in ("WHEN", "THEN", "ELSE"))
_CASE, _AND, _OR, _BETWEEN = (Token.Value(name) for name in ("CASE", "AND", "OR", "BETWEEN"))

if api_implementation._c_module is not None:
    # Its own limit is 100 levels, two of which are one of SQL's: `a || b || …` of 48 terms would not be read.
    api_implementation._c_module.SetAllowOversizeProtos(True)


def parse(text: str) -> Any:
    """The tree. Raises postgast.PgQueryError for what the grammar rejects, TooDeep, and ValueError for what is no text."""
    _check(text)
    try:
        return postgast.parse(text)
    except DecodeError as error:
        raise TooDeep from error


def normalise(text: str) -> str | None:
    """The text with its constants replaced by $n; None where it cannot be parsed. For shape caching."""
    try:
        _check(text)
        return str(postgast.normalize(text))
    except (postgast.PgQueryError, TooDeep, ValueError):
        return None


def _check(text: str) -> None:
    for run in _OPERATORS.finditer(text):
        if text.count("/*", run.start(), run.end()) * len(run[0]) > RUNS_MAX:
            raise TooDeep
    if len(text) >= COUNTED_FROM and levels(text) > LEVELS_MAX:
        raise TooDeep


class _Level:
    """Between a parenthesis, bracket or CASE and its end."""

    __slots__ = ("between", "chain", "deepest", "inner", "is_case", "tokens")

    def __init__(self, is_case: bool) -> None:
        self.is_case = is_case
        self.between = False
        self.tokens = 0
        """Of the part at hand: an item of a list, a term of AND, a branch of CASE."""
        self.inner = 0
        """The deepest of what was opened and closed in this part."""
        self.deepest = 0
        """Of the parts before."""
        self.chain = 0

    def next_part(self) -> None:
        self.deepest = max(self.deepest, self.tokens + self.inner)
        self.tokens = self.inner = 0
        self.between = False

    def levels(self) -> int:
        self.next_part()
        return self.deepest + self.chain + 3  # AND in OR, and the level itself


def levels(text: str) -> int:
    """At least as many as the tree has, and for what people write not many more. Never raises: what the lexer rejects has none."""
    try:
        tokens = postgast.scan(text).tokens
    except (postgast.PgQueryError, ValueError):
        return 0
    stack = [_Level(False)]
    most = 0
    for item in tokens:
        token, level = item.token, stack[-1]
        if token in (_COMMA, _OR) or (token in _BRANCHES and level.is_case):
            level.next_part()
        elif token in _OPENS:
            level.tokens += 1
            stack.append(_Level(token == _CASE))
        elif token in _CLOSES and len(stack) > 1:
            stack.pop()
            stack[-1].inner = max(stack[-1].inner, level.levels())
        elif token == _AND and not level.between:
            level.next_part()
        elif token == _SEMICOLON:
            most = max(most, _folded(stack))
            stack = [_Level(False)]
        elif token not in _COMMENTS:
            level.tokens += 1
            level.chain += token in _CHAINS
            level.between = token == _BETWEEN or (level.between and token != _AND)
    return max(most, _folded(stack))


def _folded(stack: list[_Level]) -> int:
    inner = 0
    for level in reversed(stack):
        level.inner = max(level.inner, inner)
        inner = level.levels()
    return inner
