"""A request's body as the JSON that rules ask for. What a server could read otherwise than we do is unknown, never absent."""

from __future__ import annotations

import json
from typing import Any, Final

from sidecar.codecs.http1 import Head

_MARKS: Final = b"\xef\xbb\xbf\xfe\xff\0 \t\r\n"
"""Byte order marks, the zeros of UTF-16 and white space, which may stand before JSON."""


class _Ambiguous(ValueError):
    """Readers differ: a name twice, or a number that JSON does not have."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Ambiguous("a name stands twice in an object")
    return found


def _constant(name: str) -> None:
    raise _Ambiguous(name)


def request_json(head: Head, body: bytes) -> tuple[bool, object | None]:
    """(known, document). Known and None: it is no JSON. Whatever the content type says: servers differ in whether they look at it."""
    if not body:
        return True, None
    if head.words(b"content-encoding") not in ([], [b"identity"]):
        return False, None
    try:
        return True, json.loads(body.decode(), object_pairs_hook=_pairs, parse_constant=_constant)
    except (ValueError, RecursionError):
        declared = b"json" in (head.get(b"content-type") or b"").lower()
        return not (declared or body.lstrip(_MARKS)[:1] in (b"{", b"[")), None
