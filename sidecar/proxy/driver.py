"""Carries out one session's commands on two asyncio transports. Decides nothing.

Order is the audit's contract: records that stand before a `Send` are in the spool file before those bytes are given to a
transport. Where the spool cannot take a record (full, unwritable) or has to be on disk first (`audit.sync: strict`), the
rest of the commands waits, in order, and neither side is read meanwhile: nothing passes unrecorded, nothing grows.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, cast

from sidecar.errors import AuditError
from sidecar.model.flow import Address, Side
from sidecar.model.reasons import CloseReason
from sidecar.model.record import EncodedRecord, Record
from sidecar.proxy import limits
from sidecar.proxy.hop import Hop
from sidecar.session.commands import (
    CloseFlow,
    Command,
    HalfClose,
    MintLeaf,
    OpenHold,
    OpenUpstream,
    PauseReading,
    Send,
    Session,
    SignAssertion,
    StartTls,
    WithdrawHold,
    WriteRecord,
)

if TYPE_CHECKING:
    from sidecar.proxy.worker import Worker

log = logging.getLogger(__name__)

PAUSE_SESSION: Final = 2
PAUSE_SPOOL: Final = 4
"""A record waits for the spool, or new requests are blocked."""

RESET_REASONS: Final = frozenset(
    {CloseReason.UPSTREAM_UNREACHABLE, CloseReason.RESET, CloseReason.ORIGIN_UNKNOWN, CloseReason.NOT_STEERED}
)
"""Ends that the client sees as a reset, as near to the server's own refusal as can be."""


class FlowDriver:
    """One flow: two hops, one session."""

    __slots__ = (
        "_pending",
        "_retry",
        "_tls_beginning",
        "_waiting_input",
        "address",
        "blocked",
        "bytes_client",
        "bytes_server",
        "client",
        "closed",
        "denied",
        "flow",
        "held",
        "holds",
        "loop",
        "protocol",
        "requests",
        "server",
        "session",
        "tasks",
        "worker",
    )

    def __init__(
        self, worker: Worker, client: Hop, session: Session, flow: str, address: Address, protocol: str
    ) -> None:
        self.worker = worker
        self.loop = worker.loop
        self.client = client
        self.server = Hop(worker.gate, from_client=False)
        self.session = session
        self.flow = flow
        self.address = address
        self.protocol = protocol
        self.closed = False
        self.blocked = False
        self.requests = 0
        self.denied = 0
        self.bytes_client = 0
        self.bytes_server = 0
        self.held = False
        self.holds: set[str] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self._pending: deque[Command] = deque()
        self._waiting_input: deque[tuple[Hop, bytes | None]] = deque()
        self._retry: asyncio.TimerHandle | None = None
        self._tls_beginning: asyncio.Task[Any] | None = None
        client.flow = self.server.flow = self
        client.peer, self.server.peer = self.server, client
        self._find_lane()

    def _find_lane(self) -> None:
        """A session that has just found out what is spoken may have a lane now."""
        self.client.lane = self.server.lane = getattr(self.session, "lane", None)

    # -- events of the transports

    def start(self) -> None:
        self._drive("start")
        if not self.closed and hasattr(self.session, "settle"):
            self.loop.call_later(limits.FIRST_BYTES_S, self._settle)

    def _settle(self) -> None:
        """A client that says nothing may wait for the server to speak first."""
        if not self.closed:
            self._drive("settle")

    def received(self, hop: Hop, data: bytes) -> None:
        if self.closed:
            return
        if hop is self.client:
            self.bytes_client += len(data)
        else:
            self.bytes_server += len(data)
        if self.blocked or (self.worker.blocked and hop is self.client):
            self._waiting_input.append((hop, data))
            self.pause(hop, PAUSE_SPOOL, True)
            return
        try:
            self.carry_out(self.session.receive(hop.side, data, time.time_ns()))
        except Exception:  # noqa: BLE001 - the worker outlives any fault of one session; the flow ends, closed
            self.fault()
        if hop.lane is None:
            self._find_lane()

    def ended(self, hop: Hop) -> None:
        if self.closed:
            if hop.transport is not None:
                hop.transport.close()
            return
        if hop.eof:
            return
        hop.eof = True
        if self._waiting_input:
            self._waiting_input.append((hop, None))
            return
        self._drive("eof", hop.side)

    def lost(self, hop: Hop, exc: Exception | None) -> None:
        if self.closed:
            self._finish()
            return
        self.ended(hop)
        if not self.closed:
            reason = CloseReason.CLIENT_CLOSED if hop is self.client else CloseReason.SERVER_CLOSED
            detail = "connection reset" if isinstance(exc, ConnectionError) else ""
            self._waiting_input.clear()
            self.abort(reason, detail)

    # -- events of the worker

    def abort(self, reason: CloseReason, detail: str) -> None:
        if not self.closed:
            self._drive("abort", reason, detail)

    def hold_decided(self, hold_id: str, outcome: str, by: str | None, reason: str) -> None:
        self.holds.discard(hold_id)
        if not self.closed:
            self._drive("hold_decided", hold_id, outcome, by, reason)

    def assertion_signed(self, assertion: str | None) -> None:
        if not self.closed:
            self._drive("assertion_signed", assertion)

    def leaf_minted(self, server_context: ssl.SSLContext | None) -> None:
        if not self.closed:
            self._drive("leaf_minted", server_context)

    def engine_changed(self) -> None:
        if not self.closed:
            self._drive("engine_changed", self.worker.engine)

    def unblocked(self) -> None:
        """New requests may go on: hand over what waited."""
        if not self.blocked and not self.closed:
            self._replay()

    def hung_up(self) -> bool:
        """Look whether a client that is not being read has gone."""
        transport = self.client.transport
        if self.closed or self.client.eof or transport is None or not self.client.paused:
            return False
        sock = transport.get_extra_info("socket")
        if sock is None:
            return False
        poller = select.poll()
        poller.register(sock.fileno(), select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        return bool(poller.poll(0))

    # -- carrying out

    def _drive(self, event: str, *arguments: object) -> None:
        try:
            self.carry_out(getattr(self.session, event)(*arguments, time.time_ns()))
        except Exception:  # noqa: BLE001 - as in `received`
            self.fault()

    def carry_out(self, commands: list[Command]) -> None:
        if self.blocked:
            self._pending.extend(commands)
            return
        records: list[Record | EncodedRecord] = []
        for index, command in enumerate(commands):
            kind = type(command)
            if kind is Send:
                if records and not self._append(records, commands, index):
                    return
                assert isinstance(command, Send)
                hop = self.server if command.side is Side.SERVER else self.client
                if hop.transport is not None and not hop.lost:
                    hop.transport.write(command.data)
            elif kind is WriteRecord:
                assert isinstance(command, WriteRecord)
                records.append(command.record)
            else:
                if records and not self._append(records, commands, index):
                    return
                self._other(command)
        if records:
            self._append(records, commands, len(commands))

    def _append(self, records: list[Record | EncodedRecord], commands: list[Command], index: int) -> bool:
        """Append and clear `records`. False: the rest of `commands`, from `index`, waits."""
        try:
            self.worker.append(records)
        except AuditError as error:
            self.worker.append_failed(str(error))
            self._wait(deque([*map(WriteRecord, records), *commands[index:]]))
            self._retry = self.loop.call_later(limits.SPOOL_RETRY_S, self._try_again)
            return False
        strict = False
        for record in records:
            if record.kind == "request":
                strict = self.worker.sync_strict
                self.requests += 1
                if type(record) is Record and record.verdict is not None and record.verdict.action == "deny":
                    self.denied += 1
        records.clear()
        if strict:
            self._wait(deque(commands[index:]))
            self._task(self._synced())
            return False
        return True

    async def _synced(self) -> None:
        try:
            await self.worker.sync()
        except OSError as error:
            self.worker.append_failed(str(error))
            self._retry = self.loop.call_later(limits.SPOOL_RETRY_S, lambda: self._task(self._synced()))
            return
        self._go_on()

    def _wait(self, rest: deque[Command]) -> None:
        self.blocked = True
        rest.extend(self._pending)
        self._pending = rest
        self.pause(self.client, PAUSE_SPOOL, True)
        self.pause(self.server, PAUSE_SPOOL, True)

    def _try_again(self) -> None:
        self._retry = None
        self._go_on()

    def _go_on(self) -> None:
        self.blocked = False
        rest, self._pending = list(self._pending), deque()
        try:
            self.carry_out(rest)
        except Exception:  # noqa: BLE001 - as in `received`
            self.fault()
        if not self.blocked and not self.closed:
            self._replay()

    def _replay(self) -> None:
        while self._waiting_input and not self.blocked and not self.closed:
            hop, data = self._waiting_input[0]
            if hop is self.client and self.worker.blocked:
                break
            self._waiting_input.popleft()
            if data is None:
                self._drive("eof", hop.side)
            else:
                self._drive("receive", hop.side, data)
        if not self.blocked and not self.closed:
            self.pause(self.server, PAUSE_SPOOL, False)
            if not self.worker.blocked:
                self.pause(self.client, PAUSE_SPOOL, False)

    def _other(self, command: Command) -> None:
        match command:
            case OpenUpstream():
                self._task(self._connect())
            case StartTls():
                self._task(self._start_tls(command))
            case MintLeaf():
                self.worker.mint(self, command.names)
            case SignAssertion():
                self.worker.sign(self, command.backend_pid)
            case OpenHold():
                self.holds.add(command.hold_id)
                self.worker.open_hold(self, command)
            case WithdrawHold():
                self.holds.discard(command.hold_id)
                self.worker.withdraw_hold(command.hold_id)
            case PauseReading():
                hop = self.client if command.side is Side.CLIENT else self.server
                self.pause(hop, PAUSE_SESSION, command.paused)
            case HalfClose():
                hop = self.client if command.side is Side.CLIENT else self.server
                if hop.transport is not None and not hop.lost and hop.transport.can_write_eof():
                    hop.transport.write_eof()
            case CloseFlow():
                self._close(command.reason)
            case _:
                raise TypeError(f"{type(command).__name__} is no command")

    def _task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(limits.CONNECT_TIMEOUT_S):
                await self.loop.create_connection(
                    lambda: cast(asyncio.Protocol, self.server), self.address.host, self.address.port
                )
        except (OSError, TimeoutError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            self.abort(CloseReason.UPSTREAM_UNREACHABLE, f"{self.address}: {reason}")
            return
        if self.closed:
            self.server.reset()
            return
        assert self.server.transport is not None
        sock = self.server.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self.server.paused:
            self.server.transport.pause_reading()
        self._drive("upstream_connected")

    async def _start_tls(self, command: StartTls) -> None:
        transport = self.server.transport
        if transport is None or self.server.lost or transport.is_closing():
            return
        self._tls_beginning = asyncio.current_task()
        try:
            context = self.worker.tls_context(command.verify, command.ca_file)
            upgraded = await self.loop.start_tls(
                transport,
                cast(asyncio.Protocol, self.server),
                context,
                server_hostname=command.server_name or "",
                ssl_handshake_timeout=limits.TLS_HANDSHAKE_TIMEOUT_S,
            )
        except (ssl.SSLError, ssl.CertificateError, OSError, ValueError) as error:
            self._tls_beginning = None
            self.abort(CloseReason.UPSTREAM_TLS, f"{self.address}: {error}")
            return
        except asyncio.CancelledError:
            transport.abort()
            raise
        self._tls_beginning = None
        if upgraded is None or self.closed:
            return
        self.server.transport = upgraded
        upgraded.set_write_buffer_limits(high=limits.WRITE_HIGH_WATER)
        if self.server.paused:
            upgraded.pause_reading()
        self._drive("tls_started")

    # -- pausing and ending

    def other(self, hop: Hop) -> Hop:
        return self.server if hop is self.client else self.client

    def pause(self, hop: Hop, bit: int, on: bool) -> None:
        before = hop.paused
        hop.paused = before | bit if on else before & ~bit
        transport = hop.transport
        if transport is None or hop.lost or transport.is_closing() or bool(before) == bool(hop.paused):
            return
        if hop.paused:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def fault(self) -> None:
        log.exception("flow %s: fault of the inspector; the flow is ended", self.flow)
        if self.closed:
            return
        try:
            commands = self.session.abort(
                CloseReason.INTERNAL_ERROR, "fault of the inspector", time.time_ns()
            )
            self.carry_out(commands)
        except Exception:
            log.exception("flow %s: the session could not be ended in order", self.flow)
        if not self.closed and not self.blocked:
            self._close(CloseReason.INTERNAL_ERROR)

    def _close(self, reason: CloseReason) -> None:
        if self.closed:
            return
        self.closed = True
        if self._retry is not None:
            self._retry.cancel()
        self._waiting_input.clear()
        for hold_id in self.holds:
            self.worker.withdraw_hold(hold_id)
        self.holds.clear()
        self.worker.flow_closed(self, reason)
        server, client = self.server, self.client
        self.loop.call_later(limits.FLUSH_S, self._abandon)
        if self._tls_beginning is not None:
            # uvloop's start_tls has its first write still before it: to close the transport under it would raise in the loop.
            self._tls_beginning.cancel()
        elif server.transport is not None and not server.lost:
            server.transport.close()
        if client.transport is None or client.lost:
            self._finish()
            return
        if reason in RESET_REASONS:
            client.reset()
            return
        if client.eof:
            client.transport.close()
            return
        # Read off what the client still sends, so that a reset does not overtake the answer.
        client.paused = 0
        if not client.transport.is_closing():
            if client.transport.can_write_eof():
                client.transport.write_eof()
            client.transport.resume_reading()
        self.loop.call_later(limits.LINGER_S, client.transport.close)

    def _abandon(self) -> None:
        """A peer that does not read what is left for it does not keep us for ever."""
        for hop in (self.client, self.server):
            if hop.transport is not None and not hop.lost:
                hop.transport.abort()

    def _finish(self) -> None:
        for task in self.tasks:
            task.cancel()
