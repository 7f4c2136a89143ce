"""A leaf as an ssl.SSLContext. The module ssl takes keys from files only: an anonymous one in memory, which nobody else can open."""

from __future__ import annotations

import os
import ssl

from sidecar.tls.authority import Leaf


def server_context(leaf: Leaf) -> ssl.SSLContext:
    """For the server's side, TLS 1.2 or newer. Raises OSError, ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    descriptor = os.memfd_create("sidecar-leaf", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "wb") as file:
        file.write(leaf.key_pem + leaf.certificate_chain_pem)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    return context
