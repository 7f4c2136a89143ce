"""Joins the kernel's facts with procfs, cgroup and CI variables.

What the kernel noted at connect always stands. PID reuse cannot misattribute: a process that started after
the connect is not the one that made it, and then nothing of procfs is believed. Blocks on procfs; safe to
call from several threads.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from sidecar.attribution import cgroup, ci, procfs
from sidecar.attribution.lineage import Ancestor, Lineage, places, within_job
from sidecar.attribution.redaction import redact_cmdline
from sidecar.model.origin import Origin
from sidecar.model.workload import CiJob, Container, Workload, WorkloadContext

DEMANDS_TLS: Final = frozenset({"require", "verify-ca", "verify-full"})
_SSLMODE: Final = re.compile(r"(?i)(?<![a-z])sslmode\s*=\s*'?\s*([a-z-]+)")
_JDBC_SSL: Final = re.compile(r"(?i)jdbc:postgresql:\S*[?&]ssl=true\b")
_DEAD: Final = frozenset("ZXx")


class KernelOrigin(Protocol):
    """kernel.steering.SocketOrigin: `pid` is the thread, `tgid` the process, `ktime_ns` CLOCK_MONOTONIC at
    connect."""

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
    """`context` is for finding the job's token; it holds the process's environment and is never recorded."""

    origin: Origin
    workload: Workload
    context: WorkloadContext
    client_wants_tls: bool


def boot_offset_ns() -> int:
    """CLOCK_BOOTTIME minus CLOCK_MONOTONIC: start times count suspended time, the hook's clock does not."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def started_after(stat: procfs.Stat, ktime_ns: int) -> bool:
    """Whether the process began after the connect, that is: whether its pid was used again.

    Start times are whole ticks (10 ms), rounded down, so that a process that connects at once is never taken
    for another. A pid that is used again within the tick of the connect would be missed; the kernel hands
    pids out in a circle of at least 32,768, which nothing forks through in 10 ms.
    """
    return stat.start_ticks * procfs.TICK_NS > ktime_ns + boot_offset_ns()


class Describer(Protocol):
    """docker_engine.ContainerEngines."""

    def describe(self, container: Container) -> Container: ...
    def at_cgroup(self, cgroup_id: int) -> Container | None: ...


class Resolver:
    """Thread-safe. Without `engines`, a container is known by its id only."""

    def __init__(self, engines: Describer | None = None) -> None:
        self._paths = cgroup.CgroupPaths()
        self._lineage = Lineage()
        self._engines = engines

    def resolve(self, seen: KernelOrigin) -> Attributed:
        """Never raises for a process that has gone: then `origin.exited` is set and the kernel's facts
        remain."""
        stat = procfs.read_stat(seen.tgid)
        if stat is None or started_after(stat, seen.ktime_ns):
            return self._gone(seen)
        tgid = seen.tgid
        raw_cmdline = procfs.raw_cmdline(tgid)
        raw_environ = procfs.raw_environ(tgid)
        exe = procfs.exe(tgid)
        netns = procfs.netns(tgid)
        cgroups = procfs.cgroup_text(tgid)
        login = procfs.login_uid(tgid)
        ancestry = self._lineage.ancestors(stat.ppid)
        again = procfs.read_stat(tgid)
        if again is not None and again.start_ticks != stat.start_ticks:
            return self._gone(seen)  # the pid changed hands while we read
        job_ancestors = within_job(places(cgroups), ancestry)
        path = self._paths.path(seen.cgroup_id, tgid)
        environ = procfs.parse_environ(raw_environ)
        origin = Origin(
            pid=seen.pid,
            tgid=tgid,
            uid=seen.uid,
            gid=seen.gid,
            comm=seen.comm,
            exe=exe,
            cmdline=redact_cmdline(raw_cmdline),
            cgroup=path,
            cgroup_id=seen.cgroup_id,
            netns=netns,
            started_ns=stat.start_ticks * procfs.TICK_NS,
            ancestors=tuple(ancestor.process for ancestor in ancestry),
            exited=again is None or stat.state in _DEAD,
        )
        facts = [("session", str(stat.session))]
        if login is not None:
            facts.append(("login_uid", str(login)))
        return Attributed(
            origin=origin,
            workload=self._workload(
                origin, (path, *cgroup.naming_paths(cgroups)), _job(environ, job_ancestors), tuple(facts)
            ),
            context=WorkloadContext(
                pids=(tgid, *(ancestor.process.pid for ancestor in job_ancestors)),
                uid=seen.uid,
                environ=environ,
                gid=seen.gid,
                starts=(stat.start_ticks, *(ancestor.process.start_ticks for ancestor in job_ancestors)),
                exited=origin.exited,
            ),
            client_wants_tls=demands_tls(environ, raw_cmdline),
        )

    def _gone(self, seen: KernelOrigin) -> Attributed:
        path = self._paths.path(seen.cgroup_id)
        origin = Origin(
            pid=seen.pid,
            tgid=seen.tgid,
            uid=seen.uid,
            gid=seen.gid,
            comm=seen.comm,
            exe="",
            cmdline=(),
            cgroup=path,
            cgroup_id=seen.cgroup_id,
            netns=0,
            exited=True,
        )
        context = WorkloadContext(pids=(), uid=seen.uid, environ={}, gid=seen.gid, exited=True)
        return Attributed(origin, self._workload(origin, (path,), None, ()), context, False)

    def _workload(
        self, origin: Origin, paths: tuple[str, ...], job: CiJob | None, facts: tuple[tuple[str, str], ...]
    ) -> Workload:
        container = cgroup.container_of(*paths)
        if self._engines is not None:
            if container is not None:
                container = self._engines.describe(container)
            elif not origin.cgroup:
                container = self._engines.at_cgroup(origin.cgroup_id)
        return Workload(
            kind="ci" if job else "container" if container else "process",
            uid=origin.uid,
            exe=origin.exe,
            cgroup=origin.cgroup,
            unit=cgroup.unit_of(*paths),
            container=container,
            ci=job,
            facts=facts,
        )


def _job(environ: Mapping[str, str], ancestors: tuple[Ancestor, ...]) -> CiJob | None:
    """From the process's own environment, else from the nearest ancestor of the same job that has one."""
    return ci.ci_job(environ) or next((ancestor.ci for ancestor in ancestors if ancestor.ci), None)


def demands_tls(environ: Mapping[str, str], cmdline: tuple[str, ...]) -> bool:
    """Whether the client was told to insist on TLS, as far as its environment and command line show.

    A connection string wins over the environment, as in libpq. What a program reads from files of its own is
    not seen: that client leaves after our answer `N`, and its next connection is relayed.
    """
    given = [match[1].lower() for part in cmdline for match in _SSLMODE.finditer(part)]
    if any(_JDBC_SSL.search(part) for part in cmdline):
        return True
    if given:
        return any(mode in DEMANDS_TLS for mode in given)
    mode = environ.get("PGSSLMODE", "").lower()
    return mode in DEMANDS_TLS or (not mode and environ.get("PGREQUIRESSL") == "1")
