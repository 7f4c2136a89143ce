"""The life of a hold, as a pure state machine (design, section 2, `approve:`).

Owns: which holds wait, who may decide them, that a decision is made once, and that an approval releases one
text once. Must not: read a clock (`now_ns` is passed in, ns since the epoch), talk to a worker, write a
record. The caller does so with the `Grant` that each method returns.

Theory of operation
-------------------
A session parks a statement and asks for a hold. A hold is made for one *digest* (SHA-256 over exact text,
parameters, target and principal) and has one deadline. It leaves `pending` exactly once, by whichever of four
things comes first: an approval, a rejection, the deadline, or the client going away. An approval is not yet a
release: `spend` is, and it succeeds once, only for the digest the hold was made for, and only while the
deadline has not passed. So a second use, a changed text and a late release all fail.

    state       decide(yes)  decide(no)  deadline  withdraw   spend(digest)
    ---------   -----------  ----------  --------  ---------  -------------------------------
    pending     approved     rejected    expired   withdrawn  refused: pending
    approved    refused      refused     expired*  withdrawn* approved, spent; then refused: spent
    rejected    refused      refused     -         -          refused
    expired     refused      refused     -         -          refused
    withdrawn   refused      refused     -         -          refused

`-`: no change (idempotent).  `*`: only while unspent; a spent approval is final. A decision at or after the
deadline is refused even where `expire` has not run yet: time decides, not scheduling.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from sidecar.errors import ControlError, LimitExceeded
from sidecar.model.ids import short_id
from sidecar.model.verdict import ApproveTerms

OPERATOR_GROUP: Final = "sidecar"
"""Members decide holds whose rule names nobody, and read status and flows."""


class GrantState(enum.StrEnum):
    PENDING = "pending"
    APPROVED = "approved"
    REJECTED = "rejected"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"


class RefusalCause(enum.StrEnum):
    """Why a decision or a release was refused."""

    UNKNOWN = "unknown"
    PENDING = "pending"
    DECIDED = "decided"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"
    NOT_ALLOWED = "not_allowed"
    DIGEST = "digest"
    SPENT = "spent"


class GrantRefused(ControlError):
    """A decision or release that the state machine does not allow; `cause` is one word of `RefusalCause`."""

    def __init__(self, message: str, *, cause: RefusalCause, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Decider:
    """Who decides, as the kernel says (SO_PEERCRED, SO_PEERGROUPS), never as they say.

    `label` is what a trusted relay (the web page, running as root) says about the person behind it; it is
    shown, and decides nothing.
    """

    name: str
    uid: int
    groups: frozenset[str] = frozenset()
    label: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.label})" if self.label else self.name

    @property
    def is_operator(self) -> bool:
        """Root, or a member of the group `sidecar`."""
        return self.uid == 0 or OPERATOR_GROUP in self.groups


@dataclass(frozen=True, slots=True)
class GrantLimits:
    """Bounds; each is documented in docs/operations.md."""

    max_pending: int = 1024
    """Holds that wait at one time on a host. Each parks one session, which keeps up to `held_max_bytes`."""
    max_pending_per_job: int = 64
    """So that one job cannot use up the host's."""
    max_finished: int = 1024
    """Finished holds that stay visible for `approvals show`."""
    max_within_s: float = 86_400.0
    """The longest wait a rule can ask for."""
    max_reason_chars: int = 500


@dataclass(frozen=True, slots=True)
class Grant:
    """One hold. Times in ns since the epoch, 0 while not reached."""

    hold_id: str
    flow: str
    job: str
    digest: str
    by: tuple[str, ...]
    opened_ns: int
    expires_ns: int
    state: GrantState = GrantState.PENDING
    decided_by: str | None = None
    decided_ns: int = 0
    reason: str = ""
    spent: bool = False


def may_decide(by: tuple[str, ...], decider: Decider) -> bool:
    """Whether `decider` may answer a hold whose rule says `approve: {by: [...]}`.

    Root always may. A term names a user or a group of this host. Where the rule names nobody, operators may.
    """
    if decider.uid == 0:
        return True
    if not by:
        return decider.is_operator
    return decider.name in by or not decider.groups.isdisjoint(by)


class Grants:
    """All holds of one agent."""

    def __init__(self, limits: GrantLimits | None = None) -> None:
        self._limits = limits or GrantLimits()
        self._pending: dict[str, Grant] = {}
        self._finished: dict[str, Grant] = {}

    def open(
        self,
        hold_id: str,
        *,
        digest: str,
        terms: ApproveTerms,
        now_ns: int,
        flow: str = "",
        job: str = "",
    ) -> Grant:
        """Begin to wait. `job` is any key that names who asks (a cgroup, a uid): it is bounded on its own.

        Raises LimitExceeded where too many wait, ControlError where the id was seen or there is no digest.
        """
        limits = self._limits
        if hold_id in self._pending or hold_id in self._finished:
            raise ControlError(f"hold {hold_id} exists already")
        if not digest:
            raise ControlError(f"hold {hold_id} has no digest, so nothing could be approved")
        if len(self._pending) >= limits.max_pending:
            raise LimitExceeded(
                f"{len(self._pending)} statements wait for approval already",
                limit="max_pending",
                value=limits.max_pending,
                hint="decide some of them: sidecar approvals list",
            )
        if sum(1 for grant in self._pending.values() if grant.job == job) >= limits.max_pending_per_job:
            raise LimitExceeded(
                f"this job has {limits.max_pending_per_job} statements waiting for approval already",
                limit="max_pending_per_job",
                value=limits.max_pending_per_job,
                hint="decide some of them: sidecar approvals list",
            )
        within_ns = int(min(max(terms.within_s, 0.0), limits.max_within_s) * 1e9)
        grant = Grant(
            hold_id=hold_id,
            flow=flow,
            job=job,
            digest=digest,
            by=terms.by,
            opened_ns=now_ns,
            expires_ns=now_ns + within_ns,
        )
        self._pending[hold_id] = grant
        return grant

    def decide(self, hold_id: str, approve: bool, decider: Decider, reason: str, now_ns: int) -> Grant:
        """Answer a pending hold, once. Raises GrantRefused and changes nothing otherwise."""
        grant = self._pending.get(hold_id)
        if grant is None:
            raise self._not_pending(hold_id)
        if not may_decide(grant.by, decider):
            raise GrantRefused(
                f"{decider.name} may not decide hold {hold_id}",
                cause=RefusalCause.NOT_ALLOWED,
                hint=f"it takes root, or a user or group named {' or '.join(grant.by) or OPERATOR_GROUP}",
            )
        if now_ns >= grant.expires_ns:
            raise GrantRefused(f"hold {hold_id} has expired", cause=RefusalCause.EXPIRED)
        return self._finish(
            grant,
            GrantState.APPROVED if approve else GrantState.REJECTED,
            now_ns,
            decided_by=str(decider),
            reason=reason[: self._limits.max_reason_chars],
        )

    def spend(self, hold_id: str, digest: str, now_ns: int) -> Grant:
        """Release what was approved: succeeds once, for that digest, before the deadline. Raises GrantRefused
        otherwise."""
        grant = self.get(hold_id)
        if grant is None:
            raise self._not_pending(hold_id)
        if grant.state is not GrantState.APPROVED:
            cause = RefusalCause("decided" if grant.state is GrantState.REJECTED else grant.state.value)
            raise GrantRefused(f"hold {hold_id} is {grant.state.value}", cause=cause)
        if grant.spent:
            raise GrantRefused(f"the approval of hold {hold_id} was used before", cause=RefusalCause.SPENT)
        if grant.digest != digest:
            raise GrantRefused(
                f"hold {hold_id} was approved for another text, target or principal",
                cause=RefusalCause.DIGEST,
            )
        if now_ns >= grant.expires_ns:
            raise GrantRefused(f"hold {hold_id} has expired", cause=RefusalCause.EXPIRED)
        spent = replace(grant, spent=True)
        self._finished[hold_id] = spent
        return spent

    def withdraw(self, hold_id: str, now_ns: int) -> Grant | None:
        """The client is gone. Idempotent: None where nothing changed (unknown, or final already)."""
        grant = self.get(hold_id)
        if grant is None or not self._revocable(grant):
            return None
        return self._finish(grant, GrantState.WITHDRAWN, now_ns)

    def withdraw_flow(self, flow: str, now_ns: int) -> list[Grant]:
        """The flow ended: withdraw all that it waits for."""
        ids = [grant.hold_id for grant in self if grant.flow == flow and self._revocable(grant)]
        return [done for hold_id in ids if (done := self.withdraw(hold_id, now_ns))]

    def expire(self, now_ns: int) -> list[Grant]:
        """Move everything whose deadline has passed to `expired`, and return it, so that its sessions are
        told."""
        late = [grant for grant in self if self._revocable(grant) and now_ns >= grant.expires_ns]
        return [self._finish(grant, GrantState.EXPIRED, now_ns) for grant in late]

    def next_deadline_ns(self) -> int | None:
        """When `expire` has to run next; None while nothing waits."""
        return min((grant.expires_ns for grant in self if self._revocable(grant)), default=None)

    def get(self, hold_id: str) -> Grant | None:
        return self._pending.get(hold_id) or self._finished.get(hold_id)

    def pending(self) -> list[Grant]:
        return list(self._pending.values())

    def __iter__(self) -> Iterator[Grant]:
        yield from self._pending.values()
        yield from self._finished.values()

    def __len__(self) -> int:
        return len(self._pending) + len(self._finished)

    @staticmethod
    def _revocable(grant: Grant) -> bool:
        return grant.state is GrantState.PENDING or (grant.state is GrantState.APPROVED and not grant.spent)

    def _finish(
        self,
        grant: Grant,
        state: GrantState,
        now_ns: int,
        *,
        decided_by: str | None = None,
        reason: str = "",
    ) -> Grant:
        done = replace(
            grant,
            state=state,
            decided_ns=now_ns,
            decided_by=decided_by if decided_by is not None else grant.decided_by,
            reason=reason or grant.reason,
        )
        self._pending.pop(grant.hold_id, None)
        self._finished.pop(grant.hold_id, None)
        self._finished[grant.hold_id] = done
        self._forget()
        return done

    def _forget(self) -> None:
        """Oldest final ones go first; an approval that is still to be spent is never forgotten."""
        excess = len(self._finished) - self._limits.max_finished
        if excess <= 0:
            return
        for hold_id in [g.hold_id for g in self._finished.values() if not self._revocable(g)][:excess]:
            del self._finished[hold_id]

    def _not_pending(self, hold_id: str) -> GrantRefused:
        grant = self._finished.get(hold_id)
        if grant is None:
            return GrantRefused(
                f"there is no hold {hold_id}", cause=RefusalCause.UNKNOWN, hint="sidecar approvals list"
            )
        if grant.state is GrantState.EXPIRED:
            return GrantRefused(
                f"hold {hold_id} has expired", cause=RefusalCause.EXPIRED, hint="let the job run it again"
            )
        if grant.state is GrantState.WITHDRAWN:
            return GrantRefused(
                f"hold {hold_id} was withdrawn: its client is gone",
                cause=RefusalCause.WITHDRAWN,
                hint="let the job run it again",
            )
        return GrantRefused(
            f"hold {hold_id} was {grant.state.value} already, by {grant.decided_by}",
            cause=RefusalCause.DECIDED,
            hint=f"sidecar why {short_id(hold_id)} says what became of it",
        )
