"""The composition root: the only module that wires kernel, attribution, identity, audit, control and workers together.

Runs as the supervisor, for `sidecar run` (steers a host) and for `sidecar exec` (steers one command). Start-up order is the
order of failing closed: policy, spool and workers stand before the first connection is steered; steering ends before they do.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import pwd
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvloop

from sidecar.agent_control import AgentControl
from sidecar.approvals.grants import Grant
from sidecar.attribution.resolver import Resolver
from sidecar.audit.hostkey import HostKey
from sidecar.audit.shipper import Shipper
from sidecar.audit.spool import Spool, StreamHandle, StreamWriter
from sidecar.audit.writer import segment_bytes
from sidecar.config import Config
from sidecar.control.protocol import DriftStatus, socket_path
from sidecar.control.server import ControlServer
from sidecar.control.server import Refusal as ControlRefusal
from sidecar.embedded_collector import EmbeddedCollector
from sidecar.errors import AuditError, PrerequisiteError, SidecarError
from sidecar.identity.assertion import AssertionSigner
from sidecar.identity.service import IdentityService
from sidecar.kernel import cgroups, run_state
from sidecar.kernel.steering import Steering, SteeringPlan
from sidecar.launch import invoking_user, launch
from sidecar.model.flow import FlowFacts
from sidecar.model.ids import IdSource
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.model.record import HoldPart, OperationPart, Record, TargetPart, VerdictPart
from sidecar.proxy import limits, link
from sidecar.proxy.holds import HoldDesk
from sidecar.proxy.listener import Listeners, open_listeners
from sidecar.proxy.policy_file import PolicySource
from sidecar.proxy.resolve import FlowResolver, Refusal
from sidecar.proxy.targets import REFRESH_S, NameBook
from sidecar.proxy.workers import WorkerHandle, WorkerPool

if TYPE_CHECKING:
    from sidecar.attribution.docker_engine import ContainerEngines

log = logging.getLogger("sidecar")

COMMIT_INTERVAL_S: Final = 0.05
AUDIT_FAILING_S: Final = 2.0
"""Four times `SPOOL_SAY_S` of a worker: what has not been said again for so long is over."""
MAX_UNWRITTEN: Final = 10_000
"""The supervisor's own records that wait in memory while the spool takes none."""
POLICY_POLL_S: Final = 0.5
MAX_DRIFTS_SHOWN: Final = 32
MAX_WORKERS: Final = 4
WORKER_USER: Final = "sidecar"
NOBODY: Final = 65534
SETUP_FAILED: Final = 125


def worker_identity() -> tuple[int, int]:
    """uid and gid of workers: the user `sidecar` where it exists, else nobody."""
    try:
        account = pwd.getpwnam(WORKER_USER)
    except KeyError:
        return NOBODY, NOBODY
    return account.pw_uid, account.pw_gid


class Agent:
    """One instance. `start`, then `serve` or a command, then `stop`; `stop` is safe after a failed `start`."""

    def __init__(
        self,
        config: Config,
        *,
        mode: str,
        policy: Path | None = None,
        command: tuple[str, ...] = (),
        instance: str | None = None,
    ) -> None:
        self.config = config
        self.mode = mode
        self.command = command
        self.instance = instance or os.urandom(4).hex()
        self.started_ns = time.time_ns()
        self.host = socket.gethostname()
        self.ids = IdSource()
        self.names = NameBook()
        self.policy = PolicySource(
            policy or config.policy,
            hash_key=config.hash_key(),
            upstream=config.upstream is not None,
        )
        self.facts: dict[str, FlowFacts] = {}
        self.gaps: dict[str, int] = {}
        self.drifts: deque[DriftStatus] = deque(maxlen=MAX_DRIFTS_SHOWN)
        self.drift_count = 0
        self.refused = 0
        self.identity_counts = [0, 0]
        self.audit_failing: dict[int, tuple[str, float]] = {}
        """By worker (-1: our own stream): what does not take its records, and when that was last said (monotonic)."""
        self.blocked_reason = ""
        self.collector: EmbeddedCollector | None = None
        self.collector_address: str | None = None
        self.job_cgroup: Path | None = None
        self.shipper: Shipper | None = None
        self.pool: WorkerPool | None = None
        self.steering: Steering | None = None
        self.resolver: FlowResolver | None = None
        self.spool: Spool | None = None
        self._kernel_thread = concurrent.futures.ThreadPoolExecutor(1, "kernel")
        self._spool_thread = concurrent.futures.ThreadPoolExecutor(1, "spool")
        self._names_thread = concurrent.futures.ThreadPoolExecutor(1, "names")
        self._reader_thread = concurrent.futures.ThreadPoolExecutor(1, "reader")
        self._listeners: Listeners | None = None
        self._writer: StreamWriter | None = None
        self._own_stream = ""
        self._unwritten: deque[Record] = deque()
        self._lost = 0
        self._rotating = False
        self._control: ControlServer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._begun = False
        self.engines: ContainerEngines | None = None
        self.holds = HoldDesk(self.instance, self._hold_decided)
        self.stopping = asyncio.Event()
        self._event_loop = asyncio.get_running_loop()

    # -- life

    async def start(self) -> None:
        """Bring everything up, or raise a SidecarError; the caller then calls `stop`."""
        if os.geteuid() != 0:
            raise PrerequisiteError("steering needs root", hint="sudo sidecar " + self.mode)
        config = self.config
        self.policy.load()
        self._watch_names()
        loop = asyncio.get_running_loop()
        names = loop.run_in_executor(self._names_thread, self.names.refresh)
        await self._begin()
        inspector, job = cgroups.create(self.instance)
        cgroups.move(os.getpid(), inspector)
        if self.mode == "exec":
            self.job_cgroup = job
        self.spool = Spool(
            config.audit.directory, self.host, max_bytes=config.audit.max_bytes, on_full=config.audit.on_full
        )
        handle = await self._spool_call(self.spool.open_stream, "supervisor")
        self._own_stream = handle.stream
        self._writer = StreamWriter(
            handle.fd,
            stream=handle.stream,
            host=self.host,
            head=handle.head,
            next_seq=handle.next_seq,
            segment_bytes=segment_bytes(config.audit.max_bytes),
        )
        self.record_agent("started", f"{self.mode}, policy {self.policy.policy.revision}")
        count = 1 if self.mode == "exec" else min(MAX_WORKERS, os.cpu_count() or 1)
        self._listeners = open_listeners(count)
        self.pool = WorkerPool(self, self._listeners.by_worker, *worker_identity())
        key: HostKey = self.spool.host_key
        self.signer = AssertionSigner(key.private_key, self.host)
        self.identity = IdentityService(config.identity)
        await self.pool.start()
        self.steering = Steering(
            SteeringPlan(
                instance=self.instance,
                scope_cgroups=(job,) if self.mode == "exec" else self._scope(),
                inspector_cgroup=inspector,
                exclusive=self.mode == "exec",
                ports=tuple(config.steering.ports),
                exclude=tuple(config.steering.exclude),
                listen_port=self._listeners.port,
                on_failure=config.steering.on_failure,
                foreign_netns="refuse" if self.mode == "exec" else "record",
                heartbeat_timeout_s=limits.HEARTBEAT_TIMEOUT_S,
            )
        )
        self._watch_containers()
        self.resolver = FlowResolver(config, self.steering, Resolver(self.engines), self.identity, self.names)
        try:
            async with asyncio.timeout(5):
                await names
        except TimeoutError:
            log.warning("names of targets and rules do not resolve yet; trying again every %.0f s", REFRESH_S)
        await loop.run_in_executor(self._kernel_thread, self._start_steering)
        self._control = ControlServer(
            socket_path(self.instance), AgentControl(self), on_refusal=self._control_refused
        )
        await self._control.start()
        self._start_shipping()
        for job_ in (self._beat, self._commit, self._watch_policy, self._watch_holds, self._refresh_names):
            self._tasks.append(asyncio.create_task(job_(), name=job_.__name__))

    def _start_steering(self) -> None:
        assert self.steering is not None
        self.steering.start()
        self.steering.beat()

    def _watch_containers(self) -> None:
        """An `exec` on a host without engines is spared the import of their library, which takes a tenth of a second."""
        addresses = self.config.attribution.engines
        if self.mode == "run" or any(Path(address.removeprefix("unix://")).exists() for address in addresses):
            from sidecar.attribution.docker_engine import ContainerEngines

            self.engines = ContainerEngines(addresses)
            self.engines.start()

    async def _begin(self) -> None:
        """Say who we are, before anything is made."""
        if self.mode == "exec":
            run_state.save(self.instance)
        else:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._kernel_thread, run_state.claim, self.instance, self._scope())
        self._begun = True

    def _scope(self) -> tuple[Path, ...]:
        """The cgroups that `run` steers. Raises PrerequisiteError where one is not there."""
        scope = self.config.steering.scope
        root = cgroups.cgroup2_mount()
        if scope.kind == "exec":
            return ()
        if scope.kind != "cgroups":
            return (root,)
        for path in scope.cgroups:
            if not (root / path.lstrip("/")).is_dir():
                raise PrerequisiteError(
                    f"there is no cgroup {path}",
                    hint=f"steering.scope names cgroups below {root}; systemctl start makes those of units",
                )
        return tuple(root / path.lstrip("/") for path in scope.cgroups)

    async def stop(self) -> None:
        """Undo everything, in the order of failing closed. A step that fails is logged and hinders no later one."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for step in (
            self._stop_flows, self._stop_steering, self._stop_listening, self._stop_recording, self._stop_collector,
            self._remove_traces,
        ):  # fmt: skip
            try:
                await step()
            except (SidecarError, OSError) as error:
                log.error("stopping, %s: %s", step.__name__.removeprefix("_").replace("_", " "), error)

    async def _stop_flows(self) -> None:
        if self.steering is not None:
            await asyncio.get_running_loop().run_in_executor(self._kernel_thread, self._take_events)
        if self.pool is not None:
            await self.pool.stop(limits.DRAIN_S if self.mode == "run" else 0.5)

    async def _stop_steering(self) -> None:
        if self.steering is not None:
            await asyncio.get_running_loop().run_in_executor(self._kernel_thread, self.steering.close)

    async def _stop_listening(self) -> None:
        if self._control is not None:
            await self._control.close()
        if self._listeners is not None:
            self._listeners.close()
        if self.resolver is not None:
            self.resolver.close()
        if self.engines is not None:
            self.engines.stop()

    async def _stop_recording(self) -> None:
        if self.spool is None:
            return
        try:
            if self._writer is not None:
                self.record_agent("stopped", self.mode)
                await self._spool_call(self.spool.close_stream, self._own_stream, "stopped")
            await self._spool_call(self.spool.commit)
            if self.shipper is not None:
                await self.shipper.stop(flush_s=5.0)
        finally:
            await self._spool_call(self.spool.close)

    async def _stop_collector(self) -> None:
        if self.collector is not None:
            await self.collector.stop()

    async def _remove_traces(self) -> None:
        if self._begun:
            await asyncio.to_thread(cgroups.remove, self.instance)
            await asyncio.to_thread(run_state.end, self.instance)
        for thread in (self._kernel_thread, self._spool_thread, self._names_thread, self._reader_thread):
            thread.shutdown(wait=False, cancel_futures=True)

    def _start_shipping(self) -> None:
        assert self.spool is not None
        upstream = self.config.upstream
        if upstream is not None:
            self.shipper = Shipper(self.spool, upstream.url, upstream.read_token())
        elif self.mode == "run":
            data = self.config.audit.directory / "collector"
            self.collector = EmbeddedCollector(data, self._ship_to_collector)
            self.collector_address = self.collector.address
            self._tasks.append(asyncio.create_task(self.collector.serve(), name="collector"))
        if self.shipper is not None:
            self.shipper.start()

    def _ship_to_collector(self) -> None:
        assert self.spool is not None
        if self.shipper is None:
            self.shipper = Shipper(self.spool, f"{self.collector_address}", None)
            self.shipper.start()

    # -- periodic work

    async def _beat(self) -> None:
        """The heartbeat that lets covered connections through: written only after the kernel state was verified, and with
        the time at which a worker last spoke: one that hangs is refused as soon as one that is gone."""
        loop = asyncio.get_running_loop()
        assert self.steering is not None
        assert self.pool is not None
        while True:
            heard = self.pool.heard()
            if heard is not None:
                try:
                    await loop.run_in_executor(self._kernel_thread, self._verify_and_beat, heard)
                except (SidecarError, OSError) as error:
                    log.error("steering could not be verified; new connections are refused: %s", error)
            await loop.run_in_executor(self._kernel_thread, self._take_events)
            await asyncio.sleep(limits.BEAT_INTERVAL_S)

    def _verify_and_beat(self, heard: float) -> None:
        assert self.steering is not None
        for drift in self.steering.beat(heard):
            self.drift_count += 1
            self.drifts.append(DriftStatus(drift.name, drift.detail, drift.repaired, time.time_ns()))
            reason = GapReason.HOOK_DETACHED if "hook" in drift.name else GapReason.TABLE_CHANGED
            self._later(
                self.record_gap,
                reason,
                f"{drift.name}: {drift.detail}" + ("; repaired" if drift.repaired else ""),
            )

    def _take_events(self) -> None:
        assert self.steering is not None
        for event in self.steering.drain_events():
            self._later(self._kernel_event, event)

    def _later(self, call: Callable[..., None], *arguments: Any) -> None:
        self._event_loop.call_soon_threadsafe(call, *arguments)

    def _kernel_event(self, event: Any) -> None:
        self.refused += 1 if event.refused else 0
        self.record_gap(GapReason(event.reason), event.detail, event=event)

    async def _commit(self) -> None:
        """Group commit: on disk, verified and signed within about `COMMIT_INTERVAL_S`."""
        assert self.spool is not None
        while True:
            try:
                await self._spool_call(self.spool.commit)
            except (AuditError, OSError) as error:
                log.error("audit: %s", error)
            self._update_block()
            await asyncio.sleep(COMMIT_INTERVAL_S)

    def _update_block(self) -> None:
        assert self.spool is not None
        assert self.pool is not None
        self._write_waiting()
        state = self.spool.state()
        if state.ok:  # the directory takes files again: who still fails says so again
            then = time.monotonic() - AUDIT_FAILING_S
            self.audit_failing = {n: said for n, said in self.audit_failing.items() if said[1] > then}
        failing = next((detail for detail, _ in self.audit_failing.values()), "")
        reason = failing or ("" if state.ok else state.blocked_reason or "the spool is full")
        if reason != self.blocked_reason:
            self.blocked_reason = reason
            if reason:
                log.error("audit is blocked, new requests wait: %s", reason)
            else:
                log.info("audit goes on")
            self.pool.broadcast(link.Block("" if self.config.audit.on_full == "drop" else reason))

    async def _watch_policy(self) -> None:
        while True:
            await asyncio.sleep(POLICY_POLL_S)
            self.reload_policy(force=False)

    def reload_policy(self, *, force: bool = True) -> None:
        if self.policy.poll(force=force):
            assert self.pool is not None
            self.pool.broadcast(self.policy.message())
            self._watch_names()
            self.record_agent("policy_changed", self.policy.policy.revision)

    async def _watch_holds(self) -> None:
        while True:
            self.holds.expire()
            await asyncio.sleep(0.25)

    def _watch_names(self) -> None:
        self.names.watch([*self.config.host_names(), *self.policy.policy.host_names])

    async def _refresh_names(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            await asyncio.get_running_loop().run_in_executor(self._names_thread, self.names.refresh)

    @property
    def listen_port(self) -> int:
        return self._listeners.port if self._listeners else 0

    async def in_reader(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Reading records back is slow: a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._reader_thread, call, *arguments)

    async def _spool_call(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """All of the spool's work happens in one thread, in order."""
        return await asyncio.get_running_loop().run_in_executor(self._spool_thread, call, *arguments)

    # -- workers (proxy.workers.Owner)

    def worker_started(self, worker: WorkerHandle) -> None:
        audit = self.config.audit
        worker.send(
            link.Configure(
                host=self.host,
                sync_strict=audit.sync == "strict",
                on_full_drop=audit.on_full == "drop",
                segment_bytes=segment_bytes(audit.max_bytes),
                request_max_bytes=audit.requests.max_bytes,
                response_max_rows=audit.responses.max_rows,
                response_max_bytes=audit.responses.max_bytes,
            )
        )
        worker.send(self.policy.message())
        self._task(self._give_segment(worker, None))

    async def _give_segment(self, worker: WorkerHandle, rotate: str | None) -> None:
        assert self.spool is not None
        try:
            handle: StreamHandle = (
                await self._spool_call(self.spool.rotate, rotate)
                if rotate
                else await self._spool_call(self.spool.open_stream, f"worker-{worker.number}")
            )
        except (AuditError, OSError) as error:
            self._audit_fails(worker.number, str(error))
            log.error("no segment for worker %d: %s", worker.number, error)
            await asyncio.sleep(1.0)
            self._task(self._give_segment(worker, rotate))
            return
        self.audit_failing.pop(worker.number, None)
        worker.stream = handle.stream
        worker.send(link.Segment(handle.stream, handle.head, handle.next_seq), (handle.fd,))
        if self.blocked_reason and self.config.audit.on_full == "block":
            worker.send(link.Block(self.blocked_reason))

    def _task(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.append(task)
        task.add_done_callback(lambda done: self._tasks.remove(done) if done in self._tasks else None)

    def worker_message(self, worker: WorkerHandle, message: Any) -> None:
        match message:
            case link.Resolve():
                self._task(self._resolve(worker, message))
            case link.FlowClosed():
                worker.flows.pop(message.flow, None)
                self.facts.pop(message.flow, None)
                self.holds.flow_ended(message.flow)
            case link.Sign():
                self._sign(worker, message)
            case link.HoldRequested():
                facts = self.facts.get(message.flow)
                if facts is None:
                    worker.send(link.HoldDecided(message.hold_id, "rejected", None, "the flow is not known"))
                else:
                    self.holds.requested(worker, message, facts)
                    log.info("held by %s: sidecar approvals approve %s", message.rule, message.hold_id[-8:])
            case link.HoldWithdrawn():
                self.holds.withdrawn(message)
            case link.NeedSegment():
                self._task(self._give_segment(worker, worker.stream))
            case link.ClientRequiresTls():
                facts = self.facts.get(message.flow)
                if facts is not None and self.resolver is not None:
                    self.resolver.remember_tls(facts)
            case link.AuditFailed():
                self._audit_fails(worker.number, message.detail)
                self._update_block()
            case link.AuditRecovered():
                self.audit_failing.pop(worker.number, None)

    def worker_died(self, worker: WorkerHandle, detail: str) -> None:
        self.audit_failing.pop(worker.number, None)
        for flow in list(worker.flows):
            self.facts.pop(flow, None)
            self.holds.flow_ended(flow)
            self.append(
                Record(
                    id=self.ids.new(time.time_ns()),
                    ts_ns=time.time_ns(),
                    kind="close",
                    flow=flow,
                    reason=CloseReason.WORKER_DIED.value,
                    detail=detail,
                )
            )
        if worker.stream and self.spool is not None:
            stream, worker.stream = worker.stream, ""
            self._task(self._spool_call(self.spool.close_stream, stream, "worker " + detail))

    async def _resolve(self, worker: WorkerHandle, message: link.Resolve) -> None:
        assert self.resolver is not None
        outcome = await self.resolver.resolve(message)
        if isinstance(outcome, Refusal):
            worker.send(link.Resolved(message.id, None, outcome.reason.value))
            self._refused(outcome)
            return
        self.identity_counts[0 if outcome.principal else 1] += 1
        self.facts[outcome.flow] = outcome
        worker.flows[outcome.flow] = None
        worker.send(link.Resolved(message.id, outcome))

    def _refused(self, refusal: Refusal) -> None:
        now_ns = time.time_ns()
        origin = refusal.origin
        flow = self.ids.new(now_ns)
        self.append(
            Record(
                id=flow,
                ts_ns=now_ns,
                kind="open",
                flow=flow,
                origin={"pid": origin.pid, "tgid": origin.tgid, "uid": origin.uid, "comm": origin.comm}
                if origin
                else {"uncertain": True},
                target=TargetPart(
                    host=refusal.original.host,
                    port=refusal.original.port,
                    protocol="unknown",
                    address=refusal.original.host,
                    host_source="address",
                ),
                operation=OperationPart(kind="connect"),
                verdict=VerdictPart(action="deny", rule="steering", reason=refusal.detail),
            )
        )
        self.append(
            Record(
                id=self.ids.new(now_ns),
                ts_ns=now_ns,
                kind="close",
                flow=flow,
                reason=refusal.reason.value,
                detail=refusal.detail,
            )
        )

    def _sign(self, worker: WorkerHandle, message: link.Sign) -> None:
        facts = self.facts.get(message.flow)
        assertion = None
        if facts is not None and facts.principal is not None:
            assertion = self.signer.sign(
                facts.principal,
                flow=message.flow,
                backend_pid=message.backend_pid,
                target=facts.target.name or facts.target.host,
                now_s=time.time(),
            )
        worker.send(link.Signed(message.id, assertion))

    # -- records of our own

    def _hold_decided(self, grant: Grant, request: link.HoldRequested) -> None:
        now_ns = time.time_ns()
        self.append(
            Record(
                id=self.ids.new(now_ns),
                ts_ns=now_ns,
                kind="decision",
                flow=request.flow,
                request=request.request_id,
                hold=HoldPart(
                    id=grant.hold_id,
                    state=grant.state.value,
                    by=grant.decided_by,
                    reason=grant.reason,
                    expires_ns=grant.expires_ns,
                    digest=grant.digest,
                ),
            )
        )

    def _control_refused(self, refusal: ControlRefusal) -> None:
        self.record_agent(
            "control_refused",
            f"{refusal.method} {refusal.subject} by pid {refusal.pid} uid {refusal.uid}: {refusal.cause}",
        )

    def record_gap(self, reason: GapReason, detail: str, *, event: Any = None) -> None:
        now_ns = time.time_ns()
        self.gaps[reason.value] = self.gaps.get(reason.value, 0) + 1
        record = Record(id=self.ids.new(now_ns), ts_ns=now_ns, kind="gap", reason=reason.value, detail=detail)
        if event is not None:
            record.origin = {"pid": event.pid, "tgid": event.tgid, "uid": event.uid, "comm": event.comm}
            record.target = TargetPart(
                host=event.destination.host,
                port=event.destination.port,
                protocol="unknown",
                address=event.destination.host,
                host_source="address",
            )
        self.append(record)

    def record_agent(self, reason: str, detail: str) -> None:
        now_ns = time.time_ns()
        self.append(Record(id=self.ids.new(now_ns), ts_ns=now_ns, kind="agent", reason=reason, detail=detail))

    def append(self, record: Record) -> None:
        """To the supervisor's own stream; kept in memory, bounded, while the spool cannot take it."""
        if self._unwritten or not self._append(record):
            if len(self._unwritten) < MAX_UNWRITTEN:
                self._unwritten.append(record)
            else:
                self._lost += 1

    def _write_waiting(self) -> None:
        """Records that the spool could not take when they were made; what did not fit in memory either becomes a gap."""
        while self._unwritten and self._append(self._unwritten[0]):
            self._unwritten.popleft()
        if self._lost and not self._unwritten:
            lost, self._lost = self._lost, 0
            self.record_gap(GapReason.SPOOL_DROPPED, f"{lost} records of the supervisor could not be kept")

    def _audit_fails(self, number: int, detail: str) -> None:
        self.audit_failing[number] = (detail, time.monotonic())

    def _append(self, record: Record) -> bool:
        if self._writer is None:
            return False
        try:
            self._writer.append(record)
        except AuditError as error:
            self._audit_fails(-1, str(error))
            return False
        self.audit_failing.pop(-1, None)
        if self._writer.full and not self._rotating:
            self._rotating = True
            self._task(self._rotate_own())
        return True

    async def _rotate_own(self) -> None:
        assert self.spool is not None
        assert self._writer is not None
        try:
            self._writer.switch((await self._spool_call(self.spool.rotate, self._own_stream)).fd)
        except AuditError as error:  # the next record asks again
            log.error("no segment for the supervisor's stream: %s", error)
        finally:
            self._rotating = False

    async def run_until_stopped(self) -> None:
        await self.stopping.wait()


async def _run(agent: Agent, ready: Callable[[], Any] | None = None) -> int:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.stopping.set)
    loop.add_signal_handler(signal.SIGHUP, agent.reload_policy)
    try:
        await agent.start()
        if ready is None:
            log.info("instance %s runs; look at it with `sidecar status`, end it with Ctrl-C", agent.instance)
            await agent.run_until_stopped()
            return 0
        return int(await ready())
    finally:
        await agent.stop()


def run_agent(config: Config) -> int:
    """`sidecar run`: until SIGTERM or SIGINT; SIGHUP reloads the policy. Returns the exit status."""

    async def main() -> int:
        agent = Agent(config, mode="run")
        return await _run(agent)

    return int(uvloop.run(main()))


def run_exec(config: Config, argv: list[str], policy: Path | None, instance: str) -> int:
    """`sidecar exec`, as `instance`: returns the command's exit status. Raises SidecarError where steering could not be set up."""

    async def main() -> int:
        agent = Agent(config, mode="exec", policy=policy, command=tuple(argv), instance=instance)

        async def command() -> int:
            assert agent.job_cgroup is not None
            running = asyncio.create_task(
                launch(
                    argv,
                    job_cgroup=agent.job_cgroup,
                    user=invoking_user(),
                    extra_env={"PGCHANNELBINDING": "disable"},
                )
            )
            stop = asyncio.create_task(agent.stopping.wait())
            await asyncio.wait({running, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                return 128 + signal.SIGTERM
            stop.cancel()
            return running.result()

        return await _run(agent, command)

    return int(uvloop.run(main()))
