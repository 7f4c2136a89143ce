"""`audit.max_bytes`: what a collector has given a receipt for goes, nothing else; then requests wait, or what is lost is counted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sidecar.audit import hostkey, read
from sidecar.audit.ledger import LEDGER_FILE, REMOVED, Entry, LedgerReader
from sidecar.audit.segment import entry_bytes, receipt_path, segment_paths
from sidecar.audit.spool import Spool
from sidecar.audit.verify import verify
from sidecar.audit.writer import MIN_SEGMENT_BYTES, SEGMENT_BYTES, StreamWriter, segment_bytes
from tests.support.spools import Collector, make_spool, request, writer_of

MAX = 400_000
TEXT = "x" * 900


class Worker:
    """Writes into a stream and goes on in a new segment after every 100 records."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.handle = spool.open_stream("w")
        self.writer: StreamWriter = writer_of(self.handle)
        self.count = 0

    @property
    def stream(self) -> str:
        return self.handle.stream

    def write(self, records: int) -> None:
        for _ in range(records):
            self.writer.append(request(self.count, TEXT))
            self.count += 1
            if self.count % 100 == 0:
                self.writer.switch(self.spool.rotate(self.stream).fd)

    def numbers(self) -> list[int]:
        return [int(path.name.split(".")[1]) for path in segment_paths(self.spool.directory, self.stream)]


def maintain(spool: Spool) -> None:
    spool._measure_at = 0.0
    spool.commit()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return make_spool(tmp_path / "audit", max_bytes=MAX)


def test_only_what_has_a_receipt_goes(spool: Spool, tmp_path: Path) -> None:
    collector, worker = Collector(spool.directory, tmp_path / "c"), Worker(spool)
    worker.write(250)
    maintain(spool)
    assert worker.numbers() == [0, 1, 2]
    collector.take(spool, worker.stream)
    maintain(spool)
    assert worker.numbers() == [0, 1, 2]  # there is room: it stays for `audit show` and `why`
    worker.write(250)  # above max_bytes, and the newer half has no receipt
    maintain(spool)
    state = spool.state()
    assert worker.numbers() == [2, 3, 4, 5]
    assert state.ok
    assert state.unshipped_bytes < MAX
    report = verify(spool.directory)
    assert report.ok, report.findings
    assert report.records == 500
    assert [stream.removed for stream in report.streams] == [200]
    worker.write(300)
    maintain(spool)
    assert 2 in worker.numbers()  # its second half has no receipt
    state = spool.state()
    assert not state.ok
    assert f"bytes that no collector has taken, audit.max_bytes is {MAX}" in (state.blocked_reason or "")
    collector.take(spool, worker.stream)
    maintain(spool)
    maintain(spool)
    assert spool.state().ok
    assert spool.state().used_bytes < MAX
    spool.close()
    assert verify(spool.directory).ok
    assert [row["seq"] for row in read.records(spool.directory)][-1] == 799


def test_a_receipt_that_does_not_hold_frees_nothing(spool: Spool, tmp_path: Path) -> None:
    collector, worker = Collector(spool.directory, tmp_path / "c"), Worker(spool)
    worker.write(500)
    spool.commit()
    collector.take(spool, worker.stream)
    path = receipt_path(spool.directory, worker.stream)
    path.write_text(path.read_text().replace('"last":499', '"last":498'))
    maintain(spool)
    assert worker.numbers() == [0, 1, 2, 3, 4, 5]
    assert not spool.state().ok
    assert not verify(spool.directory).ok
    spool.close()


def test_what_was_removed_needs_its_receipt_to_verify(spool: Spool, tmp_path: Path) -> None:
    collector, worker = Collector(spool.directory, tmp_path / "c"), Worker(spool)
    worker.write(450)
    spool.commit()
    collector.take(spool, worker.stream)
    maintain(spool)
    spool.close()
    assert worker.numbers()[0] > 0
    assert verify(spool.directory).ok
    receipt_path(spool.directory, worker.stream).unlink()
    report = verify(spool.directory)
    assert [finding.problem for finding in report.findings] == [
        "segments were removed and no receipt says that a collector holds them"
    ]


def test_a_stream_that_has_ended_goes_whole(spool: Spool, tmp_path: Path) -> None:
    collector, ended, running = Collector(spool.directory, tmp_path / "c"), Worker(spool), Worker(spool)
    ended.write(150)
    spool.close_stream(ended.stream, "done")
    collector.take(spool, ended.stream)
    running.write(300)
    maintain(spool)
    assert ended.numbers() == []
    assert list(spool.directory.glob(f"{ended.stream}*")) == []
    assert running.numbers() == [0, 1, 2, 3]
    report = verify(spool.directory)
    assert report.ok, report.findings
    assert report.records == 450
    # The ledger knows it: its receipt is there for whoever asks what became of it.
    ledger = spool.directory / "streams.ledger"
    assert ended.stream.encode() in ledger.read_bytes()
    spool.close()


def test_another_instance_keeps_its_own(spool: Spool, tmp_path: Path) -> None:
    """Retention of one never takes a segment that another one writes."""
    collector, mine = Collector(spool.directory, tmp_path / "c"), Worker(spool)
    other = make_spool(spool.directory, max_bytes=MAX)
    theirs = Worker(other)
    theirs.write(450)
    other.commit()
    collector.take(other, theirs.stream)
    mine.write(50)
    maintain(spool)
    assert theirs.numbers() == [0, 1, 2, 3, 4]
    maintain(other)
    assert 0 not in theirs.numbers()
    for each in (spool, other):
        each.close()
    report = verify(spool.directory)
    assert report.ok, report.findings
    assert report.records == 500


def test_drop_removes_the_oldest_and_counts_it(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "audit", max_bytes=MAX, on_full="drop")
    worker = Worker(spool)
    worker.write(600)
    maintain(spool)
    assert spool.state().ok
    kept = worker.numbers()
    assert kept
    assert kept[0] > 0
    assert kept[-1] == 6  # never the one that is being written
    spool.close()
    gaps = [row for row in read.records(spool.directory) if row["kind"] == "gap"]
    assert [row["reason"] for row in gaps] == ["spool_dropped"] * kept[0]
    assert [row["detail"].split(" of stream")[0] for row in gaps] == ["100 unshipped records"] * kept[0]
    assert len(list(read.records(spool.directory))) == 600 - 100 * kept[0] + len(gaps)
    report = verify(spool.directory)
    # It is missing, whoever allowed that: verify says so, and which.
    assert {finding.stream for finding in report.findings} == {worker.stream}
    assert max(finding.seq for finding in report.findings) == 100 * kept[0] - 1
    assert report.gaps == {"spool_dropped": kept[0]}


def test_a_removal_that_a_crash_cut_is_finished(spool: Spool, tmp_path: Path) -> None:
    """The ledger has the entry, the files are still there."""
    collector, worker = Collector(spool.directory, tmp_path / "c"), Worker(spool)
    worker.write(450)
    spool.commit()
    collector.take(spool, worker.stream)
    kept = {path: path.read_bytes() for path in spool.directory.glob(f"{worker.stream}.000000.*")}
    assert len(kept) == 2
    maintain(spool)
    spool.close()
    for path, data in kept.items():
        assert not path.exists()
        path.write_bytes(data)
    assert verify(spool.directory).ok
    make_spool(spool.directory).close()
    assert not any(path.exists() for path in kept)
    assert verify(spool.directory).ok


def test_segments_are_smaller_where_the_spool_is() -> None:
    assert segment_bytes(1 << 30) == SEGMENT_BYTES
    assert segment_bytes(16 << 20) == 1 << 20
    assert segment_bytes(1) == MIN_SEGMENT_BYTES


def test_a_long_ledger_does_not_slow_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows with every stream that a host has ever had; only `verify` reads all of it."""
    spool = make_spool(tmp_path / "audit")
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)
    for number in range(500):
        spool._ledger.append(REMOVED, f"stream-{number}", segment=1)
    monkeypatch.undo()
    spool.open_stream("w")
    spool.close()
    verified: list[bytes] = []
    check = hostkey.verify
    monkeypatch.setattr(
        hostkey,
        "verify",
        lambda public, signature, data: verified.append(data) or check(public, signature, data),
    )
    again = make_spool(tmp_path / "audit")
    stream = again.open_stream("w").stream
    again.close()
    assert len(verified) < 10
    monkeypatch.undo()
    assert len(LedgerReader(tmp_path / "audit", again.host_key.public).read()) == 502
    report = verify(tmp_path / "audit")
    assert report.ok, report.findings
    assert stream in {found.stream for found in report.streams}


def test_a_removal_that_the_host_did_not_sign_removes_nothing(spool: Spool) -> None:
    """Somebody wrote an entry into the ledger."""
    worker = Worker(spool)
    worker.write(250)
    spool.close()
    path = spool.directory / LEDGER_FILE
    entry = Entry(b"p" * 32, REMOVED, worker.stream, segment=2, seq=200, head=b"h" * 32).encode()
    path.write_bytes(path.read_bytes() + entry_bytes(entry, b"s" * 64))
    make_spool(spool.directory).close()
    assert worker.numbers() == [0, 1, 2]
    assert not verify(spool.directory).ok
