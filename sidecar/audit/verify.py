"""Verifies a spool directory offline: ledger, chains, signatures, receipts, gaps; names the first bad record of each stream.

Reads only, and may run beside live instances, which write, rotate, ship, retire and end streams meanwhile: what they write counts as
not signed yet. The list of files is read before the ledger, which names what is gone before it goes, and both before the streams; a
stream with a finding is looked at again where any of it, or whether the stream lives, has changed since. What stays is no instance's
doing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sidecar.audit import hostkey
from sidecar.audit.ledger import DROPPED, LEDGER_FILE, OPENED, REMOVED, RETIRED, Entry, LedgerReader
from sidecar.audit.receipt import RECEIPT, read_line
from sidecar.audit.report import LEDGER_STREAM, Report, StreamReport
from sidecar.audit.retention import COLLECTOR_KEY
from sidecar.audit.segment import STREAM_SUFFIXES, is_live, list_directory, lock_path, not_readable
from sidecar.audit.verify_stream import Known, verify_stream
from sidecar.errors import AuditError

ATTEMPTS: Final = 5
"""Looks at a stream that changes whenever it is looked at. Each finds it whole but for a change in that very moment."""


@dataclass(slots=True)
class _Survey:
    """The directory as a whole at one moment; `problems` are what does not hold of it."""

    collector: bytes | None = None
    readable: bool = False
    opened: set[str] = field(default_factory=set)
    kept_from: dict[str, Entry] = field(default_factory=dict)
    """The newest removal from a stream that still has segments."""
    retired: dict[str, Entry] = field(default_factory=dict)
    dropped: list[Entry] = field(default_factory=list)
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of each stream's files."""
    problems: list[str] = field(default_factory=list)

    def known(self, directory: Path, name: str, public: bytes) -> Known:
        live = is_live(directory, name)
        return Known(
            public,
            self.collector,
            ledger_readable=self.readable,
            opened=name in self.opened,
            removed=self.kept_from.get(name),
            files=self.files.get(name, ()),
            live=live,
            crashed=not live and lock_path(directory, name).exists(),
        )


def verify(directory: Path) -> Report:
    """Never raises for what is altered or missing in the directory. Raises AuditError where there is none, or nothing in it that
    could be verified; ConfigurationError where it is a file; PrerequisiteError where this user may not read all of it."""
    try:
        return _verify(directory)
    except PermissionError as error:
        raise not_readable(error, directory) from error


def _verify(directory: Path) -> Report:
    report = Report(str(directory))
    public_path = directory / hostkey.PUBLIC_FILE
    if public_path.name not in list_directory(directory):
        return _without_key(directory, report)
    try:
        public = hostkey.load_public(public_path)
    except AuditError as error:
        report.bad(LEDGER_STREAM, f"{error.message}: nothing can be verified without it")
        return report
    report.host_key = public.hex()
    try:
        hostkey.check_pair(directory)
    except AuditError as error:
        report.bad(LEDGER_STREAM, error.message)
    except PermissionError:
        report.notes.append(f"whether {hostkey.KEY_FILE} is this key's was not looked at: it may not be read")
    ledger = LedgerReader(directory, public)
    first = survey = _survey(directory, ledger)
    for problem in first.problems:
        report.bad(LEDGER_STREAM, problem)
    for name in sorted(first.files):
        survey, found = _settled(directory, name, public, ledger, survey)
        if found is not None:
            report.take(found)
    if survey.readable:
        _verify_ledger(directory, ledger, survey, report)
    return report


def _settled(
    directory: Path, name: str, public: bytes, ledger: LedgerReader, survey: _Survey
) -> tuple[_Survey, Report | None]:
    """One stream's report, None where nothing is here of it any more; and the newest survey."""
    found: Report | None = None
    for _ in range(ATTEMPTS):
        if name in survey.retired or name not in survey.files:
            return survey, None
        known = survey.known(directory, name, public)
        found = Report("")
        verify_stream(directory, name, known, found)
        if found.ok:
            break
        survey = _survey(directory, ledger)
        if survey.known(directory, name, public) == known:
            break
    return survey, found


# -- the directory as a whole


def _without_key(directory: Path, report: Report) -> Report:
    """Raises AuditError where nothing says that this was an audit directory."""
    names = list_directory(directory)
    if not _files(directory) and not {hostkey.KEY_FILE, LEDGER_FILE, COLLECTOR_KEY} & set(names):
        found = "other files" if names else "nothing"
        raise AuditError(
            f"{directory} is no audit directory: it holds {found}, neither a host's key nor records",
            hint="name one with --directory; where records were, all of them were removed",
        )
    report.bad(
        LEDGER_STREAM,
        f"missing: {directory / hostkey.PUBLIC_FILE}. Without the host's public key nothing here can be verified: put it back "
        "from a copy",
    )
    return report


def _files(directory: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for name in sorted(list_directory(directory)):
        if name.endswith(STREAM_SUFFIXES):
            found.setdefault(name.split(".")[0], []).append(name)
    return {stream: tuple(names) for stream, names in found.items()}


def _survey(directory: Path, ledger: LedgerReader) -> _Survey:
    found = _Survey(files=_files(directory))
    try:
        found.collector = hostkey.load_public(directory / COLLECTOR_KEY)
    except AuditError as error:
        if (directory / COLLECTOR_KEY).exists():
            found.problems.append(error.message)
    try:
        entries = ledger.read()
        found.readable = True
    except PermissionError:
        raise
    except (AuditError, OSError) as error:
        found.problems.append(str(error))
        entries = []
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


def _verify_ledger(directory: Path, ledger: LedgerReader, survey: _Survey, report: Report) -> None:
    missing = _missing(survey)
    if missing:  # opened after the files were listed, or retired or dropped meanwhile?
        survey = _survey(directory, ledger)
        missing &= _missing(survey)
    for entry in survey.dropped:
        report.bad(
            entry.stream,
            "missing: unshipped records up to this one were dropped (audit.on_full: drop)",
            entry.seq - 1,
        )
    seen = {stream.stream for stream in report.streams}
    for entry in survey.retired.values():
        if entry.stream in seen:  # it went after it had been looked at
            continue
        report.streams.append(
            StreamReport(entry.stream, "", entry.seq, entry.seq, entry.seq, entry.seq, "shipped and removed")
        )
        try:
            if survey.collector is None:
                raise AuditError(f"{COLLECTOR_KEY} is missing")
            said = read_line(entry.receipt, survey.collector, RECEIPT)
            if (said.stream, said.last, said.head, said.ended) != (
                entry.stream, entry.seq - 1, entry.head.hex(), True,
            ):  # fmt: skip
                raise AuditError("its receipt is for something else")
        except AuditError as error:
            report.bad(
                entry.stream, f"removed, but no receipt says that a collector holds it: {error.message}"
            )
    for name in sorted(missing):
        report.bad(name, "missing: the ledger names this stream and no file of it is there")


def _missing(survey: _Survey) -> set[str]:
    gone_whole = {entry.stream for entry in survey.dropped}
    return survey.opened - set(survey.files) - set(survey.retired) - gone_whole
