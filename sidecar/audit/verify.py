"""Verifies a spool directory offline: ledger, chains, signatures, receipts, gaps; names the first bad record of each stream.

Reads only. May run beside live instances: what they write meanwhile counts as not signed yet. The order of reading is what makes
that sound: receipts before signatures before records, the ledger first and again for what is missing at the end.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sidecar.audit import chain, hostkey
from sidecar.audit.batch import Header
from sidecar.audit.encode import decode_record
from sidecar.audit.ledger import DROPPED, OPENED, REMOVED, RETIRED, Entry, read_ledger
from sidecar.audit.receipt import RECEIPT, REFUSAL, Said, read_line
from sidecar.audit.retention import COLLECTOR_KEY
from sidecar.audit.segment import (
    FRAME,
    MAX_RECORD_BYTES,
    frames,
    is_live,
    lock_path,
    read_header,
    receipt_path,
    refusal_path,
    segment_number,
    segment_paths,
    signature_path,
    start_of,
    stream_names,
    whole_entries,
)
from sidecar.errors import AuditError

LEDGER_STREAM: Final = ""
"""Stands as the stream of findings that concern the directory as a whole."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not hold. `seq` is the first bad record's, -1 where none can be named; `record` its id."""

    stream: str
    seq: int
    record: str
    problem: str


@dataclass(slots=True)
class StreamReport:
    stream: str
    label: str = ""
    records: int = 0
    """Records of the stream that are here, or were and are with the collector."""
    signed: int = 0
    """Records under a signature of the host."""
    receipted: int = 0
    removed: int = 0
    """Records that are with the collector only."""
    end: str = ""
    live: bool = False
    crashed: bool = False
    """Its instance is gone and the next start has not ended it yet."""
    unsigned: int = 0
    """Written after the last signature: a live stream's newest ones, or a crash's."""


@dataclass(slots=True)
class Report:
    directory: str
    host_key: str = ""
    streams: list[StreamReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is known to be incomplete, and was recorded as such when it happened."""
    gaps: Counter[str] = field(default_factory=Counter)
    """Gap records by their reason."""

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def records(self) -> int:
        return sum(stream.records for stream in self.streams)

    def bad(self, stream: str, problem: str, seq: int = -1, record: str = "") -> None:
        self.findings.append(Finding(stream, seq, record, problem))


class _Bad(AuditError):
    """The first thing in a stream that does not hold."""

    def __init__(self, problem: str, seq: int = -1, record: str = "") -> None:
        super().__init__(problem)
        self.seq = seq
        self.record = record


def verify(directory: Path) -> Report:
    """Never raises for what is in the directory; AuditError where there is none."""
    if not directory.is_dir():
        raise AuditError(f"there is no audit directory {directory}", hint="name one with --directory")
    report = Report(str(directory))
    if not (directory / hostkey.PUBLIC_FILE).exists() and not stream_names(directory):
        report.bad(LEDGER_STREAM, f"{directory} is no spool: it holds neither a host's key nor records")
        return report
    try:
        public = hostkey.load_public(directory / hostkey.PUBLIC_FILE)
    except AuditError as error:
        report.bad(LEDGER_STREAM, error.message)
        return report
    report.host_key = public.hex()
    try:
        hostkey.check_pair(directory)
    except AuditError as error:
        report.bad(LEDGER_STREAM, error.message)
    collector = _collector_key(directory, report)
    ledger = _ledger(directory, public, report)
    names = stream_names(directory)
    for name in names:
        if name in ledger.retired:
            continue
        attempt = Report("")
        _verify_stream(directory, name, public, collector, ledger, attempt)
        if attempt.findings and is_live(directory, name):  # retention may have removed segments meanwhile
            ledger = _ledger(directory, public, Report(""))
            attempt = Report("")
            _verify_stream(directory, name, public, collector, ledger, attempt)
        report.streams += attempt.streams
        report.findings += attempt.findings
        report.notes += attempt.notes
        report.gaps += attempt.gaps
    _verify_ledger(directory, public, collector, ledger, set(names), report)
    return report


# -- the directory as a whole


@dataclass(slots=True)
class _Ledger:
    readable: bool = False
    opened: set[str] = field(default_factory=set)
    kept_from: dict[str, Entry] = field(default_factory=dict)
    """The newest removal from a stream that still has segments."""
    retired: dict[str, Entry] = field(default_factory=dict)
    dropped: list[Entry] = field(default_factory=list)


def _ledger(directory: Path, public: bytes, report: Report) -> _Ledger:
    found = _Ledger()
    try:
        entries = read_ledger(directory, public)
    except (AuditError, OSError) as error:
        report.bad(LEDGER_STREAM, str(error))
        return found
    found.readable = True
    for entry in entries:
        if entry.what == OPENED:
            found.opened.add(entry.stream)
        elif entry.what in (REMOVED, DROPPED):
            found.kept_from[entry.stream] = entry
        elif entry.what == RETIRED:
            found.retired[entry.stream] = entry
        if entry.what == DROPPED:
            found.dropped.append(entry)
    return found


def _verify_ledger(
    directory: Path, public: bytes, collector: bytes | None, ledger: _Ledger, names: set[str], report: Report
) -> None:
    if not ledger.readable:
        return
    for entry in ledger.dropped:
        report.bad(
            entry.stream,
            "missing: unshipped records up to this one were dropped (audit.on_full: drop)",
            entry.seq - 1,
        )
    for entry in ledger.retired.values():
        report.streams.append(
            StreamReport(entry.stream, "", entry.seq, entry.seq, entry.seq, entry.seq, "shipped and removed")
        )
        try:
            if collector is None:
                raise AuditError(f"{COLLECTOR_KEY} is missing")
            said = read_line(entry.receipt, collector, RECEIPT)
            if (said.stream, said.last, said.head, said.ended) != (
                entry.stream, entry.seq - 1, entry.head.hex(), True,
            ):  # fmt: skip
                raise AuditError("its receipt is for something else")
        except AuditError as error:
            report.bad(
                entry.stream, f"removed, but no receipt says that a collector holds it: {error.message}"
            )
    gone_whole = {entry.stream for entry in ledger.dropped}
    missing = ledger.opened - names - set(ledger.retired) - gone_whole
    if missing:  # retired meanwhile?
        missing -= set(_ledger(directory, public, Report("")).retired)
    for name in sorted(missing):
        report.bad(name, "missing: the ledger names this stream and no file of it is there")


def _collector_key(directory: Path, report: Report) -> bytes | None:
    path = directory / COLLECTOR_KEY
    if not path.exists():
        return None
    try:
        return hostkey.load_public(path)
    except AuditError as error:
        report.bad(LEDGER_STREAM, error.message)
        return None


# -- one stream


def _verify_stream(
    directory: Path, name: str, public: bytes, collector: bytes | None, ledger: _Ledger, report: Report
) -> None:
    found = StreamReport(name)
    report.streams.append(found)
    try:
        found.live = is_live(directory, name)
        found.crashed = not found.live and lock_path(directory, name).exists()
        said = _said(receipt_path(directory, name), name, collector, RECEIPT)
        refused = _said(refusal_path(directory, name), name, collector, REFUSAL)
        removed = ledger.kept_from.get(name)
        headers = _headers(directory, name, public, found, removed)
        _check_receipt(said, refused, headers, removed, found)
        _records(directory, name, public, headers, removed, found, report)
        if removed is not None and removed.what == REMOVED and (said is None or said.last < removed.seq - 1):
            raise _Bad("segments were removed and no receipt says that a collector holds them", 0)
        if ledger.readable and name not in ledger.opened:
            if found.records:
                raise _Bad("the ledger does not name this stream: it was cut, or the stream was put here")
            report.notes.append(
                f"stream {name} has no records and is not in the ledger: its opening was cut short"
            )
        if not found.end and not found.live:
            if not found.crashed:
                raise _Bad("cut: the stream has no signed end, and no instance is writing it", found.records)
            report.notes.append(
                f"stream {name} has no end and its instance is gone: after a crash the next start ends it"
            )
        elif found.end and "torn_tail" in found.end:
            report.notes.append(f"stream {name}: {found.end}")
    except _Bad as error:
        report.bad(name, error.message, error.seq, error.record)
    except AuditError as error:
        report.bad(name, error.message)
    except OSError as error:
        report.bad(name, f"cannot be read: {error.strerror}: {error.filename}")


def _said(path: Path, name: str, collector: bytes | None, kind: str) -> Said | None:
    if not path.exists():
        return None
    if collector is None:
        raise _Bad(f"there is a collector's {kind} and {COLLECTOR_KEY} is missing")
    try:
        said = read_line(path.read_text(encoding="utf-8"), collector, kind)
    except UnicodeDecodeError as error:
        raise _Bad(f"a collector's {kind} does not hold: {error.reason}") from error
    if said.stream != name:
        raise _Bad(f"a collector's {kind} is for another stream")
    return said


def _headers(
    directory: Path, name: str, public: bytes, found: StreamReport, removed: Entry | None
) -> list[Header]:
    """Everything signed of the stream, verified and contiguous."""
    headers: list[Header] = []
    expected = removed.seq if removed is not None else 0
    previous = removed.head if removed is not None else None
    paths = segment_paths(directory, name)
    orphans = set(directory.glob(f"{name}.[0-9]*.sig")) - {signature_path(path) for path in paths}
    if orphans:
        raise _Bad(f"missing: {min(orphans).name} has no segment", expected)
    for path in paths:
        if removed is not None and segment_number(path) < removed.segment:
            continue  # a removal that a crash cut; the next start finishes it
        try:
            data = signature_path(path).read_bytes()
        except FileNotFoundError as error:
            raise _Bad(f"{signature_path(path).name} is missing", expected) from error
        for encoded, signature in whole_entries(data, torn_tail=found.live or found.crashed):
            if not hostkey.verify(public, signature, encoded):
                raise _Bad(f"{signature_path(path).name}: a signature does not hold", expected)
            header = Header.decode(encoded)
            if header.stream != name:
                raise _Bad(f"{signature_path(path).name} belongs to another stream", expected)
            if header.first != expected or (previous is not None and header.prev != previous):
                raise _Bad(f"missing: signatures go from record {expected} to {header.first}", expected)
            if headers and headers[-1].end:
                raise _Bad("added: a signature follows the end of the stream", expected)
            expected, previous = header.last + 1, header.head
            headers.append(header)
    found.signed = expected
    found.end = headers[-1].end if headers else ""
    return headers


def _check_receipt(
    said: Said | None, refused: Said | None, headers: list[Header], removed: Entry | None, found: StreamReport
) -> None:
    if said is not None:
        heads = {header.last: header.head.hex() for header in headers}
        if removed is not None:
            heads.setdefault(removed.seq - 1, removed.head.hex())
        if heads.get(said.last) != said.head and (removed is None or said.last >= removed.seq):
            raise _Bad(
                "rolled back: a collector holds a head that is not among the signed ones here",
                min(said.last, found.signed),
            )
        if said.ended and not found.end:
            raise _Bad("cut: a collector holds the end of the stream, and here it has none", found.signed)
        found.receipted = said.last + 1
    if refused is not None:
        raise _Bad(f"the collector refused the stream: {refused.reason}", refused.last + 1)


def _records(
    directory: Path,
    name: str,
    public: bytes,
    headers: list[Header],
    removed: Entry | None,
    found: StreamReport,
    report: Report,
) -> None:
    """Every record against the chain, its hash, the signed heads and its own place."""
    heads = {header.last: header.head for header in headers}
    seq = removed.seq if removed is not None else 0
    number = removed.segment if removed is not None else 0
    head = removed.head if removed is not None else None
    found.removed = seq
    for path in segment_paths(directory, name):
        if segment_number(path) < number and removed is not None and segment_number(path) < removed.segment:
            continue
        data = path.read_bytes()
        header, body, signature, offset = read_header(data)
        if not hostkey.verify(public, signature, body) or header.key != public:
            raise _Bad(f"{path.name}: its header is not signed by this host", seq)
        if header.stream != name or header.segment != segment_number(path):
            raise _Bad(f"{path.name}: its header names another segment", seq)
        if header.segment != number:
            raise _Bad(f"missing: segment {number}", seq)
        if any(signed.boot != header.boot or signed.host != header.host for signed in headers[:1]):
            raise _Bad(f"{path.name}: another host or boot than was signed", seq)
        number += 1
        found.label = header.label
        head = head if head is not None else start_of(header)
        for after, digest, record in frames(data, offset):
            following = chain.link(head, record)
            if following != digest and found.crashed and seq >= found.signed:
                break  # it was on its way to the disk
            head = following
            if head != digest:
                raise _Bad("altered: it does not follow the chain", seq, _identity(record))
            if heads.get(seq, head) != head:
                raise _Bad("replaced: the chain does not lead to the signed head", seq, _identity(record))
            _check_place(record, header.host, name, seq, report)
            seq += 1
            offset = after
        if offset != len(data) and not (found.live and seq >= found.signed):
            _raise_torn(
                path,
                data,
                offset,
                seq,
                live_or_crashed=(found.live or found.crashed) and seq >= found.signed,
            )
            report.notes.append(
                f"{path.name}: {len(data) - offset} bytes of a record that was never complete"
            )
    found.records = seq
    found.unsigned = max(seq - found.signed, 0)
    if seq < found.signed:
        raise _Bad(f"missing: {found.signed} records were signed, {seq} are there", seq)
    if found.unsigned and found.end:
        raise _Bad("added: records follow the signed end of the stream", found.signed)


def _raise_torn(path: Path, data: bytes, offset: int, seq: int, *, live_or_crashed: bool) -> None:
    """An incomplete frame is a crash's only after the last signature of a stream that was not ended."""
    if live_or_crashed:
        return
    length = FRAME.unpack_from(data, offset)[0] if offset + FRAME.size <= len(data) else 0
    wrong = f", its length says {length}" if length > MAX_RECORD_BYTES or length else ""
    raise _Bad(f"{path.name}: the last {len(data) - offset} bytes are no whole record{wrong}", seq)


def _check_place(record: bytes, host: str, stream: str, seq: int, report: Report) -> None:
    fields = _decoded(record, seq)
    if (fields.get("stream"), fields.get("seq"), fields.get("host")) != (stream, seq, host):
        raise _Bad("it names another place than it stands at", seq, str(fields.get("id", "")))
    if fields.get("kind") == "gap":
        report.gaps[str(fields.get("reason", ""))] += 1


def _decoded(record: bytes, seq: int) -> dict[str, Any]:
    try:
        return decode_record(record)
    except AuditError as error:
        raise _Bad(error.message, seq) from error


def _identity(record: bytes) -> str:
    try:
        return str(decode_record(record).get("id", ""))
    except AuditError:
        return ""


def report_map(report: Report) -> dict[str, Any]:
    """The report as `audit verify --json` prints it."""
    return {
        "ok": report.ok,
        "directory": report.directory,
        "host_key": report.host_key,
        "records": report.records,
        "streams": [{name: getattr(s, name) for name in s.__slots__} for s in report.streams],
        "findings": [{name: getattr(f, name) for name in f.__slots__} for f in report.findings],
        "gaps": dict(report.gaps),
        "notes": report.notes,
    }
