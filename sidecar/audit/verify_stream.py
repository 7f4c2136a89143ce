"""One stream of a spool, verified: what is signed of it, the collector's word, every record, and its end.

Sound beside the instance that writes it, by the order of reading: receipts, then the sizes of the signature files, then those of the
segments, each from the newest file to the oldest, and nothing beyond. So nothing was signed that is not read, and no file lacks what
precedes the next. What retention removes meanwhile is still read, through descriptors. Memory does not grow with the stream.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from sidecar.audit import chain, hostkey
from sidecar.audit.batch import Header
from sidecar.audit.encode import decode_record
from sidecar.audit.ledger import REMOVED, Entry
from sidecar.audit.receipt import RECEIPT, REFUSAL, Said, read_line
from sidecar.audit.report import Report, StreamReport
from sidecar.audit.retention import COLLECTOR_KEY
from sidecar.audit.segment import (
    FRAME,
    MAX_ENTRY_BYTES,
    MAX_RECORD_BYTES,
    read_entries,
    read_frames,
    read_header,
    receipt_path,
    refusal_path,
    segment_number,
    signature_path,
    start_of,
)
from sidecar.errors import AuditError

MAX_HELD: Final = 256
"""Segments of one stream whose files are held open at once."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a stream before its files are read. `files` are their names; `live`: an instance holds it; `crashed`: its
    instance is gone and the next start has not ended it yet."""

    public: bytes
    collector: bytes | None
    ledger_readable: bool
    opened: bool
    removed: Entry | None
    files: tuple[str, ...]
    live: bool
    crashed: bool

    @property
    def first(self) -> int:
        """Sequence of the first record that has to be here."""
        return self.removed.seq if self.removed is not None else 0


@dataclass(slots=True)
class _Piece:
    """A segment: what may be read of its signature file and of itself, in bytes. `signed_bytes` is None where there is no such
    file."""

    path: Path
    number: int
    signed_bytes: int | None = None
    size: int = 0
    held: dict[Path, int] = field(default_factory=dict)
    """Descriptors of the two files."""

    def hold(self, path: Path) -> int:
        """The file's size; it stays readable when it is removed."""
        self.held[path] = descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return os.fstat(descriptor).st_size

    def open(self, path: Path) -> BinaryIO:
        """From its beginning. One reader at a time."""
        if path not in self.held:
            return path.open("rb")
        file = os.fdopen(os.dup(self.held[path]), "rb")
        file.seek(0)
        return file


@dataclass(slots=True)
class _Signed:
    """What the signatures say: of records before `seq`, up to `head`."""

    seq: int
    head: bytes | None
    first: Header | None = None
    end: str = ""
    receipted: bool = False
    """They lead over the head that the collector holds."""


class _Bad(AuditError):
    """The first thing in a stream that does not hold."""

    def __init__(self, problem: str, seq: int = -1, record: str = "") -> None:
        super().__init__(problem)
        self.seq = seq
        self.record = record


def verify_stream(directory: Path, name: str, known: Known, report: Report) -> None:
    """Adds one stream, and its first finding where there is one."""
    found = StreamReport(name, live=known.live, crashed=known.crashed)
    report.streams.append(found)
    try:
        said = _said(receipt_path(directory, name), name, known, RECEIPT)
        refused = _said(refusal_path(directory, name), name, known, REFUSAL)
        with _pieces(directory, known) as pieces:
            signed = _signatures(name, pieces, known, said, found)
            _check_receipt(said, refused, signed, known, found)
            _Records(name, known, signed, found, report).check(pieces)
        _check_end(said, known, found, report)
    except _Bad as error:
        report.bad(name, error.message, error.seq, error.record)
    except AuditError as error:
        report.bad(name, error.message)
    except PermissionError:
        raise  # says nothing of the stream
    except OSError as error:
        report.bad(name, f"cannot be read: {error.strerror}: {error.filename}")


def _said(path: Path, name: str, known: Known, kind: str) -> Said | None:
    try:
        line = path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise _Bad(f"a collector's {kind} does not hold: {error.reason}") from error
    if known.collector is None:
        raise _Bad(f"there is a collector's {kind} and {COLLECTOR_KEY} is missing")
    said = read_line(line, known.collector, kind)
    if said.stream != name:
        raise _Bad(f"a collector's {kind} is for another stream")
    return said


@contextlib.contextmanager
def _pieces(directory: Path, known: Known) -> Iterator[list[_Piece]]:
    """The segments from the first that has to be here on, with the sizes up to which they are read."""
    paths = [directory / file for file in known.files if file.endswith(".seg")]
    files = set(known.files)
    orphans = [
        file
        for file in known.files
        if file.endswith(".sig") and file.removesuffix(".sig") + ".seg" not in files
    ]
    if orphans:
        raise _Bad(f"missing: {orphans[0]} has no segment", known.first)
    pieces = [_Piece(path, segment_number(path)) for path in paths]
    if known.removed is not None:  # others: a removal that a crash cut; the next start finishes it
        pieces = [piece for piece in pieces if piece.number >= known.removed.segment]
    held = pieces[:MAX_HELD]  # retention takes the oldest first
    beyond = held[-1].number + 1 if held else 0
    try:
        for piece in reversed(pieces):
            path = signature_path(piece.path)
            with contextlib.suppress(FileNotFoundError):
                piece.signed_bytes = piece.hold(path) if piece.number < beyond else path.stat().st_size
        for piece in reversed(pieces):
            piece.size = piece.hold(piece.path) if piece.number < beyond else piece.path.stat().st_size
        yield pieces
    finally:
        for piece in held:
            for descriptor in piece.held.values():
                os.close(descriptor)


def _is_unborn(piece: _Piece, pieces: list[_Piece], known: Known) -> bool:
    """Its making is under way, or was cut by a crash: no writer has had it. The signature file comes before the first record."""
    if not (known.live or known.crashed) or piece is not pieces[-1]:
        return False
    if signature_path(piece.path).exists():
        return True  # it was made a moment ago
    try:
        with piece.open(piece.path) as file:
            *_, offset = read_header(file.read(MAX_ENTRY_BYTES))
            return len(file.read(1)) == 0 and piece.size <= offset
    except AuditError:
        return piece.size < MAX_ENTRY_BYTES


# -- signatures


def _signatures(
    name: str, pieces: list[_Piece], known: Known, said: Said | None, found: StreamReport
) -> _Signed:
    """Every signature, verified and contiguous."""
    removed = known.removed
    signed = _Signed(known.first, removed.head if removed is not None else None)
    if removed is not None and said is not None:
        signed.receipted = said.last < removed.seq - 1 or (
            said.last == removed.seq - 1 and said.head == removed.head.hex()
        )
    for piece in pieces:
        path = signature_path(piece.path)
        if piece.signed_bytes is None:
            if not _is_unborn(piece, pieces, known):
                raise _Bad(f"{path.name} is missing", signed.seq)
            continue
        offset = 0
        with piece.open(path) as file:
            for after, encoded, signature in read_entries(file, piece.signed_bytes):
                if not hostkey.verify(known.public, signature, encoded):
                    raise _Bad(f"{path.name}: a signature does not hold", signed.seq)
                header = Header.decode(encoded)
                if header.stream != name:
                    raise _Bad(f"{path.name} belongs to another stream", signed.seq)
                if header.first != signed.seq or (signed.head is not None and header.prev != signed.head):
                    raise _Bad(
                        f"missing: signatures go from record {signed.seq} to {header.first}", signed.seq
                    )
                if signed.end:
                    raise _Bad("added: a signature follows the end of the stream", signed.seq)
                signed.first = signed.first or header
                signed.seq, signed.head, signed.end = header.last + 1, header.head, header.end
                found.signed, found.end = signed.seq, signed.end
                if said is not None and said.last == header.last:
                    signed.receipted = said.head == header.head.hex()
                offset = after
        if offset != piece.signed_bytes and not (known.live or known.crashed):
            raise _Bad(f"{path.name}: a signature file ends inside an entry", signed.seq)
    found.signed = signed.seq
    return signed


def _check_receipt(
    said: Said | None, refused: Said | None, signed: _Signed, known: Known, found: StreamReport
) -> None:
    if said is not None:
        if not signed.receipted:
            raise _Bad(
                "rolled back: a collector holds a head that is not among the signed ones here",
                min(said.last, signed.seq),
            )
        if said.ended and not signed.end:
            raise _Bad("cut: a collector holds the end of the stream, and here it has none", signed.seq)
        found.receipted = said.last + 1
    if refused is not None:
        raise _Bad(f"the collector refused the stream: {refused.reason}", refused.last + 1)


def _heads(pieces: list[_Piece]) -> Iterator[tuple[int, bytes]]:
    """(sequence, hash after it) of each signature, which were verified before."""
    for piece in pieces:
        if piece.signed_bytes is None:
            continue
        with piece.open(signature_path(piece.path)) as file:
            for _, encoded, _ in read_entries(file, piece.signed_bytes):
                header = Header.decode(encoded)
                yield header.last, header.head


# -- records


class _Records:
    """Every record against the chain, its hash, the signed heads and its own place."""

    def __init__(self, name: str, known: Known, signed: _Signed, found: StreamReport, report: Report) -> None:
        self._name = name
        self._known = known
        self._signed = signed
        self._found = found
        self._report = report
        self._seq = known.first
        self._head = known.removed.head if known.removed is not None else None
        self._number = known.removed.segment if known.removed is not None else 0
        self._lost = False
        """A crash's: what follows was on its way to the disk."""

    def check(self, pieces: list[_Piece]) -> None:
        found, signed = self._found, self._signed
        self._heads = _heads(pieces)
        self._mark = next(self._heads, None)
        found.removed = self._seq
        for piece in pieces:
            if not self._lost:
                self._piece(piece, pieces)
        found.records = self._seq
        found.unsigned = max(self._seq - signed.seq, 0)
        if self._seq < signed.seq:
            raise _Bad(f"missing: {signed.seq} records were signed, {self._seq} are there", self._seq)
        if found.unsigned and signed.end:
            raise _Bad("added: records follow the signed end of the stream", signed.seq)

    def _piece(self, piece: _Piece, pieces: list[_Piece]) -> None:
        with piece.open(piece.path) as file:
            try:
                host, offset = self._header(piece, file)
            except AuditError:
                if piece.signed_bytes is None and _is_unborn(piece, pieces, self._known):
                    return
                raise
            for after, digest, record in read_frames(file, offset, piece.size):
                assert self._head is not None
                following = chain.link(self._head, record)
                if following != digest:
                    if self._known.crashed and self._seq >= self._signed.seq:
                        self._lost = True
                        break
                    raise _Bad("altered: it does not follow the chain", self._seq, _identity(record))
                self._head = following
                self._meet_signature(record)
                self._place(record, host)
                self._seq += 1
                offset = after
            if offset < piece.size:
                self._tail(piece, file, offset)

    def _header(self, piece: _Piece, file: BinaryIO) -> tuple[str, int]:
        """The host's name and the offset of the first record."""
        name, seq, first = piece.path.name, self._seq, self._signed.first
        header, body, signature, offset = read_header(file.read(min(piece.size, MAX_ENTRY_BYTES)))
        if not hostkey.verify(self._known.public, signature, body) or header.key != self._known.public:
            raise _Bad(f"{name}: its header is not signed by this host", seq)
        if header.stream != self._name or header.segment != piece.number:
            raise _Bad(f"{name}: its header names another segment", seq)
        if header.segment != self._number:
            raise _Bad(f"missing: segment {self._number}", seq)
        if first is not None and (first.boot, first.host) != (header.boot, header.host):
            raise _Bad(f"{name}: another host or boot than was signed", seq)
        self._number += 1
        self._found.label = header.label
        if self._head is None:
            self._head = start_of(header)
        return header.host, offset

    def _meet_signature(self, record: bytes) -> None:
        """The signatures that end with this record, or ended before it."""
        while self._mark is not None and self._mark[0] <= self._seq:
            if self._mark[0] == self._seq and self._mark[1] != self._head:
                raise _Bad(
                    "replaced: the chain does not lead to the signed head", self._seq, _identity(record)
                )
            self._mark = next(self._heads, None)

    def _place(self, record: bytes, host: str) -> None:
        try:
            fields = decode_record(record)
        except AuditError as error:
            raise _Bad(error.message, self._seq) from error
        if (fields.get("stream"), fields.get("seq"), fields.get("host")) != (self._name, self._seq, host):
            raise _Bad("it names another place than it stands at", self._seq, str(fields.get("id", "")))
        if fields.get("kind") == "gap":
            self._report.gaps[str(fields.get("reason", ""))] += 1

    def _tail(self, piece: _Piece, file: BinaryIO, offset: int) -> None:
        """What follows the last whole record: a writer's next one, or a crash's, after the last signature of a stream without
        an end."""
        known, left = self._known, piece.size - offset
        file.seek(offset)
        start = file.read(min(FRAME.size, left))
        length = FRAME.unpack(start)[0] if len(start) == FRAME.size else 0
        open_end = self._seq >= self._signed.seq and not self._signed.end
        if open_end and known.live and length <= MAX_RECORD_BYTES:
            return
        if not (open_end and known.crashed):
            wrong = f", its length says {length}" if length else ""
            raise _Bad(f"{piece.path.name}: the last {left} bytes are no whole record{wrong}", self._seq)
        self._report.notes.append(f"{piece.path.name}: {left} bytes of a record that was never complete")


def _identity(record: bytes) -> str:
    try:
        return str(decode_record(record).get("id", ""))
    except AuditError:
        return ""


# -- the end


def _check_end(said: Said | None, known: Known, found: StreamReport, report: Report) -> None:
    name, removed = found.stream, known.removed
    if removed is not None and removed.what == REMOVED and (said is None or said.last < removed.seq - 1):
        raise _Bad("segments were removed and no receipt says that a collector holds them", 0)
    if known.ledger_readable and not known.opened:
        if found.records:
            raise _Bad("the ledger does not name this stream: it was cut, or the stream was put here")
        if not known.live:
            report.notes.append(
                f"stream {name} has no records and is not in the ledger: its opening was cut short"
            )
    if not found.end and not known.live:
        if not known.crashed:
            raise _Bad("cut: the stream has no signed end, and no instance is writing it", found.records)
        report.notes.append(
            f"stream {name} has no end and its instance is gone: after a crash the next start ends it"
        )
    elif "torn_tail" in found.end:
        report.notes.append(f"stream {name}: {found.end}")
