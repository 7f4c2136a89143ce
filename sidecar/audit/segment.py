"""The files of the spool, their formats and names. Reading them; `audit.writer` writes frames, `audit.spool` the rest.

    segment     `SCS1` | u32 length | msgpack {stream, host, boot, key, segment, label} | 64 bytes signature | frame…
    frame       u32 length | 32 bytes hash after this record | record
    signatures  (u32 length | 64 bytes signature | header)…      one file a segment, and the ledger
All integers are little-endian. See docs/audit.md.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgpack

from sidecar.audit import chain
from sidecar.errors import AuditError

MAGIC: Final = b"SCS1"
FRAME: Final = struct.Struct("<I32s")
LENGTH: Final = struct.Struct("<I")
MAX_RECORD_BYTES: Final = 64 * 1024 * 1024
MAX_ENTRY_BYTES: Final = 65_536
"""Of one signed header or ledger entry; ours are below 2 KiB."""
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
        body = bytes(data[8 : 8 + length])
        signature = bytes(data[8 + length : 8 + length + SIGNATURE_BYTES])
        if len(body) != length or len(signature) != SIGNATURE_BYTES:
            raise ValueError("length")
        found: Any = msgpack.unpackb(body, raw=False)
        header = SegmentHeader(**found)
        texts = (header.stream, header.host, header.boot, header.label)
        if not all(isinstance(text, str) for text in texts) or not isinstance(header.segment, int):
            raise ValueError("types")
        if not isinstance(header.key, bytes):
            raise ValueError("key")
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


def read_frames(file: BinaryIO, offset: int) -> Iterator[tuple[int, bytes, bytes]]:
    """As `frames`, from a file that may be larger than memory, or grow. Nothing else may seek in it meanwhile."""
    file.seek(offset)
    while len(start := file.read(FRAME.size)) == FRAME.size:
        length, digest = FRAME.unpack(start)
        if length > MAX_RECORD_BYTES:
            return
        record = file.read(length)
        if len(record) != length:
            return
        offset += FRAME.size + length
        yield offset, digest, record


def entries(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(offset after it, body, signature) of each whole entry; stops before an incomplete one.
    Raises AuditError for a length that none can have."""
    offset, end = 0, len(data)
    while offset + 4 <= end:
        (length,) = LENGTH.unpack_from(data, offset)
        start = offset + 4 + SIGNATURE_BYTES
        if length > MAX_ENTRY_BYTES:
            raise AuditError("a signature file is damaged")
        if start + length > end:
            return
        signature = data[offset + 4 : start]
        offset = start + length
        yield offset, data[start:offset], signature


def whole_entries(data: bytes, *, torn_tail: bool = False) -> Iterator[tuple[bytes, bytes]]:
    """(body, signature) of each entry. Raises AuditError where the file is damaged, or ends inside an entry and
    `torn_tail` does not allow that."""
    offset = 0
    for after, body, signature in entries(data):
        offset = after
        yield body, signature
    if offset != len(data) and not torn_tail:
        raise AuditError("a signature file ends inside an entry")


def entry_bytes(body: bytes, signature: bytes) -> bytes:
    return LENGTH.pack(len(body)) + signature + body


def append_whole(descriptor: int, data: bytes) -> None:
    """Write all of `data` at the end, or leave the file as it was and raise OSError or AuditError."""
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, data)
    except OSError:
        os.ftruncate(descriptor, size)
        raise
    if written != len(data):
        os.ftruncate(descriptor, size)
        raise AuditError("the spool is full", hint="free space in audit.directory")


# -- names


def segment_path(directory: Path, stream: str, number: int) -> Path:
    return directory / f"{stream}.{number:06d}.seg"


def signature_path(segment: Path) -> Path:
    """The signature file of a segment."""
    return segment.with_suffix(".sig")


def lock_path(directory: Path, stream: str) -> Path:
    """Locked by the instance whose stream it is; gone once the stream has ended."""
    return directory / f"{stream}.lock"


def receipt_path(directory: Path, stream: str) -> Path:
    """The collector's newest receipt."""
    return directory / f"{stream}.receipt"


def refusal_path(directory: Path, stream: str) -> Path:
    """The collector's signed word that it cannot take the stream as we hold it."""
    return directory / f"{stream}.refused"


def segment_paths(directory: Path, stream: str) -> list[Path]:
    return sorted(directory.glob(f"{stream}.[0-9]*.seg"))


def segment_number(path: Path) -> int:
    """Raises AuditError for a name that is none of ours."""
    try:
        return int(path.name.split(".")[1])
    except (IndexError, ValueError) as error:
        raise AuditError(f"{path.name} is no segment") from error


def stream_names(directory: Path) -> list[str]:
    """All streams that have any file, oldest first (their names are UUIDv7)."""
    suffixes = (".seg", ".sig", ".lock", ".receipt", ".refused")
    return sorted({name.split(".")[0] for name in os.listdir(directory) if name.endswith(suffixes)})


def open_lock(directory: Path, stream: str, *, create: bool = False) -> int | None:
    """The stream's lock file, exclusively locked; None where another instance holds it or it is gone."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        descriptor = os.open(lock_path(directory, stream), flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def is_live(directory: Path, stream: str) -> bool:
    """Whether an instance holds the stream at this moment."""
    try:
        descriptor = os.open(lock_path(directory, stream), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def start_of(header: SegmentHeader) -> bytes:
    return chain.genesis(header.key, header.stream, header.boot)
