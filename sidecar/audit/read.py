"""Reads records back from a spool directory: for `audit tail`, `show`, `export` and `why`. Never writes.

A spool may hold millions of records: streams are read lazily, and a record that is looked for is found in the raw bytes before
anything is decoded. Every record is checked against the hash that stands beside it. What does not hold ends the reading of that
stream and is told to the caller (`damaged`), with file, byte and record; the others go on. Signatures and receipts are `verify`'s.
"""

from __future__ import annotations

import contextlib
import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

from sidecar.audit import chain
from sidecar.audit.encode import decode_record
from sidecar.audit.segment import (
    FRAME,
    MAX_ENTRY_BYTES,
    all_segments,
    list_directory,
    lock_path,
    read_frames,
    read_header,
    segment_number,
    sizes_newest_first,
    start_of,
)
from sidecar.errors import AuditError

JOINED: Final = ("origin", "workload", "principal", "target", "identity_error")
"""Of a flow's `open` record, filled into its other records by `joined`."""

FOLLOW_INTERVAL_S: Final = 0.25
MIN_ID_DIGITS: Final = 4
"""Of an id's end that are looked for."""
MAX_OPEN_FLOWS: Final = 100_000
"""`open` records that `joined` keeps for flows whose `close` it has not met."""
SEARCH_BYTES: Final = 1024 * 1024
CHANGE_SLACK_NS: Final = 60 * 10**9
"""A record may be this much younger than the last change of its file: clocks are set."""
NO_RECORD: Final = "the file goes on with what is no whole record"

Damaged: TypeAlias = Callable[[AuditError], None]
"""Called with what does not hold; reading goes on with what does."""


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


def raise_damaged(error: AuditError) -> None:
    raise error


def _bad(path: Path, offset: int, problem: str) -> AuditError:
    return AuditError(
        f"{path}, byte {offset}: {problem}", hint=f"sidecar audit verify {path.parent}: says what else"
    )


def _open_segment(path: Path, file: BinaryIO) -> tuple[bytes | None, int]:
    """The chain's hash before the first record, where it is known, and the offset of that."""
    try:
        header, *_, offset = read_header(file.read(MAX_ENTRY_BYTES))
    except AuditError as error:
        raise _bad(path, 0, error.message) from error
    return (start_of(header) if header.segment == 0 else None), offset


def _segment_records(
    path: Path, head: bytes | None = None, *, size: int | None = None, being_written: bool | None = None
) -> Iterator[tuple[int, bytes, bytes]]:
    """(offset, hash, stored record) of each record of a segment; `head` is the hash before the first one. Only its first `size`
    bytes are read, all of it without that. Raises AuditError where one does not hold."""
    if being_written is None:
        being_written = _is_written(path.parent, path.name.split(".")[0])
    try:
        file = path.open("rb")
    except FileNotFoundError:  # retention removed it
        return
    with file:
        try:
            start, offset = _open_segment(path, file)
        except AuditError:
            if being_written:
                return
            raise
        head = head or start
        for after, digest, record in read_frames(file, offset, size):
            if head is not None and chain.link(head, record) != digest:
                raise _bad(path, offset, f"{_name(record)} does not follow the chain: it was altered")
            yield offset, digest, record
            offset, head = after, digest
        file.seek(offset)
        left = file.read(FRAME.size)
        if left and not being_written:
            raise _bad(path, offset, NO_RECORD)


def _name(record: bytes) -> str:
    try:
        found = decode_record(record)
    except AuditError:
        return "a record"
    return f"record {found.get('seq')} ({found.get('id')})"


def _decode(path: Path, offset: int, record: bytes) -> dict[str, Any]:
    try:
        return decode_record(record)
    except AuditError as error:
        raise _bad(path, offset, error.message) from error


def _is_written(directory: Path, stream: str) -> bool:
    """Whether an instance writes the stream, or has left it without an end. To be asked before the stream is read."""
    return lock_path(directory, stream).exists()


def _stream_records(
    directory: Path, stream: str, segments: list[Path], damaged: Damaged
) -> Iterator[dict[str, Any]]:
    head: bytes | None = None
    written = _is_written(directory, stream)
    before: int | None = None
    try:
        for path, size in sizes_newest_first(segments):
            number = segment_number(path)
            if before is not None and number != before + 1:
                head = None  # what was between is gone: `verify` knows whether it may be
            before = number
            found = False
            for offset, digest, record in _segment_records(path, head, size=size, being_written=written):
                head, found = digest, True
                yield _decode(path, offset, record)
            if not found and not path.exists():
                head = None  # retention removed it meanwhile
    except AuditError as error:
        damaged(error)


def _opened_ns(stream: str) -> int:
    """When a stream was opened, by its name (UUIDv7); 0 for a name that is none."""
    try:
        return int(stream.replace("-", "")[:12], 16) * 1_000_000
    except ValueError:
        return 0


def records(directory: Path, damaged: Damaged = raise_damaged) -> Iterator[dict[str, Any]]:
    """All records of the segments that are there: streams merged by time, each in the order of its chain."""
    waiting = deque(all_segments(directory, list_directory(directory)).items())
    heap: list[tuple[int, int, dict[str, Any], Iterator[dict[str, Any]]]] = []
    number = 0
    while waiting or heap:
        while waiting and (not heap or _opened_ns(waiting[0][0]) <= heap[0][0]):
            source = _stream_records(directory, *waiting.popleft(), damaged)
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


def joined(directory: Path, damaged: Damaged = raise_damaged) -> Iterator[dict[str, Any]]:
    """All records with their flow's facts joined in, in order of time."""
    join = Joiner(directory, look_back=False)
    for record in records(directory, damaged):
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


def _search(
    directory: Path, wanted: bytes, damaged: Damaged = raise_damaged, *, newest_first: bool = False
) -> Iterator[dict[str, Any]]:
    """Records whose stored bytes hold `wanted`."""
    found = all_segments(directory, list_directory(directory))
    paths = [path for segments in found.values() for path in segments]
    for path in reversed(paths) if newest_first else paths:
        if not _holds(path, wanted):
            continue
        try:
            for offset, _, record in _segment_records(path):
                if wanted in record:
                    yield _decode(path, offset, record)
        except AuditError as error:
            damaged(error)


def _holds(path: Path, wanted: bytes) -> bool:
    """Whether a file holds `wanted` anywhere."""
    try:
        with path.open("rb") as file:
            before = b""
            while chunk := file.read(SEARCH_BYTES):
                if wanted in before + chunk:
                    return True
                before = chunk[-len(wanted) :]
    except FileNotFoundError:  # retention removed it
        pass
    return False


def _ignore(error: AuditError) -> None:
    """For a look-up on the side: whoever reads the streams is told."""


def opening_of(directory: Path, flow: str) -> dict[str, Any] | None:
    """The `open` record of a flow, by its full id."""
    for record in _search(directory, flow.encode(), _ignore, newest_first=True):
        if record.get("kind") == "open" and record.get("flow") == flow:
            return record
    return None


def _digits(text: str) -> str:
    wanted = text.strip().lower()
    if len(wanted) < MIN_ID_DIGITS:
        raise AuditError(f"{text!r} is too short for an id", hint=f"give at least {MIN_ID_DIGITS} digits")
    return wanted


def flow_records(directory: Path, flow: str, damaged: Damaged = raise_damaged) -> list[dict[str, Any]]:
    """One flow's records in order of time, by full id, its last digits, or those of one of its records. Empty where there is
    none; AuditError where several match."""
    wanted = _digits(flow)
    found = [
        r for r in _search(directory, wanted.encode(), damaged) if str(r.get("flow", "")).endswith(wanted)
    ]
    if not found:
        view = find_record(directory, wanted)
        if view is None or not view.record.get("flow"):
            return []
        return flow_records(directory, view.record["flow"], damaged)
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
    for record in _search(directory, wanted.encode(), _ignore):
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
            (
                r
                for r in _search(directory, record["request"].encode(), _ignore)
                if r.get("id") == record["request"]
            ),
            None,
        )
        record = held or record
    if record.get("kind") == "request":
        holds = [
            r
            for r in _search(directory, record["id"].encode(), _ignore)
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

    def __init__(self, directory: Path, damaged: Damaged = raise_damaged) -> None:
        self._directory = directory
        self._damaged = damaged
        self._places: dict[Path, tuple[int, bytes | None]] = {}
        """Of each segment: the offset of what has not been seen, and the chain's hash before it."""
        self._over: set[Path] = set()
        """Segments that are not looked at again: of ended streams, or damaged."""

    def newest(self, count: int) -> list[dict[str, Any]]:
        """The last `count` records that are there, in order of time. Call it first, with 0 for none.

        What was last written before the oldest of them is not read: a segment's time of change tells."""
        found: list[tuple[tuple[int, int], int, dict[str, Any]]] = []  # a heap, the oldest first
        number = 0
        for last_ns, path, written in self._by_change():
            if not count or (len(found) == count and last_ns + CHANGE_SLACK_NS < found[0][0][0]):
                self._skip(path, written)
                continue
            for place in deque(self._new(path, written), maxlen=count):
                record = _decode(*place)
                number += 1
                item = (_moment(record), number, record)
                if len(found) < count:
                    heapq.heappush(found, item)
                else:
                    heapq.heappushpop(found, item)
        return [record for _, _, record in sorted(found)]

    def new(self) -> list[dict[str, Any]]:
        """What was written since the last call, in order of time."""
        found = [
            _decode(*place)
            for path, written in self._segments()
            if path not in self._over
            for place in self._new(path, written)
        ]
        found.sort(key=_moment)
        return found

    def _segments(self) -> list[tuple[Path, bool]]:
        """Each, and whether an instance writes its stream or has left it without an end."""
        names = list_directory(self._directory)
        locked = {name.removesuffix(".lock") for name in names if name.endswith(".lock")}
        return [
            (path, stream in locked)
            for stream, paths in all_segments(self._directory, names).items()
            for path in paths
        ]

    def _by_change(self) -> list[tuple[int, Path, bool]]:
        """With the time of its last change, the newest first."""
        found = []
        for path, written in self._segments():
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_mtime_ns, path, written))
        found.sort(key=lambda item: (item[0], item[1]), reverse=True)
        return found

    def _skip(self, path: Path, written: bool) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._places[path] = (path.stat().st_size, None)
        if not written:
            self._over.add(path)

    def _new(self, path: Path, being_written: bool) -> Iterator[tuple[Path, int, bytes]]:
        offset, head = self._places.get(path, (0, None))
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if size != offset or not (offset or being_written):
                    file.seek(0)
                    if not offset:
                        head, offset = _open_segment(path, file)
                    for after, digest, record in read_frames(file, offset):
                        if head is not None and chain.link(head, record) != digest:
                            raise _bad(
                                path, offset, f"{_name(record)} does not follow the chain: it was altered"
                            )
                        place = (path, offset, record)
                        offset, head = after, digest
                        self._places[path] = (offset, head)
                        yield place
                    self._places[path] = (offset, head)
            if not being_written:
                self._over.add(path)
                if size > offset:
                    raise _bad(path, offset, NO_RECORD)
        except FileNotFoundError:
            self._places.pop(path, None)
        except AuditError as error:
            if being_written and not offset:
                return  # being made at this moment
            self._over.add(path)
            self._damaged(error)


def _moment(record: dict[str, Any]) -> tuple[int, int]:
    return record.get("ts_ns", 0), record.get("seq", 0)
