"""Spools with flows in them, for the tests of everything that reads, ships or verifies one."""

from __future__ import annotations

from pathlib import Path

from sidecar.audit.spool import Spool, StreamHandle
from sidecar.audit.writer import StreamWriter
from sidecar.model.ids import IdSource
from sidecar.model.record import ColumnPart, OperationPart, Record, ResponsePart, TargetPart, VerdictPart

IDS = IdSource()
START_NS = 1_790_000_000 * 10**9
HOST = "h"


def make_spool(directory: Path, *, max_bytes: int = 1 << 30, on_full: str = "block") -> Spool:
    return Spool(directory, HOST, max_bytes=max_bytes, on_full=on_full)


def writer_of(handle: StreamHandle, host: str = HOST) -> StreamWriter:
    return StreamWriter(
        handle.fd, stream=handle.stream, host=host, head=handle.head, next_seq=handle.next_seq
    )


def request(number: int, text: str = "", *, flow: str = "f" * 36, action: str = "allow") -> Record:
    at = START_NS + number * 10**6
    return Record(
        id=IDS.new(at), ts_ns=at, kind="request", flow=flow,
        operation=OperationPart(kind="query", text=text or f"SELECT {number}"),
        verdict=VerdictPart(action=action, rule="a-rule" if action == "deny" else None),
    )  # fmt: skip


def flow_of(number: int, text: str = "SELECT 1", *, value: str = "1") -> list[Record]:
    """A whole flow: opened, one statement with its rows, closed."""
    at = START_NS + number * 10**9
    flow = IDS.new(at)
    opening = Record(
        id=IDS.new(at), ts_ns=at, kind="open", flow=flow,
        origin={"exe": "/usr/bin/psql", "comm": "psql", "tgid": 100 + number, "uid": 1000, "cmdline": ["psql", "orders"],
                "cgroup": "/ci.slice", "ancestors": [{"comm": "bash", "pid": 7, "cmdline": ["bash", "nightly.sh"]}]},
        principal={"issuer": "https://issuer.example", "subject": "repo:acme/reports"},
        target=TargetPart(host="orders.internal", port=5432, protocol="postgres", address="10.0.0.9", host_source="dns"),
        verdict=VerdictPart(action="allow"),
    )  # fmt: skip
    asked = request(number * 1000 + 1, text, flow=flow)
    answered = Record(
        id=IDS.new(at + 2), ts_ns=asked.ts_ns + 1, kind="response", flow=flow, request=asked.id,
        response=ResponsePart(
            status="SELECT 1", rows=1, bytes=20, columns=(ColumnPart(name="a"), ColumnPart(name="ssn", masked="pii")),
            sample=((value, None),),
        ),
    )  # fmt: skip
    closed = Record(
        id=IDS.new(at + 3), ts_ns=answered.ts_ns + 1, kind="close", flow=flow, reason="client_closed"
    )
    return [opening, asked, answered, closed]
