"""A worker's end of its stream: frames are encoded, chained and written here, on the path of every statement.

Owns one append-only descriptor. Never syncs, signs or opens files: that is the supervisor's (`audit.spool`).
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgpack

from sidecar.audit.encode import encode_record
from sidecar.audit.segment import FRAME
from sidecar.errors import AuditError
from sidecar.model.record import RECORD_VERSION, EncodedRecord, Record

if TYPE_CHECKING:
    from sidecar.audit._tail import Tail
else:
    try:
        from sidecar.audit._tail import Tail
    except ImportError:  # not compiled

        class Tail:
            def __init__(self, fd, head, seq, written, place):
                self.fd, self.head, self.seq, self.written, self.place = fd, head, seq, written, place
                self.clean, self.cut, self.cut_ids = True, b"", []

            def put(self, records):
                return False


SEGMENT_BYTES: Final = 64 * 1024 * 1024
"""From this size on the writer asks for another segment (`full`)."""
MIN_SEGMENT_BYTES: Final = 256 * 1024
SEGMENT_SHARE: Final = 16
"""Segments are smaller where `audit.max_bytes` is: only whole ones can be let go."""

MAX_DONE_IDS: Final = 100_000
"""Records that went into the file with a short write and were not yet appended again by their caller."""

_sha256 = hashlib.sha256
_pack = FRAME.pack
_write = os.write


def segment_bytes(max_bytes: int) -> int:
    """The size of segments in a spool of `max_bytes`."""
    return max(MIN_SEGMENT_BYTES, min(SEGMENT_BYTES, max_bytes // SEGMENT_SHARE))


def place_of(host: str, stream: str) -> bytes:
    """Where in its chain an encoded record stands, up to the sequence's value: what goes between its two parts."""
    return b"".join(bytes(msgpack.packb(item)) for item in ("host", host, "stream", stream, "seq"))


class StreamWriter(Tail):
    """A worker's end of its stream: one O_APPEND descriptor. Not thread-safe."""

    def __init__(
        self,
        fd: int,
        *,
        stream: str,
        host: str,
        head: bytes,
        next_seq: int,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self.place_bytes = place_of(host, stream)
        super().__init__(fd, head, next_seq, os.fstat(fd).st_size, self.place_bytes)
        self.stream = stream
        self.host = host
        self.segment_bytes = segment_bytes
        self._rest = b""
        self._done: set[str] = set()

    @property
    def full(self) -> bool:
        return self.written >= self.segment_bytes

    def append(self, record: Record | EncodedRecord) -> None:
        """Raises AuditError where the file cannot take it; call again later with the same record."""
        self.append_many([record])

    def append_many(self, records: Sequence[Record | EncodedRecord]) -> None:
        """All or none, with one write. Raises AuditError as `append`."""
        if not self.clean:
            self._finish_rest()
            pending = [record for record in records if record.id not in self._done]
            self._done.difference_update(record.id for record in records)
            self.clean = not self._done
            records = pending
            if not records:
                return
        head, seq = self.head, self.seq
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
        self.head, self.seq = head, seq
        self.written += written
        if written != len(parts):
            self._cut(bytes(parts[written:]), [record.id for record in records])
            raise AuditError("the spool took only a part of a record; the rest follows when there is room")

    def abandon(self, records: Sequence[Record | EncodedRecord]) -> int:
        """The caller will not append these again after a failure. Returns how many of them are lost: not counted are those of
        which the file took a part, whose rest follows."""
        lost = sum(record.id not in self._done for record in records)
        self._done.difference_update(record.id for record in records)
        return lost

    def switch(self, fd: int) -> int:
        """Go on in a new segment; returns the old descriptor, for the caller to close. Raises AuditError while the old one does
        not take the rest of a record; nothing has changed then."""
        if not self.clean:
            self._finish_rest()
        old, self.fd = self.fd, fd
        self.written = os.fstat(fd).st_size
        return old

    def _encode(self, record: Record | EncodedRecord, seq: int) -> bytes:
        if isinstance(record, EncodedRecord):
            return b"%b%b\xcf%b%b" % (record.front, self.place_bytes, seq.to_bytes(8, "big"), record.rest)
        record.v = RECORD_VERSION
        record.host = self.host
        record.stream = self.stream
        record.seq = seq
        return encode_record(record)

    def _cut(self, rest: bytes, ids: list[str]) -> None:
        """The file took a part: the records count as written once the rest follows, and are not written again."""
        self.clean = False
        self._rest = rest
        if len(self._done) + len(ids) > MAX_DONE_IDS:
            self._done.clear()
        self._done.update(ids)

    def _finish_rest(self) -> None:
        if self.cut:
            self._cut(self.cut, self.cut_ids)
            self.cut = b""
        if not self._rest:
            return
        try:
            written = _write(self.fd, self._rest)
        except OSError as error:
            raise self._failure(error) from error
        self.written += written
        self._rest = self._rest[written:]
        if self._rest:
            raise AuditError("the spool is full")

    @staticmethod
    def _failure(error: OSError) -> AuditError:
        hint = "free space in audit.directory" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        return AuditError(f"a record cannot be written: {error.strerror}", hint=hint)
