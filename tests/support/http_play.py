"""One HTTP flow on paper: a session with a policy, an event at a time, and what it made of them.

The client and the server are byte strings; their order is the transcript's. `to_client` and `to_server` are what left, `records` what was
written; both are free of identifiers and times (`facts_of`), so that two runs can be compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from sidecar.model.flow import Address, FlowFacts, Side, Target
from sidecar.model.ids import IdSource
from sidecar.model.principal import Attachment, Principal
from sidecar.model.record import Record
from sidecar.model.secret import Secret
from sidecar.model.verdict import Engine
from sidecar.model.workload import Workload
from sidecar.policy import load_policy
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
    WithdrawHold,
    WriteRecord,
)
from sidecar.session.context import SessionContext
from sidecar.session.http import HttpSession

C, S = Side.CLIENT, Side.SERVER
FLOW = "0190a000-0000-7000-8000-000000000000"
ALLOW = load_policy("version: 1\n", "policy.yaml")
TOKEN = "eyJ.the-job's-token"
IDENTIFIED = Attachment(
    http_header="X-Workload-Identity", http_token=Secret(TOKEN), reserved_header="X-Workload-Identity"
)
ALICE = Principal("https://issuer.example", "repo:acme/reports")


class Play:
    """Feeds a session; after a CloseFlow everything is ignored, as the driver does."""

    def __init__(
        self,
        policy: Engine | str = ALLOW,
        *,
        make: Callable[[SessionContext], Session] = HttpSession,
        connects: bool = True,
        principal: Principal | None = None,
        required: bool = False,
        attachment: Attachment | None = None,
        limits: SessionLimits | None = None,
        protocol: str = "http",
        host: str = "api.internal",
    ) -> None:
        engine = load_policy(policy, "policy.yaml") if isinstance(policy, str) else policy
        target = Target(Address("10.0.0.7", 8080), host, "target", protocol, (host,))
        facts = FlowFacts(
            FLOW, 1, Address("127.0.0.1", 1), target, None, Workload(), principal, None if principal else "no_token",
            required, attachment or Attachment(),
        )  # fmt: skip
        self.context = SessionContext(facts, engine, IdSource(random.Random(1)), limits or SessionLimits())
        self.session = make(self.context)
        self.out: dict[Side, bytearray] = {C: bytearray(), S: bytearray()}
        self.records: list[Record] = []
        self.commands: list[Command] = []
        self.holds: list[OpenHold] = []
        self.withdrawn: list[str] = []
        self.half_closed: list[Side] = []
        self.paused = False
        self.opened = False
        self.closed: str | None = None
        self.biggest_send = 0
        self._connects = connects
        self.do("start")

    def do(self, event: str, *arguments: Any) -> Play:
        if self.closed is None:
            before = self.opened
            for command in getattr(self.session, event)(*arguments, 1_000):
                self._carry_out(command)
            if self.opened and not before and self._connects:
                self.do("upstream_connected")
        return self

    def _carry_out(self, command: Command) -> None:
        assert self.closed is None, f"{command} after CloseFlow"
        self.commands.append(command)
        match command:
            case Send():
                self.out[command.side] += command.data
                self.biggest_send = max(self.biggest_send, len(command.data))
            case WriteRecord():
                assert isinstance(command.record, Record)
                self.records.append(command.record)
            case OpenUpstream():
                assert not self.opened, "opened twice"
                self.opened = True
            case OpenHold():
                self.holds.append(command)
            case WithdrawHold():
                self.withdrawn.append(command.hold_id)
            case HalfClose():
                self.half_closed.append(command.side)
            case PauseReading():
                self.paused = command.paused
            case CloseFlow():
                self.closed = command.reason.value

    def client(self, *parts: bytes) -> Play:
        for part in parts:
            if part:
                self.do("receive", C, part)
        return self

    def server(self, *parts: bytes) -> Play:
        for part in parts:
            if part:
                self.do("receive", S, part)
        return self

    def decide(self, outcome: str, by: str = "alice", reason: str = "") -> Play:
        return self.do("hold_decided", self.holds[-1].hold_id, outcome, by, reason)

    # -- what tests ask

    @property
    def to_client(self) -> bytes:
        return bytes(self.out[C])

    @property
    def to_server(self) -> bytes:
        return bytes(self.out[S])

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record.kind == kind]

    def facts_of(self) -> list[Any]:
        """The records without identifiers and times, in a form that compares."""
        return [
            (r.kind, r.operation, r.verdict, r.response, r.reason, r.detail, r.bytes_client, r.bytes_server)
            for r in self.records
        ]


def split_at(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """`data` in pieces, cut at these offsets."""
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True) if a != b]
