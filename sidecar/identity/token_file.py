"""Reads a token file on behalf of a process, as root, without becoming its tool.

The path is resolved below the process's own root, with its own mounts (openat2 with RESOLVE_IN_ROOT: neither
an absolute link nor `..` leads out of a container, and no /proc link is followed). It is read

1. with the job's own file-system identity (setfsuid(2) and groups, of this thread only): the kernel itself
   decides whether the job could have read it, so that a job which links to a stranger's token gains nothing;
2. else, where the job may not read it, as root, but only on the host's own file system and where every
   directory and link on the way belongs to root: only root can have put it there. So a broker can hand the
   agent tokens that the script never holds.

In both cases it has to be a small regular file, opened without blocking, owned by the job's user or by root
and not writable by everyone: else somebody else could pass for the job. Unsafe files are refused with
`source_unsafe` and a sentence that says which rule; a file that is not there is no error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sidecar.errors import IdentityError

_SYS_OPENAT2: Final = 437
"""The same number on every architecture (Linux 5.6)."""
_SYS_SETGROUPS: Final = {"x86_64": 116, "aarch64": 159, "riscv64": 159, "ppc64le": 81, "s390x": 206}.get(
    platform.machine()
)
"""The system call itself is per thread; the C library's function changes all threads."""
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_IN_ROOT: Final = 0x10
_MAX_LINKS: Final = 40
"""The kernel's own limit (path_resolution(7))."""
_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESRCH, errno.ELOOP, errno.ENAMETOOLONG})

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


@dataclass(frozen=True, slots=True)
class Reader:
    """As whom a file is read: the job's user, group and supplementary groups."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def open_below(root: int, path: str, flags: int) -> int:
    """openat2(2) with `path` resolved as if the directory `root` were `/`. Raises OSError."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    descriptor = int(
        _libc.syscall(
            _SYS_OPENAT2, root, os.fsencode(path), ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how))
        )
    )
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return descriptor


def read_token_file(pid: int, path: str, reader: Reader, max_bytes: int) -> str | None:
    """The stripped text, or None where there is no such file. Raises IdentityError: `too_large`,
    `source_unsafe`."""
    try:
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        try:
            with _acting_as(reader):
                return _read(root, path, reader, max_bytes)
        except PermissionError:
            if not (_same_mounts(pid) and only_root_placed(path)):
                raise
            return _read(root, path, reader, max_bytes)
    except PermissionError as error:
        raise IdentityError(
            "the token file may not be read by the job, and not only root decides what stands in its place",
            reason="source_unsafe",
        ) from error
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise IdentityError(
            f"the token file cannot be read: {error.strerror}", reason="source_unsafe"
        ) from error
    finally:
        os.close(root)


@contextlib.contextmanager
def _acting_as(reader: Reader) -> Iterator[None]:
    """This thread's file-system identity is the job's: the kernel drops CAP_DAC_* with it (capabilities(7)).

    Raises PermissionError where that cannot be had entirely; nothing has changed then.
    """
    if reader.uid == os.geteuid() == 0:
        yield
        return
    before = tuple(os.getgroups())
    if not _set_groups(reader.groups):
        raise PermissionError(errno.EPERM, "supplementary groups cannot be changed")
    try:
        gid_before = _libc.setfsgid(ctypes.c_uint(reader.gid))
        uid_before = _libc.setfsuid(ctypes.c_uint(reader.uid))
        try:
            if _libc.setfsuid(ctypes.c_uint(-1 & 0xFFFF_FFFF)) != reader.uid:
                raise PermissionError(errno.EPERM, "the file-system user cannot be changed")
            yield
        finally:
            _libc.setfsuid(ctypes.c_uint(uid_before))
            _libc.setfsgid(ctypes.c_uint(gid_before))
    finally:
        _set_groups(before)


def _set_groups(groups: tuple[int, ...]) -> bool:
    if _SYS_SETGROUPS is None:
        return False
    listed = (ctypes.c_uint * len(groups))(*groups)
    return int(_libc.syscall(_SYS_SETGROUPS, ctypes.c_long(len(groups)), listed)) == 0


def _read(root: int, path: str, reader: Reader, max_bytes: int) -> str:
    # O_PATH first: opening a device or fifo can have effects, looking at it has none
    found = open_below(root, path, os.O_PATH)
    try:
        facts = os.fstat(found)
        _refuse_unsafe(facts, reader)
        if facts.st_size > max_bytes:
            raise IdentityError(f"the token file is larger than {max_bytes} bytes", reason="too_large")
        descriptor = os.open(
            f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        )
    finally:
        os.close(found)
    try:
        raw = bytearray()
        while len(raw) <= max_bytes:
            chunk = os.read(descriptor, max_bytes + 1 - len(raw))
            if not chunk:
                break
            raw += chunk
    finally:
        os.close(descriptor)
    if len(raw) > max_bytes:
        raise IdentityError(f"the token file is larger than {max_bytes} bytes", reason="too_large")
    return raw.decode("ascii", errors="replace").strip()


def _refuse_unsafe(facts: os.stat_result, reader: Reader) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise IdentityError("the token file is no regular file", reason="source_unsafe")
    if facts.st_uid not in (0, reader.uid):
        raise IdentityError(
            "the token file belongs to neither the job's user nor root", reason="source_unsafe"
        )
    if facts.st_mode & stat.S_IWOTH:
        raise IdentityError("the token file can be written by everyone", reason="source_unsafe")


def _same_mounts(pid: int) -> bool:
    """Whether the process sees the host's own file system: our mount namespace and our root."""
    try:
        theirs, ours = os.stat(f"/proc/{pid}/ns/mnt"), os.stat("/proc/self/ns/mnt")
        their_root, our_root = os.stat(f"/proc/{pid}/root/"), os.stat("/")
    except OSError:
        return False
    return theirs.st_ino == ours.st_ino and os.path.samestat(their_root, our_root)


def only_root_placed(path: str) -> bool:
    """Whether every directory and link on the way belongs to root and is written by nobody else, so that none
    but root decides what the path means. Sticky world-writable directories do not count: anyone may create
    names in them.

    Raises OSError where the path ends early.
    """
    pending = _steps(path)
    place, links = "/", 0
    while True:
        facts = os.stat(place)
        if (
            facts.st_uid != 0
            or facts.st_mode & stat.S_IWOTH
            or (facts.st_gid != 0 and facts.st_mode & stat.S_IWGRP)
        ):
            return False
        if not pending:
            return True
        part = pending.pop(0)
        if part == "..":
            place = os.path.dirname(place)
            continue
        following = os.path.join(place, part)
        facts = os.lstat(following)
        if stat.S_ISLNK(facts.st_mode):
            links += 1
            if facts.st_uid != 0 or links > _MAX_LINKS:
                return False
            target = os.readlink(following)
            if target.startswith("/"):
                place = "/"
            pending[:0] = _steps(target)
        elif stat.S_ISDIR(facts.st_mode):
            place = following
        else:
            return not pending


def _steps(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]
