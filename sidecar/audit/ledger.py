"""The ledger of a spool: which streams were opened, and what retention took away. Signed and chained like everything else,
so that a stream that vanishes as a whole is missed.

`prev` of an entry is SHA-256 over the signature and body of the entry before it; of the first one, over the host's public key.
Several instances append to one ledger, each under an exclusive lock on it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgpack

from sidecar.audit import hostkey
from sidecar.audit.segment import append_durably, entries, entry_bytes, whole_entries
from sidecar.errors import AuditError

LEDGER_FILE: Final = "streams.ledger"

OPENED: Final = "opened"
REMOVED: Final = "removed"
"""Segments before `segment` are gone: a collector had given a receipt for every record before `seq`."""
RETIRED: Final = "retired"
"""All of an ended stream is gone; `receipt` is the collector's line for its end."""
DROPPED: Final = "dropped"
"""As `removed`, but nobody holds the records: `audit.on_full: drop`."""
KINDS: Final = (OPENED, REMOVED, RETIRED, DROPPED)

RECENT_ENTRIES: Final = 5_000
"""Each start finishes what the last crash cut, so that only entries since then matter to the next one."""
READ_WAIT_S: Final = 2.0
READ_PAUSE_S: Final = 0.002

_FIELDS: Final = ("prev", "what", "stream", "segment", "seq", "head", "receipt", "ts_ns")


@dataclass(frozen=True, slots=True)
class Entry:
    """`segment` is the first one that is kept, `seq` its first record, `head` the chain's hash before that."""

    prev: bytes
    what: str
    stream: str
    segment: int = 0
    seq: int = 0
    head: bytes = b""
    receipt: str = ""
    ts_ns: int = 0

    def encode(self) -> bytes:
        return bytes(msgpack.packb({name: getattr(self, name) for name in _FIELDS}))

    @classmethod
    def decode(cls, data: bytes) -> Entry:
        """Raises AuditError."""
        try:
            found: Any = msgpack.unpackb(data, raw=False)
            if tuple(found) != _FIELDS or found["what"] not in KINDS:
                raise ValueError("fields")
            return cls(**found)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise AuditError("a ledger entry is malformed") from error


def _first(public: bytes) -> bytes:
    return hashlib.sha256(b"sidecar ledger v1\0" + public).digest()


def _after(signature: bytes, body: bytes) -> bytes:
    return hashlib.sha256(signature + body).digest()


class Ledger:
    """The supervisor's end. Raises AuditError or OSError where it cannot be written."""

    def __init__(self, directory: Path, key: hostkey.HostKey) -> None:
        self._key = key
        self._offset = 0
        self._head = _first(key.public)
        self._fd = os.open(
            directory / LEDGER_FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
        )

    def append(
        self, what: str, stream: str, *, segment: int = 0, seq: int = 0, head: bytes = b"", receipt: str = ""
    ) -> None:
        """On disk when it returns."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            self._catch_up()
            body = Entry(self._head, what, stream, segment, seq, head, receipt, time.time_ns()).encode()
            data = entry_bytes(body, signature := self._key.sign(body))
            append_durably(self._fd, data)
            self._offset += len(data)
            self._head = _after(signature, body)
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _catch_up(self) -> None:
        """Take in what other instances appended; cut off what a crash left half written."""
        size = os.fstat(self._fd).st_size
        if size == self._offset:
            return
        data = os.pread(self._fd, size - self._offset, self._offset)
        consumed, last = 0, None
        for consumed, body, signature in entries(data):  # noqa: B007
            last = (signature, body)
        if last is not None:
            self._head = _after(*last)
        if consumed != len(data):
            os.ftruncate(self._fd, self._offset + consumed)
        self._offset += consumed

    def close(self) -> None:
        os.close(self._fd)


class LedgerReader:
    """All entries, verified; `read` again takes in only what was appended since."""

    def __init__(self, directory: Path, public: bytes) -> None:
        self._path = directory / LEDGER_FILE
        self._public = public
        self._head = _first(public)
        self._offset = 0
        self._entries: list[Entry] = []

    def read(self) -> list[Entry]:
        """Raises AuditError where the ledger is missing or does not hold; OSError where it cannot be read."""
        try:
            data = _read_from(self._path, self._offset)
        except FileNotFoundError as error:
            raise AuditError("the ledger of streams is missing") from error
        for body, signature in whole_entries(data):
            number = len(self._entries)
            if not hostkey.verify(self._public, signature, body):
                raise AuditError(f"the ledger's entry {number} is not signed by this host")
            entry = Entry.decode(body)
            if entry.prev != self._head:
                raise AuditError(f"the ledger's entry {number} does not follow the one before it")
            self._head = _after(signature, body)
            self._entries.append(entry)
        self._offset += len(data)
        return self._entries


@dataclass(frozen=True, slots=True)
class Recent:
    """One of the newest entries; nothing of it was verified yet."""

    entry: Entry
    body: bytes
    signature: bytes

    def holds(self, public: bytes) -> bool:
        """Whether the host has signed it. Its place in the ledger is not looked at."""
        return hostkey.verify(public, self.signature, self.body)


def recent_entries(directory: Path) -> list[Recent]:
    """The newest RECENT_ENTRIES, oldest first: what a start needs, however long the ledger has become. Raises AuditError where it is
    missing or has no shape; OSError where it cannot be read."""
    try:
        data = _read_from(directory / LEDGER_FILE, 0)
    except FileNotFoundError as error:
        raise AuditError("the ledger of streams is missing") from error
    newest = deque(entries(data), maxlen=RECENT_ENTRIES)
    return [Recent(Entry.decode(body), body, signature) for _, body, signature in newest]


def _read_from(path: Path, offset: int) -> bytes:
    """Not while an instance is in the middle of an entry; but whoever holds the lock for longer is not waited for."""
    with path.open("rb") as file:
        until = time.monotonic() + READ_WAIT_S
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(READ_PAUSE_S)
        file.seek(offset)
        return file.read()
