"""Bytes of a message that is not whole yet, kept in pieces and joined once: linear however small the pieces are.

Owns no limits of its own: whoever frames the messages reads the length first and refuses what is too long before it is kept.
"""

from __future__ import annotations


class Fragment:
    """`keep` what is left of a read, `join` the next read to it."""

    __slots__ = ("_need", "_parts", "_size")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._need = 0

    def __len__(self) -> int:
        return self._size

    def keep(self, data: bytes, need: int) -> None:
        """`data` is the beginning of a message that can be judged once `need` bytes of it are there."""
        self._parts.append(data)
        self._size += len(data)
        self._need = need

    def join(self, data: bytes) -> bytes | None:
        """All that was kept, and `data`; None (and `data` is kept) while that is shorter than what is needed."""
        if not self._parts:
            return data
        self._parts.append(data)
        self._size += len(data)
        if self._size < self._need:
            return None
        whole = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        return whole

    def joined(self) -> bytes | None:
        """All that was kept, where it is as much as is needed."""
        return self.join(b"") if self._parts and self._size >= self._need else None
