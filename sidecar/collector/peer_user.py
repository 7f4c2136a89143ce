"""Which user is at the other end of a connection over loopback.

Records are for whoever may read the audit directory. Over loopback every user of the host, and every job, reaches the collector, so that
being there proves nothing; whose socket it is does. Source: proc_pid_net(5), /proc/net/tcp; state 01 is TCP_ESTABLISHED.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ESTABLISHED: Final = "01"
"""A socket that its process has closed shows user 0, in another state."""
TABLES: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))

Address = tuple[str, int]


def user_of(client: Address, server: Address, tables: tuple[Path, ...] = TABLES) -> int | None:
    """The user id of the socket at `client` that is connected to `server`; None where there is none in this network namespace."""
    wanted = {(_shown(*client, mapped=mapped), _shown(*server, mapped=mapped)) for mapped in (False, True)}
    for table in tables:
        for local, remote, state, user in _rows(table):
            if state == ESTABLISHED and (local, remote) in wanted:
                return user
    return None


def is_ours(client: Address | None, server: Address | None) -> bool:
    """Whether root, or the user that this process runs as, is at the other end."""
    return client is not None and server is not None and user_of(client, server) in (0, os.geteuid())


def _rows(table: Path) -> Iterator[tuple[str, str, str, int]]:
    try:
        lines = table.read_text(encoding="ascii").splitlines()[1:]
    except FileNotFoundError:  # no IPv6
        return
    for line in lines:
        fields = line.split()
        yield fields[1], fields[2], fields[3], int(fields[7])


def _shown(host: str, port: int, *, mapped: bool) -> str:
    """As the kernel prints it: 32-bit words in the machine's order. `mapped`: IPv4 in a socket of IPv6."""
    address = ipaddress.ip_address(host)
    if mapped and address.version == 4:
        address = ipaddress.ip_address(f"::ffff:{host}")
    words = [address.packed[start : start + 4] for start in range(0, len(address.packed), 4)]
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words) + f":{port:04X}"
