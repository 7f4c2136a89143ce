"""Grants under arbitrary interleavings: whatever happens, a text runs at most once, and only if somebody
allowed it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from sidecar.approvals.grants import Decider, GrantLimits, GrantRefused, Grants, GrantState
from sidecar.errors import LimitExceeded
from sidecar.model.verdict import ApproveTerms

LIMITS = GrantLimits(max_pending=6, max_pending_per_job=4, max_finished=5)
SECOND = 1_000_000_000
DECIDERS = (
    Decider("root", 0),
    Decider("operator", 1, frozenset({"sidecar"})),
    Decider("dba", 2),
    Decider("member", 3, frozenset({"dba"})),
    Decider("stranger", 4, frozenset({"users"})),
)
TRUE_DECIDERS = {("dba",): {"root", "dba", "member"}, (): {"root", "operator"}}
FINAL = {GrantState.REJECTED, GrantState.EXPIRED, GrantState.WITHDRAWN}


class GrantsMachine(RuleBasedStateMachine):
    """Beside the real thing: a plain log of what was allowed, and what has run."""

    holds: Bundle[str] = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.grants = Grants(LIMITS)
        self.now_ns = 0
        self.number = 0
        self.opened: dict[str, tuple[str, tuple[str, ...], int]] = {}  # id -> digest, by, deadline
        self.approved: dict[str, int] = {}  # id -> when
        self.ended: dict[str, GrantState] = {}
        self.runs: dict[str, int] = {}

    @rule(
        target=holds,
        digest=st.sampled_from(["x", "y"]),
        by=st.sampled_from([(), ("dba",)]),
        within_s=st.integers(0, 5),
        job=st.sampled_from(["one", "two"]),
    )
    def open(self, digest: str, by: tuple[str, ...], within_s: int, job: str) -> str:
        self.number += 1
        hold_id = f"h{self.number}"
        waiting = self.grants.pending()
        full = len(waiting) >= LIMITS.max_pending
        full = full or sum(grant.job == job for grant in waiting) >= LIMITS.max_pending_per_job
        try:
            grant = self.grants.open(
                hold_id,
                digest=digest,
                terms=ApproveTerms(by=by, within_s=within_s),
                now_ns=self.now_ns,
                flow=f"flow{self.number % 3}",
                job=job,
            )
        except LimitExceeded:
            assert full
        else:
            assert not full
            assert grant.state is GrantState.PENDING
            self.opened[hold_id] = (digest, by, self.now_ns + within_s * SECOND)
        return hold_id

    @rule(seconds=st.integers(0, 3))
    def wait(self, seconds: int) -> None:
        self.now_ns += seconds * SECOND

    @rule(hold_id=holds, approve=st.booleans(), decider=st.sampled_from(DECIDERS))
    def decide(self, hold_id: str, approve: bool, decider: Decider) -> None:
        may = (
            hold_id in self.opened
            and hold_id not in self.approved
            and hold_id not in self.ended
            and self.now_ns < self.opened[hold_id][2]
            and decider.name in TRUE_DECIDERS[self.opened[hold_id][1]]
        )
        try:
            self.grants.decide(hold_id, approve, decider, "", self.now_ns)
        except GrantRefused:
            assert not may
            return
        assert may
        if approve:
            self.approved[hold_id] = self.now_ns
        else:
            self.ended[hold_id] = GrantState.REJECTED

    @rule(hold_id=holds, digest=st.sampled_from(["x", "y"]))
    def spend(self, hold_id: str, digest: str) -> None:
        may = (
            hold_id in self.approved
            and hold_id not in self.ended
            and hold_id not in self.runs
            and self.opened[hold_id][0] == digest
            and self.now_ns < self.opened[hold_id][2]
        )
        try:
            self.grants.spend(hold_id, digest, self.now_ns)
        except GrantRefused:
            assert not may
            return
        assert may
        self.runs[hold_id] = self.runs.get(hold_id, 0) + 1

    @rule(hold_id=holds)
    def withdraw(self, hold_id: str) -> None:
        open_still = hold_id in self.opened and hold_id not in self.ended and hold_id not in self.runs
        assert (self.grants.withdraw(hold_id, self.now_ns) is not None) == open_still
        if open_still:
            self.ended[hold_id] = GrantState.WITHDRAWN

    @rule(number=st.integers(0, 2))
    def withdraw_flow(self, number: int) -> None:
        for grant in self.grants.withdraw_flow(f"flow{number}", self.now_ns):
            assert grant.hold_id not in self.ended
            self.ended[grant.hold_id] = GrantState.WITHDRAWN

    @rule()
    def expire(self) -> None:
        late = {grant.hold_id for grant in self.grants.expire(self.now_ns)}
        assert late == {
            hold_id
            for hold_id, (_, _, deadline) in self.opened.items()
            if hold_id not in self.ended and hold_id not in self.runs and self.now_ns >= deadline
        }
        self.ended.update(dict.fromkeys(late, GrantState.EXPIRED))

    @invariant()
    def bounded(self) -> None:
        waiting_release = sum(1 for h in self.approved if h not in self.ended and h not in self.runs)
        assert len(self.grants.pending()) <= LIMITS.max_pending
        assert len(self.grants) - len(self.grants.pending()) <= max(LIMITS.max_finished, waiting_release)

    @invariant()
    def runs_once_and_allowed(self) -> None:
        assert all(count == 1 for count in self.runs.values())
        assert self.runs.keys() <= self.approved.keys()

    @invariant()
    def states_agree(self) -> None:
        for grant in self.grants:
            expected = self.ended.get(grant.hold_id)
            if expected is None:
                expected = GrantState.APPROVED if grant.hold_id in self.approved else GrantState.PENDING
            assert grant.state is expected
            assert grant.spent == (grant.hold_id in self.runs)
            assert not (grant.spent and grant.state in FINAL)


GrantsMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestGrants = GrantsMachine.TestCase
