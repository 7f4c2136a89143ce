"""A spool whose instance dies, at any byte: what `append` had taken is there after a SIGKILL, what was committed is there after a
power cut; what was torn is cut off and said; and the whole verifies."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import struct
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.audit import read
from sidecar.audit.segment import entries, segment_paths, signature_path
from sidecar.audit.spool import Spool
from sidecar.audit.verify import verify
from tests.support.spools import make_spool, request, writer_of

SEQ = struct.Struct("<q")
KILLS = 12


def _write_for_ever(directory: Path, told: int) -> None:
    """Appends, commits and rotates; tells each record once `append` has returned."""
    spool = make_spool(directory)
    handle = spool.open_stream("w")
    writer = writer_of(handle)
    number = 0
    while True:
        writer.append(request(number, f"SELECT {number}, '{'x' * (number % 700)}'"))
        os.write(told, SEQ.pack(number))
        number += 1
        if number % 7 == 0:
            spool.commit()
        if number % 20 == 0:
            writer.switch(spool.rotate(handle.stream).fd)


def test_sigkill_at_any_moment(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    acknowledged: list[int] = []
    chance = random.Random(11)
    for _ in range(KILLS):
        reader, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with contextlib.suppress(BaseException):
                _write_for_ever(directory, told)
            os._exit(1)
        os.close(told)
        try:
            wanted = chance.randrange(1, 160)
            seen = b""
            while len(seen) < wanted * SEQ.size:
                seen += os.read(reader, SEQ.size)
        finally:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(reader, 65536):
            seen += more
        os.close(reader)
        acknowledged.append(len(seen) // SEQ.size)
    spool = make_spool(directory)
    assert spool.recovered
    report = verify(directory)
    assert report.ok, report.findings
    found: dict[str, int] = {}
    for row in read.records(directory):
        if row["kind"] == "request":
            assert row["seq"] == found.get(row["stream"], 0)
            found[row["stream"]] = row["seq"] + 1
    for name, told in zip(sorted(found), acknowledged, strict=True):
        assert found[name] >= told
    spool.close()


def _crashed(directory: Path, committed: int, written: int) -> tuple[str, Path]:
    """Files as a crash leaves them: `committed` records signed, `written` more only in the file. Returns stream and segment."""
    spool = make_spool(directory)
    handle = spool.open_stream("w")
    writer = writer_of(handle)
    for number in range(committed):
        writer.append(request(number))
    spool.commit()
    for number in range(committed, committed + written):
        writer.append(request(number))
    _die(spool)
    return handle.stream, segment_paths(directory, handle.stream)[-1]


def _die(spool: Spool) -> None:
    """What SIGKILL leaves of an instance: files, and nothing that holds them."""
    for stream in spool._streams.values():
        stream.close_files()
    spool._streams.clear()
    spool._ledger.close()


@settings(max_examples=60, deadline=None)
@given(
    committed=st.integers(0, 6),
    written=st.integers(0, 4),
    cut=st.floats(0, 1),
    zeros=st.integers(0, 120),
    cut_signature=st.integers(0, 400),
)
def test_a_power_cut_at_any_byte(
    committed: int, written: int, cut: float, zeros: int, cut_signature: int
) -> None:
    """The unsynced tail of the segment is cut anywhere, or is zeros that the file system had not filled; the signature that was
    being written is cut as well."""
    place = Path(tempfile.mkdtemp())
    try:
        directory = place / "audit"
        stream, segment = _crashed(directory, committed, written)
        signed_to = _signed_end(segment, committed)
        size = segment.stat().st_size
        at = signed_to + int((size - signed_to) * cut)
        os.truncate(segment, at)
        os.truncate(segment, at + zeros)
        signatures = signature_path(segment)
        torn = b"\x90\x01\0\0" + b"s" * 500
        with signatures.open("ab") as file:
            file.write(torn[:cut_signature])
        before = verify(directory)
        assert before.ok, before.findings  # a crash is no alteration, also before anybody repairs it
        spool = make_spool(directory)
        spool.close()
        after = verify(directory)
        assert after.ok, after.findings
        rows = [row for row in read.records(directory) if row["kind"] == "request"]
        assert len(rows) >= committed
        assert [row["seq"] for row in rows] == list(range(len(rows)))
        (found,) = [item for item in after.streams if item.stream == stream]
        assert found.end.startswith("recovered after a crash")
        assert ("torn_tail" in found.end) is (after.gaps["torn_tail"] == 1)
        whole = sum(1 for _ in _frames_until(segment))
        assert whole == len(rows)
        # A second start finds nothing to do, and says nothing.
        again = make_spool(directory)
        assert again.recovered == []
        again.close()
    finally:
        shutil.rmtree(place)


def _signed_end(segment: Path, committed: int) -> int:
    with segment.open("rb") as file:
        *_, offset = read.read_header(file.read(65536))
        for number, (after, _, _) in enumerate(read.read_frames(file, offset)):
            if number < committed:
                offset = after
    return offset


def _frames_until(segment: Path) -> list[bytes]:
    with segment.open("rb") as file:
        *_, offset = read.read_header(file.read(65536))
        return [record for _, _, record in read.read_frames(file, offset)]


@settings(max_examples=40, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_change_of_what_was_signed_is_never_taken_for_a_crash(where: float, bit: int) -> None:
    place = Path(tempfile.mkdtemp())
    try:
        directory = place / "audit"
        stream, segment = _crashed(directory, 4, 0)
        data = bytearray(segment.read_bytes())
        data[int(where * len(data))] ^= 1 << bit
        segment.write_bytes(data)
        spool = make_spool(directory)
        assert "was left as it is" in spool.recovered[0]
        spool.close()
        report = verify(directory)
        assert stream in {finding.stream for finding in report.findings}
        assert list(entries(signature_path(segment).read_bytes()))  # evidence stays
    finally:
        shutil.rmtree(place)


def test_a_death_while_a_stream_or_segment_is_made(tmp_path: Path) -> None:
    """Every prefix of a new segment's file, before any writer had it."""
    directory = tmp_path / "audit"
    stream, segment = _crashed(directory, 3, 0)
    with segment.open("rb") as file:
        *_, length = read.read_header(data := file.read(65536))
    following = segment.with_name(f"{stream}.000001.seg")
    for size in range(0, length + 1, 9):
        copy = tmp_path / f"copy-{size}"
        shutil.copytree(directory, copy)
        (copy / following.name).write_bytes(data[:size])
        make_spool(copy).close()
        report = verify(copy)
        assert report.ok, (size, report.findings)
        assert len([row for row in read.records(copy) if row["kind"] == "request"]) == 3
