"""Record and flow identifiers: UUIDv7 (RFC 9562, section 5.7), so that they sort by time."""

from __future__ import annotations

import random

SHORT_ID_LENGTH = 8
"""Hex digits of a short id: the *last* ones, which are random (the first ones are the time)."""


class IdSource:
    """Makes UUIDv7 text. Pure given its random generator; time is passed in.

    Identifiers are no secrets, so a Mersenne generator seeded from the system is enough.
    """

    __slots__ = ("_bits",)

    def __init__(self, generator: random.Random | None = None) -> None:
        self._bits = (generator or random.Random(random.SystemRandom().getrandbits(128))).getrandbits

    def new(self, now_ns: int) -> str:
        """Return a 36-character UUIDv7 for the time `now_ns` (ns since the epoch)."""
        milliseconds = (now_ns // 1_000_000) & 0xFFFF_FFFF_FFFF
        noise = self._bits(74)
        value = (milliseconds << 80) | (7 << 76) | ((noise >> 62) << 64) | (2 << 62) | (noise & (2**62 - 1))
        text = f"{value:032x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def short_id(record_id: str) -> str:
    """The form that people see and type: the last eight hex digits."""
    return record_id[-SHORT_ID_LENGTH:]
