"""What is taken out of a request's head before it is judged, so that neither hop is told something that we do not stand for."""

from __future__ import annotations

import re
from typing import Final

from sidecar.codecs.http1 import Head, Headers

EVADING_UPGRADES: Final = (b"h2c", b"tls/")
"""HTTP/2 in plain text (RFC 7540 section 3.2) and TLS (RFC 2817): the same requests in a form that is not inspected here. A server
answers without the upgrade, as RFC 9110 section 7.8 has it."""


_FOLDED: Final = re.compile(r"[^a-z0-9]")


def is_reserved(name: bytes, reserved: str | None) -> bool:
    """Whether only we may set this field. Also in spellings that servers fold into it: CGI turns `-` into `_`, and some servers all
    that is neither letter nor digit."""
    if not reserved:
        return False
    return _FOLDED.sub("-", name.decode("latin-1").lower()) == _FOLDED.sub("-", reserved.lower())


def without_reserved(fields: Headers, reserved: str | None) -> Headers:
    return [(key, value) for key, value in fields if not is_reserved(key, reserved)]


def clean(head: Head, reserved: str | None) -> None:
    """Remove fields that only we may set, upgrades that would hide what follows, and what `Connection` says of either: a client that
    names a field there has the next proxy remove it."""
    head.headers = without_reserved(head.headers, reserved)
    dropped: set[bytes] = {word for word in head.words(b"connection") if is_reserved(word, reserved)}
    upgrades = head.words(b"upgrade")
    kept = [word for word in upgrades if not word.startswith(EVADING_UPGRADES)]
    if len(kept) != len(upgrades):
        head.without(b"upgrade", b"http2-settings")
        dropped.add(b"http2-settings")
        if kept:
            head.headers.append((b"Upgrade", b", ".join(kept)))
        else:
            dropped.add(b"upgrade")
    if dropped:
        words = [word for word in head.words(b"connection") if word not in dropped]
        head.without(b"connection")
        if words:
            head.headers.append((b"Connection", b", ".join(words)))
