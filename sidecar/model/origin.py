"""Who opened a connection, as the kernel saw it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Process:
    """One process of the ancestry, nearest first. `start_ticks` (since boot) tells PID reuse apart."""

    pid: int
    comm: str
    exe: str
    cmdline: tuple[str, ...]
    start_ticks: int


@dataclass(frozen=True, slots=True)
class Origin:
    """The opener of a flow.

    `pid` is the thread, `tgid` the process; `cgroup` is the path in the unified hierarchy, `cgroup_id` its
    inode; `netns` the network namespace's inode (0 where unknown). `exe`, `cmdline` and `ancestors` come from
    procfs and may be empty for a process that has exited; what the kernel recorded at connect stays.
    Secrets are removed from `cmdline` before it gets here.
    """

    pid: int
    tgid: int
    uid: int
    gid: int
    comm: str
    exe: str
    cmdline: tuple[str, ...]
    cgroup: str
    cgroup_id: int
    netns: int
    started_ns: int = 0
    ancestors: tuple[Process, ...] = ()
    exited: bool = False
    """The process was gone before procfs could be read."""
