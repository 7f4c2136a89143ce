"""The compiled check of a chain says what the one in Python says, of any bytes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.audit import chain
from sidecar.audit.check import check_frames, check_in_python
from sidecar.audit.segment import FRAME, MAX_RECORD_BYTES

tail = pytest.importorskip("sidecar.audit._tail", reason="the short way was not compiled (setup.py)")
START = b"h" * 32


def framed(records: list[bytes]) -> bytes:
    data, head = b"", START
    for record in records:
        head = chain.link(head, record)
        data += FRAME.pack(len(record), head) + record
    return data


@settings(max_examples=200, deadline=None)
@given(
    records=st.lists(st.binary(max_size=90), max_size=6),
    at=st.integers(0, 700),
    change=st.integers(0, 255),
    cut=st.integers(0, 60),
    more=st.binary(max_size=60),
)
def test_both_say_the_same(records: list[bytes], at: int, change: int, cut: int, more: bytes) -> None:
    data = bytearray(framed(records))
    if at < len(data):
        data[at] ^= change
    del data[len(data) - cut :]
    data += more
    compiled = tail.check_frames(bytearray(data), START, MAX_RECORD_BYTES)
    assert compiled == check_in_python(bytearray(data), START, MAX_RECORD_BYTES)
    assert compiled == check_frames(bytearray(data), START)


def test_what_holds_is_counted_up_to_what_does_not() -> None:
    good = framed([b"one", b"two", b"three"])
    assert check_frames(bytearray(good), START)[1:] == (3, len(good), True)
    assert check_frames(bytearray(good[:-1]), START)[1:] == (2, len(framed([b"one", b"two"])), True)
    bad = good.replace(b"two", b"twx")
    assert check_frames(bytearray(bad), START) == (chain.link(START, b"one"), 1, len(framed([b"one"])), False)
    assert check_frames(bytearray(good), b"x" * 32) == (b"x" * 32, 0, 0, False)
    assert check_frames(bytearray(), START) == (START, 0, 0, True)
