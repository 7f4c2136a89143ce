"""A minimal asyncio driver for one kind of session: real clients on one side, a real server on the other, in a thread.

Keeps every record, everything that went upstream and every hold, so that a test can ask what the server got to see.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sidecar.model.flow import Address, FlowFacts, Side, Target
from sidecar.model.ids import IdSource
from sidecar.model.principal import Attachment, Principal
from sidecar.model.record import Record
from sidecar.model.verdict import Engine
from sidecar.model.workload import Workload
from sidecar.session.commands import (
    CloseFlow,
    Command,
    HalfClose,
    OpenHold,
    OpenUpstream,
    PauseReading,
    Send,
    Session,
    SessionLimits,
    SignAssertion,
    StartTls,
    WithdrawHold,
    WriteRecord,
)
from sidecar.session.context import SessionContext
from sidecar.session.postgres_definitions import Databases


@dataclass
class Settings:
    """What a flow's facts hold besides its addresses."""

    attachment: Attachment = field(default_factory=Attachment)
    principal: Principal | None = None
    identity_required: bool = False
    client_wants_tls: bool = False
    tls_mode: str | None = None
    tls_ca: str | None = None
    host: str | None = None
    limits: SessionLimits = field(default_factory=SessionLimits)


class _Hop(asyncio.Protocol):
    def __init__(self, flow: _Flow, side: Side) -> None:
        self.flow, self.side = flow, side
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self.side is Side.CLIENT:
            self.flow.client = self
            self.flow.drive("start")

    def data_received(self, data: bytes) -> None:
        self.flow.drive("receive", self.side, data)

    def eof_received(self) -> bool:
        self.flow.drive("eof", self.side)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.flow.drive("eof", self.side)


class _Flow:
    def __init__(self, relay: SessionRelay) -> None:
        self.relay = relay
        self.session = relay.make(relay.context())
        self.client: _Hop | None = None
        self.server = _Hop(self, Side.SERVER)
        relay.flows.append(self)
        self.closed = False
        self.ended: set[Side] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    def drive(self, event: str, *arguments: object) -> None:
        if self.closed:
            return
        if event == "eof":
            side = arguments[0]
            assert isinstance(side, Side)
            if side in self.ended:
                return
            self.ended.add(side)
        try:
            commands = getattr(self.session, event)(*arguments, time.time_ns())
        except BaseException as error:
            self.relay.faults.append(error)
            self.close()
            raise
        for command in commands:
            self.carry_out(command)

    def carry_out(self, command: Command) -> None:
        relay = self.relay
        match command:
            case Send():
                hop = self.server if command.side is Side.SERVER else self.client
                if command.side is Side.SERVER:
                    relay.upstream += command.data
                if hop is not None and hop.transport is not None:
                    hop.transport.write(bytes(command.data))
            case WriteRecord():
                relay.records.append(command.record)
            case OpenUpstream():
                self.task(self.connect())
            case StartTls():
                self.task(self.start_tls(command))
            case SignAssertion():
                relay.backend_pids.append(command.backend_pid)
                self.drive("assertion_signed", f"assertion-for-{command.backend_pid}")
            case OpenHold():
                relay.holds.append(command)
                relay.waiting[command.hold_id] = self
            case WithdrawHold():
                relay.withdrawn.append(command.hold_id)
            case PauseReading():
                hop = self.client if command.side is Side.CLIENT else self.server
                if hop is not None and hop.transport is not None and not hop.transport.is_closing():
                    (hop.transport.pause_reading if command.paused else hop.transport.resume_reading)()
            case HalfClose():
                hop = self.client if command.side is Side.CLIENT else self.server
                if hop is not None and hop.transport is not None and hop.transport.can_write_eof():
                    hop.transport.write_eof()
            case CloseFlow():
                relay.reasons.append(command.reason.value)
                self.close()

    def close(self) -> None:
        self.closed = True
        for hop in (self.client, self.server):
            if hop is not None and hop.transport is not None:
                hop.transport.close()

    def task(self, coroutine: object) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)  # type: ignore[arg-type]
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def connect(self) -> None:
        await asyncio.get_running_loop().create_connection(
            lambda: self.server, self.relay.server.host, self.relay.server.port
        )
        if self.closed:
            assert self.server.transport is not None
            self.server.transport.abort()
            return
        self.drive("upstream_connected")

    async def start_tls(self, command: StartTls) -> None:
        context = ssl.create_default_context(cafile=command.ca_file)
        context.check_hostname = command.verify == "verify-full"
        if command.verify in (None, "require"):
            context.verify_mode = ssl.CERT_NONE
        assert self.server.transport is not None
        self.relay.tls += 1
        upgraded = await asyncio.get_running_loop().start_tls(
            self.server.transport, self.server, context, server_hostname=command.server_name or ""
        )
        self.server.transport = upgraded
        self.drive("tls_started")


class SessionRelay:
    """Context manager; `address` is where clients connect."""

    def __init__(
        self,
        make: Callable[[SessionContext], Session],
        engine: Engine,
        server: Address,
        settings: Settings | None = None,
    ) -> None:
        self.make, self.engine, self.server = make, engine, server
        self.settings = settings or Settings()
        self.address = server
        self.ids = IdSource()
        self.records: list[Record] = []
        self.upstream = bytearray()
        self.holds: list[OpenHold] = []
        self.withdrawn: list[str] = []
        self.waiting: dict[str, _Flow] = {}
        self.flows: list[_Flow] = []
        self.backend_pids: list[int] = []
        self.reasons: list[str] = []
        self.faults: list[BaseException] = []
        self.tls = 0
        self.databases = Databases()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._listener: asyncio.Server | None = None

    def context(self) -> SessionContext:
        settings, now = self.settings, time.time_ns()
        target = Target(
            self.server,
            settings.host or self.server.host,
            "target" if settings.host else "address",
            "postgres",
            (settings.host,) if settings.host else (),
            settings.host,
            settings.tls_mode,
            settings.tls_ca,
        )
        facts = FlowFacts(
            self.ids.new(now), now, Address("127.0.0.1", 1), target, None, Workload(), settings.principal,
            None, settings.identity_required, settings.attachment, settings.client_wants_tls,
        )  # fmt: skip
        return SessionContext(facts, self.engine, self.ids, settings.limits, self.databases)

    def __enter__(self) -> SessionRelay:
        self._thread.start()
        self._call(self._listen())
        return self

    async def _listen(self) -> None:
        self._listener = await self._loop.create_server(
            lambda: _Hop(_Flow(self), Side.CLIENT), "127.0.0.1", 0
        )
        host, port = self._listener.sockets[0].getsockname()
        self.address = Address(host, port)

    def _call(self, coroutine: object) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)  # type: ignore[arg-type]

    def decide(self, hold_id: str, outcome: str, by: str = "alice", reason: str = "") -> None:
        flow = self.waiting[hold_id]
        self._loop.call_soon_threadsafe(flow.drive, "hold_decided", hold_id, outcome, by, reason)

    def change_engine(self, engine: Engine) -> None:
        """The policy in force, in open flows too."""
        self.engine = engine

        async def change() -> None:
            for flow in self.flows:
                flow.drive("engine_changed", engine)

        self._call(change())

    def wait_for(self, condition: Callable[[], object], timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            assert self._listener is not None
            self._listener.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)
            for flow in self.flows:
                for hop in (flow.client, flow.server):
                    if hop is not None and hop.transport is not None:
                        hop.transport.abort()
            await asyncio.sleep(0.02)

        with contextlib.suppress(TimeoutError):
            self._call(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()
        assert not self.faults, self.faults

    # -- what tests ask

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record.kind == kind]

    def texts(self) -> list[str]:
        return [str(record.operation.text) for record in self.of_kind("request") if record.operation]
