"""The local certificate authority: a root made on first use and kept in two files, and short-lived leaves made from it.

Owns the root's key: it lies in a file that only its owner reads, and in the process that opened it; workers get leaves. Never makes
a new root by itself where there was one: hosts, images and keystores trust the old one, and would stop to. docs/tls.md.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from sidecar.errors import TrustError
from sidecar.tls import certificates
from sidecar.tls.names import Permitted, valid_names

DEFAULT_DIRECTORY: Final = Path("/var/lib/sidecar/ca")
DEFAULT_LIFETIME_S: Final = 3650 * 86_400.0
DEFAULT_LEAF_LIFETIME_S: Final = 86_400.0
BACKDATED_S: Final = 300.0
"""For clients whose clock is late."""
MAX_CACHED: Final = 4096
"""Leaves, the least recently used go first; each is about 2 KiB."""
MAX_FILE_BYTES: Final = 65_536

KEY_FILE: Final = "authority.key"
CERTIFICATE_FILE: Final = "authority.pem"
LOCK_FILE: Final = ".lock"
_NEW: Final = ".new"
_REGENERATE: Final = "sidecar ca regenerate, then sidecar ca install, as root"
_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Leaf:
    """A server's certificate. `certificate_chain_pem` is what it sends, without the root, which clients have; `not_after_ns` is
    nanoseconds since the epoch."""

    certificate_chain_pem: bytes
    key_pem: bytes = field(repr=False)
    not_after_ns: int


class Authority:
    """Made by `open` or `regenerate`. `certificate_pem` is the root, public. Safe to use from several threads."""

    def __init__(
        self,
        key: ec.EllipticCurvePrivateKey,
        certificate: x509.Certificate,
        permitted: Permitted,
        leaf_lifetime_s: float,
        clock_ns: Callable[[], int],
    ) -> None:
        self._key = key
        self.certificate = certificate
        self.certificate_pem = certificates.pem(certificate)
        self.permitted = permitted
        self._leaf_lifetime_s = leaf_lifetime_s
        self._clock_ns = clock_ns
        self._leaves: OrderedDict[tuple[str, ...], tuple[Leaf, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Authority({certificates.fingerprint(self.certificate)[:23]}…)"

    @classmethod
    def open(
        cls,
        directory: Path = DEFAULT_DIRECTORY,
        *,
        lifetime_s: float = DEFAULT_LIFETIME_S,
        leaf_lifetime_s: float = DEFAULT_LEAF_LIFETIME_S,
        permitted: tuple[str, ...] = (),
        hostname: str | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> Authority:
        """The authority of `directory`, made there where there is none yet. Several processes may ask at once: one makes it.

        `lifetime_s` and `hostname` (this host's) are for one that is made now. `permitted`: domains, addresses, CIDRs; empty is
        everything. Raises TrustError where it has expired, its files are not a pair, are unsafe, or it is constrained otherwise.
        """
        allowed = Permitted.parse(permitted)
        try:
            with _locked(directory):
                key_file, certificate_file = directory / KEY_FILE, directory / CERTIFICATE_FILE
                _finish_interrupted(directory)
                if not key_file.exists() and not certificate_file.exists():
                    _make(directory, allowed, lifetime_s, hostname, clock_ns())
                key = _read_key(key_file)
                certificate = read_certificate(directory)
        except FileNotFoundError as error:
            raise TrustError(
                f"{error.filename} is missing, and the other half of the authority is there",
                hint=f"bring the file back, or make a new authority: {_REGENERATE}",
            ) from error
        except OSError as error:
            raise _unusable(directory, error) from error
        _check_pair(directory, key, certificate)
        constrained = certificates.constraints_of(certificate)
        if set(constrained.texts()) != set(allowed.texts()):
            raise TrustError(
                f"the authority in {directory} is constrained to {', '.join(constrained.texts()) or 'nothing'}, and "
                f"tls.authority.permitted names {', '.join(allowed.texts()) or 'nothing'}",
                hint=f"set it back, or make a new one: {_REGENERATE}",
            )
        check_validity(certificate, clock_ns())
        return cls(key, certificate, allowed, leaf_lifetime_s, clock_ns)

    @classmethod
    def regenerate(
        cls,
        directory: Path = DEFAULT_DIRECTORY,
        *,
        lifetime_s: float = DEFAULT_LIFETIME_S,
        leaf_lifetime_s: float = DEFAULT_LEAF_LIFETIME_S,
        permitted: tuple[str, ...] = (),
        hostname: str | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> Authority:
        """A new authority in the place of the old one, whose leaves nobody trusts any more once it is uninstalled. Raises
        TrustError."""
        allowed = Permitted.parse(permitted)
        try:
            with _locked(directory):
                _make(directory, allowed, lifetime_s, hostname, clock_ns())
        except OSError as error:
            raise _unusable(directory, error) from error
        return cls.open(
            directory,
            leaf_lifetime_s=leaf_lifetime_s,
            permitted=permitted,
            hostname=hostname,
            clock_ns=clock_ns,
        )

    def leaf(self, names: tuple[str, ...]) -> Leaf:
        """A certificate for a server of these `names`: DNS names (a-labels) and IP addresses, 1 to 16.

        Kept and given again until a third of its lifetime is left. Takes about half a millisecond where it is made. Raises
        TrustError: a name that is none, or is not permitted; the authority has expired.
        """
        checked = valid_names(names)
        for name in checked:
            if not self.permitted.covers(name):
                raise TrustError(
                    f"{name}: the local authority may not vouch for it",
                    hint="tls.authority.permitted names what it may; docs/tls.md",
                )
        with self._lock:
            now_ns = self._clock_ns()
            kept = self._leaves.get(checked)
            if kept is not None and now_ns < kept[1]:
                self._leaves.move_to_end(checked)
                return kept[0]
            made = self._make_leaf(checked, now_ns)
            self._leaves[checked] = made, made.not_after_ns - (made.not_after_ns - now_ns) // 3
            self._leaves.move_to_end(checked)
            if len(self._leaves) > MAX_CACHED:
                self._leaves.popitem(last=False)
            return made

    def _make_leaf(self, names: tuple[str, ...], now_ns: int) -> Leaf:
        check_validity(self.certificate, now_ns)
        now = _moment(now_ns)
        not_after = min(
            now + datetime.timedelta(seconds=self._leaf_lifetime_s), self.certificate.not_valid_after_utc
        )
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = certificates.leaf(
            key,
            names,
            self.certificate,
            self._key,
            not_before=max(
                now - datetime.timedelta(seconds=BACKDATED_S), self.certificate.not_valid_before_utc
            ),
            not_after=not_after,
        )
        return Leaf(
            certificates.pem(certificate), certificates.key_pem(key), int(not_after.timestamp()) * _NS
        )


def read_certificate(directory: Path) -> x509.Certificate:
    """The root, for who may not read its key. Raises TrustError; FileNotFoundError where there is none."""
    path = directory / CERTIFICATE_FILE
    data = _read(path, 0o022)
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise TrustError(
            f"{path} is no certificate", hint=f"bring the file back, or: {_REGENERATE}"
        ) from error


def check_validity(certificate: x509.Certificate, now_ns: int) -> None:
    """Raises TrustError."""
    now = _moment(now_ns)
    if now >= certificate.not_valid_after_utc:
        raise TrustError(
            f"the local authority expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC",
            hint=_REGENERATE,
        )
    if now < certificate.not_valid_before_utc:
        raise TrustError(
            f"the local authority is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC only",
            hint="set this host's clock",
        )


def _moment(now_ns: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(now_ns // _NS, tz=datetime.UTC)


def _unusable(directory: Path, error: OSError) -> TrustError:
    denied = isinstance(error, PermissionError) and os.geteuid() != 0
    return TrustError(
        f"the local authority in {directory} cannot be used: {error.filename or directory}: {error.strerror}",
        hint="run it as root" if denied else "tls.authority.directory names the place; docs/tls.md",
    )


# -- files


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time, in a directory where nobody else can put files. Raises TrustError, OSError."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    check_way(directory)
    descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_way(path: Path) -> None:
    """Raises TrustError where anybody but root or us could put another file at `path`, or a directory on the way to it."""
    real = path.resolve(strict=True)
    for place in (real, *real.parents):
        facts = place.stat()
        shared = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (
            place != real and facts.st_mode & stat.S_ISVTX
        )
        if facts.st_uid not in (0, os.geteuid()) or shared:
            raise TrustError(
                f"{place} can be changed by others: whoever does makes certificates that this host trusts",
                hint=f"chown root {place} && chmod go-w {place}",
            )


def _make(
    directory: Path, permitted: Permitted, lifetime_s: float, hostname: str | None, now_ns: int
) -> None:
    """Key and certificate, each whole and on disk before either gets its name. Between the two names a crash leaves the new certificate
    beside the new key, and `_finish_interrupted` goes on."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = _moment(now_ns)
    certificate = certificates.root(
        key,
        hostname if hostname is not None else os.uname().nodename,
        permitted,
        not_before=now - datetime.timedelta(seconds=BACKDATED_S),
        not_after=now + datetime.timedelta(seconds=lifetime_s),
    )
    _write(directory / (KEY_FILE + _NEW), certificates.key_pem(key), 0o600)
    _write(directory / (CERTIFICATE_FILE + _NEW), certificates.pem(certificate), 0o644)
    _sync(directory)
    (directory / (KEY_FILE + _NEW)).rename(directory / KEY_FILE)
    _sync(directory)
    (directory / (CERTIFICATE_FILE + _NEW)).rename(directory / CERTIFICATE_FILE)
    _sync(directory)


def _finish_interrupted(directory: Path) -> None:
    """After a crash in `_make`: the certificate gets its name where its key has it already; else both go, the certificate first."""
    new_key, new_certificate = directory / (KEY_FILE + _NEW), directory / (CERTIFICATE_FILE + _NEW)
    if new_certificate.exists() and not new_key.exists() and (directory / KEY_FILE).exists():
        new_certificate.rename(directory / CERTIFICATE_FILE)
    elif new_certificate.exists() or new_key.exists():
        new_certificate.unlink(missing_ok=True)
        new_key.unlink(missing_ok=True)
    else:
        return
    _sync(directory)


def _write(path: Path, data: bytes, mode: int) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path, forbidden: int) -> bytes:
    """A small file of root's or ours, no link, with none of the `forbidden` mode bits. Raises TrustError, OSError."""
    if path.is_symlink():
        raise TrustError(f"{path} is a link", hint="the authority's files stand in its directory")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_FILE_BYTES:
            raise TrustError(
                f"{path} is no small regular file", hint=f"bring the file back, or: {_REGENERATE}"
            )
        if facts.st_uid not in (0, os.geteuid()):
            raise TrustError(
                f"{path} belongs to user {facts.st_uid}", hint=f"chown root {path}, if it is ours at all"
            )
        if facts.st_mode & forbidden:
            what = "read or written" if forbidden & 0o044 else "written"
            raise TrustError(
                f"{path} can be {what} by others (mode {stat.S_IMODE(facts.st_mode):04o})",
                hint=f"chmod go-{'rwx' if forbidden & 0o044 else 'w'} {path}; if somebody may have read a key: {_REGENERATE}",
            )
        return os.read(descriptor, MAX_FILE_BYTES)
    finally:
        os.close(descriptor)


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    data = _read(path, 0o077)
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError):  # whose own text may show what is in the file
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TrustError(f"{path} is no key of an authority", hint=f"bring the file back, or: {_REGENERATE}")
    return key


def _check_pair(directory: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    wrong = TrustError(
        f"{directory / CERTIFICATE_FILE} and {directory / KEY_FILE} do not belong together",
        hint=f"bring the right ones back, or make a new authority: {_REGENERATE}",
    )
    if certificate.public_key() != key.public_key():
        raise wrong
    try:
        certificate.verify_directly_issued_by(certificate)
        authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound):
        raise wrong from None
    if not authority:
        raise wrong
