"""What every session is given, and the records that every session writes the same way."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from sidecar.model.flow import FlowFacts
from sidecar.model.ids import IdSource
from sidecar.model.operation import ConnectOperation
from sidecar.model.reasons import CloseReason, GapReason
from sidecar.model.record import OperationPart, Record, TargetPart, VerdictPart
from sidecar.model.verdict import Action, Engine, Verdict
from sidecar.session.commands import SessionLimits
from sidecar.session.postgres_definitions import Databases

_encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class SessionContext:
    """Facts, policy and bounds of one flow. `engine` is replaced by `engine_changed`."""

    facts: FlowFacts
    engine: Engine
    ids: IdSource
    limits: SessionLimits = field(default_factory=SessionLimits)
    databases: Databases = field(default_factory=Databases)
    """Shared by all sessions of a worker."""
    origin_summary: msgspec.Raw = field(init=False)
    """Pre-encoded for `request` records: pid, tgid, uid, exe."""
    principal_summary: msgspec.Raw | None = field(init=False)
    """Pre-encoded for `request` records: issuer, subject."""

    def __post_init__(self) -> None:
        origin, principal = self.facts.origin, self.facts.principal
        self.origin_summary = msgspec.Raw(
            _encode(
                {"pid": origin.pid, "tgid": origin.tgid, "uid": origin.uid, "exe": origin.exe}
                if origin
                else {"uncertain": True}
            )
        )
        self.principal_summary = (
            msgspec.Raw(_encode({"issuer": principal.issuer, "subject": principal.subject}))
            if principal
            else None
        )

    def target_part(
        self, protocol: str, *, database: str | None = None, user: str | None = None, tls: str | None = None
    ) -> TargetPart:
        target = self.facts.target
        return TargetPart(
            host=target.host,
            port=target.address.port,
            protocol=protocol,
            address=target.address.host,
            host_source=target.host_source,
            name=target.name,
            database=database,
            user=user,
            tls=tls,
        )

    def judge_connect(self, protocol: str) -> Verdict:
        """The verdict on opening the flow. Callers check `identity_denial` first."""
        return self.engine.evaluate(ConnectOperation(protocol), self.facts)

    def identity_denial(self) -> str | None:
        """Why this flow may not open at all: identity is required and was not verified. None where it may."""
        facts = self.facts
        if facts.identity_required and facts.principal is None:
            return f"a verified identity is required and there is none ({facts.identity_error or 'no_token'})"
        return None

    def open_record(self, protocol: str, verdict: VerdictPart, now_ns: int) -> Record:
        """The `open` record: everything known of who and where, in full. Its id is the flow's."""
        facts = self.facts
        return Record(
            id=facts.flow,
            ts_ns=now_ns,
            kind="open",
            flow=facts.flow,
            origin=facts.origin if facts.origin else {"uncertain": True},
            workload=facts.workload,
            principal=facts.principal,
            identity_error=facts.identity_error,
            target=self.target_part(protocol),
            operation=OperationPart(kind="connect"),
            verdict=verdict,
        )

    def close_record(
        self,
        reason: CloseReason,
        now_ns: int,
        *,
        detail: str | None = None,
        bytes_client: int,
        bytes_server: int,
    ) -> Record:
        """The `close` record. `bytes_client` came from the client, `bytes_server` from the server."""
        return Record(
            id=self.ids.new(now_ns),
            ts_ns=now_ns,
            kind="close",
            flow=self.facts.flow,
            reason=reason.value,
            detail=detail,
            bytes_client=bytes_client,
            bytes_server=bytes_server,
        )

    def gap_record(self, reason: GapReason, now_ns: int, *, detail: str | None = None) -> Record:
        return Record(
            id=self.ids.new(now_ns),
            ts_ns=now_ns,
            kind="gap",
            flow=self.facts.flow,
            reason=reason.value,
            detail=detail,
        )


def verdict_part(verdict: Verdict) -> VerdictPart:
    """A verdict as it stands in records."""
    return VerdictPart(
        action=verdict.action.value,
        rule=verdict.rule,
        reason=verdict.reason,
        policy=verdict.policy,
        enforced=verdict.enforced,
        would=verdict.would,
        severity=verdict.severity,
        owner=verdict.owner,
        tags=verdict.tags,
        masks=verdict.masks.rules,
    )


def denial_message(rule: str | None, reason: str) -> str:
    """The sentence a client sees, in every protocol."""
    return (
        f"denied by policy: {rule or 'default'}: {reason}"
        if reason
        else f"denied by policy: {rule or 'default'}"
    )


IDENTITY_RULE = "identity.required"
"""Stands as the rule where the configuration, not the policy, denies a flow."""


def identity_verdict_part(reason: str, policy: str) -> VerdictPart:
    return VerdictPart(action=Action.DENY.value, rule=IDENTITY_RULE, reason=reason, policy=policy)
