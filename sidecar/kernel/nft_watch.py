"""Notices at once when somebody changes our nft table: the kernel tells every change to the subscribers of NFNLGRP_NFTABLES, as `nft
monitor` shows them. What stands then, `nft.Table.differences` reads; this only says when to look.

Source: linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h. Every message on tables, chains, rules and sets names its table.
"""

from __future__ import annotations

import errno
import socket
from typing import Final

from sidecar.errors import SteeringError

NFNLGRP_NFTABLES: Final = 7
NETLINK_NETFILTER: Final = 12
_DATAGRAM_BYTES: Final = 65_536
"""More than the kernel joins in one (NLMSG_GOODSIZE, a page or 8 KiB)."""


class TableWatch:
    """A subscription in the network namespace of the caller, whose descriptor is readable when anything was changed. Raises
    SteeringError where the kernel has none."""

    def __init__(self, name: str) -> None:
        self._name = name.encode() + b"\0"
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                NETLINK_NETFILTER,
            )
            self._socket.bind((0, 1 << (NFNLGRP_NFTABLES - 1)))
        except OSError as error:
            raise SteeringError(
                f"changes of nftables cannot be watched: {error}", hint="sidecar doctor"
            ) from error

    def fileno(self) -> int:
        return self._socket.fileno()

    def touched(self) -> bool:
        """Take what has come; whether any of it is about our table, or some was lost. Other tables' changes cost no look: a host
        with containers makes many."""
        ours = False
        while True:
            try:
                ours |= self._name in self._socket.recv(_DATAGRAM_BYTES)
            except BlockingIOError:
                return ours
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                ours = True  # more came than the buffer holds

    def close(self) -> None:
        self._socket.close()
