"""A worker's certificates of the local authority: asked for once, kept by their names while they are good.

The key is made and signed by the supervisor, which alone has the authority's; it reaches the worker over the link, and OpenSSL through a
file in memory that no path names.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from typing import Final

from sidecar.model.secret import Secret

log = logging.getLogger(__name__)

MAX_KEPT: Final = 1024
RENEW_BEFORE_S: Final = 600.0
"""A leaf is not handed to a new connection any more so long before it expires."""
PROTOCOLS: Final = ["http/1.1"]
"""What we speak inside; a client that speaks only others finds no common one."""


def server_context(chain: str, key: Secret) -> ssl.SSLContext:
    """Serves TLS 1.2 and 1.3 under this certificate. Raises OSError (ssl.SSLError is one)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(PROTOCOLS)
    descriptor = os.memfd_create("leaf", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "w") as file:
            file.write(key.reveal() + chain)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context


class Leaves:
    """Belongs to the worker's loop."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], tuple[float, ssl.SSLContext]] = {}

    def get(self, names: tuple[str, ...]) -> ssl.SSLContext | None:
        kept = self._kept.get(names)
        return kept[1] if kept is not None and time.time() < kept[0] else None

    def take(
        self, names: tuple[str, ...], chain: str, key: Secret, not_after_ns: int
    ) -> ssl.SSLContext | None:
        """None where it cannot be used."""
        try:
            context = server_context(chain, key)
        except OSError as error:
            log.error("a certificate of the local authority cannot be used: %s", error)
            return None
        self._kept.pop(names, None)
        while len(self._kept) >= MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[names] = (not_after_ns / 1e9 - RENEW_BEFORE_S, context)
        return context
