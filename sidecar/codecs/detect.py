"""What a flow's first bytes are."""

from __future__ import annotations

import struct
from typing import Final

from sidecar.codecs.postgres import messages

DETECT_MAX_BYTES: Final = 4096
METHODS: Final = (
    b"GET",
    b"HEAD",
    b"POST",
    b"PUT",
    b"DELETE",
    b"CONNECT",
    b"OPTIONS",
    b"TRACE",
    b"PATCH",
    b"PROPFIND",
    b"REPORT",
    b"MKCOL",
    b"COPY",
    b"MOVE",
    b"LOCK",
    b"UNLOCK",
    b"PROPPATCH",
    b"SEARCH",
    b"PURGE",
    b"QUERY",
)
HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_POSTGRES_CODES: Final = (messages.SSL_REQUEST, messages.GSSENC_REQUEST, messages.CANCEL_REQUEST)


def detect(data: bytes) -> str | None:
    """`postgres`, `http`, `tls`, `http2` or `opaque`; None while more bytes are needed."""
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
    word, space, _ = data.partition(b" ")
    if space:
        return "http" if word in METHODS else "opaque"
    if any(method.startswith(word) for method in METHODS):
        return None
    return "opaque"
