"""Reads records back from a spool directory: for `audit tail`, `show`, `export` and `why`. Never writes.

A spool may hold millions of records: streams are read lazily, and a record that is looked for is found in the raw bytes before
anything is decoded.
"""

from __future__ import annotations

import heapq
import mmap
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sidecar.audit.encode import decode_record
from sidecar.audit.segment import MAX_ENTRY_BYTES, frames, read_header, segment_paths, stream_names
from sidecar.errors import AuditError

JOINED: Final = ("origin", "workload", "principal", "target", "identity_error")
"""Of a flow's `open` record, filled into its other records by `joined`."""

FOLLOW_INTERVAL_S: Final = 0.25
MIN_ID_DIGITS: Final = 4
"""Of an id's end that are looked for."""
MAX_OPEN_FLOWS: Final = 100_000
"""`open` records that `joined` keeps for flows whose `close` it has not met."""


@dataclass(frozen=True, slots=True)
class RecordView:
    """A record and the `open` record of its flow, both as maps."""

    record: dict[str, Any]
    opened: dict[str, Any] | None

    def joined(self) -> dict[str, Any]:
        """The record with who, whose and where of its flow filled in: it can be read alone."""
        found = dict(self.record)
        if self.opened is not None:
            for name in JOINED:
                if name not in self.opened or found.get("kind") == "gap":
                    continue
                own = found.get(name)
                if own is None:
                    found[name] = self.opened[name]
                elif isinstance(own, dict) and isinstance(self.opened[name], dict):
                    found[name] = {**self.opened[name], **own}
        return found


def _bytes_of(path: Path) -> mmap.mmap | bytes:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:  # retention removed it
        return b""


def _segment_records(path: Path) -> Iterator[bytes]:
    """Stored records of a segment. Raises AuditError where its header is damaged."""
    data = _bytes_of(path)
    if not data:
        return
    *_, offset = read_header(data[:MAX_ENTRY_BYTES])
    with memoryview(data) as view:
        for _, _, record in frames(view, offset):
            yield record


def _stream_records(directory: Path, stream: str) -> Iterator[dict[str, Any]]:
    for path in segment_paths(directory, stream):
        for record in _segment_records(path):
            yield decode_record(record)


def _streams(directory: Path) -> list[str]:
    if not directory.is_dir():
        raise AuditError(f"there is no audit directory {directory}", hint="name one with --directory")
    return stream_names(directory)


def _opened_ns(stream: str) -> int:
    """When a stream was opened, by its name (UUIDv7); 0 for a name that is none."""
    try:
        return int(stream.replace("-", "")[:12], 16) * 1_000_000
    except ValueError:
        return 0


def records(directory: Path) -> Iterator[dict[str, Any]]:
    """All records: streams merged by time, each in the order of its chain. Raises AuditError where one is damaged."""
    waiting = deque(_streams(directory))
    heap: list[tuple[int, int, dict[str, Any], Iterator[dict[str, Any]]]] = []
    number = 0
    while waiting or heap:
        while waiting and (not heap or _opened_ns(waiting[0]) <= heap[0][0]):
            source = _stream_records(directory, waiting.popleft())
            first = next(source, None)
            if first is not None:
                heapq.heappush(heap, (int(first.get("ts_ns", 0)), number, first, source))
                number += 1
        if not heap:
            continue
        latest, order, record, source = heap[0]
        yield record
        following = next(source, None)
        if following is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (max(latest, int(following.get("ts_ns", 0))), order, following, source))


def joined(directory: Path) -> Iterator[dict[str, Any]]:
    """All records with their flow's facts joined in, in order of time."""
    join = Joiner(directory, look_back=False)
    for record in records(directory):
        yield join(record)


class Joiner:
    """Joins each record with the `open` record of its flow, met before or, with `look_back`, looked for in the spool."""

    def __init__(self, directory: Path, *, look_back: bool) -> None:
        self._directory = directory
        self._look_back = look_back
        self._opened: dict[str, dict[str, Any] | None] = {}

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        flow, kind = str(record.get("flow", "")), record.get("kind")
        if not flow:
            return record
        if kind == "open":
            if len(self._opened) >= MAX_OPEN_FLOWS:
                del self._opened[next(iter(self._opened))]
            self._opened[flow] = record
            return record
        if self._look_back and flow not in self._opened:
            self._opened[flow] = opening_of(self._directory, flow)
        view = RecordView(record, self._opened.get(flow))
        if kind == "close":
            self._opened.pop(flow, None)
        return view.joined()


def _search(directory: Path, wanted: bytes) -> Iterator[dict[str, Any]]:
    """Records whose stored bytes hold `wanted`."""
    for stream in _streams(directory):
        for path in segment_paths(directory, stream):
            data = _bytes_of(path)
            if not data or data.find(wanted) < 0:
                continue
            for record in _segment_records(path):
                if wanted in record:
                    yield decode_record(record)


def opening_of(directory: Path, flow: str) -> dict[str, Any] | None:
    """The `open` record of a flow, by its full id."""
    for record in _search(directory, flow.encode()):
        if record.get("kind") == "open" and record.get("flow") == flow:
            return record
    return None


def _digits(text: str) -> str:
    wanted = text.strip().lower()
    if len(wanted) < MIN_ID_DIGITS:
        raise AuditError(f"{text!r} is too short for an id", hint=f"give at least {MIN_ID_DIGITS} digits")
    return wanted


def flow_records(directory: Path, flow: str) -> list[dict[str, Any]]:
    """One flow's records in order of time, by full id, its last digits, or those of one of its records. Empty where there is
    none; AuditError where several match."""
    wanted = _digits(flow)
    found = [r for r in _search(directory, wanted.encode()) if str(r.get("flow", "")).endswith(wanted)]
    if not found:
        view = find_record(directory, wanted)
        if view is None or not view.record.get("flow"):
            return []
        return flow_records(directory, view.record["flow"])
    flows = {record["flow"] for record in found}
    if len(flows) > 1:
        raise AuditError(f"{len(flows)} flows end in {flow}", hint="give more digits")
    found.sort(key=lambda record: (record.get("ts_ns", 0), record.get("seq", 0)))
    return found


def find_record(directory: Path, record_id: str) -> RecordView | None:
    """By full id, or by its last digits, or by a hold's. The request itself is preferred to what refers to it; where it was held,
    what became of that is under `hold`. Raises AuditError where several match."""
    wanted = _digits(record_id)
    matches: dict[str, dict[str, Any]] = {}
    for record in _search(directory, wanted.encode()):
        names = (str(record.get("id", "")), str((record.get("hold") or {}).get("id", "")))
        if any(name.endswith(wanted) for name in names):
            matches.setdefault(names[0], record)
    if not matches:
        return None
    if len({record.get("flow") or record["id"] for record in matches.values()}) > 1:
        raise AuditError(f"{len(matches)} records end in {record_id}", hint="give more digits")
    order = {"request": 0, "open": 1, "hold": 2, "decision": 3}
    record = min(matches.values(), key=lambda item: order.get(str(item.get("kind")), 4))
    flow = str(record.get("flow", ""))
    if record.get("kind") in ("hold", "decision") and record.get("request"):
        held = next(
            (r for r in _search(directory, record["request"].encode()) if r.get("id") == record["request"]),
            None,
        )
        record = held or record
    if record.get("kind") == "request":
        holds = [
            r
            for r in _search(directory, record["id"].encode())
            if r.get("request") == record["id"] and r.get("hold")
        ]
        if holds:
            record = {
                **record,
                "hold": max(holds, key=lambda r: (r.get("ts_ns", 0), r.get("kind") == "decision"))["hold"],
            }
    opened = record if record.get("kind") == "open" else opening_of(directory, flow) if flow else None
    return RecordView(record, opened)


class Follower:
    """The newest records, then what is written from then on: nothing is left out or shown twice between the two."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._offsets: dict[Path, int] = {}

    def newest(self, count: int) -> list[dict[str, Any]]:
        """The last `count` records that are there, in order of time. Call it first, with 0 for none."""
        found: list[dict[str, Any]] = []
        for stream in _streams(self._directory):
            tail: deque[bytes] = deque(maxlen=count)
            for path in segment_paths(self._directory, stream):
                for record in self._new(path):
                    tail.append(record)
            found += map(decode_record, tail)
        found.sort(key=lambda record: (record.get("ts_ns", 0), record.get("seq", 0)))
        return found[-count:] if count else []

    def new(self) -> list[dict[str, Any]]:
        """What was written since the last call, in order of time."""
        found = [
            decode_record(record)
            for stream in _streams(self._directory)
            for path in segment_paths(self._directory, stream)
            for record in self._new(path)
        ]
        found.sort(key=lambda record: (record.get("ts_ns", 0), record.get("seq", 0)))
        return found

    def _new(self, path: Path) -> Iterator[bytes]:
        start = self._offsets.get(path, 0)
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size <= start:
                    return
                file.seek(start)
                data = file.read()
        except FileNotFoundError:
            self._offsets.pop(path, None)
            return
        offset = 0
        if not start:
            try:
                *_, offset = read_header(data)
            except AuditError:
                return  # being made at this moment
            self._offsets[path] = offset
        for after, _, record in frames(data, offset):
            self._offsets[path] = start + after
            yield record


def follow(directory: Path) -> Iterator[dict[str, Any]]:
    """Records that are written from now on, for ever."""
    follower = Follower(directory)
    follower.newest(0)
    while True:
        yield from follower.new()
        time.sleep(FOLLOW_INTERVAL_S)
