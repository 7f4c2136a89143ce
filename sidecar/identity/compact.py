"""The compact form of a signed JWT, taken apart and believed in nothing. Source: RFC 7515, section 7.1."""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any, Final

from sidecar.errors import IdentityError

MAX_TOKEN_BYTES: Final = 65_536
_COMPACT: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")


def peek(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and claims of a compact JWS, *unverified*. Raises IdentityError: `malformed`,
    `critical_header`."""
    if not _COMPACT.fullmatch(text):
        raise IdentityError("the token is no JWT: not three parts of base64url", reason="malformed")
    header_part, claims_part, _ = text.split(".")
    header, claims = _json_object(header_part, "header"), _json_object(claims_part, "claims")
    if "crit" in header or header.get("b64", True) is not True:
        raise IdentityError("the token demands an extension that is not understood", reason="critical_header")
    return header, claims


def _json_object(part: str, what: str) -> dict[str, Any]:
    """Strict: no name twice (two readers could see two tokens), no NaN."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice")
        return found

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is no number")

    try:
        raw = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (binascii.Error, ValueError, RecursionError) as error:
        raise IdentityError(f"the token's {what} cannot be read", reason="malformed") from error
    if not isinstance(found, dict):
        raise IdentityError(f"the token's {what} is no object", reason="malformed")
    return found
