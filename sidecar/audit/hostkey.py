"""The host's signing key: Ed25519, made on first use beside the spool, 0600. Workers never hold it."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sidecar.errors import AuditError

KEY_FILE: Final = "host.key"
PUBLIC_FILE: Final = "host.pub"


class HostKey:
    """A key pair; `public` is its 32 raw bytes."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self.private_key = private_key
        self.public = private_key.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        return self.private_key.sign(data)

    def __repr__(self) -> str:
        return f"HostKey({self.public.hex()[:16]}…)"


@functools.lru_cache(maxsize=8)
def _key_of(public: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(public)


def verify(public: bytes, signature: bytes, data: bytes) -> bool:
    try:
        _key_of(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def load_or_create(directory: Path, name: str = KEY_FILE, public_name: str = PUBLIC_FILE) -> HostKey:
    """Several instances may ask at once: one of them makes it, whole or not at all. Raises AuditError where the key is unreadable,
    too open or does not fit its public half."""
    path = directory / name
    try:
        if not path.exists():
            _make(path)
        return _load(path, directory / public_name)
    except OSError as error:
        raise AuditError(f"the signing key {path} cannot be used: {error.strerror}") from error


def _make(path: Path) -> None:
    """Nothing where another instance was quicker."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(Ed25519PrivateKey.generate().private_bytes_raw())
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()


def _load(path: Path, public_path: Path) -> HostKey:
    if path.stat().st_mode & 0o077:
        raise AuditError(
            f"the signing key {path} can be read by others", hint=f"chmod 600 {path}; think about a new key"
        )
    raw = path.read_bytes()
    if len(raw) != 32:
        raise AuditError(f"the signing key {path} is damaged")
    key = HostKey(Ed25519PrivateKey.from_private_bytes(raw))
    if not public_path.is_file():
        write_whole(public_path, key.public.hex() + "\n")
    if load_public(public_path) != key.public:
        raise AuditError(f"{public_path} does not belong to {path}")
    return key


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all, also after a crash. Raises OSError."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fdatasync(file.fileno())
    temporary.replace(path)


def check_pair(directory: Path) -> None:
    """Where the private key is there, it has to be the public one's (and closed to others). Raises AuditError; PermissionError
    where it may not be read."""
    if (directory / KEY_FILE).exists():
        try:
            _load(directory / KEY_FILE, directory / PUBLIC_FILE)
        except PermissionError:
            raise
        except OSError as error:
            raise AuditError(
                f"the signing key {directory / KEY_FILE} cannot be read: {error.strerror}"
            ) from error


def load_public(path: Path) -> bytes:
    """32 raw bytes from a file of 64 hex digits and a line feed, exactly. Raises AuditError; PermissionError where it may not be
    read."""
    try:
        text = path.read_text(encoding="ascii")
        public = bytes.fromhex(text.removesuffix("\n"))
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise AuditError(f"{path} is no public key") from error
    if len(public) != 32 or text != public.hex() + "\n":
        raise AuditError(f"{path} is no public key")
    return public
