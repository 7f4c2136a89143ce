"""The supervisor's part of recording: the spool, in a thread of its own; the records that are nobody's flow's or that a worker cannot
write any more; and whether new requests must wait because the audit takes none.

Belongs to the agent's loop. Ships nothing, decides nothing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from sidecar.approvals.grants import Grant
from sidecar.audit.hostkey import HostKey
from sidecar.audit.spool import Spool, SpoolState, StreamHandle, StreamWriter
from sidecar.config import Audit
from sidecar.control.server import Refusal as ControlRefusal
from sidecar.errors import AuditError
from sidecar.kernel.steering import KernelEvent
from sidecar.model.ids import IdSource
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.model.record import HoldPart, OperationPart, Record, TargetPart, VerdictPart
from sidecar.proxy import link
from sidecar.proxy.resolve import Refusal

log = logging.getLogger("sidecar")

COMMIT_INTERVAL_S: Final = 0.05
FAILING_S: Final = 2.0
"""Four times `SPOOL_SAY_S` of a worker: what has not been said again for so long is over."""
RETRY_S: Final = 1.0
MAX_UNWRITTEN: Final = 10_000
"""The supervisor's own records that wait in memory while the spool takes none."""
OWN: Final = -1
"""Our own stream, among the workers' numbers."""


class Recording:
    """`open`, then records, then `close`. `spawn` runs a coroutine until it ends or the agent does; `block` tells the workers why new
    requests wait, or `""` when they need not any more."""

    def __init__(
        self,
        audit: Audit,
        host: str,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        block: Callable[[str], None],
    ) -> None:
        self.ids = IdSource()
        self.gaps: dict[str, int] = {}
        """By word of GapReason."""
        self.blocked_reason = ""
        self.spool: Spool | None = None
        self._audit = audit
        self._host = host
        self._spawn = spawn
        self._block = block
        self._failing: dict[int, tuple[str, float]] = {}
        """By worker, or OWN: what does not take its records, and when that was last said (monotonic)."""
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "spool")
        self._writer: StreamWriter | None = None
        self._own_stream = ""
        self._unwritten: deque[Record] = deque()
        self._lost = 0
        self._rotating = False

    # -- life

    async def open(self, said: str) -> None:
        """Open the spool and our own stream, whose first record is `started`. Raises AuditError or OSError."""
        audit = self._audit
        self.spool = Spool(audit.directory, self._host, max_bytes=audit.max_bytes, on_full=audit.on_full)
        handle = await self._call(self.spool.open_stream, "supervisor")
        self._own_stream = handle.stream
        self._writer = handle.writer(self._host, audit.max_bytes)
        self.agent("started", said)

    async def close(self, said: str, ship: Callable[[], Awaitable[None]]) -> None:
        """End our own stream with `stopped`; `ship` takes what is committed by then."""
        if self.spool is None:
            return
        try:
            if self._writer is not None:
                self.agent("stopped", said)
                await self._call(self.spool.close_stream, self._own_stream, "stopped")
            await self._call(self.spool.commit)
            await ship()
        finally:
            await self._call(self.spool.close)

    def end(self) -> None:
        """No call any more, also after a failed `open`."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _call(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """All of the spool's work happens in one thread, in order."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    @property
    def host_key(self) -> HostKey:
        assert self.spool is not None
        return self.spool.host_key

    def state(self) -> SpoolState | None:
        return self.spool.state() if self.spool else None

    async def commit_forever(self) -> None:
        """Group commit: on disk, verified and signed within about `COMMIT_INTERVAL_S`."""
        assert self.spool is not None
        while True:
            try:
                await self._call(self.spool.commit)
            except (AuditError, OSError) as error:
                log.error("audit: %s", error)
            self.update_block()
            await asyncio.sleep(COMMIT_INTERVAL_S)

    # -- whether it takes records

    def fails(self, number: int, detail: str) -> None:
        """What a worker says of its stream, or OWN of ours."""
        self._failing[number] = (detail, time.monotonic())

    def works(self, number: int) -> None:
        self._failing.pop(number, None)

    def update_block(self) -> None:
        self._write_waiting()
        state = self.state()
        assert state is not None
        if state.ok:  # the directory takes files again: who still fails says so again
            then = time.monotonic() - FAILING_S
            self._failing = {n: said for n, said in self._failing.items() if said[1] > then}
        failing = next((detail for detail, _ in self._failing.values()), "")
        reason = failing or ("" if state.ok else state.blocked_reason or "the spool is full")
        if reason != self.blocked_reason:
            self.blocked_reason = reason
            if reason:
                log.error("audit is blocked, new requests wait: %s", reason)
            else:
                log.info("audit goes on")
            self._block("" if self._audit.on_full == "drop" else reason)

    # -- streams of workers

    async def segment(self, number: int, rotate: str | None) -> StreamHandle:
        """A new stream for a worker, or the next segment of the one that it has; tried until there is one."""
        assert self.spool is not None
        while True:
            try:
                handle: StreamHandle = (
                    await self._call(self.spool.rotate, rotate)
                    if rotate
                    else await self._call(self.spool.open_stream, f"worker-{number}")
                )
            except (AuditError, OSError) as error:
                self.fails(number, str(error))
                log.error("no segment for worker %d: %s", number, error)
                await asyncio.sleep(RETRY_S)
                continue
            self.works(number)
            return handle

    async def close_stream(self, stream: str, why: str) -> None:
        assert self.spool is not None
        await self._call(self.spool.close_stream, stream, why)

    # -- our own records

    def gap(self, reason: GapReason, detail: str, *, event: KernelEvent | None = None) -> None:
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

    def agent(self, reason: str, detail: str) -> None:
        now_ns = time.time_ns()
        self.append(Record(id=self.ids.new(now_ns), ts_ns=now_ns, kind="agent", reason=reason, detail=detail))

    def hold_decided(self, grant: Grant, request: link.HoldRequested) -> None:
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

    def control_refused(self, refusal: ControlRefusal) -> None:
        self.agent(
            "control_refused",
            f"{refusal.method} {refusal.subject} by pid {refusal.pid} uid {refusal.uid}: {refusal.cause}",
        )

    def refused(self, refusal: Refusal) -> None:
        """A flow that never became one."""
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
        self._closed(flow, refusal.reason.value, refusal.detail)

    def flow_lost(self, flow: str, detail: str) -> None:
        """Its worker died."""
        self._closed(flow, CloseReason.WORKER_DIED.value, detail)

    def _closed(self, flow: str, reason: str, detail: str) -> None:
        now_ns = time.time_ns()
        self.append(
            Record(
                id=self.ids.new(now_ns), ts_ns=now_ns, kind="close", flow=flow, reason=reason, detail=detail
            )
        )

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
            self.gap(GapReason.SPOOL_DROPPED, f"{lost} records of the supervisor could not be kept")

    def _append(self, record: Record) -> bool:
        if self._writer is None:
            return False
        try:
            self._writer.append(record)
        except AuditError as error:
            self.fails(OWN, str(error))
            return False
        self.works(OWN)
        if self._writer.full and not self._rotating:
            self._rotating = True
            self._spawn(self._rotate_own())
        return True

    async def _rotate_own(self) -> None:
        assert self.spool is not None
        assert self._writer is not None
        try:
            self._writer.switch((await self._call(self.spool.rotate, self._own_stream)).fd)
        except AuditError as error:  # the next record asks again
            log.error("no segment for the supervisor's stream: %s", error)
        finally:
            self._rotating = False
