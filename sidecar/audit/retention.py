"""What the spool takes up, and what of it may go: segments that a collector has given a receipt for, oldest first. Every removal
is in the ledger before the file is gone.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.audit import hostkey
from sidecar.audit.batch import Header
from sidecar.audit.ledger import DROPPED, REMOVED, RETIRED, Ledger
from sidecar.audit.receipt import RECEIPT, Said, read_line
from sidecar.audit.segment import (
    all_segments,
    entries,
    is_live,
    list_directory,
    lock_path,
    receipt_path,
    refusal_path,
    segment_number,
    signature_path,
)
from sidecar.audit.stream import OpenStream
from sidecar.errors import AuditError

HIGH_WATER: Final = 0.9
"""Of max_bytes: from here on shipped segments go."""
LOW_WATER: Final = 0.75
"""Of max_bytes: down to here."""
MAX_SHIPPED_STREAMS: Final = 2_000
"""Ended and shipped streams that are kept for `audit show` and `why`, whatever their size: each takes four files."""

COLLECTOR_KEY: Final = "collector.pub"


@dataclass(frozen=True, slots=True)
class Usage:
    used_bytes: int
    unshipped_bytes: int
    streams: int = 0
    """That have segments."""


@dataclass(frozen=True, slots=True)
class Freed:
    """`lost`: records that nobody holds any more (`on_full: drop`)."""

    stream: str
    lost: int
    first: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """A segment that no writer has. `header`: the last one in its signature file."""

    stream: str
    number: int
    path: Path
    size: int
    header: Header
    shipped: bool
    last: bool
    """The last segment of an ended stream."""


def last_signed(signatures: Path) -> Header | None:
    """Raises AuditError where the file is damaged."""
    try:
        data = signatures.read_bytes()
    except FileNotFoundError:
        return None
    body = None
    for _, body, _ in entries(data):  # noqa: B007
        pass
    return Header.decode(body) if body is not None else None


def kept_receipt(directory: Path, stream: str) -> tuple[str, Said] | None:
    """The collector's newest receipt for the stream. Raises AuditError where it does not hold."""
    try:
        line = receipt_path(directory, stream).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise AuditError(f"the receipt of stream {stream} cannot be read") from error
    return line, read_line(line, hostkey.load_public(directory / COLLECTOR_KEY), RECEIPT)


class Retention:
    """Belongs to the spool's thread. Caches what can no longer change."""

    def __init__(self, directory: Path, ledger: Ledger, max_bytes: int) -> None:
        self._directory = directory
        self._ledger = ledger
        self._max_bytes = max_bytes
        self._last: dict[Path, Header] = {}
        self._receipts: dict[str, tuple[int, Said | None]] = {}

    def receipted(self, stream: str) -> Said | None:
        """The newest receipt, None where there is none that holds."""
        try:
            stamp = receipt_path(self._directory, stream).stat().st_mtime_ns
        except OSError:
            return None
        cached = self._receipts.get(stream)
        if cached is not None and cached[0] == stamp:
            return cached[1]
        try:
            found = kept_receipt(self._directory, stream)
        except AuditError:
            found = None
        said = found[1] if found else None
        self._receipts[stream] = (stamp, said)
        return said

    def measure(self, own: Mapping[str, OpenStream]) -> Usage:
        used, unshipped = 0, 0
        seen: dict[str, list[tuple[Path, int]]] = {}
        with os.scandir(self._directory) as listing:
            for entry in listing:
                if not entry.name.endswith((".seg", ".sig", ".receipt", ".ledger")):
                    continue
                try:
                    size = entry.stat().st_size
                except FileNotFoundError:
                    continue
                used += size
                if entry.name.endswith(".seg"):
                    seen.setdefault(entry.name.split(".")[0], []).append((Path(entry.path), size))
        for name, segments in seen.items():
            said = self.receipted(name)
            stream = own.get(name)
            if stream is not None:
                sizes = {segment_number(path): size for path, size in segments}
                unshipped += stream.unshipped_bytes(said.last if said else -1, sizes)
                continue
            for path, size in segments:
                header = self._signed(path) if said is not None else None
                if said is None or header is None or header.last > said.last:
                    unshipped += size
        return Usage(used, unshipped, len(seen))

    def _signed(self, path: Path) -> Header | None:
        """Last header of a segment that is written no more (or was last looked at; then it only counts as unshipped longer)."""
        header = self._last.get(path)
        if header is None:
            try:
                header = last_signed(signature_path(path))
            except AuditError:
                return None
            if header is not None and not is_live(self._directory, header.stream):
                self._last[path] = header
        return header

    def _pieces(self, own: Mapping[str, OpenStream]) -> list[_Piece]:
        found = []
        for name, paths in all_segments(self._directory, list_directory(self._directory)).items():
            stream = own.get(name)
            ended = stream is None and not lock_path(self._directory, name).exists()
            if stream is None and not ended:
                continue  # another instance's, or to be recovered
            said = self.receipted(name)
            first_held = stream.segments[0].number if stream is not None else None
            for path in paths:
                if first_held is not None and segment_number(path) >= first_held:
                    break
                header = last_signed(signature_path(path))
                if header is None:
                    break
                last = ended and path == paths[-1]
                if last and not header.end:
                    break  # damaged: evidence, not to be removed
                shipped = said is not None and said.last >= header.last and (said.ended or not last)
                try:
                    size = path.stat().st_size + signature_path(path).stat().st_size
                except FileNotFoundError:
                    break  # a starting instance finished a removal that a crash had cut
                found.append(_Piece(name, segment_number(path), path, size, header, shipped, last))
        return found

    def free(self, own: Mapping[str, OpenStream], usage: Usage, *, drop: bool) -> list[Freed]:
        """Remove shipped segments above the high-water mark; with `drop`, then unshipped ones where that is not enough; nothing
        while another instance does it in the same directory. Raises AuditError or OSError where the ledger cannot be written;
        nothing is removed then."""
        over = usage.used_bytes - int(self._max_bytes * LOW_WATER)
        crowded = usage.used_bytes > self._max_bytes * HIGH_WATER
        dropping = drop and usage.unshipped_bytes >= self._max_bytes
        if not (crowded or dropping or usage.streams > MAX_SHIPPED_STREAMS):
            return []
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return self._free(own, usage, over=over, crowded=crowded, dropping=dropping)
        except BlockingIOError:
            return []
        finally:
            os.close(descriptor)

    def _free(
        self, own: Mapping[str, OpenStream], usage: Usage, *, over: int, crowded: bool, dropping: bool
    ) -> list[Freed]:
        freed: list[Freed] = []
        pieces = self._pieces(own)
        kept = {piece.stream for piece in pieces if piece.last and piece.shipped}
        spare = len(kept) - MAX_SHIPPED_STREAMS
        blocked: set[str] = set()
        for piece in pieces:
            surplus = spare > 0 and piece.stream in kept
            if not piece.shipped or piece.stream in blocked or not (surplus or (crowded and over > 0)):
                blocked.add(piece.stream)  # a stream only loses its oldest segments
                continue
            over -= self._remove(piece, lost=False)
            spare -= piece.last
        unshipped = usage.unshipped_bytes
        if dropping:
            for piece in pieces:
                if unshipped <= self._max_bytes * LOW_WATER:
                    break
                if piece.shipped or not piece.path.exists():
                    continue
                first = self._first(piece)
                unshipped -= self._remove(piece, lost=True)
                freed.append(Freed(piece.stream, piece.header.last + 1 - first, first))
        return freed

    def _first(self, piece: _Piece) -> int:
        for _, body, _ in entries(signature_path(piece.path).read_bytes()):
            return Header.decode(body).first
        return piece.header.first

    def _remove(self, piece: _Piece, *, lost: bool) -> int:
        header, name = piece.header, piece.stream
        what = DROPPED if lost else RETIRED if piece.last else REMOVED
        found = None if lost else kept_receipt(self._directory, name)
        self._ledger.append(
            what,
            name,
            segment=piece.number + 1,
            seq=header.last + 1,
            head=header.head,
            receipt=found[0] if found else "",
        )
        if what == RETIRED:
            receipt_path(self._directory, name).unlink(missing_ok=True)
            refusal_path(self._directory, name).unlink(missing_ok=True)
        remove_segments([piece.path])
        self._last.pop(piece.path, None)
        return piece.size


def remove_segments(paths: Iterable[Path]) -> None:
    """With their signatures; the ledger must say that they are gone."""
    for path in paths:
        signature_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)  # last: a left-over segment is looked for
