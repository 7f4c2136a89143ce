"""What `audit verify` found: streams, findings (what does not hold), notes (what is incomplete and was said when it happened)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

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

    def take(self, other: Report) -> None:
        """What was found of one more stream."""
        self.streams += other.streams
        self.findings += other.findings
        self.notes += other.notes
        self.gaps += other.gaps

    def bad(self, stream: str, problem: str, seq: int = -1, record: str = "") -> None:
        self.findings.append(Finding(stream, seq, record, problem))


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
