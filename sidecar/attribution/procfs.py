"""Processes as /proc shows them. Every read is bounded, and a process that vanishes is an answer, not an
error.

Start times are in clock ticks since boot and tell a reused pid apart: whoever reads twice from one pid
compares them. Owns no cache and no judgement. Source: proc(5).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from sidecar.attribution.redaction import redact_cmdline
from sidecar.model.origin import Process

MAX_STAT_BYTES: Final = 4096
MAX_CGROUP_BYTES: Final = 65_536
MAX_CMDLINE_BYTES: Final = 65_536
MAX_CMDLINE_ARGUMENTS: Final = 1024
MAX_ENVIRON_BYTES: Final = 2 * 1024 * 1024
"""What is read of an environment: the kernel's default limit for arguments and environment together (a
quarter of an 8 MiB stack)."""
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
TICK_NS: Final = 1_000_000_000 // TICKS_PER_S
_CHUNK: Final = 65_536
DELETED: Final = " (deleted)"


@dataclass(frozen=True, slots=True)
class Stat:
    """Of /proc/<pid>/stat: what attribution asks. `state` is its letter; `Z` is a zombie, whose memory is
    gone."""

    ppid: int
    start_ticks: int
    comm: str
    session: int
    state: str = "R"


def read_bounded(path: str, limit: int) -> bytes:
    """At most `limit` bytes; empty where the process is gone, is a zombie or may not be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        first = os.read(descriptor, min(_CHUNK, limit))
        if not first:
            return b""
        chunks, size = [first], len(first)
        while size < limit:
            # procfs answers with less than was asked for: only an empty read is the end
            chunk = os.read(descriptor, min(_CHUNK, limit - size))
            if not chunk:
                break
            chunks.append(chunk)
            size += len(chunk)
        return b"".join(chunks) if len(chunks) > 1 else first
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def read_stat(pid: int) -> Stat | None:
    """None where the process is gone."""
    raw = read_bounded(f"/proc/{pid}/stat", MAX_STAT_BYTES)
    head, _, tail = raw.rpartition(b")")  # comm may hold parentheses and blanks: the last one closes it
    fields = tail.split(None, 21)
    try:
        return Stat(
            ppid=int(fields[1]),
            start_ticks=int(fields[19]),
            comm=head.partition(b"(")[2].decode(errors="replace"),
            session=int(fields[3]),
            state=fields[0].decode("ascii", errors="replace"),
        )
    except (IndexError, ValueError):
        return None


def raw_cmdline(pid: int) -> tuple[str, ...]:
    """The command line as it is, with its secrets: for judging, never for records."""
    raw = read_bounded(f"/proc/{pid}/cmdline", MAX_CMDLINE_BYTES)
    if not raw:
        return ()
    parts = raw.rstrip(b"\0").split(b"\0", MAX_CMDLINE_ARGUMENTS)
    return tuple(part.decode(errors="replace") for part in parts[:MAX_CMDLINE_ARGUMENTS])


def raw_environ(pid: int) -> bytes:
    """NUL-separated, at most MAX_ENVIRON_BYTES; an entry that this bound cut is left out."""
    raw = read_bounded(f"/proc/{pid}/environ", MAX_ENVIRON_BYTES)
    return raw if len(raw) < MAX_ENVIRON_BYTES else raw[: raw.rfind(b"\0") + 1]


def parse_environ(raw: bytes) -> dict[str, str]:
    """As getenv(3) sees it: the first of two entries of one name counts."""
    found: dict[str, str] = {}
    for entry in raw.split(b"\0"):
        key, separator, value = entry.partition(b"=")
        if separator and key:
            found.setdefault(key.decode(errors="replace"), value.decode(errors="replace"))
    return found


def environ(pid: int) -> dict[str, str]:
    """The environment that the process was started with (its own later changes are not in it); empty where it
    is gone."""
    return parse_environ(raw_environ(pid))


def exe(pid: int) -> str:
    """The executable's path as the process's own mount namespace has it; ` (deleted)` stays at the end where
    it was replaced or removed while running. Empty where the process is gone, and for kernel threads."""
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


def netns(pid: int) -> int:
    """Inode of the network namespace, 0 where unknown."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0


def cgroup_text(pid: int) -> str:
    """/proc/<pid>/cgroup: a line per hierarchy."""
    return read_bounded(f"/proc/{pid}/cgroup", MAX_CGROUP_BYTES).decode(errors="replace")


def process_of(pid: int, stat: Stat) -> Process:
    """A process whose `stat` was just read; without secrets in its command line."""
    return Process(
        pid=pid,
        comm=stat.comm,
        exe=exe(pid),
        cmdline=redact_cmdline(raw_cmdline(pid)),
        start_ticks=stat.start_ticks,
    )


NO_LOGIN: Final = 0xFFFF_FFFF


def login_uid(pid: int) -> int | None:
    """Who logged in, whatever sudo and su did since (the audit login uid); None where nobody did or it is not
    known."""
    raw = read_bounded(f"/proc/{pid}/loginuid", 16)
    return int(raw) if raw.isdigit() and int(raw) != NO_LOGIN else None
