"""Layouts shared with bpf/include/abi.h, as ctypes. tests/kernel/test_abi.py compares both."""

from __future__ import annotations

import ctypes
import ipaddress
from typing import Final

from sidecar.model.flow import Address
from sidecar.model.reasons import GapReason

FAIL_OPEN: Final = 1
REFUSE_FOREIGN_NETNS: Final = 2
REFUSE_QUIC: Final = 4
STEER_CONTAINERS: Final = 8

ROLE_INSPECTOR: Final = 1
ROLE_EXCLUSIVE: Final = 2

EVENT_BIND: Final = 11

EVENTS: Final[dict[int, tuple[GapReason, str]]] = {
    1: (GapReason.REFUSED_BY_KERNEL, "refused: no living inspector (heartbeat is stale)"),
    2: (GapReason.FAIL_OPEN, "let through: no living inspector and on_failure is open"),
    3: (GapReason.FOREIGN_NETNS, "refused: the process is in another network namespace"),
    4: (GapReason.FOREIGN_NETNS, "not inspected: the process is in another network namespace"),
    5: (GapReason.REFUSED_BY_KERNEL, "refused: the socket is bound to a device and could not be released"),
    6: (GapReason.REFUSED_BY_KERNEL, "refused: scoped link-local destinations cannot be steered"),
    7: (GapReason.REFUSED_BY_KERNEL, "refused: a kernel map is full"),
    8: (GapReason.REFUSED_BY_KERNEL, "refused: the socket could not be marked"),
    9: (
        GapReason.GUARD_DROPPED,
        "dropped: a steered connection would have left for another place than the inspector",
    ),
    10: (GapReason.QUIC_REFUSED, "refused: QUIC (UDP 443) cannot be inspected"),
    11: (GapReason.REFUSED_BY_KERNEL, "refused: somebody tried to bind the inspector's port"),
}
"""event.reason → gap reason and sentence."""
UNCLAIMED: Final = "not inspected: the connection left its network namespace by another way than a container bridge of this host"


class Config(ctypes.Structure):
    _fields_ = (
        ("netns_cookie", ctypes.c_uint64),
        ("instance", ctypes.c_uint64),
        ("heartbeat_timeout_ns", ctypes.c_uint64),
        ("mark", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("listen_port", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class Owner(ctypes.Structure):
    _fields_ = (("instance", ctypes.c_uint64), ("role", ctypes.c_uint32), ("pad", ctypes.c_uint32))


class SocketAddress(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_uint8 * 16),
        ("port", ctypes.c_uint16),
        ("family", ctypes.c_uint16),
        ("pad", ctypes.c_uint32),
    )

    def address(self) -> Address:
        return Address(text(bytes(self.bytes)), self.port)


class Origin(ctypes.Structure):
    _fields_ = (
        ("cookie", ctypes.c_uint64),
        ("netns_cookie", ctypes.c_uint64),
        ("cgroup_id", ctypes.c_uint64),
        ("ktime_ns", ctypes.c_uint64),
        ("pid", ctypes.c_uint32),
        ("tgid", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("comm", ctypes.c_char * 16),
        ("original", SocketAddress),
    )


class FlowKey(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_uint8 * 16),
        ("destination", ctypes.c_uint8 * 16),
        ("source_port", ctypes.c_uint16),
        ("destination_port", ctypes.c_uint16),
        ("pad", ctypes.c_uint32),
    )


class Event(ctypes.Structure):
    _fields_ = (("reason", ctypes.c_uint32), ("refused", ctypes.c_uint32), ("origin", Origin))


class Prefix4(ctypes.Structure):
    _fields_ = (("prefixlen", ctypes.c_uint32), ("bytes", ctypes.c_uint8 * 4))


class Prefix6(ctypes.Structure):
    _fields_ = (("prefixlen", ctypes.c_uint32), ("bytes", ctypes.c_uint8 * 16))


STRUCTS: Final = {
    "sidecar_config": Config,
    "sidecar_owner": Owner,
    "sidecar_address": SocketAddress,
    "sidecar_origin": Origin,
    "sidecar_flow_key": FlowKey,
    "sidecar_event": Event,
    "sidecar_prefix4": Prefix4,
    "sidecar_prefix6": Prefix6,
}


def packed(host: str) -> bytes:
    """16 bytes; IPv4 in its mapped form."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return b"\0" * 10 + b"\xff\xff" + address.packed
    return address.packed


def text(raw: bytes) -> str:
    address = ipaddress.IPv6Address(raw)
    return str(address.ipv4_mapped or address)


def flow_key(peer: Address, local: Address) -> FlowKey:
    key = FlowKey(source_port=peer.port, destination_port=local.port)
    ctypes.memmove(key.source, packed(peer.host), 16)
    ctypes.memmove(key.destination, packed(local.host), 16)
    return key
