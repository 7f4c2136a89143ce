"""What a crash left: streams without an end whose instance is gone. Each is verified from its last signature on, cut where it is
torn, signed, and ended; what was lost or does not hold is named.

A stream whose *signed* part does not hold is left as it is: that is no crash, and `verify` names it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sidecar.audit import chain, hostkey
from sidecar.audit.batch import Header
from sidecar.audit.segment import (
    SegmentHeader,
    entries,
    frames,
    lock_path,
    open_lock,
    read_header,
    segment_paths,
    signature_path,
)
from sidecar.audit.stream import OpenStream, Segment
from sidecar.errors import AuditError


@dataclass(frozen=True, slots=True)
class Recovered:
    """`lost` is empty where nothing was: the stream was only without its end."""

    stream: str
    records: int
    torn_bytes: int
    damage: str

    def words(self) -> str:
        if self.damage:
            return f"stream {self.stream} is damaged and was left as it is: {self.damage}"
        torn = f"; {self.torn_bytes} bytes of a record that was never complete were cut off"
        return f"stream {self.stream} was ended after a crash" + (torn if self.torn_bytes else "")


def recover(directory: Path, key: hostkey.HostKey) -> list[Recovered]:
    """End every dead stream of `directory`. Streams of live instances are left alone."""
    found = []
    for path in sorted(directory.glob("*.lock")):
        name = path.name.removesuffix(".lock")
        lock = open_lock(directory, name)
        if lock is None:
            continue
        try:
            outcome = _recover_stream(directory, key, name, lock)
        except AuditError as error:
            outcome = Recovered(name, 0, 0, error.message)
            os.close(lock)
        except OSError as error:
            outcome = Recovered(name, 0, 0, error.strerror or str(error))
            os.close(lock)
        if outcome is not None:
            found.append(outcome)
    return found


def _recover_stream(directory: Path, key: hostkey.HostKey, name: str, lock: int) -> Recovered | None:
    """Takes `lock` over unless it raises."""
    _drop_unborn_segment(directory, name)
    paths = segment_paths(directory, name)
    if not paths:  # died while it was opened: no worker ever had it
        lock_path(directory, name).unlink(missing_ok=True)
        os.close(lock)
        return None
    stream, cut = None, 0
    ended = False
    try:
        for path in paths:
            header, segment, signed, torn = _open(path, name, key)
            cut += torn
            if stream is None:
                stream = OpenStream(
                    directory,
                    key,
                    host=header.host,
                    boot=header.boot,
                    name=name,
                    label=header.label,
                    lock=lock,
                )
                if signed:  # not 0 where earlier segments were shipped and removed
                    stream.seq, stream.head = signed[0].first, signed[0].prev
            stream.adopt(segment)
            _skip_signed(stream, segment, signed)
            ended = bool(signed and signed[-1].end)
        assert stream is not None
        if not ended:  # else it died between the signature of the end and the removal of the lock
            _leave_signed(stream)
            stream.advance()
            cut += _cut_unsigned(stream)
            note = f"; torn_tail of {cut} bytes cut off" if cut else ""
            stream.end("recovered after a crash" + note)
    except (AuditError, OSError):
        for segment in stream.segments if stream else ():
            segment.close()
        raise
    lock_path(directory, name).unlink(missing_ok=True)
    stream.close_files()
    return Recovered(name, stream.seq, cut, "")


def _drop_unborn_segment(directory: Path, name: str) -> None:
    """The newest segment where a crash stopped its making: no writer had it yet."""
    for path in segment_paths(directory, name)[-1:]:
        signatures = signature_path(path)
        try:
            *_, offset = read_header(data := path.read_bytes())
            born = len(data) > offset or signatures.exists()
        except AuditError:
            born = signatures.exists() and signatures.stat().st_size > 0
        if not born:
            path.unlink()
            signatures.unlink(missing_ok=True)


def _open(path: Path, name: str, key: hostkey.HostKey) -> tuple[SegmentHeader, Segment, list[Header], int]:
    """Header, open segment, what was signed, and bytes of a torn signature that were cut off."""
    data = path.read_bytes()
    header, body, signature, offset = read_header(data)
    if not hostkey.verify(key.public, signature, body) or header.stream != name:
        raise AuditError(f"{path.name}: its header is not signed by this host")
    signatures = signature_path(path)
    signed_data = signatures.read_bytes() if signatures.exists() else b""
    signed, whole = [], 0
    for whole, encoded, signature in entries(signed_data):  # noqa: B007
        if not hostkey.verify(key.public, signature, encoded):
            raise AuditError(f"{signatures.name}: a signature does not hold")
        signed.append(Header.decode(encoded))
    torn = len(signed_data) - whole
    reader = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    descriptor = os.open(signatures, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if torn:
        os.ftruncate(descriptor, whole)
    segment = Segment(header.segment, path, -1, reader, descriptor, offset, doubtful=True)
    return header, segment, signed, torn


def _skip_signed(stream: OpenStream, segment: Segment, signed: list[Header]) -> None:
    """Move to where the segment's last signature stands. Raises AuditError where its records do not lead there."""
    if not signed:
        return
    last = signed[-1]
    data = segment.path.read_bytes()
    for after, digest, record in frames(data, segment.offset):
        if stream.seq > last.last:
            break
        stream.head = chain.link(stream.head, record)
        if stream.head != digest:
            raise AuditError(f"record {stream.seq} does not follow the chain")
        stream.seq += 1
        segment.offset = after
    if stream.seq != last.last + 1 or stream.head != last.head:
        raise AuditError(f"record {stream.seq} is missing or altered, although it was signed")


def _leave_signed(stream: OpenStream) -> None:
    """`advance` goes on to the next segment once that holds anything unsigned; these had been left before the crash."""
    while len(stream.segments) > 1:
        segment = stream.segments[0]
        if os.fstat(segment.reader).st_size > segment.offset:
            return
        segment.close()
        stream.segments.pop(0)


def _cut_unsigned(stream: OpenStream) -> int:
    """Cut off what follows the last whole record that chains: it was on its way to disk when the host died."""
    cut = 0
    for segment in stream.segments:
        size = os.fstat(segment.reader).st_size
        if size > segment.offset:
            cut += size - segment.offset
            os.truncate(segment.path, segment.offset)
    stream.broken = ""
    return cut
