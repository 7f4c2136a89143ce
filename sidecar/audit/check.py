"""Whole frames against their chain: what the supervisor does with every record before it signs. Compiled where there is a compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar.audit import chain
from sidecar.audit.segment import MAX_RECORD_BYTES, frames


def check_in_python(data: bytearray, head: bytes, max_record: int) -> tuple[bytes, int, int, bool]:
    """As `check_frames`."""
    del max_record
    count = consumed = 0
    for end, digest, record in frames(memoryview(data), 0):
        following = chain.link(head, record)
        if following != digest:
            return head, count, consumed, False
        head, count, consumed = following, count + 1, end
    return head, count, consumed, True


if TYPE_CHECKING:
    from sidecar.audit._tail import check_frames as _check
else:
    try:
        from sidecar.audit._tail import check_frames as _check
    except ImportError:  # not compiled
        _check = check_in_python


def check_frames(data: bytearray, head: bytes) -> tuple[bytes, int, int, bool]:
    """(hash after them, number, bytes) of the whole frames at the start of `data` that follow `head`, and whether the one after
    them, where it is whole, does so too. `data` is used up."""
    return _check(data, head, MAX_RECORD_BYTES)
