"""Where secrets and values stand in a text: passwords, by the server's own lexer, and the span of a constant."""

from __future__ import annotations

import re
from typing import Final

import postgast

from sidecar.policy.sql_facts import Analysis

_SECRET_WORD: Final = re.compile(
    r"(?i)passw|pwd|secret|connection|conninfo|://|token|api_?key|private_?key|credential|crypt|hmac|dblink|program"
)
_SECRET_KEYWORDS: Final = frozenset(
    {b"password", b"passwd", b"pwd", b"secret", b"connection", b"primary_conninfo"}
)
_SECRET_IN_LITERAL: Final = re.compile(
    rb"(?i)passw|pwd|secret|://[^/@:\s]*:[^/@\s]*@|authorization|bearer\s|api_?key|(?:-u|--user)[\s=]*\S+:\S"
)
_LITERAL_TOKENS: Final = frozenset({"SCONST", "USCONST", "BCONST", "XCONST"})
_COMMENT_TOKENS: Final = frozenset({"SQL_COMMENT", "C_COMMENT"})


def may_hold_secrets(text: str) -> bool:
    """A word that goes before a secret stands anywhere in the text, literals and comments included."""
    return _SECRET_WORD.search(text) is not None


def find_passwords(text: str, found: Analysis) -> None:
    """By the server's own lexer, so that comments, dollar quotes and escapes cannot hide a literal: the literal after a word
    such as PASSWORD, any literal that itself speaks of one, and every option of a user mapping or foreign server."""
    raw = text.encode("utf-8", "surrogateescape")
    all_literals = found.secret_options
    before = b""
    for token in postgast.scan(text).tokens:
        kind = token.DESCRIPTOR.fields_by_name["token"].enum_type.values_by_number[token.token].name
        if kind in _COMMENT_TOKENS:
            if _SECRET_IN_LITERAL.search(raw, token.start, token.end):
                found.password_spans.append((token.start, token.end))
                found.constant_sensitive = True
            continue
        word = raw[token.start : token.end]
        if kind in _LITERAL_TOKENS and (
            all_literals or before in _SECRET_KEYWORDS or _SECRET_IN_LITERAL.search(word)
        ):
            found.password_spans.append((token.start, token.end))
            found.constant_sensitive = True
        if word != b"=" and kind != "TYPECAST":
            before = word.strip(b'"').lower()


def string_spans(text: str) -> list[tuple[int, int]]:
    """Of every string in a text that can be parsed."""
    spans = []
    for token in postgast.scan(text).tokens:
        kind = token.DESCRIPTOR.fields_by_name["token"].enum_type.values_by_number[token.token].name
        if kind in _LITERAL_TOKENS:
            spans.append((token.start, token.end))
    return spans


def literal_span(raw: bytes, start: int) -> tuple[int, int] | None:
    """[start, end) of the constant at byte offset `start`."""
    match = re.compile(
        rb"[eE]'(?:[^'\\]|''|\\.)*'|(?:[bBxXnN]|[uU]&)?'(?:[^']|'')*'|\$([a-zA-Z_]\w*)?\$.*?\$\1\$|[-+]?[\w.]+",
        re.DOTALL,
    ).match(raw, start)
    return match.span() if match else None
