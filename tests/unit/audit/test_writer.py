"""The writer's two ways put the same into the file, and neither loses or doubles a record where the file takes only a part."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sidecar.audit import read
from sidecar.audit.spool import Spool
from sidecar.audit.verify import verify
from sidecar.audit.writer import StreamWriter
from sidecar.errors import AuditError
from sidecar.model.ids import IdSource
from sidecar.model.record import RECORD_VERSION, EncodedRecord
from sidecar.session.postgres_lane import COMPILED

IDS = IdSource()
pack = msgspec.msgpack.encode


def encoded(number: int, text: str = "") -> EncodedRecord:
    name = IDS.new(10**18 + number)
    front = b"\x89" + b"".join(
        pack(item) for item in ("v", RECORD_VERSION, "id", name, "ts_ns", 10**18 + number)
    )
    rest = b"".join(
        pack(item) for item in ("kind", "request", "flow", "f" * 36, "detail", text or str(number))
    )
    return EncodedRecord("request", name, front, rest)


def put(writer: StreamWriter, record: EncodedRecord) -> None:
    """As the receiving end of a connection does it: the short way, and where that does not take it, the long one."""
    if not writer.put([record]):
        writer.append(record)


@pytest.fixture(params=["put", "append"])
def add(request: pytest.FixtureRequest) -> Callable[[StreamWriter, EncodedRecord], None]:
    if request.param == "put":
        if not COMPILED:
            pytest.skip("the short way was not compiled (setup.py)")
        return put
    return StreamWriter.append


def opened(spool: Spool) -> StreamWriter:
    handle = spool.open_stream("w")
    return StreamWriter(handle.fd, stream=handle.stream, host="h", head=handle.head, next_seq=handle.next_seq)


def test_both_ways_are_one_chain(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "audit", "h", max_bytes=1 << 30)
    writer = opened(spool)
    for number in range(20):
        (put if number % 3 and COMPILED else StreamWriter.append)(writer, encoded(number))
    spool.commit()
    rows = list(read.records(spool.directory))
    assert [(row["seq"], row["detail"], row["host"]) for row in rows] == [(n, str(n), "h") for n in range(20)]
    spool.close()
    assert verify(tmp_path / "audit").ok


@pytest.mark.parametrize("room", [0, 1, 35, 36, 37, 100, 400])
def test_a_file_that_takes_a_part(
    tmp_path: Path, add: Callable[[StreamWriter, EncodedRecord], None], room: int
) -> None:
    """A process of its own may write only up to a size (RLIMIT_FSIZE); then it may write on. Nothing is lost or doubled."""
    spool = Spool(tmp_path / "audit", "h", max_bytes=1 << 30)
    writer = opened(spool)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            add(writer, encoded(0))
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.fstat(writer.fd).st_size + room, hard))
            record = encoded(1, "x" * 300)
            try:
                add(writer, record)
                status = 2  # it fitted: the case shows nothing
            except AuditError:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
                add(writer, record)  # what a flow does that waits for room
                add(writer, encoded(2))
                status = 0
        finally:
            os._exit(status)
    _, result = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(result) == 0
    spool.commit()
    spool.close()
    rows = list(read.records(tmp_path / "audit"))
    assert [row["detail"] for row in rows] == ["0", "x" * 300, "2"]
    assert verify(tmp_path / "audit").ok
