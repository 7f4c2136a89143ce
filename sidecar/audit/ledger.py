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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgpack

from sidecar.audit import hostkey
from sidecar.audit.segment import append_whole, entries, entry_bytes, whole_entries
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
            append_whole(self._fd, data)
            os.fdatasync(self._fd)
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
        consumed = 0
        for after, body, signature in entries(data):
            consumed = after
            self._head = _after(signature, body)
        if consumed != len(data):
            os.ftruncate(self._fd, self._offset + consumed)
        self._offset += consumed

    def close(self) -> None:
        os.close(self._fd)


def read_ledger(directory: Path, public: bytes) -> list[Entry]:
    """All entries, verified. Raises AuditError where it is missing or does not hold."""
    try:
        data = (directory / LEDGER_FILE).read_bytes()
    except FileNotFoundError as error:
        raise AuditError("the ledger of streams is missing") from error
    head = _first(public)
    found = []
    for number, (body, signature) in enumerate(whole_entries(data)):
        if not hostkey.verify(public, signature, body):
            raise AuditError(f"the ledger's entry {number} is not signed by this host")
        entry = Entry.decode(body)
        if entry.prev != head:
            raise AuditError(f"the ledger's entry {number} does not follow the one before it")
        head = _after(signature, body)
        found.append(entry)
    return found
