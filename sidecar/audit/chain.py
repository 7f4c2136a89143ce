"""The hash chain of a stream: hash_n = SHA-256(hash_{n-1} || stored bytes of record n)."""

from __future__ import annotations

import hashlib

HASH_BYTES = 32


def genesis(host_key: bytes, stream: str, boot_id: str) -> bytes:
    """hash_0: binds the host's public key (32 bytes, raw), the stream and the boot."""
    return hashlib.sha256(
        b"sidecar stream v1\0" + host_key + b"\0" + stream.encode() + b"\0" + boot_id.encode()
    ).digest()


def link(previous: bytes, stored: bytes) -> bytes:
    """The hash after one more record."""
    return hashlib.sha256(previous + stored).digest()
