"""Records survive what can happen to a host, and no byte of the spool can be changed unseen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.audit import read
from sidecar.audit.spool import Spool, StreamHandle, StreamWriter
from sidecar.audit.verify import verify
from sidecar.errors import AuditError
from sidecar.model.ids import IdSource
from sidecar.model.record import OperationPart, Record

IDS = IdSource()


def record(number: int, kind: str = "request") -> Record:
    return Record(
        id=IDS.new(10**18 + number), ts_ns=10**18 + number, kind=kind, flow="f" * 36,
        operation=OperationPart(kind="query", text=f"SELECT {number}"),
    )  # fmt: skip


def writer_of(handle: StreamHandle) -> StreamWriter:
    return StreamWriter(handle.fd, stream=handle.stream, host="h", head=handle.head, next_seq=handle.next_seq)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "audit", "h", max_bytes=1 << 30)
    yield made
    made.close()


def test_records_come_back_in_order_and_verify(spool: Spool) -> None:
    writer = writer_of(spool.open_stream("w"))
    for number in range(10):
        writer.append(record(number))
    writer.append_many([record(10), record(11)])
    spool.commit()
    rows = list(read.records(spool.directory))
    assert [row["operation"]["text"] for row in rows] == [f"SELECT {number}" for number in range(12)]
    assert [row["seq"] for row in rows] == list(range(12))
    report = verify(spool.directory)
    assert report.ok
    assert report.records == 12


def test_rotation_keeps_one_chain(spool: Spool) -> None:
    handle = spool.open_stream("w")
    writer = writer_of(handle)
    writer.append(record(1))
    following = spool.rotate(handle.stream)
    writer.append(record(2))  # still the old segment: the worker has not switched yet
    writer.switch(following.fd)
    writer.append(record(3))
    spool.close_stream(handle.stream, "done")
    assert [row["seq"] for row in read.records(spool.directory)] == [0, 1, 2]
    assert verify(spool.directory).ok


def test_what_was_written_after_a_rotation_is_signed_with_the_end(spool: Spool) -> None:
    """More in the second segment than the first one had, and no commit between."""
    handle = spool.open_stream("w")
    writer = writer_of(handle)
    writer.append(record(0))
    writer.switch(spool.rotate(handle.stream).fd)
    for number in range(1, 50):
        writer.append(record(number))
    spool.close_stream(handle.stream, "done")
    assert [row["seq"] for row in read.records(spool.directory)] == list(range(50))
    (stream,) = verify(spool.directory).streams
    assert (stream.signed, stream.end) == (50, "done")


def crash(spool: Spool) -> None:
    """What SIGKILL leaves: descriptors and locks gone, nothing signed at the end."""
    for stream in spool._streams.values():
        os.close(stream.lock)
        for segment in stream.segments:
            os.close(segment.fd)
    spool._streams.clear()


@pytest.mark.parametrize("torn", [b"", b"\x05", b"\x40\0\0\0" + b"x" * 40])
def test_a_crash_is_recovered_and_a_torn_tail_named(tmp_path: Path, torn: bytes) -> None:
    first = Spool(tmp_path / "audit", "h", max_bytes=1 << 30)
    handle = first.open_stream("w")
    writer = writer_of(handle)
    writer.append(record(1))
    first.commit()
    writer.append(record(2))
    os.write(handle.fd, torn)
    crash(first)
    second = Spool(tmp_path / "audit", "h", max_bytes=1 << 30)
    assert second.recovered
    report = verify(second.directory)
    assert report.ok, report.findings
    (stream,) = [item for item in report.streams if item.stream == handle.stream]
    assert stream.records == 2
    assert ("torn_tail" in stream.end) is bool(torn)
    second.close()


def test_two_instances_share_a_directory(tmp_path: Path) -> None:
    first = Spool(tmp_path / "audit", "h", max_bytes=1 << 30)
    writer = writer_of(first.open_stream("a"))
    writer.append(record(1))
    second = Spool(tmp_path / "audit", "h", max_bytes=1 << 30)
    assert second.recovered == []
    writer.append(record(2))
    second.close()
    first.close()
    assert verify(tmp_path / "audit").ok


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "audit", "h", max_bytes=1 << 30)
    writer = writer_of(spool.open_stream("w"))
    for number in range(2):
        writer.append(record(number))
    spool.close()
    assert verify(spool.directory).ok
    for path in sorted(spool.directory.iterdir()):
        original = path.read_bytes()
        for offset in range(len(original)):
            damaged = bytearray(original)
            damaged[offset] ^= 0x01
            path.write_bytes(damaged)
            assert not verify(spool.directory).ok, f"{path.name}: byte {offset}"
        path.write_bytes(original)
    assert verify(spool.directory).ok


def test_a_truncated_tail_is_missing_and_named(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "audit", "h", max_bytes=1 << 30)
    handle = spool.open_stream("w")
    writer = writer_of(handle)
    for number in range(3):
        writer.append(record(number))
    spool.close()
    path = next(spool.directory.glob("*.seg"))
    data = path.read_bytes()
    last = data.rindex(b"SELECT 2")
    start = data.rfind(b"SELECT 1", 0, last)
    path.write_bytes(data[: start + 8])
    report = verify(spool.directory)
    assert not report.ok
    assert report.findings[0].seq in (1, 2)


def test_a_full_disk_blocks_and_loses_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "audit", "h", max_bytes=1 << 30)
    handle = spool.open_stream("w")
    writer = writer_of(handle)
    writer.append(record(0))
    full = os.open("/dev/full", os.O_WRONLY)
    keep = os.dup(handle.fd)
    os.dup2(full, handle.fd)
    waiting = record(1)
    for _ in range(2):
        with pytest.raises(AuditError, match="No space left"):
            writer.append(waiting)
    os.dup2(keep, handle.fd)
    os.close(full)
    os.close(keep)
    writer.append(waiting)
    spool.close()
    assert [row["seq"] for row in read.records(spool.directory)] == [0, 1]
    assert verify(spool.directory).ok


def test_max_bytes_blocks(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "audit", "h", max_bytes=100)
    writer_of(spool.open_stream("w")).append(record(0))
    spool._measured = -1e9
    spool.commit()
    state = spool.state()
    assert not state.ok
    assert "audit.max_bytes" in (state.blocked_reason or "")
    spool.close()
