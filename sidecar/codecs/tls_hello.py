"""The server name in a TLS ClientHello (RFC 8446 section 4.1.2, RFC 6066 section 3). Reads, never answers."""

from __future__ import annotations

import re
from typing import Final

HANDSHAKE: Final = 0x16
"""What every TLS connection begins with: a handshake record."""
HELLO_MAX_BYTES: Final = 16_384 + 5
_HOST: Final = re.compile(rb"[A-Za-z0-9._-]{1,255}")
"""What may stand in a record, a log and a rule's view of the target."""


def server_name(data: bytes) -> str | None:
    """The SNI host name, lower case; None where there is none or the hello is not whole or malformed."""
    try:
        if data[0] != HANDSHAKE or data[5] != 1:
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
                name = body[5 : 5 + int.from_bytes(body[3:5])]
                return name.decode("ascii").lower() if _HOST.fullmatch(name) else None
            offset += 4 + size
    except IndexError:
        return None
    return None
