"""Verifies a spool directory offline: chains, signatures, receipts, gaps; names the first bad record of each stream."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sidecar.audit import chain, hostkey
from sidecar.audit.batch import Header
from sidecar.audit.encode import decode_record
from sidecar.audit.segment import (
    FRAME,
    frames,
    read_header,
    segment_paths,
    signatures,
    start_of,
    stream_names,
)
from sidecar.errors import AuditError


class Bad(Protocol):
    def __call__(self, seq: int, problem: str, record: str = "") -> None: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not hold. `seq` is the first bad record's, -1 where none can be named."""

    stream: str
    seq: int
    record: str
    problem: str


@dataclass(slots=True)
class StreamReport:
    stream: str
    records: int = 0
    signed: int = 0
    """Records under a signature of the host."""
    receipted: int = 0
    end: str = ""
    unsigned: int = 0
    """Written after the last signature: a live stream's newest ones, or a crash's."""


@dataclass(slots=True)
class Report:
    directory: str
    host_key: str = ""
    streams: list[StreamReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def records(self) -> int:
        return sum(stream.records for stream in self.streams)


def verify(directory: Path) -> Report:
    """Never raises for what is in the directory; AuditError where there is none."""
    if not directory.is_dir():
        raise AuditError(f"there is no audit directory {directory}")
    report = Report(str(directory))
    try:
        public = hostkey.load_public(directory / hostkey.PUBLIC_FILE)
    except AuditError as error:
        report.findings.append(Finding("", -1, "", error.message))
        return report
    report.host_key = public.hex()
    private = directory / hostkey.KEY_FILE
    if private.is_file():
        try:
            hostkey.load_or_create(directory)
        except AuditError as error:
            report.findings.append(Finding("", -1, "", error.message))
    for stream in stream_names(directory):
        _stream(directory, stream, public, report)
    return report


def _stream(directory: Path, name: str, public: bytes, report: Report) -> None:
    found = StreamReport(name)
    report.streams.append(found)

    def bad(seq: int, problem: str, record: str = "") -> None:
        report.findings.append(Finding(name, seq, record, problem))

    headers: list[Header] = []
    try:
        data = (directory / f"{name}.sig").read_bytes()
        for encoded, signature in signatures(data):
            if not hostkey.verify(public, signature, encoded):
                raise AuditError("a signature does not hold")
            header = Header.decode(encoded)
            if header.stream != name:
                raise AuditError("a signature of another stream")
            headers.append(header)
    except (OSError, AuditError) as error:
        bad(-1, error.message if isinstance(error, AuditError) else "the signature file is missing")
    expected = 0
    for header in headers:
        if header.first != expected:
            bad(expected, f"signatures skip from record {expected} to {header.first}")
            break
        expected = header.last + 1
    heads = {header.last: header for header in headers}
    pruned = not segment_paths(directory, name)
    receipt = _receipt(directory, name, headers, bad)
    found.receipted = receipt + 1
    if headers:
        found.end = headers[-1].end
        found.signed = headers[-1].last + 1
    if pruned:
        if headers and headers[-1].last > receipt:
            bad(max(receipt + 1, 0), "the segments are gone and no receipt says that a collector holds them")
        found.records = found.signed
        return
    _records(directory, name, public, headers, heads, found, bad)


def _records(
    directory: Path,
    name: str,
    public: bytes,
    headers: list[Header],
    heads: dict[int, Header],
    found: StreamReport,
    bad: Bad,
) -> None:
    head: bytes | None = None
    seq = 0
    for number, path in enumerate(segment_paths(directory, name)):
        data = path.read_bytes()
        try:
            header, body, signature, offset = read_header(data)
        except AuditError as error:
            bad(seq, f"{path.name}: {error.message}")
            return
        if not hostkey.verify(public, signature, body) or header.stream != name or header.key != public:
            bad(seq, f"{path.name}: its header is not signed by this host")
            return
        if header.segment != number:
            bad(seq, f"segment {number} is missing")
            return
        if head is None:
            head = start_of(header)
        if headers and headers[0].boot != header.boot:
            bad(seq, f"{path.name}: another boot than was signed")
            return
        for after, digest, record in frames(data, offset):
            head = chain.link(head, record)
            if head != digest:
                bad(seq, "altered: it does not follow the chain", _identity(record))
                return
            signed = heads.get(seq)
            if signed is not None and signed.head != head:
                bad(seq, "replaced: the chain does not lead to the head that was signed", _identity(record))
                return
            seq += 1
            offset = after
        if offset != len(data):
            length = FRAME.unpack_from(data, offset)[0] if offset + FRAME.size <= len(data) else 0
            bad(
                seq,
                f"{path.name}: {len(data) - offset} bytes at its end are no whole record (of {length} bytes)",
            )
            return
    found.records = seq
    found.unsigned = max(seq - found.signed, 0)
    if seq < found.signed:
        bad(seq, f"missing: {found.signed} records were signed, {seq} are there")
    elif found.unsigned and found.end:
        bad(found.signed, "added: records follow the signed end of the stream")


def _identity(record: bytes) -> str:
    try:
        return str(decode_record(record).get("id", ""))
    except AuditError:
        return ""


def _receipt(directory: Path, name: str, headers: list[Header], bad: Bad) -> int:
    """The last sequence that a collector has signed for; -1 for none."""
    path = directory / f"{name}.receipts"
    if not path.is_file():
        return -1
    last = -1
    try:
        collector = hostkey.load_public(directory / "collector.pub")
        for line in path.read_text(encoding="ascii").splitlines(keepends=True):
            if not line.endswith("\n"):
                raise ValueError("cut")
            entry = json.loads(line)
            signed = json.dumps(entry["receipt"], sort_keys=True, separators=(",", ":")).encode()
            if (
                not hostkey.verify(collector, bytes.fromhex(entry["sig"]), signed)
                or line != json.dumps(entry, sort_keys=True, separators=(",", ":")) + "\n"
            ):
                raise ValueError("signature")
            receipt = entry["receipt"]
            if receipt["stream"] != name:
                raise ValueError("stream")
            if not any(h.last == receipt["last"] and h.head.hex() == receipt["head"] for h in headers):
                bad(
                    receipt["last"],
                    "a collector holds a head that this host has no signature of: records were rolled back",
                )
                return last
            last = max(last, int(receipt["last"]))
    except (OSError, ValueError, KeyError, TypeError, AuditError) as error:
        bad(-1, f"the receipts do not hold ({error})")
    return last
