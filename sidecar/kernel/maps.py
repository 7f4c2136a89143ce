"""Map and program operations on descriptors, through the distribution's libbpf (a dependency of bcc).

Source: bpf/bpf.h of libbpf 1.x. Return values below zero are negated errno.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, Final

from sidecar.errors import PrerequisiteError, SteeringError

ALLOW_MULTI: Final = 2
"""BPF_F_ALLOW_MULTI: other owners (systemd, Cilium) use the same hooks."""

ATTACH_TYPES: Final = {
    "sidecar_egress": 1,  # BPF_CGROUP_INET_EGRESS
    "sidecar_bind4": 8,  # BPF_CGROUP_INET4_BIND
    "sidecar_bind6": 9,
    "sidecar_connect4": 10,  # BPF_CGROUP_INET4_CONNECT
    "sidecar_connect6": 11,
    "sidecar_sendmsg4": 14,  # BPF_CGROUP_UDP4_SENDMSG
    "sidecar_sendmsg6": 15,
}

_MAX_PROGRAMS = 64
_MAX_PROG_INFO = 256


def _load() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise PrerequisiteError("libbpf.so.1 is missing", hint="apt-get install libbpf1") from error


_lib: ctypes.CDLL | None = None


def _libbpf() -> ctypes.CDLL:
    global _lib
    if _lib is None:
        _lib = _load()
    return _lib


def _check(result: int, what: str) -> int:
    if result < 0:
        number = -result if result != -1 else ctypes.get_errno()
        raise SteeringError(f"{what}: {os.strerror(number)}")
    return result


def lookup(fd: int, key: Any, value_type: type[Any]) -> Any:
    """The value of `key`, or None."""
    value = value_type()
    result = _libbpf().bpf_map_lookup_elem(fd, ctypes.byref(key), ctypes.byref(value))
    return value if result == 0 else None


def update(fd: int, key: Any, value: Any, what: str) -> None:
    _libbpf().bpf_map_update_elem.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
    _check(_libbpf().bpf_map_update_elem(fd, ctypes.addressof(key), ctypes.addressof(value), 0), what)


def delete(fd: int, key: Any) -> bool:
    return int(_libbpf().bpf_map_delete_elem(fd, ctypes.byref(key))) == 0


def keys(fd: int, key_type: type[Any]) -> list[Any]:
    """All keys; a map that changes meanwhile may repeat or miss some."""
    found: list[Any] = []
    previous = None
    while True:
        following = key_type()
        result = _libbpf().bpf_map_get_next_key(
            fd, ctypes.byref(previous) if previous is not None else None, ctypes.byref(following)
        )
        if result != 0:
            return found
        found.append(following)
        previous = following


def attach(program: int, cgroup: Path, attach_type: int) -> None:
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _check(
            _libbpf().bpf_prog_attach(program, fd, attach_type, ALLOW_MULTI),
            f"attaching to {cgroup} (attach type {attach_type})",
        )
    finally:
        os.close(fd)


def detach(program: int, cgroup: Path, attach_type: int) -> bool:
    """False where it was not attached (any more)."""
    try:
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        return int(_libbpf().bpf_prog_detach2(program, fd, attach_type)) == 0
    finally:
        os.close(fd)


def attached_ids(cgroup: Path, attach_type: int) -> list[int]:
    """Ids of the programs attached to exactly this cgroup; empty where it is gone."""
    try:
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return []
    try:
        ids = (ctypes.c_uint32 * _MAX_PROGRAMS)()
        count = ctypes.c_uint32(_MAX_PROGRAMS)
        flags = ctypes.c_uint32(0)
        result = _libbpf().bpf_prog_query(fd, attach_type, 0, ctypes.byref(flags), ids, ctypes.byref(count))
        return list(ids[: count.value]) if result == 0 else []
    finally:
        os.close(fd)


def program_fd(program_id: int) -> int | None:
    result = int(_libbpf().bpf_prog_get_fd_by_id(ctypes.c_uint32(program_id)))
    return result if result >= 0 else None


class _ProgramInfo(ctypes.Structure):
    """The head of `struct bpf_prog_info` (linux/bpf.h), as far as the name."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("jited_prog_len", ctypes.c_uint32),
        ("xlated_prog_len", ctypes.c_uint32),
        ("jited_prog_insns", ctypes.c_uint64),
        ("xlated_prog_insns", ctypes.c_uint64),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", ctypes.c_uint32),
        ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
    )


def program_info(fd: int) -> tuple[int, str]:
    """(id, name as the kernel keeps it: 15 characters)."""
    info = _ProgramInfo()
    size = ctypes.c_uint32(ctypes.sizeof(info))
    _check(_libbpf().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size)), "program info")
    return info.id, info.name.decode()


def pinned(path: Path) -> int | None:
    """A descriptor of what is pinned at `path`, or None."""
    result = int(_libbpf().bpf_obj_get(str(path).encode()))
    return result if result >= 0 else None
