"""Who is on the other end of the control socket, and whether that is the job which waits for the decision.

All facts come from the kernel: SO_PEERCRED and SO_PEERGROUPS as they were when the peer connected,
SO_PEERPIDFD (Linux 6.5; else pidfd_open at once) so that a reused pid is never taken for the peer, and procfs
for ancestry.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.approvals.grants import Decider
from sidecar.model.origin import Origin

_SO_PEERGROUPS: Final = 59
_SO_PEERPIDFD: Final = 77
_UCRED: Final = struct.Struct("=iII")
_MAX_GROUPS: Final = 256
"""As many as Python's getsockopt has room for (1024 bytes)."""
MAX_ANCESTORS: Final = 256
PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """One process as procfs shows it. `start_ticks` tells a reused pid apart."""

    pid: int
    ppid: int
    session: int
    start_ticks: int
    comm: str
    cgroup: str


@dataclass(frozen=True, slots=True)
class Peer:
    """A connected process. `pidfd` is owned by whoever called `peer_of`."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int]
    pidfd: int | None

    def is_alive(self) -> bool:
        """Whether the process that connected still runs, so that /proc/<pid> is about it."""
        if self.pidfd is None:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def decider(self, label: str = "") -> Decider:
        return Decider(
            name=user_name(self.uid),
            uid=self.uid,
            groups=frozenset(name for gid in {self.gid, *self.groups} if (name := _group_name(gid))),
            label=label,
        )


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _group_name(gid: int) -> str | None:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return None


def peer_of(connection: socket.socket) -> Peer:
    """The peer's credentials. Raises OSError where the kernel does not give them."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(raw)
    return Peer(pid, uid, gid, _peer_groups(connection), _peer_pidfd(connection, pid))


def _peer_groups(connection: socket.socket) -> frozenset[int]:
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MAX_GROUPS)
    except OSError as error:
        if error.errno == errno.ERANGE:
            return frozenset()  # in more groups than fit: none of them counts, which only takes rights away
        raise
    return frozenset(struct.unpack(f"={len(raw) // 4}I", raw))


def _peer_pidfd(connection: socket.socket, pid: int) -> int | None:
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        pass  # before Linux 6.5, or the peer has been reaped
    try:
        return os.pidfd_open(pid) if pid > 0 else None
    except OSError:
        return None


def read_process(pid: int, proc: Path = PROC) -> ProcessFacts | None:
    """None where there is no such process (any more)."""
    try:
        head, _, tail = (proc / str(pid) / "stat").read_bytes().rpartition(b")")
        fields = tail.split()
        return ProcessFacts(
            pid=pid,
            ppid=int(fields[1]),
            session=int(fields[3]),
            start_ticks=int(fields[19]),
            comm=head.partition(b"(")[2].decode("utf-8", "replace"),
            cgroup=_unified_cgroup((proc / str(pid) / "cgroup").read_text()),
        )
    except (OSError, IndexError, ValueError):
        return None


def _unified_cgroup(text: str) -> str:
    for line in text.splitlines():
        if line.startswith("0::"):
            return line[3:]
    return ""


def ancestry(pid: int, proc: Path = PROC) -> list[ProcessFacts]:
    """The process and its ancestors, nearest first, without process 1."""
    found: list[ProcessFacts] = []
    while pid > 1 and len(found) < MAX_ANCESTORS:
        facts = read_process(pid, proc)
        if facts is None or (found and facts.start_ticks > found[-1].start_ticks):
            break  # a parent that is younger than its child is a reused pid
        found.append(facts)
        pid = facts.ppid
    return found


def kinship(
    peer: Peer,
    origin: Origin | None,
    is_steered: Callable[[int, str], bool],
    *,
    relay_parent: int,
    proc: Path = PROC,
) -> str | None:
    """Why this peer may not decide a hold of `origin`, or None where it may. A job cannot approve itself.

    Refused are: whoever is inside a job's scope; the held process and its descendants; and the held process's
    job. What the job is, its cgroup says where that separates jobs (an `exec`, a service, a container):
    nothing that it forks gets out of there without root. Where it does not (the root cgroup, a person's
    login), the job is the session, and for unprivileged users the uid, since a fork can leave a session.
    """
    line = ancestry(peer.pid, proc)
    if not line or not peer.is_alive():
        return "the process that asks has ended, so nobody can say whose it is"
    if any(is_steered(process.pid, process.cgroup) for process in line):
        return "it comes from inside a steered job"
    if any(process.pid == relay_parent for process in line):
        return None
    if origin is None:
        return None if peer.uid == 0 else "the origin of the held statement is unknown: only root may decide"
    if any(process.pid == origin.tgid for process in line):
        return "it descends from the process whose statement is held"
    held = read_process(origin.tgid, proc)
    cgroup = held.cgroup if held is not None and held.cgroup else origin.cgroup
    if separates_jobs(cgroup):
        if any(process.cgroup == cgroup or process.cgroup.startswith(cgroup + "/") for process in line):
            return f"it shares the cgroup {cgroup} with the process whose statement is held"
        return None
    session = _session_of(held, origin, proc)
    if session and any(process.session == session for process in line):
        return "it shares a session with the process whose statement is held"
    if peer.uid != 0 and peer.uid == origin.uid:
        return f"it runs as {user_name(peer.uid)}, like the process whose statement is held"
    return None


def _session_of(held: ProcessFacts | None, origin: Origin, proc: Path) -> int:
    """The held process's session; where it is gone (a child may keep its connection), its nearest living
    ancestor's."""
    if held is not None:
        return held.session
    for ancestor in origin.ancestors:
        facts = read_process(ancestor.pid, proc)
        if facts is not None and facts.start_ticks == ancestor.start_ticks:
            return facts.session
    return 0


def separates_jobs(cgroup: str) -> bool:
    """Whether sharing this cgroup means to be the same job: not for the root, nor for a person's login."""
    return cgroup not in ("", "/") and not cgroup.startswith("/user.slice")
