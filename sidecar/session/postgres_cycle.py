"""What the short way (postgres_lane.py) asks of a session, and the way back from it.

The lane is armed while nothing is under way. Whatever it does not take, the session does: then all that the lane has sent becomes
what the long way would have made of it (`_leave`), before anything else happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from sidecar.codecs.postgres import messages
from sidecar.session.context import SessionContext
from sidecar.session.postgres_exchange import Decision, Exchange, Portal, Prepared, RowPlan, own_name
from sidecar.session.postgres_lane import COMPILED

if COMPILED:
    from sidecar.session.postgres_lane import CHUNK_MAX_BYTES, Lane, make_answer, make_known
if TYPE_CHECKING:
    from sidecar.session.postgres_lane import Answer, Cycle, Known
from sidecar.session.postgres_reach import runs_unseen_code
from sidecar.session.postgres_results import Results

KNOWN_MAX: Final = 1024
"""Statements, and descriptions, whose records are kept in pieces; a few kilobytes each at most."""


class Cycles(Results):
    def __init__(self, context: SessionContext) -> None:
        super().__init__(context)
        limits = context.limits
        self._lane: Lane | None = None
        if COMPILED:
            self._lane = Lane(self, limits.response_max_rows, limits.response_max_bytes)
            self._bare = make_answer(self.facts.flow, ())
        self._known: dict[tuple[Decision, bool], Known | None] = {}
        self._answers: dict[RowPlan, Answer] = {}
        self._known_under = (-1, -1)
        self._unseen_passed = False
        """The lane may have let a statement through that runs code nobody sees."""
        self._order = 0
        self._segment = 0
        """Counts the client's Syncs: the server skips to the end of a segment after any failure in it."""
        self._open_segment = False

    def _quiet(self) -> bool:
        """Nothing is under way: no answer awaited, nothing kept, held, skipped or injected."""
        raise NotImplementedError

    def _arm(self) -> None:
        lane = self._lane
        if lane is None or not self._quiet():
            return
        under = (self.judge.generation, self._catalog.version)
        if under != self._known_under or len(self._known) > KNOWN_MAX or len(self._answers) > KNOWN_MAX:
            self._known.clear()
            self._answers.clear()
            self._known_under = under
        lane.arm(self._status)
        lane.until_ns = self.judge.lane_until_ns(self._status)

    # -- what the lane asks

    def known_query(self, raw: bytes) -> Known | None:
        decision = self.judge.alike(raw)
        return self._known_by(decision, raw, True) if decision is not None else None

    def known_shape(self, raw: bytes) -> bool:
        """Whether all texts of its shape are decided alike."""
        return self.judge.shares(raw)

    def known_parse(self, raw: bytes) -> Known | None:
        return self._known_by(self.judge.decide(raw), raw, False)

    def known_statement(self, name: bytes) -> Known | None:
        prepared = self._statements.get(name)
        if not own_name(name):
            return None
        if prepared is None or prepared.raw is None or prepared.closed or not prepared.confirmed:
            return None
        if not self.judge.reads_alike(prepared):
            return None
        return self._known_by(self.judge.decide(prepared.raw), prepared.raw, False)

    def answer_for(self, known: Known, description: bytes) -> Answer | None:
        decision = cast(Decision, known.decision)
        plan = decision.row_plans.get(description)
        if plan is None or not plan.plain or plan.catalog != self._catalog.version:
            return None
        answer = self._answers.get(plan)
        if answer is None:
            answer = self._answers[plan] = make_answer(self.facts.flow, plan.parts)
        return answer

    def _known_by(self, decision: Decision, raw: bytes, query: bool) -> Known | None:
        if self._stale and decision.masks_columns:
            return None
        key = (decision, query)
        if key not in self._known:
            self._known[key] = self._make_known(decision, raw, query)
        known = self._known[key]
        if known is not None and not self._unseen_passed:
            self._unseen_passed = runs_unseen_code(self._catalog, decision)
        return known

    def _make_known(self, decision: Decision, raw: bytes, query: bool) -> Known | None:
        facts = decision.verdict.sql
        operation = decision.operation
        limit = self.limits.record_text_max_bytes
        if (
            not decision.passes
            or not decision.steady
            or decision.unseen
            or decision.ambiguous
            or decision.ddl
            or decision.resets
            or decision.names
            or facts is None
            or facts.masked_parameters
            or limit < CHUNK_MAX_BYTES
        ):
            return None
        if query and (not raw.isascii() or operation.text != decision.text or operation.truncated):
            return None
        kind = "query" if query else "execute"
        request = self.judge.request(decision, kind, None, "", 0)
        if request.operation is None or request.operation.kind != kind:
            return None
        unmasked = decision.plan is None and decision.record_plan is None
        return make_known(decision, raw, request, self._bare, query=query, bare_rows=unmasked and not query)

    # -- the way back

    def _leave(self) -> None:
        """Take over what the lane has under way."""
        lane = self._lane
        assert lane is not None
        lane.armed = False
        self._status = lane.status
        self._bytes[0] += lane.bytes_client
        self._bytes[1] += lane.bytes_server
        answered = lane.sent - len(lane.cycles)
        self._order += answered
        if self._unseen_passed:
            self._unseen_passed = False
            self.judge.doubted = self._order + len(lane.cycles) + 1
        self._segment += answered
        if lane.confirmed is not None:
            self._statements[b""] = self._as_prepared(lane.confirmed.raw, confirmed=True)
        if lane.executed is not None:
            if lane.status == b"I":
                self._end_portals()
            else:
                portal, _ = self._portal_of(lane.executed)
                portal.confirmed, portal.older = True, None
                self._portals[b""] = portal
        for cycle in lane.cycles:
            self._take_over(cycle)
        lane.cycles.clear()

    def _as_prepared(self, raw: bytes, *, confirmed: bool = False, older: Prepared | None = None) -> Prepared:
        """What the lane parsed; a change of the encoding would have ended it."""
        return Prepared(raw, self._segment, confirmed=confirmed, older=older, reading=self.judge.reading)

    def _portal_of(self, cycle: Cycle) -> tuple[Portal, Prepared | None]:
        """The portal that a cycle's Bind makes, and the statement that its Parse makes."""
        chunk, known = cycle.chunk, cycle.known
        begin = 1 + int.from_bytes(chunk[1:5]) if cycle.parsed else 0
        bind = messages.parse_bind(
            chunk[begin + 5 : begin + 1 + int.from_bytes(chunk[begin + 1 : begin + 5])]
        )
        parsed = None
        if cycle.parsed:
            parsed = self._as_prepared(known.raw, older=self._statements.get(b""))
        prepared = (
            parsed or self._statements.get(bind.statement) or self._as_prepared(known.raw, confirmed=True)
        )
        portal = Portal((prepared,), bind, self._segment, older=self._portals.get(b""), order=self._order)
        portal.described = cycle.described
        return portal, parsed

    def _take_over(self, cycle: Cycle) -> None:
        """A cycle as the messages that it is."""
        self._order += 1
        now, order = cycle.started_ns, self._order
        execute = Exchange("Q" if cycle.known.query else "E", now, order)
        execute.record_id, execute.decision = cycle.record_id, cast(Decision, cycle.known.decision)
        if cycle.known.query:
            self._pending.append(execute)
            return
        portal, parsed = self._portal_of(cycle)
        execute.portal = portal
        if parsed is not None:
            self._statements[b""] = parsed
            self._pending.append(Exchange("P", now, order))
            self._pending[-1].version = parsed
        self._portals[b""] = portal
        self._pending.append(Exchange("B", now, order))
        self._pending[-1].version = portal
        if cycle.described:
            self._pending.append(Exchange("D", now, order))
            self._pending[-1].portal = portal
        self._pending.append(execute)
        self._pending.append(Exchange("S", now, order))
        self._segment += 1
