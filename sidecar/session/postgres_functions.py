"""The users' own functions and operators: which of them cannot read a masked column, as far as their bodies say. No I/O.

A function reads what its body names: a table, a view, another function. So one whose body names none that shows a masked column, makes
no statement out of a string and fetches from no cursor of somebody else's is clean. Any other language than SQL and PL/pgSQL, and any
body that is not at hand, may read anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from sidecar.policy.sql_vocabulary import TABLE_BY_NAME

BODY_MAX_CHARS: Final = 65_536
"""The snapshot does not bring longer ones."""
_WORD: Final = re.compile(r"[\w$]+")
_READ_ANYTHING: Final = frozenset(
    {"execute", "fetch", "move", "copy", "pg_stats", "pg_stats_ext", "pg_stats_ext_exprs", "pg_statistic",
     "pg_statistic_ext_data", "pg_toast", "pg_largeobject", *TABLE_BY_NAME}
)  # fmt: skip
"""Words of bodies that may read what they do not name."""
_READABLE: Final = frozenset({"sql", "plpgsql"})


class Functions:
    def __init__(self) -> None:
        self._bodies: dict[str, list[tuple[frozenset[str], str] | None]] = {}

    def add(self, name: str, language: str, body: str) -> None:
        """One of this name; several may share it. Of the language `internal`, the body is the name of PostgreSQL's own."""
        lowered = body.lower()
        words = frozenset(_WORD.findall(lowered))
        known = language == "internal" or (
            language in _READABLE and bool(body.strip()) and "u&" not in lowered
        )
        clean = known and words.isdisjoint(_READ_ANYTHING)
        self._bodies.setdefault(name, []).append((words, lowered) if clean else None)

    def reading(self, relations: Iterable[str]) -> frozenset[str]:
        """The functions that may read one of these relations, or that nothing is known of."""
        found = {name for name, bodies in self._bodies.items() if None in bodies}
        sought = {name.lower() for name in relations}
        while True:
            sought |= {name.lower() for name in found}
            more = {
                name
                for name, bodies in self._bodies.items()
                if name not in found and any(body is None or _names(*body, sought) for body in bodies)
            }
            if not more:
                return frozenset(found)
            found |= more

    def is_known(self, name: str) -> bool:
        return name in self._bodies

    @staticmethod
    def code_reads(code: str, names: Iterable[str]) -> bool:
        """Whether a DO block may read one of these relations, or call one of these functions."""
        lowered = code.lower()
        words = frozenset(_WORD.findall(lowered))
        sought = {name.lower() for name in names}
        return "u&" in lowered or not words.isdisjoint(_READ_ANYTHING) or _names(words, lowered, sought)

    @staticmethod
    def names(code: str, names: Iterable[str]) -> bool:
        """Whether code names one of these."""
        lowered = code.lower()
        return _names(frozenset(_WORD.findall(lowered)), lowered, {name.lower() for name in names})


def _names(words: frozenset[str], body: str, sought: set[str]) -> bool:
    """Whether a body names one of `sought`: as a word, or, where that is no word, anywhere in it."""
    return not words.isdisjoint(sought) or any(
        name in body for name in sought if _WORD.fullmatch(name) is None
    )
