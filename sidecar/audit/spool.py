"""The disk queue. A worker appends and chains through `StreamWriter`; the supervisor's `Spool` opens, verifies, signs, closes.

Durability: a record is in the file when `append` returns, and on disk within one `commit` (called every 50 ms). Crashes: a
stream whose supervisor is gone is closed by the next one that opens the directory; a torn last frame is cut off and named.
Several instances may share a directory: each holds a lock on its own streams' signature files.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgpack

from sidecar.audit import chain, hostkey
from sidecar.audit.batch import MAX_BATCH_BYTES, Batch, Header
from sidecar.audit.encode import encode_record
from sidecar.audit.segment import (
    FRAME,
    SegmentHeader,
    frames,
    header_bytes,
    read_header,
    segment_paths,
    signature_entry,
    signatures,
    start_of,
    stream_names,
)
from sidecar.errors import AuditError
from sidecar.model.ids import IdSource
from sidecar.model.record import RECORD_VERSION, EncodedRecord, Record

SEGMENT_BYTES: Final = 64 * 1024 * 1024
READ_BYTES: Final = 4 * 1024 * 1024
USAGE_INTERVAL_S: Final = 1.0
MAX_DONE_IDS: Final = 100_000

_sha256 = hashlib.sha256
_pack = FRAME.pack
_write = os.write


def place_of(host: str, stream: str) -> bytes:
    """Where in its chain an encoded record stands, up to the sequence's value: what goes between its two parts."""
    return b"".join(bytes(msgpack.packb(item)) for item in ("host", host, "stream", stream, "seq"))


class StreamWriter:
    """A worker's end of its stream: one O_APPEND descriptor. Not thread-safe."""

    __slots__ = ("_done", "_head", "_place", "_rest", "_seq", "_written", "fd", "full", "host", "stream")

    def __init__(self, fd: int, *, stream: str, host: str, head: bytes, next_seq: int) -> None:
        self.fd = fd
        self.stream = stream
        self.host = host
        self.full = False
        self._head = head
        self._seq = next_seq
        self._place = place_of(host, stream)
        self._written = os.fstat(fd).st_size
        self._rest = b""
        self._done: set[str] = set()

    def append(self, record: Record | EncodedRecord) -> None:
        """Raises AuditError where the file cannot take it; call again later with the same record."""
        if self._rest or self._done:
            self.append_many([record])
            return
        data = self._encode(record, self._seq)
        head = _sha256(self._head + data).digest()
        frame = _pack(len(data), head) + data
        try:
            written = _write(self.fd, frame)
        except OSError as error:
            raise self._failure(error) from error
        self._head = head
        self._seq += 1
        self._written += written
        if written != len(frame):
            self._cut(frame[written:], [record])
        if self._written >= SEGMENT_BYTES:
            self.full = True

    def _encode(self, record: Record | EncodedRecord, seq: int) -> bytes:
        if type(record) is EncodedRecord:
            return b"%b%b\xcf%b%b" % (record.front, self._place, seq.to_bytes(8, "big"), record.rest)
        assert type(record) is Record
        record.v = RECORD_VERSION
        record.host = self.host
        record.stream = self.stream
        record.seq = seq
        return encode_record(record)

    def append_many(self, records: list[Record | EncodedRecord]) -> None:
        """All or none, with one write. Raises AuditError as `append`."""
        if self._rest:
            self._finish_rest()
        if self._done:
            pending = [record for record in records if record.id not in self._done]
            self._done.difference_update(record.id for record in records)
            records = pending
            if not records:
                return
        head, seq = self._head, self._seq
        parts = bytearray()
        for record in records:
            data = self._encode(record, seq)
            head = _sha256(head + data).digest()
            parts += _pack(len(data), head)
            parts += data
            seq += 1
        try:
            written = _write(self.fd, parts)
        except OSError as error:
            raise self._failure(error) from error
        self._head, self._seq = head, seq
        self._written += written
        if written != len(parts):
            self._cut(bytes(parts[written:]), records)
        if self._written >= SEGMENT_BYTES:
            self.full = True

    def switch(self, fd: int) -> int:
        """Go on in a new segment; returns the old descriptor, for the caller to close."""
        if self._rest:
            self._finish_rest()
        old, self.fd = self.fd, fd
        self._written = os.fstat(fd).st_size
        self.full = False
        return old

    def _cut(self, rest: bytes, records: list[Record | EncodedRecord]) -> None:
        """The file took a part: the records count as written once the rest follows, and are not written again."""
        self._rest = rest
        self._done.update(record.id for record in records)
        if len(self._done) > MAX_DONE_IDS:
            self._done.clear()
        raise AuditError("the spool took only a part of a record; the rest follows when there is room")

    def _finish_rest(self) -> None:
        try:
            written = _write(self.fd, self._rest)
        except OSError as error:
            raise self._failure(error) from error
        self._written += written
        self._rest = self._rest[written:]
        if self._rest:
            raise AuditError("the spool is full")

    @staticmethod
    def _failure(error: OSError) -> AuditError:
        hint = "free space in audit.directory" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        return AuditError(f"a record cannot be written: {error.strerror}", hint=hint)


@dataclass(frozen=True, slots=True)
class StreamHandle:
    """What a worker needs; `fd` stays owned by the spool."""

    stream: str
    fd: int
    head: bytes
    next_seq: int


@dataclass(frozen=True, slots=True)
class SpoolState:
    ok: bool
    blocked_reason: str | None
    used_bytes: int
    unshipped_bytes: int


@dataclass(slots=True)
class _Segment:
    path: Path
    fd: int
    offset: int


@dataclass(slots=True)
class _Stream:
    """A live stream as the supervisor has verified it: `head` after record `seq - 1`."""

    name: str
    label: str
    lock: int
    head: bytes
    seq: int = 0
    number: int = 0
    segments: list[_Segment] = field(default_factory=list)


class Spool:
    """The supervisor's side. All methods belong to one thread."""

    def __init__(self, directory: Path, host: str, *, max_bytes: int, on_full: str = "block") -> None:
        self.directory = directory
        self.host = host
        self._max_bytes = max_bytes
        self._on_full = on_full
        self._ids = IdSource()
        self._streams: dict[str, _Stream] = {}
        self._failure: str | None = None
        self._used = 0
        self._measured = 0.0
        self.recovered: list[str] = []
        """What opening found of dead instances, in words."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
        except OSError as error:
            raise AuditError(f"the audit directory {directory} cannot be used: {error.strerror}") from error
        self.host_key = hostkey.load_or_create(directory)
        self.boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._recover()
        self._measure()

    # -- streams

    def open_stream(self, label: str) -> StreamHandle:
        name = self._ids.new(time.time_ns())
        lock = self._lock(name)
        assert lock is not None
        stream = _Stream(name, label, lock, chain.genesis(self.host_key.public, name, self.boot_id))
        self._streams[name] = stream
        return StreamHandle(name, self._new_segment(stream).fd, stream.head, 0)

    def rotate(self, name: str) -> StreamHandle:
        """A new segment of the same chain. The writer goes on from its own head and sequence."""
        stream = self._streams[name]
        segment = self._new_segment(stream)
        return StreamHandle(name, segment.fd, stream.head, stream.seq)

    def _new_segment(self, stream: _Stream) -> _Segment:
        path = self.directory / f"{stream.name}.{stream.number:06d}.seg"
        header = SegmentHeader(
            stream.name, self.host, self.boot_id, self.host_key.public, stream.number, stream.label
        )
        data = header_bytes(header, self.host_key.sign(header.encode()))
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            if os.write(fd, data) != len(data):
                os.close(fd)
                raise AuditError("the spool is full", hint="free space in audit.directory")
            os.fsync(fd)
        except OSError as error:
            raise AuditError(f"no segment can be made in {self.directory}: {error.strerror}") from error
        self._sync_directory()
        stream.number += 1
        segment = _Segment(path, fd, len(data))
        stream.segments.append(segment)
        return segment

    def close_stream(self, name: str, reason: str) -> None:
        """Sign what is there and the end. A torn last frame is cut off; it is named in the end's reason."""
        stream = self._streams.pop(name, None)
        if stream is None:
            return
        self._advance(stream)
        torn = 0
        if stream.segments:
            last = stream.segments[-1]
            torn = os.fstat(last.fd).st_size - last.offset
            if torn:
                os.ftruncate(last.fd, last.offset)
        self._sign(
            stream, stream.seq, stream.head, reason + (f"; torn_tail of {torn} bytes cut off" if torn else "")
        )
        for segment in stream.segments:
            os.close(segment.fd)
        os.close(stream.lock)

    def close(self) -> None:
        """End all streams."""
        for name in list(self._streams):
            self.close_stream(name, "stopped")

    # -- group commit

    def commit(self) -> None:
        """Bring everything written so far to disk, verify it and sign it. Raises AuditError where a chain does not hold: a
        worker wrote what it must not."""
        failure = None
        for stream in list(self._streams.values()):
            try:
                self._advance(stream)
            except OSError as error:
                failure = f"{self.directory}: {error.strerror}"
        if time.monotonic() - self._measured > USAGE_INTERVAL_S:
            self._measure()
            failure = failure or self._probe()
        self._failure = failure

    def _advance(self, stream: _Stream) -> None:
        """What was written up to now; what is written meanwhile is the next commit's, so that commits stay groups."""
        upto = os.fstat(stream.segments[0].fd).st_size
        if upto > stream.segments[0].offset:
            os.fdatasync(stream.segments[0].fd)
        while True:
            segment = stream.segments[0]
            if upto > segment.offset and self._read(stream, segment):
                continue
            if len(stream.segments) == 1:
                return
            following = stream.segments[1]
            if os.fstat(following.fd).st_size <= following.offset:
                return
            if self._read(stream, segment):
                continue
            os.close(segment.fd)
            stream.segments.pop(0)

    def _read(self, stream: _Stream, segment: _Segment) -> bool:
        """Verify and sign the next whole frames. False where there are none."""
        size = min(READ_BYTES, max(os.fstat(segment.fd).st_size - segment.offset, 0))
        data = os.pread(segment.fd, size, segment.offset)
        if len(data) >= FRAME.size:
            needed = FRAME.size + FRAME.unpack_from(data)[0]
            if needed > len(data):
                data = os.pread(segment.fd, needed, segment.offset)
        previous, first = stream.head, stream.seq
        consumed = 0
        head, seq = previous, first
        for end, digest, record in frames(data, 0):
            head = chain.link(head, record)
            if head != digest:
                raise AuditError(f"stream {stream.name}: record {seq} does not follow the chain")
            seq += 1
            consumed = end
        if not consumed:
            return False
        segment.offset += consumed
        stream.head, stream.seq = head, seq
        self._sign(stream, first, previous, "")
        return True

    def _sign(self, stream: _Stream, first: int, previous: bytes, end: str) -> None:
        header = Header(
            self.host,
            stream.name,
            self.boot_id,
            first,
            stream.seq - 1,
            previous,
            stream.head,
            time.time_ns(),
            end,
        ).encode()
        os.write(stream.lock, signature_entry(header, self.host_key.sign(header)))
        os.fdatasync(stream.lock)

    # -- state

    def state(self) -> SpoolState:
        reason = self._failure
        if reason is None and self._used >= self._max_bytes and self._on_full == "block":
            reason = f"{self.directory} holds {self._used} bytes, audit.max_bytes is {self._max_bytes}"
        return SpoolState(reason is None, reason, self._used, self._used)

    def _measure(self) -> None:
        self._measured = time.monotonic()
        used = 0
        for path in self.directory.glob("*.s[ei]g"):
            try:
                used += path.stat().st_size
            except OSError:
                continue
        self._used = used

    def _probe(self) -> str | None:
        """Whether the directory still takes a file: records fail late, this says so early."""
        path = self.directory / f".probe-{os.getpid()}"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, b"\0" * 4096)
            finally:
                os.close(descriptor)
                os.unlink(path)
        except OSError as error:
            return f"{self.directory} cannot be written: {error.strerror}"
        return None

    # -- shipping

    def batch(self, stream: str, after_seq: int) -> tuple[Batch, int] | None:
        """The first signed batch of `stream` that holds a record after `after_seq`, or its end; and its last sequence."""
        path = self.directory / f"{stream}.sig"
        for header_data, signature in signatures(path.read_bytes()):
            header = Header.decode(header_data)
            if header.last > after_seq:
                records = self._records(stream, header.first, header.last)
                return Batch(header_data, signature, self.host_key.public, records), header.last
        return None

    def _records(self, stream: str, first: int, last: int) -> tuple[bytes, ...]:
        found: list[bytes] = []
        seq = 0
        for path in segment_paths(self.directory, stream):
            data = path.read_bytes()
            *_, offset = read_header(data)
            for _, _, record in frames(data, offset):
                if first <= seq <= last:
                    found.append(record)
                seq += 1
                if seq > last:
                    return tuple(found)
        return tuple(found)

    # -- recovery

    def _lock(self, name: str) -> int | None:
        """An exclusive lock on the stream's signature file; None where another instance lives."""
        descriptor = os.open(
            self.directory / f"{name}.sig", os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def _recover(self) -> None:
        for name in stream_names(self.directory):
            lock = self._lock(name)
            if lock is None:
                continue
            try:
                self._recover_stream(name, lock)
            except AuditError as error:
                self.recovered.append(f"stream {name} is damaged and was left as it is: {error.message}")
            finally:
                os.close(lock)

    def _recover_stream(self, name: str, lock: int) -> None:
        """Sign the end of a stream whose supervisor died."""
        data = os.pread(lock, os.fstat(lock).st_size, 0)
        last: Header | None = None
        for header_data, signature in signatures(data):
            if not hostkey.verify(self.host_key.public, signature, header_data):
                raise AuditError("a signature does not hold")
            last = Header.decode(header_data)
        if last is not None and last.end:
            return
        stream: _Stream | None = None
        for path in segment_paths(self.directory, name):
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            raw = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            try:
                header, body, signature, offset = read_header(raw)
                if not hostkey.verify(self.host_key.public, signature, body):
                    raise AuditError("a segment's header is not signed by this host")
            except AuditError:
                os.close(descriptor)
                raise
            if stream is None:
                stream = _Stream(name, header.label, os.dup(lock), start_of(header))
                self.boot_id, own_boot = header.boot, self.boot_id
            stream.segments.append(_Segment(path, descriptor, offset))
        if stream is None:
            return
        try:
            self._streams[name] = stream
            self._skip_signed(stream, last)
            self.close_stream(name, "recovered after a crash")
            self.recovered.append(f"stream {name} was closed: its supervisor had died")
        finally:
            self._streams.pop(name, None)
            self.boot_id = own_boot

    def _skip_signed(self, stream: _Stream, last: Header | None) -> None:
        """Move to where the last signature stands, verifying on the way."""
        if last is None:
            return
        while stream.seq <= last.last:
            segment = stream.segments[0]
            data = os.pread(segment.fd, os.fstat(segment.fd).st_size, 0)
            moved = False
            for end, digest, record in frames(data, segment.offset):
                if stream.seq > last.last:
                    break
                stream.head = chain.link(stream.head, record)
                if stream.head != digest:
                    raise AuditError(f"record {stream.seq} does not follow the chain")
                stream.seq += 1
                segment.offset = end
                moved = True
            if stream.seq <= last.last and len(stream.segments) > 1:
                os.close(segment.fd)
                stream.segments.pop(0)
            elif stream.seq <= last.last and not moved:
                raise AuditError(f"record {stream.seq} is missing, although it was signed")
        if stream.head != last.head:
            raise AuditError("the records do not lead to the signed head")

    def _sync_directory(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


__all__ = ["MAX_BATCH_BYTES", "Spool", "SpoolState", "StreamHandle", "StreamWriter"]
