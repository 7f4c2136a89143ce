"""What is to be shipped of a stream: signed records, read in order, joined into batches of bounded size under a new signature of
the same host over the same chain. Reads the spool's files only; belongs to the shipper's thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final

from sidecar.audit.batch import MAX_BATCH_BYTES, MAX_RECORDS, Batch, Header
from sidecar.audit.hostkey import HostKey
from sidecar.audit.segment import (
    LENGTH,
    MAX_ENTRY_BYTES,
    SIGNATURE_BYTES,
    read_frames,
    read_header,
    segment_number,
    segment_paths,
    signature_path,
)
from sidecar.errors import AuditError

TARGET_BYTES: Final = 1024 * 1024
"""Of records in a batch; a commit that is larger by itself is one batch (at most about READ_BYTES of audit.stream)."""
TARGET_RECORDS: Final = 5_000


@dataclass(slots=True)
class _Position:
    """In one segment: where the next header and the next frame stand."""

    number: int
    signatures: int
    frames: int


class Outbox:
    """One stream's unshipped part. `next` after `taken` gives the batch after that."""

    def __init__(self, directory: Path, stream: str, key: HostKey, *, after_seq: int) -> None:
        self._directory = directory
        self._stream = stream
        self._key = key
        self._after = after_seq
        self._position: _Position | None = None
        self._following: _Position | None = None
        self.ended = False
        """The stream's end was taken."""

    def next(self) -> tuple[Batch, Header] | None:
        """The next batch, None where nothing more is signed. Raises AuditError where the files do not hold, OSError."""
        self._following = None
        while True:
            position = self._position or self._first()
            if position is None:
                return None
            try:
                joined, records, position = self._join(position)
            except FileNotFoundError:  # retention removed what was shipped
                joined, records = None, []
            if joined is not None:
                self._following = position
                return Batch.sign(joined, self._key, tuple(records)), joined
            following = self._segment_after(position.number)
            if following is None:
                self._position = position
                return None
            self._position = following

    def taken(self, header: Header) -> None:
        """The collector has the batch that `next` gave."""
        assert self._following is not None
        self._position, self._following = self._following, None
        self._after = header.last
        self.ended = bool(header.end)

    def _first(self) -> _Position | None:
        """The beginning of the oldest segment there is; what is shipped already is passed over."""
        for path in segment_paths(self._directory, self._stream):
            return self._at(path)
        return None

    def _segment_after(self, number: int) -> _Position | None:
        for path in segment_paths(self._directory, self._stream):
            if segment_number(path) > number:
                return self._at(path)
        return None

    def _at(self, path: Path) -> _Position:
        with path.open("rb") as file:
            *_, offset = read_header(file.read(MAX_ENTRY_BYTES))
        return _Position(segment_number(path), 0, offset)

    def _join(self, position: _Position) -> tuple[Header | None, list[bytes], _Position]:
        """Headers of one segment joined from `position`, their records, and where that ends."""
        path = self._directory / f"{self._stream}.{position.number:06d}.seg"
        joined: Header | None = None
        records: list[bytes] = []
        size = 0
        signatures, offset = position.signatures, position.frames
        with path.open("rb") as segment, signature_path(path).open("rb") as file:
            while size < TARGET_BYTES and len(records) < TARGET_RECORDS:
                header, after = _read_entry(file, signatures)
                if header is None:
                    break
                found, end, size_found = _read_frames(segment, offset, header.last - header.first + 1)
                if header.last > self._after or (header.end and header.last == self._after):
                    if joined is None and header.first > self._after + 1:
                        raise AuditError(
                            f"records {self._after + 1} to {header.first - 1} of stream {self._stream} are gone"
                        )
                    if records and size + size_found > MAX_BATCH_BYTES // 2:
                        break
                    joined = (
                        replace(header, ts_ns=time.time_ns())
                        if joined is None
                        else replace(joined, last=header.last, head=header.head, end=header.end)
                    )
                    records += found
                    size += size_found
                signatures, offset = after, end
        if len(records) > MAX_RECORDS:
            raise AuditError(f"stream {self._stream} has more than {MAX_RECORDS} records under one signature")
        return joined, records, _Position(position.number, signatures, offset)


def _read_entry(file: BinaryIO, offset: int) -> tuple[Header | None, int]:
    """The header at `offset` and the offset after it; None where there is no whole one."""
    file.seek(offset)
    start = file.read(LENGTH.size)
    if len(start) < LENGTH.size:
        return None, offset
    (length,) = LENGTH.unpack(start)
    if length > MAX_ENTRY_BYTES:
        raise AuditError("a signature file is damaged")
    body = file.read(SIGNATURE_BYTES + length)
    if len(body) < SIGNATURE_BYTES + length:
        return None, offset
    return Header.decode(body[SIGNATURE_BYTES:]), offset + LENGTH.size + len(body)


def _read_frames(file: BinaryIO, offset: int, count: int) -> tuple[list[bytes], int, int]:
    """`count` records from `offset`, the offset after them, and their size. Raises AuditError where they are not there."""
    records = []
    for after, _, record in islice(read_frames(file, offset), count):
        records.append(record)
        offset = after
    if len(records) != count:
        raise AuditError("records are missing, although they were signed")
    return records, offset, sum(map(len, records))
