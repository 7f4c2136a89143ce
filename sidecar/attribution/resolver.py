"""Joins the kernel's facts with procfs, cgroup and CI variables. PID reuse cannot misattribute: a process that started after the
connect is not the one that made it, and then only what the kernel noted stands."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Final, Protocol

from sidecar.attribution import cgroup, ci, procfs
from sidecar.identity.sources import WorkloadContext
from sidecar.model.origin import Origin
from sidecar.model.workload import Workload

DEMANDS_TLS: Final = frozenset({"require", "verify-ca", "verify-full"})
_SSLMODE: Final = re.compile(r"sslmode\s*=\s*'?(require|verify-ca|verify-full)\b", re.IGNORECASE)
_TICK_NS: Final = 1_000_000_000 // procfs.TICKS_PER_S


class KernelOrigin(Protocol):
    """kernel.steering.SocketOrigin."""

    @property
    def pid(self) -> int: ...
    @property
    def tgid(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def comm(self) -> str: ...
    @property
    def cgroup_id(self) -> int: ...
    @property
    def ktime_ns(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Attributed:
    origin: Origin
    workload: Workload
    context: WorkloadContext
    client_wants_tls: bool


def _boot_offset_ns() -> int:
    """CLOCK_BOOTTIME minus CLOCK_MONOTONIC: start times count suspended time, the hook's clock does not."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class Resolver:
    """Thread-safe."""

    def __init__(self) -> None:
        self._paths = cgroup.CgroupPaths()

    def resolve(self, seen: KernelOrigin) -> Attributed:
        stat = procfs.read_stat(seen.tgid)
        connected_ticks = (seen.ktime_ns + _boot_offset_ns()) // _TICK_NS
        exited = stat is None or stat.start_ticks > connected_ticks + 1
        path = self._paths.path(seen.cgroup_id, 0 if exited else seen.tgid)
        environ: dict[str, str] = {}
        cmdline: tuple[str, ...] = ()
        if exited:
            origin = Origin(
                pid=seen.pid, tgid=seen.tgid, uid=seen.uid, gid=seen.gid, comm=seen.comm, exe="", cmdline=(),
                cgroup=path, cgroup_id=seen.cgroup_id, netns=0, exited=True,
            )  # fmt: skip
        else:
            assert stat is not None
            cmdline = procfs.raw_cmdline(seen.tgid)
            environ = procfs.environ(seen.tgid)
            origin = Origin(
                pid=seen.pid,
                tgid=seen.tgid,
                uid=seen.uid,
                gid=seen.gid,
                comm=seen.comm,
                exe=procfs.exe(seen.tgid),
                cmdline=procfs.redact_cmdline(cmdline),
                cgroup=path,
                cgroup_id=seen.cgroup_id,
                netns=procfs.netns(seen.tgid),
                started_ns=stat.start_ticks * _TICK_NS,
                ancestors=procfs.ancestors(seen.tgid),
            )
        job = ci.ci_job(environ)
        if job is None:
            for parent in origin.ancestors:
                job = ci.ci_job(procfs.environ(parent.pid))
                if job is not None:
                    break
        container = cgroup.container_of(path)
        workload = Workload(
            kind="ci" if job else "container" if container else "process",
            uid=seen.uid,
            exe=origin.exe,
            cgroup=path,
            unit=cgroup.unit_of(path),
            container=container,
            ci=job,
        )
        chain = () if exited else (seen.tgid, *(parent.pid for parent in origin.ancestors))
        context = WorkloadContext(
            pids=tuple(pid for pid in chain if pid > 1), uid=seen.uid, environ=environ
        )
        return Attributed(origin, workload, context, demands_tls(environ, cmdline))


def demands_tls(environ: dict[str, str], cmdline: tuple[str, ...]) -> bool:
    """Whether the client was told to insist on TLS, as far as its environment and command line show."""
    return environ.get("PGSSLMODE", "").lower() in DEMANDS_TLS or any(_SSLMODE.search(part) for part in cmdline)
