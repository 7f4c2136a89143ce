"""Reads records back from a spool directory: for `audit tail`, `show`, `export` and `why`. Never writes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sidecar.audit.encode import decode_record
from sidecar.audit.segment import frames, read_header, segment_paths, stream_names
from sidecar.errors import AuditError

JOINED: Final = ("origin", "workload", "principal", "target", "identity_error")
FOLLOW_INTERVAL_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class RecordView:
    """A record and the `open` record of its flow, both as maps."""

    record: dict[str, Any]
    opened: dict[str, Any] | None

    def joined(self) -> dict[str, Any]:
        """The record with who, whose and where of its flow filled in."""
        found = dict(self.record)
        if self.opened is not None:
            for name in JOINED:
                if name in self.opened and (
                    name not in found or (name == "origin" and found["kind"] != "gap")
                ):
                    found[name] = self.opened[name]
        return found


def _segment_records(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    data = path.read_bytes()
    if not offset:
        *_, offset = read_header(data)
    for after, _, record in frames(data, offset):
        yield after, decode_record(record)


def records(directory: Path) -> Iterator[dict[str, Any]]:
    """All records, in order of time. Streams are merged by their records' times. Raises AuditError where one is damaged."""
    if not directory.is_dir():
        raise AuditError(f"there is no audit directory {directory}", hint="name one with --directory")
    found = [
        record
        for stream in stream_names(directory)
        for path in segment_paths(directory, stream)
        for _, record in _segment_records(path)
    ]
    found.sort(key=lambda record: (record.get("ts_ns", 0), record.get("seq", 0)))
    yield from found


def joined(directory: Path) -> Iterator[dict[str, Any]]:
    """All records with their flow's facts joined in, in order of time."""
    opened: dict[str, dict[str, Any]] = {}
    for record in records(directory):
        flow = record.get("flow", "")
        if record["kind"] == "open":
            opened[flow] = record
        yield RecordView(record, opened.get(flow)).joined()


def flow_records(directory: Path, flow: str) -> list[dict[str, Any]]:
    """One flow's records, by full id or its last digits. Empty where there is none; AuditError where several match."""
    found = [
        record
        for record in records(directory)
        if record.get("flow", "").endswith(flow) and record.get("flow")
    ]
    flows = {record["flow"] for record in found}
    if len(flows) > 1:
        raise AuditError(f"{len(flows)} flows end in {flow}", hint="give more digits")
    return found


def find_record(directory: Path, record_id: str) -> RecordView | None:
    """By full id of a record or a hold, or by its last digits. A hold is found as the request that was held, with
    what became of it under `hold`. Raises AuditError where several match."""
    wanted = record_id.lower()
    rows = list(records(directory))
    by_id = {str(record.get("id", "")): record for record in rows}
    holds: dict[str, dict[str, Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for record in rows:
        hold_id = str((record.get("hold") or {}).get("id", ""))
        request = str(record.get("request", ""))
        if hold_id and request:
            holds[request] = record["hold"]  # the newest: pending first, then the decision
        if hold_id.endswith(wanted) and request in by_id:
            found[request] = by_id[request]
        elif hold_id.endswith(wanted) or str(record.get("id", "")).endswith(wanted):
            found[record["id"]] = record
    if not found:
        return None
    if len({record.get("flow") for record in found.values()}) > 1:
        raise AuditError(f"{len(found)} records end in {record_id}", hint="give more digits")
    record = next((item for item in found.values() if item["kind"] == "request"), next(iter(found.values())))
    if record["id"] in holds:
        record = {**record, "hold": holds[record["id"]]}
    opened = (row for row in rows if row["kind"] == "open" and row.get("flow") == record.get("flow"))
    return RecordView(record, next(opened, None))


def follow(directory: Path) -> Iterator[dict[str, Any]]:
    """Records that are written from now on, for ever."""
    offsets: dict[Path, int] = {}
    first = True
    while True:
        for stream in stream_names(directory):
            for path in segment_paths(directory, stream):
                if path not in offsets:
                    data = path.read_bytes()
                    try:
                        *_, start = read_header(data)
                    except AuditError:
                        continue
                    offsets[path] = len(data) if first else start
                if path.stat().st_size > offsets[path]:
                    for after, record in _segment_records(path, offsets[path]):
                        offsets[path] = after
                        yield record
        first = False
        time.sleep(FOLLOW_INTERVAL_S)
