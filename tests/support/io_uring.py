"""connect(2) by io_uring, which makes no system call of that name: a ring of one entry, by hand.

Source: io_uring(7), linux/io_uring.h. 64-bit only.
"""

from __future__ import annotations

import ctypes
import ipaddress
import mmap
import os
import socket
import struct

SYS_IO_URING_SETUP, SYS_IO_URING_ENTER = 425, 426
IORING_OP_CONNECT = 16
IOSQE_ASYNC = 1 << 4
"""Done by one of the ring's worker threads and not by the caller."""
IORING_ENTER_GETEVENTS = 1
IORING_OFF_CQ_RING, IORING_OFF_SQES = 0x8000000, 0x10000000
RING_BYTES, PARAMS_BYTES, SQE_BYTES = 4096, 120, 64

_libc = ctypes.CDLL(None, use_errno=True)


def _called(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _address(sock: socket.socket, host: str, port: int) -> bytes:
    packed = ipaddress.ip_address(host).packed
    if sock.family == socket.AF_INET:
        return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + packed + bytes(8)
    return struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", port, 0) + packed + bytes(4)


def connect(sock: socket.socket, host: str, port: int, *, asynchronous: bool = False) -> None:
    """Raises OSError as connect(2) would."""
    params = ctypes.create_string_buffer(PARAMS_BYTES)
    ring = _called(_libc.syscall(SYS_IO_URING_SETUP, 1, params))
    try:
        # head, tail, ring_mask, ring_entries, flags, dropped, array | head, tail, ring_mask, ring_entries, overflow, cqes
        _, sq_tail, _, _, _, _, sq_array = struct.unpack_from("=7I", params, 40)
        cq_head, _, _, _, _, cq_entries = struct.unpack_from("=6I", params, 80)
        with (
            mmap.mmap(ring, RING_BYTES) as queue,
            mmap.mmap(ring, RING_BYTES, offset=IORING_OFF_CQ_RING) as done,
            mmap.mmap(ring, RING_BYTES, offset=IORING_OFF_SQES) as entries,
        ):
            address = ctypes.create_string_buffer(_address(sock, host, port))
            entries[:SQE_BYTES] = struct.pack(
                "=BBHiQQI36x",
                IORING_OP_CONNECT,
                IOSQE_ASYNC if asynchronous else 0,
                0,
                sock.fileno(),
                len(address) - 1,
                ctypes.addressof(address),
                0,
            )
            struct.pack_into("=I", queue, sq_array, 0)
            struct.pack_into("=I", queue, sq_tail, 1)
            _called(_libc.syscall(SYS_IO_URING_ENTER, ring, 1, 1, IORING_ENTER_GETEVENTS, None, 0))
            (head,) = struct.unpack_from("=I", done, cq_head)
            _, result, _ = struct.unpack_from("=QiI", done, cq_entries + head % 2 * 16)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
    finally:
        os.close(ring)


def is_available() -> bool:
    """Whether this kernel lets us have a ring (a seccomp filter or kernel.io_uring_disabled may not)."""
    ring = _libc.syscall(SYS_IO_URING_SETUP, 1, ctypes.create_string_buffer(PARAMS_BYTES))
    if ring >= 0:
        os.close(ring)
    return bool(ring >= 0)
