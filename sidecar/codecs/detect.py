"""What a flow's first bytes are.

HTTP is recognised as leniently as servers read it (empty lines before the request, any method, any white space): what looks like a
request to a server must reach the HTTP session, which judges it strictly, and never be relayed unseen as something else.
"""

from __future__ import annotations

import re
import struct
from typing import Final

from sidecar.codecs.postgres import messages

DETECT_MAX_BYTES: Final = 4096
METHODS: Final = frozenset(
    b"GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH PROPFIND REPORT MKCOL COPY MOVE LOCK UNLOCK PROPPATCH"
    b" SEARCH PURGE QUERY".split()
)
HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_POSTGRES_CODES: Final = (messages.SSL_REQUEST, messages.GSSENC_REQUEST, messages.CANCEL_REQUEST)
_BLANK: Final = b" \t\r\n"
_WORD: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TARGET: Final = re.compile(rb"[ \t]+(?:/|\*[ \t]|[A-Za-z][A-Za-z0-9+.\-]*://)")
_BINARY: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def detect(data: bytes) -> str | None:
    """`postgres`, `http`, `tls`, `http2` or `opaque`; None while more bytes are needed, which is never so from `DETECT_MAX_BYTES` on.
    `data` is not empty."""
    if data[0] == 0x16:
        if len(data) < 3:
            return None
        return "tls" if data[1] == 3 and data[2] <= 4 else "opaque"
    if data[0] == 0:
        if len(data) < 8:
            return None
        length, code = struct.unpack_from("!Ii", data)
        is_postgres = 8 <= length <= 10_000 and (code in _POSTGRES_CODES or code >> 16 == 3)
        return "postgres" if is_postgres else "opaque"
    if HTTP2_PREFACE.startswith(data[: len(HTTP2_PREFACE)]):
        return "http2" if len(data) >= len(HTTP2_PREFACE) else None
    return _text(data.lstrip(_BLANK), full=len(data) >= DETECT_MAX_BYTES)


def _text(text: bytes, *, full: bool) -> str | None:
    """A line that names HTTP, or a method and what can be its target, is HTTP. `full`: so is a long line that may become one."""
    if not text:
        return "http" if full else None
    word = _WORD.match(text)
    if word is None:
        return "opaque"
    line, newline, _ = text.partition(b"\n")
    binary = _BINARY.search(line)
    if b"HTTP/" in line[: binary.start() if binary else None].upper():
        return "http"
    if word[0].upper() in METHODS and _TARGET.match(text, word.end()):
        return "http"
    if newline or binary:
        return "opaque"
    if full:
        return "http" if text[word.end() : word.end() + 1] in (b" ", b"\t") else "opaque"
    return None


def may_become_known(data: bytes) -> bool:
    """Whether these bytes, of which `detect` makes nothing yet, may be the beginning of a protocol that is inspected, in the form that its
    clients send: then the rest is worth waiting for, however slowly it comes."""
    if data[0] in (0, 0x16):
        return True
    text = data.lstrip(_BLANK).upper()
    word, space, _ = text.partition(b" ")
    return (
        word in METHODS
        or HTTP2_PREFACE.startswith(text)
        or (not space and any(method.startswith(word) for method in METHODS))
    )
