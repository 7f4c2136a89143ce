"""Errors and notices of statements that touch masked columns: what could quote a value is withheld. No I/O.

`SELECT ssn::int` is answered with `invalid input syntax for type integer: "123-45-6789"`, a violated constraint with the row that
violates it. SQLSTATE, severity, position and the names of objects stay: clients decide by them.
"""

from __future__ import annotations

import re
from typing import Final

WITHHELD: Final = "[withheld: it could show a masked column]"
_QUOTED: Final = re.compile(r"""["'«„“‹`].*["'»“”›`]""", re.DOTALL)
"""From the first quotation mark to the last: a value may hold some itself. Servers translate them."""
_NUMBER: Final = re.compile(r"\d+")
_FREE_TEXT: Final = ("00", "01", "02", "P0", "F0", "HV", "38", "39", "XX", "2F")
"""Classes whose message is whatever a function, a trigger or a foreign server says."""
_QUIET: Final = ("24", "25", "26", "2B", "2D", "34", "3B", "40", "57")
"""Say nothing that could be a value: states of cursors and transactions, serialization, interruption. Every other class may quote
one (`ssn::regclass` is an undefined table, `chr(salary)` a limit exceeded)."""
_ROWS: Final = ("23", "44")
"""Violated constraints: the message names them, the detail shows the row."""
_MAY_QUOTE: Final = ("D", "H", "W", "q", "p")
"""Detail, hint, context, and an internal query with its position."""


def scrubbed(values: dict[str, str]) -> dict[str, str] | None:
    """The fields of an ErrorResponse or NoticeResponse without what could quote a value. None: nothing could."""
    code = values.get("C", "XX000")
    state = code[:2]
    # A position in the text itself, not in a value that was read as one: the statement is wrong, and nothing was read yet.
    if state in _QUIET or code == "42501" or (state == "42" and "P" in values and "W" not in values):
        return None
    shown = {field: text for field, text in values.items() if field not in _MAY_QUOTE}
    if state in _FREE_TEXT:
        shown["M"] = WITHHELD
    elif state not in _ROWS:
        shown["M"] = _NUMBER.sub("#", _QUOTED.sub('"[masked]"', values.get("M", "")))
    if "D" in values:
        shown["D"] = WITHHELD
    return shown
