"""Spools with flows in them, for the tests of everything that reads, ships or verifies one."""

from __future__ import annotations

from pathlib import Path

from sidecar.audit import hostkey
from sidecar.audit.outbox import Outbox
from sidecar.audit.receipt import RECEIPT, Said, line_of
from sidecar.audit.retention import COLLECTOR_KEY, kept_receipt
from sidecar.audit.segment import receipt_path
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


class Collector:
    """Signs receipts; holds no records. `made` is where its key is: several may have the same."""

    def __init__(self, directory: Path, made: Path) -> None:
        made.mkdir(exist_ok=True)
        self.key = hostkey.load_or_create(made)
        self.directory = directory
        if not (directory / COLLECTOR_KEY).exists():
            hostkey.write_whole(directory / COLLECTOR_KEY, self.key.public.hex() + "\n")

    def take(self, spool: Spool, stream: str) -> None:
        """Give a receipt for everything that is signed."""
        before = kept_receipt(self.directory, stream)
        outbox = Outbox(self.directory, stream, spool.host_key, after_seq=before[1].last if before else -1)
        while (found := outbox.next()) is not None:
            header = found[1]
            outbox.taken(header)
            said = Said(
                RECEIPT, header.host, stream, header.last, header.head.hex(), bool(header.end), "", header.ts_ns,
            )  # fmt: skip
            hostkey.write_whole(receipt_path(self.directory, stream), line_of(said.sign(self.key)))
