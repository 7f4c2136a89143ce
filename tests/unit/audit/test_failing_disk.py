"""A disk that fails under the spool: nothing counts as recorded that it did not take, `state` says so until it has, and what it failed
to take is written again. On a real block device that runs out of space behind its file system's back: writeback fails, fdatasync(2)
says so once, and the next one succeeds although the pages never reached the device."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.audit import read
from sidecar.audit.spool import Spool
from sidecar.audit.verify import verify
from sidecar.audit.writer import StreamWriter
from sidecar.errors import AuditError
from tests.support.spools import make_spool, request, writer_of
from tests.support.thin_disk import ThinDisk, thin_disk

TEXT = "x" * 60_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[ThinDisk]:
    with thin_disk(tmp_path) as made:
        yield made


def write_until_it_fails(spool: Spool, writer: StreamWriter) -> int:
    """How many records were appended."""
    for number in range(200):
        writer.append(request(number, TEXT))
        spool.commit()
        if not spool.state().ok:
            return number + 1
    raise AssertionError("the disk took all of it")


def texts(directory: Path) -> list[str]:
    return [row["operation"]["text"] for row in read.records(directory) if row["kind"] == "request"]


@pytest.mark.root
def test_what_the_disk_did_not_take_blocks_until_it_is_there(disk: ThinDisk) -> None:
    spool = make_spool(disk.place / "audit")
    writer = writer_of(spool.open_stream("w"))
    count = write_until_it_fails(spool, writer)
    reason = spool.state().blocked_reason or ""
    assert str(spool.directory) in reason
    assert "No space left on device" in reason
    assert "not on disk" in reason
    for _ in range(10):  # the kernel has said it once
        spool.commit()
        assert not spool.state().ok
    report = verify(spool.directory)
    assert report.ok, report.findings
    assert report.streams[0].unsigned >= 1

    disk.widen()
    until = time.monotonic() + 10
    while not spool.state().ok:
        assert time.monotonic() < until, spool.state()
        spool.commit()
    writer.append(request(count, TEXT))
    spool.commit()
    assert spool.state().ok
    disk_failed = [row for row in read.records(spool.directory) if row["kind"] == "agent"]
    assert [row["reason"] for row in disk_failed] == ["disk_failed"]
    assert writer.stream in disk_failed[0]["detail"]
    spool.close()
    disk.forget()
    report = verify(spool.directory)
    assert report.ok, report.findings
    assert len(texts(spool.directory)) == count + 1


@pytest.mark.root
def test_recovery_writes_again_what_a_dead_instance_could_not(disk: ThinDisk) -> None:
    directory = disk.place / "audit"
    reader, told = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            spool = make_spool(directory)
            count = write_until_it_fails(spool, writer_of(spool.open_stream("w")))
            os.write(told, count.to_bytes(4, "big"))
            status = 0
        finally:
            os._exit(status)
    os.close(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    count = int.from_bytes(os.read(reader, 4), "big")
    os.close(reader)
    disk.widen()
    make_spool(directory).close()
    disk.forget()
    report = verify(directory)
    assert report.ok, report.findings
    assert len(texts(directory)) == count


def test_a_signature_that_was_not_synced_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of the ledger: nothing stands there twice, or of what was not made."""
    spool = make_spool(tmp_path / "audit")
    writer = writer_of(spool.open_stream("w"))
    sync = os.fdatasync
    failed: list[str] = []

    def failing(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith((".sig", ".ledger")):
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    for number in range(3):
        writer.append(request(number))
        monkeypatch.setattr(os, "fdatasync", failing)
        for _ in range(3):
            spool.commit()
            assert "Input/output error" in (spool.state().blocked_reason or "")
        with pytest.raises(AuditError, match="Input/output error"):
            spool.open_stream("another")
        monkeypatch.setattr(os, "fdatasync", sync)
        spool.commit()
        assert spool.state().ok
    assert {path.rpartition(".")[2] for path in failed} == {"sig", "ledger"}
    report = verify(spool.directory)
    assert report.ok, report.findings
    assert {stream.label for stream in report.streams} == {"w", "supervisor-gaps"}
    spool.close()
    assert verify(spool.directory).ok
