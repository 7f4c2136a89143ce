"""A worker process: accepts steered connections, runs their sessions. Unprivileged: it holds its listening sockets, one
append-only segment and one link to the supervisor, nothing else.

Started by `proxy.workers` as `python -m sidecar.proxy.worker`, with descriptors named in its arguments. Everything it needs
is imported before the privileges are dropped, because afterwards it may not be able to read the installation.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from typing import Any, cast

import uvloop

from sidecar.audit.writer import SEGMENT_BYTES, StreamWriter
from sidecar.errors import AuditError, SidecarError
from sidecar.kernel.original_destination import original_destination
from sidecar.model.flow import FlowFacts
from sidecar.model.ids import IdSource
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.model.record import EncodedRecord, Record
from sidecar.model.verdict import Engine
from sidecar.policy import builtin_policy, load_policy
from sidecar.proxy import limits, link
from sidecar.proxy.driver import PAUSE_SPOOL, FlowDriver
from sidecar.proxy.hop import Gate, Hop
from sidecar.proxy.leaves import Leaves
from sidecar.session.commands import OpenHold, SessionLimits
from sidecar.session.context import SessionContext
from sidecar.session.factory import make_session
from sidecar.session.postgres_definitions import Databases

log = logging.getLogger("sidecar.worker")

GC_THRESHOLD = 20_000
"""Container objects made before the youngest generation is searched."""

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38


class Accepted(Hop):
    """A client that has connected and is not known yet: not read until the supervisor has said who it is."""

    __slots__ = ("resolve_id", "worker")

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker.gate, from_client=True)
        self.worker = worker
        self.resolve_id = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()
        self.worker.accepted(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.flow is None:
            self.worker.unresolved.pop(self.resolve_id, None)


class Worker:
    """The composition of one worker. All methods run on its loop."""

    def __init__(self, sock: socket.socket, listeners: list[socket.socket]) -> None:
        self.loop = asyncio.get_running_loop()
        self.listeners = listeners
        self.servers: list[asyncio.Server] = []
        self.engine: Engine = builtin_policy()
        self._moment = 0
        self.writer: StreamWriter | None = None
        self.gate = Gate(SEGMENT_BYTES, self.loop.call_soon, self._flush)
        self.sync_strict = False
        self.on_full_drop = False
        self._dropped = 0
        self.blocked = ""
        self.flows: dict[str, FlowDriver] = {}
        self.unresolved: dict[int, tuple[Accepted, asyncio.TimerHandle]] = {}
        self.signing: dict[int, FlowDriver] = {}
        self.leaves = Leaves()
        self.minting: dict[int, tuple[tuple[str, ...], list[FlowDriver]]] = {}
        self.holding: dict[str, FlowDriver] = {}
        self.ids = IdSource()
        self.session_limits = SessionLimits()
        self.databases = Databases()
        self.stopped: asyncio.Future[int] = self.loop.create_future()
        self._next_id = 0
        self._failing = False
        self._failed_at = 0.0
        self._asked_for_segment = False
        self._draining = False
        self.authorities: dict[str, str] = {}
        self._tls: dict[tuple[str | None, str | None], ssl.SSLContext] = {}
        self._sync_pool = concurrent.futures.ThreadPoolExecutor(1, "sync")
        self._reported: dict[str, tuple[int, ...]] = {}
        self.link = link.Link(sock, link.ToWorker, self._on_message, self._on_supervisor_gone)
        self.link.send(link.Hello(os.getpid()))
        self._beat()
        self._watch_hangups()

    # -- the supervisor

    def _on_message(self, message: Any, descriptors: list[int]) -> None:
        match message:
            case link.Configure():
                self.sync_strict = message.sync_strict
                self.on_full_drop = message.on_full_drop
                self.session_limits = SessionLimits(
                    record_text_max_bytes=message.request_max_bytes,
                    record_body_max_bytes=message.request_max_bytes,
                    response_max_rows=message.response_max_rows,
                    response_max_bytes=message.response_max_bytes,
                )
                self.host = message.host
                self.authorities = message.authorities
                self.gate.full = message.segment_bytes
                self._set_gate()
            case link.PolicyText():
                self._take_policy(message)
            case link.Segment():
                self._take_segment(message, descriptors)
            case link.Resolved():
                self._resolved(message)
            case link.Signed():
                flow = self.signing.pop(message.id, None)
                if flow is not None:
                    flow.assertion_signed(message.assertion)
            case link.LeafMinted():
                self._leaf_minted(message)
            case link.HoldDecided():
                flow = self.holding.pop(message.hold_id, None)
                if flow is not None:
                    flow.hold_decided(message.hold_id, message.outcome, message.by, message.reason)
            case link.Block():
                self.blocked = message.reason
                self._set_gate()
                if not message.reason:
                    for flow in list(self.flows.values()):
                        flow.unblocked()
            case link.Drain():
                self.loop.create_task(self._drain(message.grace_s))

    def _set_gate(self) -> None:
        """After whatever has a say in it."""
        waits = self.sync_strict or self._failing or self._dropped or self.blocked
        self.gate.set(self.writer, not waits)

    def _on_supervisor_gone(self) -> None:
        """Without a supervisor nothing is signed or resolved: end every flow in its own protocol, then go."""
        for flow in list(self.flows.values()):
            flow.abort(CloseReason.INTERNAL_ERROR, "the supervisor is gone")
        self._flush()
        if not self.stopped.done():
            self.stopped.set_result(1)

    def _take_policy(self, message: link.PolicyText) -> None:
        if message.text is None:
            self.engine = builtin_policy()
        else:
            self.engine = load_policy(
                message.text,
                message.file,
                hash_key=message.hash_key,
                upstream=message.upstream,
                now_ns=time.time_ns,
            )
        self._engine_changed()

    def _engine_changed(self) -> None:
        """Also where an `until` has passed: sessions keep decisions."""
        self._moment = self.engine.moment(time.time_ns())
        for flow in list(self.flows.values()):
            flow.engine_changed()

    def _take_segment(self, message: link.Segment, descriptors: list[int]) -> None:
        if self.writer is not None and self.writer.stream == message.stream:
            self._switch(self.writer, descriptors[0])
            return
        self._asked_for_segment = False
        self.writer = StreamWriter(
            descriptors[0],
            stream=message.stream,
            host=self.host,
            head=message.head,
            next_seq=message.next_seq,
            segment_bytes=self.gate.full,
        )
        self._set_gate()
        if not self.servers:
            self.loop.create_task(self._listen())

    def _switch(self, writer: StreamWriter, fd: int) -> None:
        """Go on in a new segment, once the one before has the rest of what it took only a part of."""
        try:
            old = writer.switch(fd)
        except AuditError as error:
            self.append_failed(str(error))
            self.loop.call_later(limits.SPOOL_RETRY_S, self._switch, writer, fd)
            return
        os.close(old)
        self._asked_for_segment = False

    async def _listen(self) -> None:
        for sock in self.listeners:
            self.servers.append(
                await self.loop.create_server(
                    lambda: cast(asyncio.Protocol, Accepted(self)), sock=sock, backlog=limits.LISTEN_BACKLOG
                )
            )
        self.link.send(link.Ready())

    def _beat(self) -> None:
        if self.engine.moment(time.time_ns()) != self._moment:
            self._engine_changed()
        stats = []
        for name, flow in self.flows.items():
            now = (flow.requests, flow.denied, flow.bytes_client, flow.bytes_server, len(flow.holds))
            if self._reported.get(name) != now:
                self._reported[name] = now
                stats.append(
                    link.FlowStat(
                        name,
                        flow.protocol,
                        flow.requests,
                        flow.denied,
                        flow.bytes_client,
                        flow.bytes_server,
                        "held" if flow.holds else "blocked" if flow.blocked else "open",
                    )
                )
        self.link.send(link.Beat(len(self.flows), tuple(stats)))
        self.loop.call_later(limits.BEAT_INTERVAL_S, self._beat)

    def _watch_hangups(self) -> None:
        for flow in list(self.flows.values()):
            if flow.client.paused and flow.hung_up():
                flow.lost(flow.client, None)
        self.loop.call_later(limits.HANGUP_POLL_S, self._watch_hangups)

    # -- opening flows

    def accepted(self, hop: Accepted) -> None:
        assert hop.transport is not None
        sock = hop.transport.get_extra_info("socket")
        if (
            sock is None
            or self._draining
            or len(self.flows) + len(self.unresolved) >= limits.MAX_FLOWS_PER_WORKER
        ):
            hop.reset()
            return
        try:
            peer, local = sock.getpeername(), sock.getsockname()
            original = original_destination(sock)
        except OSError:
            hop.reset()
            return
        self._next_id += 1
        hop.resolve_id = self._next_id
        timer = self.loop.call_later(limits.RESOLVE_TIMEOUT_S, self._unanswered, hop.resolve_id)
        self.unresolved[hop.resolve_id] = (hop, timer)
        self.link.send(
            link.Resolve(hop.resolve_id, peer[0], peer[1], local[0], local[1], original.host, original.port)
        )

    def _unanswered(self, resolve_id: int) -> None:
        waiting = self.unresolved.pop(resolve_id, None)
        if waiting is not None:
            waiting[0].reset()

    def _resolved(self, message: link.Resolved) -> None:
        waiting = self.unresolved.pop(message.id, None)
        if waiting is None:
            if message.facts is not None:
                self.link.send(link.FlowClosed(message.facts.flow, CloseReason.CLIENT_CLOSED))
            return
        hop, timer = waiting
        timer.cancel()
        if message.facts is None:
            hop.reset()
            return
        self._open(hop, message.facts)

    def _open(self, hop: Accepted, facts: FlowFacts) -> None:
        context = SessionContext(facts, self.engine, self.ids, self.session_limits, self.databases)
        session = make_session(context)
        driver = FlowDriver(self, hop, session, facts.flow, facts.target.address, facts.target.protocol)
        self.flows[facts.flow] = driver
        driver.start()
        early, hop.early = hop.early, []
        for data in early:
            if data:
                driver.received(hop, data)
            else:
                driver.ended(hop)
        if not driver.closed and hop.transport is not None and not hop.lost:
            if self.blocked:
                hop.paused |= PAUSE_SPOOL
            if not hop.paused and not hop.transport.is_closing():
                hop.transport.resume_reading()

    # -- what drivers ask for

    def append(self, records: list[Record | EncodedRecord]) -> None:
        """Append to the stream. Raises AuditError where the spool cannot take them."""
        writer = self.writer
        if writer is None:
            raise AuditError("no segment is open")
        waiting = self.gate.take()
        records = [*waiting, *records]
        told = [self._drop_record()] if self._dropped else []
        try:
            writer.append_many([*told, *records])
        except AuditError as error:
            if not self.on_full_drop:
                self.gate.waiting[:0] = waiting
                raise
            if told and not writer.abandon(told):
                self._dropped = 0  # the file took a part of it, and its rest follows
            self._dropped += writer.abandon(records)
            self.append_failed(str(error))
            return
        if self._failing:
            self._failing = False
            self.link.send(link.AuditRecovered())
        if self._dropped or not self.gate.open:
            self._dropped = 0
            self._set_gate()
        if writer.full:
            self.segment_full()

    def _flush(self) -> None:
        """Answers that were handed on and whose records could not be written at once: until they are, requests wait."""
        if not self.gate.waiting:
            return
        try:
            self.append([])
        except AuditError as error:
            self.append_failed(str(error))
            self.loop.call_later(limits.SPOOL_RETRY_S, self._flush)

    def segment_full(self) -> None:
        """Ask for the next one, once."""
        if not self._asked_for_segment:
            self._asked_for_segment = True
            self.link.send(link.NeedSegment())

    def _drop_record(self) -> Record:
        """`on_full: drop`: what was lost is named as soon as a record can be written again."""
        now_ns = time.time_ns()
        return Record(
            id=self.ids.new(now_ns),
            ts_ns=now_ns,
            kind="gap",
            reason=GapReason.SPOOL_DROPPED.value,
            detail=f"{self._dropped} records could not be written",
        )

    def append_failed(self, detail: str) -> None:
        """Say so now, and again from time to time while it lasts."""
        now = self.loop.time()
        if not self._failing or now > self._failed_at + limits.SPOOL_SAY_S:
            self._failing, self._failed_at = True, now
            self._set_gate()
            self.link.send(link.AuditFailed(detail))

    async def sync(self) -> None:
        writer = self.writer
        if writer is not None:
            await self.loop.run_in_executor(self._sync_pool, os.fdatasync, writer.fd)

    def sign(self, flow: FlowDriver, backend_pid: int) -> None:
        self._next_id += 1
        self.signing[self._next_id] = flow
        self.link.send(link.Sign(self._next_id, flow.flow, backend_pid))

    def mint(self, flow: FlowDriver, names: tuple[str, ...]) -> None:
        """Several flows that want the same leaf wait for one answer."""
        kept = self.leaves.get(names)
        if kept is not None:
            self.loop.call_soon(flow.leaf_minted, kept)
            return
        for asked, waiting in self.minting.values():
            if asked == names:
                waiting.append(flow)
                return
        self._next_id += 1
        self.minting[self._next_id] = (names, [flow])
        self.link.send(link.MintLeaf(self._next_id, names))

    def _leaf_minted(self, message: link.LeafMinted) -> None:
        names, waiting = self.minting.pop(message.id, ((), []))
        context = (
            self.leaves.take(names, message.chain, message.key, message.not_after_ns)
            if message.chain
            else None
        )
        for flow in waiting:
            flow.leaf_minted(context)

    def open_hold(self, flow: FlowDriver, command: OpenHold) -> None:
        self.holding[command.hold_id] = flow
        self.link.send(
            link.HoldRequested(
                hold_id=command.hold_id,
                flow=flow.flow,
                request_id=command.request_id,
                rule=command.rule,
                reason=command.reason,
                by=command.terms.by,
                within_s=command.terms.within_s,
                summary=command.summary,
                parameters=command.parameters,
                digest=command.digest,
            )
        )

    def withdraw_hold(self, hold_id: str) -> None:
        if self.holding.pop(hold_id, None) is not None:
            self.link.send(link.HoldWithdrawn(hold_id))

    def flow_closed(self, flow: FlowDriver, reason: CloseReason) -> None:
        self.flows.pop(flow.flow, None)
        self._reported.pop(flow.flow, None)
        if getattr(flow.session, "client_requires_tls", False):
            self.link.send(link.ClientRequiresTls(flow.flow))
        self.link.send(link.FlowClosed(flow.flow, reason.value))
        if self._draining and not self.flows and not self.stopped.done():
            self.loop.call_later(0.05, self._stop)

    def tls_context(self, verify: str | None, ca_file: str | None) -> ssl.SSLContext:
        """A client context for libpq's word `verify`; kept, because loading the system's roots is slow."""
        key = (verify, ca_file)
        context = self._tls.get(key)
        if context is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if verify in ("verify-ca", "verify-full"):
                context.check_hostname = verify == "verify-full"
                if ca_file:
                    context.load_verify_locations(cadata=self.authorities[ca_file])
                else:
                    context.load_default_certs()
            else:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self._tls[key] = context
        return context

    # -- ending

    async def _drain(self, grace_s: float) -> None:
        self._draining = True
        for server in self.servers:
            server.close()
        deadline = time.monotonic() + grace_s
        while self.flows and time.monotonic() < deadline:  # noqa: ASYNC110 - flows end by themselves
            await asyncio.sleep(0.05)
        for flow in list(self.flows.values()):
            flow.abort(CloseReason.DRAINED, "the inspector is stopping")
        await asyncio.sleep(0.05)
        self._stop()

    def _stop(self) -> None:
        self._flush()
        if not self.stopped.done():
            self.stopped.set_result(0)


def drop_privileges(uid: int, gid: int) -> None:
    """Become `uid`:`gid` for good: no supplementary groups, no way back, not dumpable, dies with the supervisor.

    Source: prctl(2). A parent that has died before PDEATHSIG was set is noticed by the closed link.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    for option, value in (
        (PR_SET_NO_NEW_PRIVS, 1),
        (PR_SET_DUMPABLE, 0),
        (PR_SET_PDEATHSIG, signal.SIGKILL),
    ):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option})")


def raise_descriptor_limit() -> None:
    wanted = 2 * limits.MAX_FLOWS_PER_WORKER + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if os.getuid() == 0:
        hard = max(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, hard)), hard))


async def serve(sock: socket.socket, listeners: list[socket.socket]) -> int:
    worker = Worker(sock, listeners)
    return await worker.stopped


def main() -> int:
    parser = argparse.ArgumentParser(prog="sidecar-worker")
    parser.add_argument("--link", type=int, required=True)
    parser.add_argument("--listen", type=int, action="append", required=True)
    parser.add_argument("--uid", type=int, required=True)
    parser.add_argument("--gid", type=int, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s"
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's to handle
    raise_descriptor_limit()
    drop_privileges(arguments.uid, arguments.gid)
    # What is imported lives for ever, and a flow's objects rarely form cycles: look for them less often.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 50)
    sock = socket.socket(fileno=arguments.link)
    listeners = [socket.socket(fileno=descriptor) for descriptor in arguments.listen]
    try:
        return int(uvloop.run(serve(sock, listeners)))
    except SidecarError as error:
        log.error("%s", error.message)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
