"""A batch: a run of a stream's records under one signature. The shipped unit, and what the spool's signature file holds.

The signature covers the header, and the header's `head` covers every record through the chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgpack

from sidecar.audit import chain, hostkey
from sidecar.errors import AuditError

VERSION: Final = 1
MAX_BATCH_BYTES: Final = 8 * 1024 * 1024
MAX_RECORDS: Final = 50_000

_HEADER: Final = ("v", "host", "stream", "boot", "first", "last", "prev", "head", "ts_ns", "end")


@dataclass(frozen=True, slots=True)
class Header:
    """Records `first`..`last` (from 0) of `stream`; `prev` is the chain's hash before `first`, `head` after `last`. `last` is
    `first - 1` in a batch without records. `end` is empty while the stream lives, else why it ended."""

    host: str
    stream: str
    boot: str
    first: int
    last: int
    prev: bytes
    head: bytes
    ts_ns: int
    end: str = ""

    def encode(self) -> bytes:
        values = (
            VERSION,
            self.host,
            self.stream,
            self.boot,
            self.first,
            self.last,
            self.prev,
            self.head,
            self.ts_ns,
            self.end,
        )
        return bytes(msgpack.packb(dict(zip(_HEADER, values, strict=True))))

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Raises AuditError."""
        try:
            found = msgpack.unpackb(data, raw=False)
            if tuple(found) != _HEADER or found["v"] != VERSION:
                raise ValueError("fields")
            header = cls(**{name: found[name] for name in _HEADER[1:]})
            texts = all(
                isinstance(value, str) for value in (header.host, header.stream, header.boot, header.end)
            )
            numbers = all(isinstance(value, int) for value in (header.first, header.last, header.ts_ns))
            hashes = all(
                isinstance(value, bytes) and len(value) == chain.HASH_BYTES
                for value in (header.prev, header.head)
            )
            if not (texts and numbers and hashes) or header.first < 0 or header.last < header.first - 1:
                raise ValueError("values")
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise AuditError("a batch header is malformed") from error
        return header


@dataclass(frozen=True, slots=True)
class Batch:
    header: bytes
    signature: bytes
    key: bytes
    records: tuple[bytes, ...]

    def encode(self) -> bytes:
        return bytes(
            msgpack.packb(
                {"header": self.header, "sig": self.signature, "key": self.key, "records": list(self.records)}
            )
        )

    @classmethod
    def decode(cls, data: bytes) -> Batch:
        """Raises AuditError."""
        try:
            found: Any = msgpack.unpackb(data, raw=False)
            batch = cls(found["header"], found["sig"], found["key"], tuple(found["records"]))
            if not all(
                isinstance(part, bytes) for part in (batch.header, batch.signature, batch.key, *batch.records)
            ):
                raise ValueError("types")
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise AuditError("not a batch") from error
        return batch

    @classmethod
    def sign(cls, header: Header, key: hostkey.HostKey, records: tuple[bytes, ...]) -> Batch:
        encoded = header.encode()
        return cls(encoded, key.sign(encoded), key.public, records)

    def check(self) -> Header:
        """Verify signature and chain; returns the header. Raises AuditError."""
        if not hostkey.verify(self.key, self.signature, self.header):
            raise AuditError("the batch's signature does not hold")
        header = Header.decode(self.header)
        if len(self.records) != header.last - header.first + 1:
            raise AuditError("the batch does not hold the records that its header names")
        head = header.prev
        for record in self.records:
            head = chain.link(head, record)
        if head != header.head:
            raise AuditError("the batch's records do not lead to its signed head")
        return header
