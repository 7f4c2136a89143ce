"""One stream as its supervisor holds it: its segments and signature files, up to where they are on disk, verified and signed.

The worker chains; here the chain is computed again from the bytes in the file, so that nothing is signed that does not hold, and only
what the disk has taken. After a failed fdatasync(2) the kernel takes the pages for clean, and the next call succeeds although they never
reached the disk: what is not signed yet is then written again, and counts only once that has been synced.
"""

from __future__ import annotations

import bisect
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.audit import chain
from sidecar.audit.batch import Header
from sidecar.audit.check import check_frames
from sidecar.audit.hostkey import HostKey
from sidecar.audit.segment import (
    FRAME,
    MAX_RECORD_BYTES,
    SegmentHeader,
    append_durably,
    append_whole,
    entry_bytes,
    header_bytes,
    segment_path,
    signature_path,
)
from sidecar.errors import AuditError

READ_BYTES: Final = 4 * 1024 * 1024
"""Records under one signature, at most; a single longer record has one of its own."""

MAX_MARKS: Final = 4096
"""Signed positions that are remembered to tell shipped bytes from others; coarser beyond."""


@dataclass(slots=True)
class Segment:
    """`offset`: up to where it is on disk, verified and signed. `fd` is the writer's end, -1 where there is none any more.
    `doubtful`: a sync has failed, or may have failed unseen: what follows `offset` has to be written again."""

    number: int
    path: Path
    fd: int
    reader: int
    signatures: int
    offset: int
    doubtful: bool = False

    def close(self) -> None:
        for descriptor in (self.fd, self.reader, self.signatures):
            if descriptor >= 0:
                os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a signature stands: the next record's sequence, segment and offset."""

    seq: int
    segment: int
    offset: int


class OpenStream:
    """`head` is the chain's hash after record `seq - 1`, both signed."""

    def __init__(
        self, directory: Path, key: HostKey, *, host: str, boot: str, name: str, label: str, lock: int
    ) -> None:
        self.directory = directory
        self.host = host
        self.boot = boot
        self.name = name
        self.label = label
        self.lock = lock
        self.head = chain.genesis(key.public, name, boot)
        self.seq = 0
        self.segments: list[Segment] = []
        self.next_number = 0
        self.broken = ""
        """Why nothing more of it is signed: it holds what its worker must not write."""
        self.ending: str | None = None
        self.sync_failures = 0
        """How often the disk did not take what was to be synced."""
        self._key = key
        self._marks: list[Mark] = []

    def add_segment(self) -> Segment:
        """A new file with its signature file, on disk. Raises AuditError or OSError; then nothing is left of it."""
        number = self.next_number
        path = segment_path(self.directory, self.name, number)
        header = SegmentHeader(self.name, self.host, self.boot, self._key.public, number, self.label)
        data = header_bytes(header, self._key.sign(header.encode()))
        create = os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        opened: list[int] = []
        try:
            opened.append(os.open(path, os.O_WRONLY | create, 0o600))
            append_whole(opened[0], data)
            os.fsync(opened[0])
            opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            opened.append(os.open(signature_path(path), os.O_RDWR | create, 0o600))
            sync_directory(self.directory)
        except (OSError, AuditError):
            for descriptor in opened:
                os.close(descriptor)
            if opened:
                path.unlink(missing_ok=True)
            if len(opened) == 3:
                signature_path(path).unlink(missing_ok=True)
            raise
        self.next_number += 1
        segment = Segment(number, path, opened[0], opened[1], opened[2], len(data))
        self.segments.append(segment)
        return segment

    def adopt(self, segment: Segment) -> None:
        """A segment that is there already (recovery)."""
        self.segments.append(segment)
        self.next_number = segment.number + 1

    def advance(self) -> None:
        """Bring what was written up to now to disk, verify and sign it; what is written meanwhile is the next call's, so that
        commits stay groups. Raises OSError or AuditError where the disk does not take it; sets `broken` where the chain does not
        hold."""
        upto = self._synced()
        while not self.broken:
            segment = self.segments[0]
            if upto > segment.offset and self._sign_next(segment, upto):
                continue
            if len(self.segments) == 1 or self.broken:
                return
            following = self.segments[1]
            if os.fstat(following.reader).st_size <= following.offset:
                return
            upto = self._synced()  # written between the look at its size and the writer's change to the next
            if upto > segment.offset and self._sign_next(segment, upto):
                continue
            segment.close()
            self.segments.pop(0)
            upto = self._synced()

    def _synced(self) -> int:
        """The size of the first segment, all of which is on disk."""
        segment = self.segments[0]
        size = os.fstat(segment.reader).st_size
        if size > segment.offset:
            if segment.doubtful:
                self._write_again(segment, size)
            try:
                os.fdatasync(segment.reader)
            except OSError:
                segment.doubtful = True
                self.sync_failures += 1
                raise
        return size

    def _write_again(self, segment: Segment, size: int) -> None:
        """What is not signed, as it is read: dirty again, it goes to the disk with the next sync. Where it cannot be read as it was
        written, it does not follow the chain, and is not signed."""
        descriptor = os.open(segment.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            position = segment.offset
            while position < size:
                data = os.pread(segment.reader, min(READ_BYTES, size - position), position)
                if not data:
                    break
                position += os.pwrite(descriptor, data, position)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        segment.doubtful = False

    def _sign_next(self, segment: Segment, upto: int) -> bool:
        """Verify and sign the next whole frames before `upto`. False where there are none."""
        left = upto - segment.offset
        data = _read(segment, min(READ_BYTES, left))
        if len(data) >= FRAME.size:
            length = FRAME.unpack_from(data)[0]
            if length > MAX_RECORD_BYTES:
                self.broken = f"record {self.seq} of stream {self.name} has an impossible length"
                return False
            if len(data) < FRAME.size + length <= left:
                data = _read(segment, FRAME.size + length)
        head, count, consumed, holds = check_frames(data, self.head)
        seq = self.seq + count
        if not holds:
            self.broken = f"record {seq} of stream {self.name} does not follow the chain"
            if self.sync_failures:
                self.broken += "; the disk had failed to take records"
        if not consumed:
            return False
        self._sign(segment, seq, head, "")
        segment.offset += consumed
        self.head, self.seq = head, seq
        self._remember(Mark(seq, segment.number, segment.offset))
        return True

    def _sign(self, segment: Segment, seq: int, head: bytes, end: str) -> None:
        """Records from `self.seq` up to before `seq`; on disk when it returns, and not in the file where it raises."""
        header = Header(
            self.host, self.name, self.boot, self.seq, seq - 1, self.head, head, time.time_ns(), end
        ).encode()
        try:
            append_durably(segment.signatures, entry_bytes(header, self._key.sign(header)))
        except OSError:
            self.sync_failures += 1
            raise

    def _remember(self, mark: Mark) -> None:
        self._marks.append(mark)
        if len(self._marks) > MAX_MARKS:
            del self._marks[::2]

    def end(self, reason: str) -> int:
        """Sign what is there, cut off a torn tail (its bytes are returned) and sign the end. The stream must have no writer
        any more. Raises OSError or AuditError where the disk does not take it; call again."""
        self.advance()
        torn = 0
        last = self.segments[-1]
        if not self.broken:
            torn = os.fstat(last.reader).st_size - last.offset
            if torn:
                os.truncate(last.path, last.offset)
        note = f"; {self.broken}" if self.broken else f"; torn_tail of {torn} bytes cut off" if torn else ""
        self._sign(last, self.seq, self.head, reason + note)
        return torn

    def close_files(self) -> None:
        for segment in self.segments:
            segment.close()
        os.close(self.lock)

    def unshipped_bytes(self, receipted: int, sizes: Mapping[int, int]) -> int:
        """Bytes after record `receipted`; `sizes` are those of the stream's segments on disk, by their number."""
        position = bisect.bisect_right(self._marks, receipted + 1, key=lambda mark: mark.seq)
        mark = self._marks[position - 1] if position else Mark(0, -1, 0)
        return sum(size for number, size in sizes.items() if number > mark.segment) + max(
            sizes.get(mark.segment, 0) - mark.offset, 0
        )


def _read(segment: Segment, size: int) -> bytearray:
    """At most `size` bytes from where the segment is not signed yet."""
    data = bytearray(size)
    del data[os.preadv(segment.reader, [data], segment.offset) :]
    return data


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
