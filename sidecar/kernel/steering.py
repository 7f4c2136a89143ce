"""Steering of one instance: hooks, maps, table, heartbeat (design.md section 4, "Steering").

Fails closed by construction: the hooks survive this process, and without a fresh heartbeat they refuse covered connections.
What is about to be attached is written to the state file first, so that `removal` finds it after a crash at any point.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sidecar.errors import SidecarError, SteeringError
from sidecar.kernel import abi, cgroups, loader, maps, nft, run_state
from sidecar.kernel.nft_watch import TableWatch
from sidecar.kernel.removal import remove_all as remove_all
from sidecar.kernel.removal import remove_dead
from sidecar.kernel.removal import traces as traces
from sidecar.kernel.ringbuf import EventReader
from sidecar.kernel.run_state import OWNERS_PIN, host_lock, mount_bpf
from sidecar.model.flow import Address
from sidecar.model.reasons import GapReason

MARK_BASE: Final = 0x51DE0000
"""The upper half of our marks; the lower half is of the instance. Other users of marks keep to low bits."""

FLOW_MAX_AGE_S: Final = 60.0
"""A connection that the listener has not asked about by then is forgotten: it is refused when it comes."""
CONTAINER_FLOW_MAX_AGE_S: Final = 5.0
"""A container's connection that has not come by then went another way (to a neighbour on its bridge, or by a network that is no bridge
of ours): it is recorded as not inspected."""
FLOW_SWEEP_S: Final = 2.0

SO_NETNS_COOKIE: Final = 71


def netns_cookie() -> int:
    """The current network namespace's cookie (socket(7), SO_NETNS_COOKIE, Linux 5.14)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")
        except OSError as error:
            raise SteeringError(
                "this kernel has no network namespace cookies", hint="Linux 5.14 or newer is needed"
            ) from error


@dataclass(frozen=True, slots=True)
class SteeringPlan:
    """What to steer. `listen_port` is bound on 127.0.0.1 (and ::1) by the caller already."""

    instance: str
    scope_cgroups: tuple[Path, ...]
    inspector_cgroup: Path
    exclusive: bool
    ports: tuple[int, ...]
    exclude: tuple[str, ...]
    listen_port: int
    on_failure: str
    foreign_netns: str
    """What becomes of a process in another network namespace: `refuse`, `record`, or `steer`, where its packets enter the host by one of
    `bridges`."""
    heartbeat_timeout_s: float = 3.0
    bridges: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class SocketOrigin:
    """What the kernel noted at connect. `ktime_ns` is CLOCK_MONOTONIC."""

    pid: int
    tgid: int
    uid: int
    gid: int
    comm: str
    cgroup_id: int
    netns_cookie: int
    ktime_ns: int
    cookie: int
    original: Address


@dataclass(frozen=True, slots=True)
class KernelEvent:
    reason: str
    """A word of GapReason."""
    detail: str
    refused: bool
    pid: int
    tgid: int
    uid: int
    comm: str
    cgroup_id: int
    destination: Address


@dataclass(frozen=True, slots=True)
class Drift:
    """A change of our kernel state that somebody else made. `name` is `hook` or `table`."""

    name: str
    detail: str
    repaired: bool


def _origin(raw: abi.Origin) -> SocketOrigin:
    return SocketOrigin(
        pid=raw.pid,
        tgid=raw.tgid,
        uid=raw.uid,
        gid=raw.gid,
        comm=raw.comm.decode(errors="replace"),
        cgroup_id=raw.cgroup_id,
        netns_cookie=raw.netns_cookie,
        ktime_ns=raw.ktime_ns,
        cookie=raw.cookie,
        original=raw.original.address(),
    )


def _event(reason: GapReason, detail: str, refused: bool, origin: SocketOrigin) -> KernelEvent:
    return KernelEvent(
        reason=reason.value,
        detail=detail,
        refused=refused,
        pid=origin.pid,
        tgid=origin.tgid,
        uid=origin.uid,
        comm=origin.comm,
        cgroup_id=origin.cgroup_id,
        destination=origin.original,
    )


@dataclass(slots=True)
class _Attachment:
    hook: str
    cgroup: Path
    program_id: int


@dataclass(slots=True)
class Steering:
    """One instance. All methods but `take_origin` belong to one thread; `take_origin` may be called from another."""

    plan: SteeringPlan
    _fds: dict[str, int] = field(default_factory=dict)
    _unclaimed: list[SocketOrigin] = field(default_factory=list)
    _netns_cookie: int = 0
    _bridges: frozenset[str] = frozenset()
    _attached: list[_Attachment] = field(default_factory=list)
    _table: nft.Table | None = None
    changes: TableWatch | None = None
    """Readable when somebody, we as well, has changed nftables; belongs to whoever waits for it. None before `start`."""
    _events: EventReader | None = None
    _owned: list[int] = field(default_factory=list)
    _swept: float = 0.0
    _lost: int = 0

    @property
    def mark(self) -> int:
        return MARK_BASE | (int(self.plan.instance, 16) & 0xFFFF)

    def start(self) -> None:
        """Load, configure, protect the port, write the table, attach. On failure everything is undone and the error raised."""
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        remove_dead(except_for=self.plan.instance, covered=self.plan.scope_cgroups)

    def _start(self) -> None:
        plan = self.plan
        with host_lock():
            mount_bpf()
            self._save()  # from here on nobody takes the shared map away
            self._fds = loader.load(OWNERS_PIN)
        self._events = EventReader(self._fds["events"])
        self._configure()
        self._own(plan.inspector_cgroup, abi.ROLE_INSPECTOR)
        if plan.exclusive:
            for cgroup in plan.scope_cgroups:
                self._own(cgroup, abi.ROLE_EXCLUSIVE)
        self._bridges = plan.bridges
        self._table = nft.Table(
            plan.instance, self.mark, plan.listen_port, self._container_rules(plan.bridges)
        )
        self.changes = TableWatch(self._table.name)
        self._table.apply()
        root = cgroups.cgroup2_mount()
        self._attach("sidecar_bind4", root)
        self._attach("sidecar_bind6", root)
        for cgroup in plan.scope_cgroups:
            # The guard stands before the first socket is marked.
            for hook in (
                "sidecar_egress",
                "sidecar_sendmsg4",
                "sidecar_sendmsg6",
                "sidecar_connect4",
                "sidecar_connect6",
            ):
                self._attach(hook, cgroup)

    def _container_rules(self, bridges: frozenset[str]) -> nft.ContainerRules:
        plan = self.plan
        return nft.ContainerRules(
            bridges if plan.foreign_netns == "steer" else frozenset(), plan.ports, plan.exclude
        )

    def cover_bridges(self, bridges: frozenset[str]) -> None:
        """Steer what comes from these container networks, and from no others. Raises SteeringError."""
        if self._table is not None and self.plan.foreign_netns == "steer" and bridges != self._bridges:
            self._table.cover(self._container_rules(bridges))
            self._table.apply()
            self._bridges = bridges

    def _configure(self) -> None:
        plan, fds = self.plan, self._fds
        flags = abi.REFUSE_QUIC
        if plan.on_failure == "open":
            flags |= abi.FAIL_OPEN
        if plan.foreign_netns == "refuse":
            flags |= abi.REFUSE_FOREIGN_NETNS
        if plan.foreign_netns == "steer":
            flags |= abi.STEER_CONTAINERS
        zero = ctypes.c_uint32(0)
        self._netns_cookie = netns_cookie()
        config = abi.Config(
            netns_cookie=self._netns_cookie,
            instance=int(plan.instance, 16),
            heartbeat_timeout_ns=int(plan.heartbeat_timeout_s * 1e9),
            mark=self.mark,
            flags=flags,
            listen_port=plan.listen_port,
        )
        maps.update(fds["config"], zero, config, "configuring the hooks")
        for port in plan.ports:
            maps.update(fds["ports"], ctypes.c_uint32(port), ctypes.c_uint8(1), "the map of ports")
        for text in plan.exclude:
            network = ipaddress.ip_network(text, strict=False)
            if isinstance(network, ipaddress.IPv4Network):
                key4 = abi.Prefix4(prefixlen=network.prefixlen)
                ctypes.memmove(key4.bytes, network.network_address.packed, 4)
                maps.update(fds["exclude4"], key4, ctypes.c_uint8(1), "the map of exclusions")
            else:
                key6 = abi.Prefix6(prefixlen=network.prefixlen)
                ctypes.memmove(key6.bytes, network.network_address.packed, 16)
                maps.update(fds["exclude6"], key6, ctypes.c_uint8(1), "the map of exclusions")

    def _own(self, cgroup: Path, role: int) -> None:
        identifier = cgroups.identifier(cgroup)
        owner = abi.Owner(instance=int(self.plan.instance, 16), role=role)
        self._owned.append(identifier)
        self._save()
        maps.update(self._fds["owners"], ctypes.c_uint64(identifier), owner, "the map of owners")

    def _attach(self, hook: str, cgroup: Path) -> None:
        program = self._fds[hook]
        self._attached.append(_Attachment(hook, cgroup, maps.program_info(program)[0]))
        self._save()
        maps.attach(program, cgroup, maps.ATTACH_TYPES[hook])

    def _save(self) -> None:
        plan = self.plan
        run_state.save(
            plan.instance,
            scopes=None if plan.exclusive else [str(cgroup) for cgroup in plan.scope_cgroups],
            table=nft.table_name(plan.instance),
            owned=self._owned,
            attached=[(a.hook, str(a.cgroup), a.program_id) for a in self._attached],
        )

    def beat(self, heard: float | None = None) -> list[Drift]:
        """Verify, repair what drifted, then write the heartbeat: that somebody looked at what is steered at `heard` (monotonic seconds;
        None: now). Raises where it could not be repaired: no beat is written, and new connections are refused."""
        drifts = self.verify()
        now = ctypes.c_uint64(time.clock_gettime_ns(time.CLOCK_MONOTONIC))
        beat = now if heard is None else ctypes.c_uint64(int(heard * 1e9))
        maps.update(self._fds["heartbeat"], ctypes.c_uint32(0), beat, "writing the heartbeat")
        if time.monotonic() - self._swept > FLOW_SWEEP_S:
            self._swept = time.monotonic()
            self._sweep(now.value)
        return drifts

    def verify(self) -> list[Drift]:
        """Compare hooks and table with what was written; repair."""
        drifts: list[Drift] = []
        for attachment in self._attached:
            attach_type = maps.ATTACH_TYPES[attachment.hook]
            if attachment.program_id in maps.attached_ids(attachment.cgroup, attach_type):
                continue
            if not attachment.cgroup.is_dir():
                continue
            maps.attach(self._fds[attachment.hook], attachment.cgroup, attach_type)
            drifts.append(Drift("hook", f"{attachment.hook} was detached from {attachment.cgroup}", True))
        assert self._table is not None
        changes = self._table.differences()
        if changes:
            self._table.apply()
            drifts += [Drift("table", change, True) for change in changes]
        return drifts

    def _sweep(self, now_ns: int) -> None:
        for key in maps.keys(self._fds["flows"], abi.FlowKey):
            origin = maps.lookup(self._fds["flows"], key, abi.Origin)
            if origin is None:
                continue
            foreign = origin.netns_cookie != self._netns_cookie
            if now_ns - origin.ktime_ns > (CONTAINER_FLOW_MAX_AGE_S if foreign else FLOW_MAX_AGE_S) * 1e9:
                maps.delete(self._fds["flows"], key)
                if foreign:
                    self._unclaimed.append(_origin(origin))

    def take_origin(self, peer: Address, local: Address, original: Address) -> SocketOrigin | None:
        """Who opened the connection that the listener sees as `peer` → `local`, and conntrack as meant for `original`; each entry is
        given once. A container's connection was noted in its own namespace, where it still went to `original`."""
        raw = self._take(abi.flow_key(peer, local))
        if raw is None and self.plan.foreign_netns == "steer":
            raw = self._take(abi.flow_key(peer, original))
        return _origin(raw) if raw is not None else None

    def _take(self, key: abi.FlowKey) -> abi.Origin | None:
        raw: abi.Origin | None = maps.lookup(self._fds["flows"], key, abi.Origin)
        if raw is not None:
            maps.delete(self._fds["flows"], key)
        return raw

    def drain_events(self) -> list[KernelEvent]:
        """What the hooks have told since the last call; what was lost meanwhile is one event with the count."""
        if self._events is None:
            return []
        found: list[KernelEvent] = []
        for raw in self._events.drain():
            reason, sentence = abi.EVENTS.get(
                raw.reason, (GapReason.REFUSED_BY_KERNEL, f"event {raw.reason}")
            )
            found.append(_event(reason, sentence, bool(raw.refused), _origin(raw.origin)))
        unclaimed, self._unclaimed = self._unclaimed, []
        found += [_event(GapReason.FOREIGN_NETNS, abi.UNCLAIMED, False, origin) for origin in unclaimed]
        total = maps.lookup(self._fds["lost"], ctypes.c_uint32(0), ctypes.c_uint64)
        lost = self._events.lost + (total.value if total is not None else 0)
        if lost > self._lost:
            found.append(
                KernelEvent(
                    reason=GapReason.EVENTS_LOST.value,
                    detail=f"{lost - self._lost} kernel events were lost: their buffer was full",
                    refused=False,
                    pid=0,
                    tgid=0,
                    uid=0,
                    comm="",
                    cgroup_id=0,
                    destination=Address("::", 0),
                )
            )
            self._lost = lost
        return found

    def close(self) -> None:
        """Leave nothing in the kernel; cgroups and state are the caller's (`run_state.end`). Idempotent.

        An exclusive scope is given up first, so that an agent at the root covers it again; then the connect hooks go, the guard last:
        nothing marked is left unguarded; then the inspector's exemption.
        """
        for identifier in self._owned[1:]:
            maps.delete(self._fds["owners"], ctypes.c_uint64(identifier))
        for attachment in reversed(self._attached):
            maps.detach(self._fds[attachment.hook], attachment.cgroup, maps.ATTACH_TYPES[attachment.hook])
        self._attached.clear()
        for identifier in self._owned:
            maps.delete(self._fds["owners"], ctypes.c_uint64(identifier))
        self._owned.clear()
        if self._table is not None:
            with contextlib.suppress(SidecarError):
                self._table.delete()
            self._table = None
        if self.changes is not None:
            self.changes.close()
            self.changes = None
        if self._events is not None:
            self._events.close()
            self._events = None
        for descriptor in self._fds.values():
            os.close(descriptor)
        self._fds = {}
