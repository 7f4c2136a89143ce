"""Reads a BPF ring buffer through libbpf. Polled by the supervisor: no thread of its own."""

from __future__ import annotations

import ctypes
from typing import Final

from sidecar.errors import SteeringError
from sidecar.kernel import abi, maps

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

MAX_EVENTS_PER_POLL: Final = 4096
"""What is kept of one poll; the rest is only counted."""


class EventReader:
    """Owns a libbpf `ring_buffer`. Not thread-safe."""

    def __init__(self, map_fd: int) -> None:
        lib = maps._libbpf()
        lib.ring_buffer__new.restype = ctypes.c_void_p
        lib.ring_buffer__new.argtypes = [ctypes.c_int, _CALLBACK, ctypes.c_void_p, ctypes.c_void_p]
        lib.ring_buffer__consume.argtypes = [ctypes.c_void_p]
        lib.ring_buffer__free.argtypes = [ctypes.c_void_p]
        self._lib = lib
        self._events: list[abi.Event] = []
        self.lost = 0
        self._callback = _CALLBACK(self._take)
        self._ring = lib.ring_buffer__new(map_fd, self._callback, None, None)
        if not self._ring:
            raise SteeringError("the ring buffer of kernel events could not be mapped")

    def _take(self, context: int, data: int, size: int) -> int:
        if size < ctypes.sizeof(abi.Event) or len(self._events) >= MAX_EVENTS_PER_POLL:
            self.lost += 1
            return 0
        self._events.append(abi.Event.from_buffer_copy(ctypes.string_at(data, ctypes.sizeof(abi.Event))))
        return 0

    def drain(self) -> list[abi.Event]:
        """All events since the last call."""
        if self._ring:
            self._lib.ring_buffer__consume(self._ring)
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        if self._ring:
            self._lib.ring_buffer__free(self._ring)
            self._ring = None
