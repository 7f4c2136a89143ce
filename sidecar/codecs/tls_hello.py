"""The server name in a TLS ClientHello (RFC 8446 section 4.1.2, RFC 6066 section 3). Reads, never answers."""

from __future__ import annotations

HELLO_MAX_BYTES = 16_384 + 5


def server_name(data: bytes) -> str | None:
    """The SNI host name, lower case; None where there is none or the hello is not whole or malformed."""
    try:
        if data[0] != 0x16 or data[5] != 1:
            return None
        offset = 5 + 4 + 2 + 32
        offset += 1 + data[offset]
        offset += 2 + int.from_bytes(data[offset : offset + 2])
        offset += 1 + data[offset]
        end = offset + 2 + int.from_bytes(data[offset : offset + 2])
        offset += 2
        while offset + 4 <= min(end, len(data)):
            kind = int.from_bytes(data[offset : offset + 2])
            size = int.from_bytes(data[offset + 2 : offset + 4])
            body = data[offset + 4 : offset + 4 + size]
            if kind == 0 and len(body) == size and size > 5 and body[2] == 0:
                length = int.from_bytes(body[3:5])
                return body[5 : 5 + length].decode("ascii").lower()
            offset += 4 + size
    except (IndexError, UnicodeDecodeError):
        return None
    return None
