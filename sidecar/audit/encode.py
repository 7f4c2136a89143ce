"""Records to msgpack and back."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec

from sidecar.errors import AuditError
from sidecar.model.record import Record

_encoder = msgspec.msgpack.Encoder()


def encode_record(record: Record) -> bytes:
    """A msgpack map; fields at their default are left out. Text that is not UTF-8 is bin."""
    return _encoder.encode(record)


def decode_record(data: bytes) -> dict[str, Any]:
    """The map. Raises AuditError where it is none."""
    try:
        found = msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise AuditError(f"a record is no msgpack: {error}") from error
    if not isinstance(found, dict):
        raise AuditError("a record is no map")
    return found
