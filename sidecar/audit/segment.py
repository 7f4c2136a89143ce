"""The files of the spool: segments (records) and signature files (batch headers). Reading them; StreamWriter writes segments.

    segment    `SCS1` | u32 length | msgpack {stream, host, boot, key, segment, label} | 64 bytes signature | frame…
    frame      u32 length | 32 bytes hash after this record | record
    signatures u32 length | 64 bytes signature | header
All integers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgpack

from sidecar.audit import chain
from sidecar.errors import AuditError

MAGIC: Final = b"SCS1"
FRAME: Final = struct.Struct("<I32s")
LENGTH: Final = struct.Struct("<I")
MAX_RECORD_BYTES: Final = 64 * 1024 * 1024
SIGNATURE_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    stream: str
    host: str
    boot: str
    key: bytes
    segment: int
    label: str

    def encode(self) -> bytes:
        return bytes(msgpack.packb({name: getattr(self, name) for name in self.__slots__}))


def header_bytes(header: SegmentHeader, signature: bytes) -> bytes:
    body = header.encode()
    return MAGIC + LENGTH.pack(len(body)) + body + signature


def read_header(data: bytes) -> tuple[SegmentHeader, bytes, bytes, int]:
    """(header, signed bytes, signature, offset of the first frame). Raises AuditError."""
    try:
        if data[:4] != MAGIC:
            raise ValueError("magic")
        (length,) = LENGTH.unpack_from(data, 4)
        body = data[8 : 8 + length]
        signature = data[8 + length : 8 + length + SIGNATURE_BYTES]
        if len(body) != length or len(signature) != SIGNATURE_BYTES:
            raise ValueError("length")
        found: Any = msgpack.unpackb(body, raw=False)
        header = SegmentHeader(**found)
    except (ValueError, TypeError, struct.error, msgpack.UnpackException) as error:
        raise AuditError("a segment's header is damaged") from error
    return header, body, signature, 8 + length + SIGNATURE_BYTES


def frames(data: bytes | memoryview, offset: int) -> Iterator[tuple[int, bytes, bytes]]:
    """(offset after it, hash, record) of each whole frame from `offset`; stops before an incomplete one."""
    end = len(data)
    while offset + FRAME.size <= end:
        length, digest = FRAME.unpack_from(data, offset)
        start = offset + FRAME.size
        if length > MAX_RECORD_BYTES or start + length > end:
            return
        offset = start + length
        yield offset, digest, bytes(data[start:offset])


def signatures(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(header, signature) of each entry. Raises AuditError where the file ends inside one or is damaged."""
    offset = 0
    while offset < len(data):
        if offset + 4 > len(data):
            raise AuditError("the signature file is cut")
        (length,) = LENGTH.unpack_from(data, offset)
        start = offset + 4 + SIGNATURE_BYTES
        if length > 65_536 or start + length > len(data):
            raise AuditError("the signature file is cut or damaged")
        yield data[start : start + length], data[offset + 4 : start]
        offset = start + length


def signature_entry(header: bytes, signature: bytes) -> bytes:
    return LENGTH.pack(len(header)) + signature + header


def segment_paths(directory: Path, stream: str) -> list[Path]:
    return sorted(directory.glob(f"{stream}.[0-9]*.seg"))


def stream_names(directory: Path) -> list[str]:
    """All streams that have segments or signatures."""
    names = {path.name.split(".")[0] for pattern in ("*.seg", "*.sig") for path in directory.glob(pattern)}
    return sorted(names)


def start_of(header: SegmentHeader) -> bytes:
    return chain.genesis(header.key, header.stream, header.boot)
