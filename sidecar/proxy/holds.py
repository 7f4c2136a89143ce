"""The supervisor's desk for held statements: joins the pure state machine with the workers that wait.

Owns what approvers see of a hold and who waits for it. Decides nothing itself (approvals.grants does), writes no record
(it hands each decision to `on_decision`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from sidecar.approvals.grants import Decider, Grant, Grants, GrantState
from sidecar.control.protocol import HoldView
from sidecar.errors import SidecarError
from sidecar.model.flow import FlowFacts
from sidecar.model.ids import short_id
from sidecar.model.origin import Origin
from sidecar.model.verdict import ApproveTerms
from sidecar.proxy.link import HoldDecided, HoldRequested, HoldWithdrawn
from sidecar.proxy.workers import WorkerHandle

MAX_VIEWS = 2048
"""Holds whose text stays readable after their end; oldest forgotten."""

OUTCOME_NOT_WAITING = "rejected"


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: HoldRequested
    facts: FlowFacts
    worker: WorkerHandle


class HoldDesk:
    """Runs on the supervisor's loop."""

    def __init__(self, instance: str, on_decision: Callable[[Grant, HoldRequested], None]) -> None:
        self._instance = instance
        self._grants = Grants()
        self._known: dict[str, _Waiting] = {}
        self._on_decision = on_decision

    def requested(self, worker: WorkerHandle, message: HoldRequested, facts: FlowFacts) -> None:
        """A session waits. Where the hold cannot be kept (bounds), it is rejected at once, with the reason."""
        origin = facts.origin
        job = (origin.cgroup or str(origin.uid)) if origin else facts.client.host
        self._known[message.hold_id] = _Waiting(message, facts, worker)
        while len(self._known) > MAX_VIEWS:
            del self._known[next(iter(self._known))]
        try:
            self._grants.open(
                message.hold_id,
                digest=message.digest,
                terms=ApproveTerms(by=message.by, within_s=message.within_s),
                now_ns=time.time_ns(),
                flow=message.flow,
                job=job,
            )
        except SidecarError as error:
            worker.send(HoldDecided(message.hold_id, OUTCOME_NOT_WAITING, None, error.message))

    def withdrawn(self, message: HoldWithdrawn) -> None:
        grant = self._grants.withdraw(message.hold_id, time.time_ns())
        if grant is not None:
            self._decided(grant)

    def flow_ended(self, flow: str) -> None:
        for grant in self._grants.withdraw_flow(flow, time.time_ns()):
            self._decided(grant)

    def expire(self) -> None:
        """Call about once a second."""
        for grant in self._grants.expire(time.time_ns()):
            self._decided(grant)
            self._tell(grant)

    def decide(self, hold_id: str, approve: bool, decider: Decider, reason: str) -> HoldView:
        """Raises GrantRefused where the state machine does not allow it."""
        full = self._full(hold_id) or hold_id
        now_ns = time.time_ns()
        grant = self._grants.decide(full, approve, decider, reason, now_ns)
        self._decided(grant)
        if grant.state is GrantState.APPROVED:
            # The worker releases exactly the text it holds, once; the approval is used up here.
            grant = self._grants.spend(full, self._known[full].request.digest, now_ns)
        self._tell(grant)
        return self._view(grant)

    def _decided(self, grant: Grant) -> None:
        waiting = self._known.get(grant.hold_id)
        if waiting is not None:
            self._on_decision(grant, waiting.request)

    def _tell(self, grant: Grant) -> None:
        waiting = self._known.get(grant.hold_id)
        if waiting is not None:
            waiting.worker.send(HoldDecided(grant.hold_id, grant.state.value, grant.decided_by, grant.reason))

    # -- what approvers see

    def views(self) -> list[HoldView]:
        """Pending ones first, then the finished ones that are still known."""
        rows = [self._view(grant) for grant in self._grants if grant.hold_id in self._known]
        return sorted(rows, key=lambda row: (row.state != "pending", -row.opened_ns))

    def view(self, hold_id: str) -> HoldView | None:
        full = self._full(hold_id)
        grant = self._grants.get(full) if full else None
        return self._view(grant) if grant else None

    def origin(self, hold_id: str) -> Origin | None:
        full = self._full(hold_id)
        return self._known[full].facts.origin if full else None

    @property
    def pending(self) -> int:
        return len(self._grants.pending())

    def _full(self, hold_id: str) -> str | None:
        if hold_id in self._known:
            return hold_id
        found = [known for known in self._known if short_id(known) == hold_id]
        return found[0] if len(found) == 1 else None

    def _view(self, grant: Grant) -> HoldView:
        waiting = self._known[grant.hold_id]
        request, facts = waiting.request, waiting.facts
        origin = facts.origin
        parameters = (
            tuple(
                value if isinstance(value, str) else "NULL" if value is None else f"({len(value)} bytes)"
                for value in request.parameters
            )
            if request.parameters is not None
            else None
        )
        return HoldView(
            id=grant.hold_id,
            instance=self._instance,
            rule=request.rule,
            reason=request.reason,
            statement=request.summary,
            target=f"{facts.target.name or facts.target.host}:{facts.target.address.port}",
            principal=facts.principal.subject if facts.principal else "",
            process=f"{origin.exe or origin.comm} (pid {origin.tgid}, uid {origin.uid})"
            if origin
            else "unknown",
            opened_ns=grant.opened_ns,
            expires_ns=grant.expires_ns,
            state=grant.state.value,
            parameters=parameters,
            by=grant.by,
            flow=request.flow,
            request=request.request_id,
            digest=grant.digest,
            decided_by=grant.decided_by,
            decided_ns=grant.decided_ns,
            decision_reason=grant.reason,
        )
