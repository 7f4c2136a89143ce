"""A directory that is full or cannot be written: requests wait (or are dropped and counted), `state` says why, and it goes on by
itself. On real, small file systems."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidecar.audit import read
from sidecar.audit.spool import Spool
from sidecar.audit.verify import verify
from sidecar.errors import AuditError
from sidecar.model.record import Record
from tests.support.spools import make_spool, request, writer_of

pytestmark = pytest.mark.root
SMALL_MIB = 2


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_MIB}m", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def commit_until(spool: Spool, condition: Callable[[], bool]) -> None:
    """As the supervisor does it."""
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, spool.state()
        spool.commit()
        time.sleep(0.02)


def fill(place: Path) -> Path:
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096) == 4096:
                pass
        except OSError:
            pass
    return ballast


def test_a_full_disk_blocks_says_why_and_goes_on(small: Path) -> None:
    spool = make_spool(small / "audit")
    handle = spool.open_stream("w")
    writer = writer_of(handle)
    writer.append(request(0))
    spool.commit()
    assert spool.state().ok
    ballast = fill(small)
    # What still fits into the last page is taken; then a record is not, and stays the caller's.
    taken, waiting = 0, request(1)
    with pytest.raises(AuditError, match="No space left|a part"):
        while taken < 100:
            writer.append(waiting)
            taken += 1
            waiting = request(taken + 1)
    commit_until(spool, lambda: not spool.state().ok)
    reason = spool.state().blocked_reason or ""
    assert str(spool.directory) in reason
    assert "No space left on device" in reason
    with pytest.raises(AuditError):
        writer.append(waiting)
    with pytest.raises(AuditError, match=str(spool.directory)):
        spool.open_stream("another")
    with pytest.raises(AuditError, match=str(spool.directory)):
        spool.rotate(handle.stream)
    assert verify(spool.directory).ok

    ballast.unlink()
    commit_until(spool, lambda: spool.state().ok)
    writer.append(waiting)
    writer.switch(spool.rotate(handle.stream).fd)
    writer.append(request(taken + 2))
    spool.close()
    texts = [row["operation"]["text"] for row in read.records(spool.directory)]
    assert texts == [f"SELECT {n}" for n in range(taken + 3)]
    report = verify(spool.directory)
    assert report.ok, report.findings
    assert not report.notes
    assert sorted(path.name for path in spool.directory.glob("*.lock")) == []


def test_an_end_that_does_not_fit_is_written_later(small: Path) -> None:
    """A worker dies while the disk is full."""
    spool = make_spool(small / "audit")
    handle = spool.open_stream("w")
    writer = writer_of(handle)
    writer.append(request(0))
    ballast = fill(small)
    try:
        for number in range(1, 100):
            writer.append(request(number, "x" * 500))
    except AuditError:
        pass
    spool.close_stream(handle.stream, "worker died")
    assert not spool.state().ok
    ballast.unlink()
    commit_until(spool, lambda: spool.state().ok and not spool.owns(handle.stream))
    spool.close()
    report = verify(spool.directory)
    assert report.ok, report.findings
    (stream,) = [found for found in report.streams if found.stream == handle.stream]
    assert stream.end.startswith("worker died")


def test_a_directory_that_became_read_only(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "audit")
    handle = spool.open_stream("w")
    writer = writer_of(handle)
    writer.append(request(0))
    subprocess.run(["mount", "--bind", spool.directory, spool.directory], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", spool.directory], check=True)
        commit_until(spool, lambda: not spool.state().ok)
        assert spool.state().blocked_reason == f"{spool.directory} cannot be written: Read-only file system"
        with pytest.raises(AuditError, match="Read-only"):
            spool.open_stream("another")
        with pytest.raises(AuditError, match="Read-only"):
            make_spool(tmp_path / "audit")
    finally:
        subprocess.run(["umount", spool.directory], check=True)
    commit_until(spool, lambda: spool.state().ok)
    writer.append(request(1))
    spool.close()
    assert [row["seq"] for row in read.records(spool.directory)] == [0, 1]
    assert verify(spool.directory).ok


def test_a_directory_that_vanished(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "audit")
    writer_of(spool.open_stream("w")).append(request(0))
    spool.directory.rename(tmp_path / "elsewhere")
    commit_until(spool, lambda: not spool.state().ok)
    assert "No such file or directory" in (spool.state().blocked_reason or "")
    (tmp_path / "elsewhere").rename(spool.directory)
    commit_until(spool, lambda: spool.state().ok)
    spool.close()
    assert verify(spool.directory).ok


def test_a_record_that_never_fits_is_counted_once(small: Path) -> None:
    """`on_full: drop` in a worker: the file took a part of one record, whose rest follows, and nothing of the next."""
    spool = make_spool(small / "audit")
    writer = writer_of(spool.open_stream("w"))
    ballast = fill(small)
    lost = 0
    cut: Record | None = None
    for number in range(200):
        asked = request(number, "x" * 500)
        try:
            writer.append(asked)
        except AuditError:
            gone = writer.abandon([asked])
            lost += gone
            if not gone:
                cut = asked
    assert lost
    ballast.unlink()
    writer.append(request(200))
    spool.close()
    rows = list(read.records(spool.directory))
    assert len(rows) == 201 - lost
    if cut is not None:
        assert cut.id in {row["id"] for row in rows}
    assert verify(spool.directory).ok
