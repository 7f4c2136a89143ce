"""Files of certificates that are trusted: where systems have theirs, and making one of theirs plus ours. Never ours alone: a client that
is told to trust one file trusts nothing else."""

from __future__ import annotations

import binascii
import os
import re
import ssl
import stat
from pathlib import Path
from typing import Final

from sidecar.errors import TrustError
from sidecar.tls.inside import inside

SYSTEM_BUNDLES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Alpine, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # RHEL, Fedora, Amazon Linux
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # Alpine without the package ca-certificates
)
"""In the order in which Go looks (crypto/x509/root_linux.go)."""
MAX_BUNDLE_BYTES: Final = 16 * 1024 * 1024
"""Debian's has 220 KiB."""

_BLOCK: Final = re.compile(rb"-----BEGIN CERTIFICATE-----\s([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")


def read_bounded(path: Path) -> bytes:
    """A regular file of at most MAX_BUNDLE_BYTES; others may have named it, so that nothing is waited for. Raises TrustError, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_BUNDLE_BYTES:
            raise TrustError(f"{path} is no file of certificates")
        data = file.read(MAX_BUNDLE_BYTES + 1)
    if len(data) > MAX_BUNDLE_BYTES:
        raise TrustError(f"{path} is larger than {MAX_BUNDLE_BYTES} bytes")
    return data


def certificates_in(data: bytes) -> list[bytes]:
    """The PEM blocks of `data` that are certificates, each once; keys and everything else are left out.

    OpenSSL decides what is one: systems trust some that a strict reader of RFC 5280 refuses (a serial number of 0).
    """
    found: dict[bytes, None] = {}
    reader = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for match in _BLOCK.finditer(data):
        try:
            reader.load_verify_locations(cadata=binascii.a2b_base64(match[1]))
        except (ssl.SSLError, ValueError):
            continue
        found[match[0].replace(b"\r", b"") + b"\n"] = None
    return list(found)


def holds(data: bytes, certificate_pem: bytes) -> bool:
    """Whether a file of certificates holds this one, however its lines are broken."""
    return _bodies(certificate_pem) <= _bodies(data)


def combined(theirs: bytes, certificate_pem: bytes) -> bytes:
    """The certificates of `theirs`, and ours. Raises TrustError where there are none of theirs."""
    blocks = certificates_in(theirs)
    if not blocks:
        raise TrustError("there is no certificate in it")
    return b"".join([*(block for block in blocks if not holds(block, certificate_pem)), certificate_pem])


def without(data: bytes, certificate_pem: bytes) -> bytes:
    """`data` but for the blocks that are this certificate; every other byte stays."""
    for match in reversed(list(_BLOCK.finditer(data))):
        if holds(match[0], certificate_pem):
            end = match.end() + (1 if data[match.end() : match.end() + 1] == b"\n" else 0)
            data = data[: match.start()] + data[end:]
    return data


def system_bundle(root: Path = Path("/")) -> Path | None:
    """The file with the roots of the system that is at `root`, as seen from here; None where there is none that holds any."""
    return next(
        (
            path
            for path in (inside(root, name) for name in SYSTEM_BUNDLES)
            if path.is_file() and path.stat().st_size > 0
        ),
        None,
    )


def _bodies(data: bytes) -> set[bytes]:
    return {b"".join(match[1].split()) for match in _BLOCK.finditer(data)}
