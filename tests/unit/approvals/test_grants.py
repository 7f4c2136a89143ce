"""The transition table of approvals.grants, row by row."""

from __future__ import annotations

import pytest

from sidecar.approvals.grants import (
    Decider,
    GrantLimits,
    GrantRefused,
    Grants,
    GrantState,
    RefusalCause,
    may_decide,
)
from sidecar.errors import ControlError, LimitExceeded
from sidecar.model.verdict import ApproveTerms

ROOT = Decider("root", 0)
SECOND = 1_000_000_000
TERMS = ApproveTerms(by=("dba",), within_s=60)
STATES = ("pending", "approved", "spent", "rejected", "expired", "withdrawn")


def in_state(state: str) -> Grants:
    """A hold `h` for digest `d`, opened at 0, that has come to `state` by second 1."""
    grants = Grants()
    within_s = 1 if state == "expired" else 60
    grants.open(
        "h", digest="d", terms=ApproveTerms(by=("dba",), within_s=within_s), now_ns=0, flow="f", job="j"
    )
    match state:
        case "approved":
            grants.decide("h", True, ROOT, "fine", SECOND)
        case "spent":
            grants.decide("h", True, ROOT, "fine", SECOND)
            grants.spend("h", "d", SECOND)
        case "rejected":
            grants.decide("h", False, ROOT, "no", SECOND)
        case "expired":
            assert [grant.hold_id for grant in grants.expire(SECOND)] == ["h"]
        case "withdrawn":
            assert grants.withdraw("h", SECOND) is not None
    return grants


def state_of(grants: Grants) -> GrantState:
    grant = grants.get("h")
    assert grant is not None
    return grant.state


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("pending", None),
        ("approved", RefusalCause.DECIDED),
        ("spent", RefusalCause.DECIDED),
        ("rejected", RefusalCause.DECIDED),
        ("expired", RefusalCause.EXPIRED),
        ("withdrawn", RefusalCause.WITHDRAWN),
    ],
)
@pytest.mark.parametrize("approve", [True, False])
def test_deciding(state: str, expected: RefusalCause | None, approve: bool) -> None:
    grants = in_state(state)
    before = grants.get("h")
    if expected is None:
        grant = grants.decide("h", approve, ROOT, "because", 2 * SECOND)
        assert grant.state is (GrantState.APPROVED if approve else GrantState.REJECTED)
        assert (grant.decided_by, grant.decided_ns, grant.reason) == ("root", 2 * SECOND, "because")
        return
    with pytest.raises(GrantRefused) as refused:
        grants.decide("h", approve, ROOT, "because", 2 * SECOND)
    assert refused.value.cause is expected
    assert grants.get("h") == before


@pytest.mark.parametrize(
    ("state", "after"),
    [
        ("pending", "withdrawn"),
        ("approved", "withdrawn"),
        ("spent", "approved"),
        ("rejected", "rejected"),
        ("expired", "expired"),
        ("withdrawn", "withdrawn"),
    ],
)
def test_withdrawing_is_idempotent(state: str, after: str) -> None:
    grants = in_state(state)
    changed = grants.withdraw("h", 2 * SECOND)
    assert (changed is not None) == (state in ("pending", "approved"))
    assert state_of(grants) == after
    assert grants.withdraw("h", 3 * SECOND) is None
    assert grants.withdraw_flow("f", 3 * SECOND) == []


@pytest.mark.parametrize(
    ("state", "after"),
    [
        ("pending", "expired"),
        ("approved", "expired"),
        ("spent", "approved"),
        ("rejected", "rejected"),
        ("withdrawn", "withdrawn"),
    ],
)
def test_the_deadline(state: str, after: str) -> None:
    grants = in_state(state)
    assert grants.expire(60 * SECOND - 1) == []
    late = grants.expire(60 * SECOND)
    assert [grant.state for grant in late] == (
        [GrantState.EXPIRED] if state in ("pending", "approved") else []
    )
    assert state_of(grants) == after
    assert grants.expire(61 * SECOND) == []
    assert grants.next_deadline_ns() is None


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("pending", RefusalCause.PENDING),
        ("approved", None),
        ("spent", RefusalCause.SPENT),
        ("rejected", RefusalCause.DECIDED),
        ("expired", RefusalCause.EXPIRED),
        ("withdrawn", RefusalCause.WITHDRAWN),
    ],
)
def test_releasing_once(state: str, cause: RefusalCause | None) -> None:
    grants = in_state(state)
    if cause is None:
        assert grants.spend("h", "d", 2 * SECOND).spent
        cause = RefusalCause.SPENT
    with pytest.raises(GrantRefused) as refused:
        grants.spend("h", "d", 2 * SECOND)
    assert refused.value.cause is cause


def test_an_approval_covers_one_digest() -> None:
    grants = in_state("approved")
    with pytest.raises(GrantRefused) as refused:
        grants.spend("h", "another", 2 * SECOND)
    assert refused.value.cause is RefusalCause.DIGEST
    assert grants.spend("h", "d", 2 * SECOND).spent  # a wrong try uses nothing up


def test_time_decides_and_not_scheduling() -> None:
    """`expire` has not run, and yet neither a decision nor a release passes the deadline."""
    for state in ("pending", "approved"):
        grants = in_state(state)
        with pytest.raises(GrantRefused) as refused:
            if state == "pending":
                grants.decide("h", True, ROOT, "", 60 * SECOND)
            else:
                grants.spend("h", "d", 60 * SECOND)
        assert refused.value.cause is RefusalCause.EXPIRED


def test_unknown_hold() -> None:
    grants = Grants()
    assert grants.withdraw("nope", 0) is None
    for attempt in (lambda: grants.decide("nope", True, ROOT, "", 0), lambda: grants.spend("nope", "d", 0)):
        with pytest.raises(GrantRefused) as refused:
            attempt()
        assert refused.value.cause is RefusalCause.UNKNOWN


@pytest.mark.parametrize(
    ("by", "decider", "allowed"),
    [
        ((), ROOT, True),
        (("dba",), ROOT, True),
        ((), Decider("alice", 1000, frozenset({"sidecar"})), True),
        ((), Decider("alice", 1000, frozenset({"users"})), False),
        (("dba",), Decider("alice", 1000, frozenset({"sidecar"})), False),
        (("dba",), Decider("alice", 1000, frozenset({"dba"})), True),
        (("dba", "alice"), Decider("alice", 1000), True),
        (("alice",), Decider("alicia", 1001), False),
        (("alice",), Decider("mallory", 1002, label="alice"), False),
    ],
)
def test_who_may_decide(by: tuple[str, ...], decider: Decider, allowed: bool) -> None:
    assert may_decide(by, decider) is allowed
    grants = Grants()
    grants.open("h", digest="d", terms=ApproveTerms(by=by), now_ns=0)
    if allowed:
        assert grants.decide("h", True, decider, "", 1).decided_by == decider.name
        return
    with pytest.raises(GrantRefused) as refused:
        grants.decide("h", True, decider, "", 1)
    assert refused.value.cause is RefusalCause.NOT_ALLOWED
    assert state_of(grants) is GrantState.PENDING


def test_bounds() -> None:
    grants = Grants(GrantLimits(max_pending=3, max_pending_per_job=2, max_finished=2))
    grants.open("a", digest="d", terms=TERMS, now_ns=0, job="one")
    grants.open("b", digest="d", terms=TERMS, now_ns=0, job="one")
    with pytest.raises(LimitExceeded) as refused:
        grants.open("c", digest="d", terms=TERMS, now_ns=0, job="one")
    assert refused.value.limit == "max_pending_per_job"
    grants.open("c", digest="d", terms=TERMS, now_ns=0, job="two")
    with pytest.raises(LimitExceeded) as refused:
        grants.open("d", digest="d", terms=TERMS, now_ns=0, job="three")
    assert refused.value.limit == "max_pending"
    for hold_id in "abc":
        grants.withdraw(hold_id, 1)
    assert len(grants) == 2
    assert grants.get("a") is None


def test_an_unspent_approval_is_not_forgotten() -> None:
    grants = Grants(GrantLimits(max_finished=1))
    grants.open("kept", digest="d", terms=TERMS, now_ns=0)
    grants.decide("kept", True, ROOT, "", 0)
    for number in range(5):
        grants.open(f"n{number}", digest="d", terms=TERMS, now_ns=0)
        grants.withdraw(f"n{number}", 0)
    assert grants.spend("kept", "d", 1).spent


def test_an_id_and_a_digest_are_needed_once() -> None:
    grants = in_state("rejected")
    with pytest.raises(ControlError):
        grants.open("h", digest="d", terms=TERMS, now_ns=0)
    with pytest.raises(ControlError):
        grants.open("new", digest="", terms=TERMS, now_ns=0)


def test_long_waits_and_long_reasons_are_cut() -> None:
    grants = Grants(GrantLimits(max_within_s=10, max_reason_chars=3))
    assert grants.open("h", digest="d", terms=ApproveTerms(within_s=1e9), now_ns=0).expires_ns == 10 * SECOND
    assert grants.decide("h", False, ROOT, "much too long", 1).reason == "muc"
    assert grants.open("past", digest="d", terms=ApproveTerms(within_s=-5), now_ns=7).expires_ns == 7


def test_a_relayed_decision_says_through_whom() -> None:
    assert str(Decider("root", 0, label="web page, alice")) == "root (web page, alice)"
