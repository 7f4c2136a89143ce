"""The disk queue, from the supervisor's side: opens, syncs, verifies, signs, rotates, ends and retains streams.

A worker appends through `StreamWriter` (audit.writer); a record is in the file when `append` returns, and on disk, verified and
signed within one `commit` (called every 50 ms). Crashes: a stream whose supervisor is gone is ended by the next spool that opens
the directory (audit.recovery). Several instances may share a directory: each holds a lock on its own streams.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.audit import hostkey
from sidecar.audit.ledger import DROPPED, LEDGER_FILE, OPENED, REMOVED, RETIRED, Ledger, recent_entries
from sidecar.audit.recovery import recover
from sidecar.audit.retention import Retention, Usage, remove_segments
from sidecar.audit.segment import all_segments, list_directory, lock_path, open_lock, segment_number
from sidecar.audit.stream import OpenStream
from sidecar.audit.writer import SEGMENT_BYTES, StreamWriter, segment_bytes
from sidecar.errors import AuditError
from sidecar.model.ids import IdSource
from sidecar.model.reasons import GapReason
from sidecar.model.record import Record

log = logging.getLogger(__name__)

MEASURE_INTERVAL_S: Final = 1.0
MEASURE_SHARE: Final = 20
"""The directory is measured at most a twentieth of the time, however many files it holds."""
MAX_WAITING_GAPS: Final = 1_000
GAP_LABEL: Final = "supervisor-gaps"
DISK_FAILED: Final = "disk_failed"
"""Reason of an `agent` record."""


@dataclass(frozen=True, slots=True)
class StreamHandle:
    """What a worker needs. `fd` is append-only and stays owned by the spool."""

    stream: str
    fd: int
    head: bytes
    next_seq: int

    def writer(self, host: str, max_bytes: int) -> StreamWriter:
        """Appends to the stream. `max_bytes` is the spool's, by which its segments are sized."""
        return StreamWriter(
            self.fd,
            stream=self.stream,
            host=host,
            head=self.head,
            next_seq=self.next_seq,
            segment_bytes=segment_bytes(max_bytes),
        )


@dataclass(frozen=True, slots=True)
class SpoolState:
    """`used_bytes` is everything in the directory; `unshipped_bytes` what no collector has given a receipt for."""

    ok: bool
    blocked_reason: str | None
    used_bytes: int
    unshipped_bytes: int


class Spool:
    """All methods belong to one thread, except `state`."""

    def __init__(self, directory: Path, host: str, *, max_bytes: int, on_full: str = "block") -> None:
        self.directory = directory
        self.host = host
        self._max_bytes = max_bytes
        self._on_full = on_full
        self._ids = IdSource()
        self._streams: dict[str, OpenStream] = {}
        self._failure: str | None = None
        self._gaps: list[Record] = []
        self._gap_writer: StreamWriter | None = None
        self._usage = Usage(0, 0)
        self._measure_at = 0.0
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            self.host_key = hostkey.load_or_create(directory)
            self.boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            self._ledger = Ledger(directory, self.host_key)
            self._retention = Retention(directory, self._ledger, max_bytes)
            self.recovered: list[str] = self._recover()
            self._usage = self._retention.measure(self._streams)
        except OSError as error:
            raise AuditError(f"the audit directory {directory} cannot be used: {error.strerror}") from error

    def _recover(self) -> list[str]:
        """What opening found of dead instances, in words; what was lost becomes a gap record."""
        found = recover(self.directory, self.host_key)
        for item in found:
            if item.torn_bytes or item.damage:
                self._note_gap(GapReason.TORN_TAIL, item.words())
        self._repair_ledger({item.stream for item in found if not item.records and not item.damage})
        return [item.words() for item in found]

    def _repair_ledger(self, empty: set[str]) -> None:
        """Finish removals that a crash cut, and enter streams that it kept from being entered: no worker had those yet, so
        they are `empty`. A stream with records that is not entered is left to `verify` to name."""
        names = list_directory(self.directory)
        streams = all_segments(self.directory, names)
        if not streams:
            return
        try:
            recent = recent_entries(self.directory)
        except AuditError as error:
            log.error("audit: %s: %s", LEDGER_FILE, error)
            return
        for name in sorted(empty - {item.entry.stream for item in recent}):
            self._ledger.append(OPENED, name)
        gone = {item.entry.stream: item for item in recent if item.entry.what in (REMOVED, RETIRED, DROPPED)}
        for name, item in gone.items():
            leftover = [path for path in streams.get(name, ()) if segment_number(path) < item.entry.segment]
            if leftover and item.holds(self.host_key.public):
                remove_segments(leftover)

    # -- streams

    def open_stream(self, label: str) -> StreamHandle:
        """A new stream with its first segment, entered in the ledger. Raises AuditError."""
        name = self._ids.new(time.time_ns())
        try:
            lock = open_lock(self.directory, name, create=True)
            if lock is None:
                raise AuditError(f"stream {name} is locked")
            stream = OpenStream(
                self.directory,
                self.host_key,
                host=self.host,
                boot=self.boot_id,
                name=name,
                label=label,
                lock=lock,
            )
            try:
                segment = stream.add_segment()
                self._ledger.append(OPENED, name)
            except (OSError, AuditError):
                stream.close_files()
                for path in self.directory.glob(f"{name}.*"):
                    path.unlink()
                raise
        except OSError as error:
            raise AuditError(f"no stream can be opened in {self.directory}: {error.strerror}") from error
        self._streams[name] = stream
        return StreamHandle(name, segment.fd, stream.head, 0)

    def rotate(self, name: str) -> StreamHandle:
        """A new segment of the same chain. The writer goes on from its own head and sequence. Raises AuditError."""
        stream = self._streams[name]
        try:
            segment = stream.add_segment()
        except OSError as error:
            raise AuditError(f"no segment can be made in {self.directory}: {error.strerror}") from error
        return StreamHandle(name, segment.fd, stream.head, stream.seq)

    def close_stream(self, name: str, reason: str) -> None:
        """Its writer is gone: sign what is there and the end; a torn tail is cut off and becomes a gap record. Where the disk
        does not take that, every `commit` tries again."""
        stream = self._streams.get(name)
        if stream is None or stream.ending is not None:
            return
        stream.ending = reason
        try:
            self._finish(stream)
        except (OSError, AuditError) as error:
            self._failure = f"{self.directory}: the end of a stream cannot be written: {error}"

    def _finish(self, stream: OpenStream) -> None:
        assert stream.ending is not None
        torn = stream.end(stream.ending)
        del self._streams[stream.name]
        self._note_disk(stream)
        lock_path(self.directory, stream.name).unlink(missing_ok=True)
        stream.close_files()
        if stream.broken:
            self._note_gap(GapReason.TORN_TAIL, f"{stream.broken}; nothing after it was signed")
        elif torn:
            self._note_gap(
                GapReason.TORN_TAIL, f"stream {stream.name}: {torn} bytes of an incomplete record cut off"
            )

    def close(self) -> None:
        """End all streams. What the disk does not take is left to the next start."""
        self._write_gaps()
        for name in list(self._streams):
            self.close_stream(name, "stopped")
        for stream in self._streams.values():
            stream.close_files()
        self._streams.clear()
        self._ledger.close()

    # -- group commit

    def commit(self) -> None:
        """Bring everything written so far to disk, verify it and sign it; keep the spool within its bounds. What fails is in
        `state`; a stream that does not hold stops no other."""
        failure = None
        for stream in list(self._streams.values()):
            try:
                if stream.ending is not None:
                    self._finish(stream)
                else:
                    stream.advance()
            except OSError as error:
                failure = f"{self.directory}: {error.strerror}; what was recorded last is not on disk yet"
            except AuditError as error:
                failure = f"{self.directory}: {error.message}"
            else:
                failure = failure or stream.broken or None
                self._note_disk(stream)
        self._write_gaps()
        if time.monotonic() >= self._measure_at:
            failure = self._maintain() or failure
        elif failure is None and self._failure is not None:
            failure = self._probe()
        self._failure = failure

    def _maintain(self) -> str | None:
        """Measure, remove what may go, and see whether the directory can be written. Returns what fails."""
        began = time.monotonic()
        try:
            self._usage = self._retention.measure(self._streams)
            freed = self._retention.free(self._streams, self._usage, drop=self._on_full == "drop")
            for item in freed:
                self._note_gap(
                    GapReason.SPOOL_DROPPED,
                    f"{item.lost} unshipped records of stream {item.stream} from {item.first} on were removed: "
                    "audit.max_bytes is reached and audit.on_full is drop",
                )
            if freed:
                self._usage = self._retention.measure(self._streams)
        except (OSError, AuditError) as error:
            return f"{self.directory}: {error}"
        finally:
            ended = time.monotonic()
            self._measure_at = ended + max(MEASURE_INTERVAL_S, (ended - began) * MEASURE_SHARE)
        return self._probe()

    def _probe(self) -> str | None:
        """Whether the directory still takes a file: records fail late, this says so early."""
        path = self.directory / f".probe-{os.getpid()}"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, b"\0" * 4096)
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
                os.unlink(path)
        except OSError as error:
            return f"{self.directory} cannot be written: {error.strerror}"
        return None

    def state(self) -> SpoolState:
        reason, usage = self._failure, self._usage
        if reason is None and usage.unshipped_bytes >= self._max_bytes and self._on_full == "block":
            reason = (
                f"{self.directory} holds {usage.unshipped_bytes} bytes that no collector has taken, "
                f"audit.max_bytes is {self._max_bytes}"
            )
        return SpoolState(reason is None, reason, usage.used_bytes, usage.unshipped_bytes)

    def owns(self, name: str) -> bool:
        """Whether the stream is this spool's. May be called from any thread."""
        return name in self._streams

    def own_streams(self) -> list[str]:
        """Names of the streams that are open here. May be called from any thread."""
        return list(self._streams)

    # -- gaps

    def _note_gap(self, reason: GapReason, detail: str) -> None:
        self._note("gap", reason.value, detail)

    def _note_disk(self, stream: OpenStream) -> None:
        """Nothing is lost, but whoever reads the records should know what they went through."""
        if stream.sync_failures and not stream.broken:
            self._note(
                "agent",
                DISK_FAILED,
                f"the disk did not take what stream {stream.name} holds up to record {stream.seq - 1}, "
                f"{stream.sync_failures} times in a row; it was written again and is there now",
            )
        stream.sync_failures = 0

    def _note(self, kind: str, reason: str, detail: str) -> None:
        now_ns = time.time_ns()
        if len(self._gaps) < MAX_WAITING_GAPS:
            self._gaps.append(
                Record(id=self._ids.new(now_ns), ts_ns=now_ns, kind=kind, reason=reason, detail=detail)
            )

    def _write_gaps(self) -> None:
        """Into a stream of our own, opened with the first gap; kept while the disk takes nothing."""
        if not self._gaps:
            return
        try:
            if self._gap_writer is None:
                handle = self.open_stream(GAP_LABEL)
                self._gap_writer = handle.writer(self.host, self._max_bytes)
            self._gap_writer.append_many(self._gaps)
            if self._gap_writer.full:
                self._gap_writer.switch(self.rotate(self._gap_writer.stream).fd)
        except AuditError as error:
            log.error("audit: a gap waits to be recorded: %s", error)
            return
        self._gaps.clear()


__all__ = ["SEGMENT_BYTES", "Spool", "SpoolState", "StreamHandle", "StreamWriter"]
