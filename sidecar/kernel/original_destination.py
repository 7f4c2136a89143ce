"""Where a redirected client meant to go, from conntrack. Needs no privileges.

Source: `SO_ORIGINAL_DST` (linux/netfilter_ipv4.h) and `IP6T_SO_ORIGINAL_DST` (linux/netfilter_ipv6/ip6_tables.h), both 80.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Final

from sidecar.model.flow import Address

SO_ORIGINAL_DST: Final = 80


def plain(host: str) -> str:
    """An address without zone and without its v4-mapped form."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def original_destination(sock: socket.socket) -> Address:
    """Raises OSError where conntrack knows nothing of the connection (it was not redirected)."""
    if sock.family == socket.AF_INET6:
        raw = sock.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
        port = struct.unpack_from("!H", raw, 2)[0]
        return Address(plain(socket.inet_ntop(socket.AF_INET6, raw[8:24])), port)
    raw = sock.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16)
    port = struct.unpack_from("!H", raw, 2)[0]
    return Address(socket.inet_ntop(socket.AF_INET, raw[4:8]), port)
