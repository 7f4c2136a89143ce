"""A process's ancestors, and how far up they still belong to the same job.

A job's processes share a cgroup, or live in cgroups below its own. The walk for a token or for CI variables
ends where an ancestor stands outside (the container engine above a container, the service manager above a
unit, the shell above `exec`): what that one holds is not the job's.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Final

from sidecar.attribution import procfs
from sidecar.attribution.ci import ci_job_in
from sidecar.model.origin import Process
from sidecar.model.workload import CiJob

MAX_ANCESTORS: Final = 32
MAX_REMEMBERED: Final = 4096
REMEMBER_S: Final = 1.0
"""A job opens many connections from one tree. Nothing that decides is remembered: start times are read
afresh."""


@dataclass(frozen=True, slots=True)
class Ancestor:
    """One of the ancestry: the process, its place, and the CI job that its own environment claims."""

    process: Process
    ppid: int
    cgroups: tuple[str, ...]
    ci: CiJob | None


def same_job(inner: tuple[str, ...], outer: tuple[str, ...]) -> bool:
    """Whether a process in `outer` belongs to the job of one in `inner`: the same cgroup or one above it, and
    not the root while the inner one is further down. Both are `places`: a path per hierarchy that names
    jobs."""
    if len(inner) != len(outer):
        return False
    return all(
        mine == theirs or (theirs != "/" and mine.startswith(theirs + "/"))
        for mine, theirs in zip(inner, outer, strict=True)
    )


def places(text: str) -> tuple[str, ...]:
    """Of /proc/<pid>/cgroup: the unified path, and systemd's where that hierarchy is apart."""
    unified, systemd = "", ""
    for line in text.splitlines():
        if line.startswith("0::"):
            unified = line[3:].removesuffix(procfs.DELETED)
        elif ":name=systemd:" in line:
            systemd = line.split(":", 2)[2].removesuffix(procfs.DELETED)
    return tuple(path for path in (unified, systemd) if path)


class Lineage:
    """Reads ancestries and remembers processes for `REMEMBER_S`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, tuple[float, str, Ancestor]] = {}

    def ancestors(self, ppid: int) -> tuple[Ancestor, ...]:
        """The process `ppid`, its parent, … up to pid 1, at most MAX_ANCESTORS."""
        found: list[Ancestor] = []
        while ppid > 0 and len(found) < MAX_ANCESTORS:
            ancestor = self._ancestor(ppid)
            if ancestor is None:
                break
            found.append(ancestor)
            ppid = ancestor.ppid
        return tuple(found)

    def _ancestor(self, pid: int) -> Ancestor | None:
        stat = procfs.read_stat(pid)
        if stat is None:
            return None
        now = time.monotonic()
        known = self._known.get(pid)
        if known is not None:
            expires, comm, ancestor = known
            same = ancestor.process.start_ticks == stat.start_ticks and comm == stat.comm
            if same and now < expires and ancestor.ppid == stat.ppid:
                return ancestor
        ancestor = Ancestor(
            process=procfs.process_of(pid, stat),
            ppid=stat.ppid,
            cgroups=places(procfs.cgroup_text(pid)),
            ci=ci_job_in(procfs.raw_environ(pid)) if pid > 1 else None,
        )
        with self._lock:
            self._known.pop(pid, None)
            while len(self._known) >= MAX_REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[pid] = (now + REMEMBER_S, stat.comm, ancestor)
        return ancestor


def within_job(own: tuple[str, ...], ancestry: tuple[Ancestor, ...]) -> tuple[Ancestor, ...]:
    """The ancestors that belong to the job of a process at `own`, nearest first, pid 1 excluded."""
    found = []
    for ancestor in ancestry:
        if ancestor.process.pid <= 1 or not same_job(own, ancestor.cgroups):
            break
        found.append(ancestor)
    return tuple(found)
