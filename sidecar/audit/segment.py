"""The files of the spool, their formats and names. Reading them; `audit.writer` writes frames, `audit.spool` the rest.

    segment     `SCS1` | u32 length | msgpack {stream, host, boot, key, segment, label} | 64 bytes signature | frame…
    frame       u32 length | 32 bytes hash after this record | record
    signatures  (u32 length | 64 bytes signature | header)…      one file a segment, and the ledger
All integers are little-endian. See docs/audit.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgpack

from sidecar.audit import chain
from sidecar.errors import AuditError, ConfigurationError, PrerequisiteError

MAGIC: Final = b"SCS1"
FRAME: Final = struct.Struct("<I32s")
LENGTH: Final = struct.Struct("<I")
MAX_RECORD_BYTES: Final = 64 * 1024 * 1024
MAX_ENTRY_BYTES: Final = 65_536
"""Of one signed header or ledger entry; ours are below 2 KiB."""
SIGNATURE_BYTES: Final = 64

STREAM_SUFFIXES: Final = (".seg", ".sig", ".lock", ".receipt", ".refused")
"""Of the files of a stream."""

LOCK_ATTEMPTS: Final = 3
MAKE_LOCK_ATTEMPTS: Final = 100
"""For the lock of a stream that is being made: nobody holds that for long."""
LOCK_PAUSE_S: Final = 0.02


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


def read_frames(file: BinaryIO, offset: int, size: int | None = None) -> Iterator[tuple[int, bytes, bytes]]:
    """As `frames`, from a file that may be larger than memory, or grow: only its first `size` bytes are looked at, where that is
    given. Nothing else may seek in it meanwhile."""
    file.seek(offset)
    while len(start := file.read(FRAME.size)) == FRAME.size:
        length, digest = FRAME.unpack(start)
        if length > MAX_RECORD_BYTES or (size is not None and offset + FRAME.size + length > size):
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


def read_entries(file: BinaryIO, size: int) -> Iterator[tuple[int, bytes, bytes]]:
    """As `entries`, of the first `size` bytes of a file that may be larger than memory, or grow."""
    offset = 0
    while len(start := file.read(LENGTH.size)) == LENGTH.size:
        (length,) = LENGTH.unpack(start)
        if length > MAX_ENTRY_BYTES:
            raise AuditError("a signature file is damaged")
        after = offset + LENGTH.size + SIGNATURE_BYTES + length
        rest = file.read(SIGNATURE_BYTES + length) if after <= size else b""
        if len(rest) != SIGNATURE_BYTES + length:
            return
        offset = after
        yield offset, rest[SIGNATURE_BYTES:], rest[:SIGNATURE_BYTES]


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


def append_durably(descriptor: int, data: bytes) -> None:
    """As `append_whole`, and on disk. What a failed sync leaves in doubt is taken out again: it is written anew."""
    size = os.fstat(descriptor).st_size
    append_whole(descriptor, data)
    try:
        os.fdatasync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


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
    """Those that are there, oldest first."""
    start = f"{stream}."
    names = (name for name in os.listdir(directory) if name.startswith(start) and name.endswith(".seg"))
    return sorted(directory / name for name in names if name[len(start)].isdigit())


def all_segments(directory: Path, names: Iterable[str]) -> dict[str, list[Path]]:
    """The segments of each stream, oldest first, among the `names` of a directory's files; streams oldest first."""
    found: dict[str, list[Path]] = {}
    for name in sorted(names):
        if name.endswith(".seg"):
            found.setdefault(name.split(".")[0], []).append(directory / name)
    return found


def sizes_newest_first(paths: Sequence[Path]) -> list[tuple[Path, int]]:
    """The files that are there, in their given order (oldest first), with sizes up to which they may be read beside a live
    instance: the newest is looked at first, so that no file lacks what was written before its writer went on in the next."""
    found = []
    for path in reversed(paths):
        with contextlib.suppress(FileNotFoundError):  # retention removed it
            found.append((path, path.stat().st_size))
    return found[::-1]


def segment_number(path: Path) -> int:
    """Raises AuditError for a name that is none of ours."""
    try:
        return int(path.name.split(".")[1])
    except (IndexError, ValueError) as error:
        raise AuditError(f"{path.name} is no segment") from error


def list_directory(directory: Path) -> list[str]:
    """Names of the files of an audit directory. Raises AuditError where there is none, ConfigurationError where it is something
    else, PrerequisiteError where this user may not read it."""
    try:
        return os.listdir(directory)
    except FileNotFoundError as error:
        raise AuditError(
            f"there is no audit directory {directory}", hint="name one with --directory"
        ) from error
    except NotADirectoryError as error:
        raise ConfigurationError(
            f"{directory} is a file, no audit directory", hint="name the directory that holds it"
        ) from error
    except PermissionError as error:
        raise not_readable(error, directory) from error


def not_readable(error: PermissionError, directory: Path) -> PrerequisiteError:
    return PrerequisiteError(
        f"{error.filename or directory} may not be read by this user: {error.strerror}",
        hint="run it as root, or as the directory's owner",
    )


def stream_names(directory: Path) -> list[str]:
    """All streams that have any file, oldest first (their names are UUIDv7)."""
    return sorted(
        {name.split(".")[0] for name in list_directory(directory) if name.endswith(STREAM_SUFFIXES)}
    )


def open_lock(directory: Path, stream: str, *, create: bool = False) -> int | None:
    """The stream's lock file, exclusively locked; None where another instance holds it or it is gone.

    Readers hold it shared for an instant, to see whether the stream lives, and a starting instance may lock and remove the file
    of a stream that another one is making: so it is tried again, and a file that is not at its path any more is not held.
    """
    path = lock_path(directory, stream)
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    for _ in range(MAKE_LOCK_ATTEMPTS if create else LOCK_ATTEMPTS):
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            time.sleep(LOCK_PAUSE_S)
            continue
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


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
