"""Which names an address may have: forward resolution of the exact names in targets and rules.

A redirect yields an address and PostgreSQL in plain text carries no name, so the names that configuration and policy use
are resolved ahead of time and again every `REFRESH_S`. Addresses that a name had before are kept for `KEEP_S`: a pool that
rotates its DNS answers must not make a deny rule miss.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterable
from typing import Final

log = logging.getLogger(__name__)

REFRESH_S: Final = 30.0
KEEP_S: Final = 3600.0
MAX_NAMES: Final = 4096


class NameBook:
    """Thread-safe. `refresh` blocks on the resolver: run it in an executor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: frozenset[str] = frozenset()
        self._seen: dict[str, dict[str, float]] = {}

    def watch(self, names: Iterable[str]) -> None:
        """Replace the set of names to resolve (exact host names, no wildcards, no addresses)."""
        with self._lock:
            self._names = frozenset(sorted({name.lower().rstrip(".") for name in names})[:MAX_NAMES])

    def refresh(self) -> None:
        with self._lock:
            names = self._names
        for name in names:
            try:
                answers = {row[4][0] for row in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
            except (OSError, UnicodeError) as error:
                log.debug("%s does not resolve: %s", name, error)
                continue
            now = time.monotonic()
            with self._lock:
                for address in answers:
                    self._seen.setdefault(str(address), {})[name] = now
        now = time.monotonic()
        with self._lock:
            for address in list(self._seen):
                kept = {
                    name: at
                    for name, at in self._seen[address].items()
                    if now - at < KEEP_S and name in names
                }
                if kept:
                    self._seen[address] = kept
                else:
                    del self._seen[address]

    def names_of(self, address: str) -> tuple[str, ...]:
        """All watched names that resolved to `address`, sorted."""
        with self._lock:
            return tuple(sorted(self._seen.get(address, ())))

    def unresolved(self) -> tuple[str, ...]:
        """Watched names that have no address at the moment."""
        with self._lock:
            known = {name for names in self._seen.values() for name in names}
            return tuple(sorted(self._names - known))
