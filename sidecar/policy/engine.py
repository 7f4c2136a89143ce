"""The compiled policy: first of deny, approve, allow that matches decides; masks of all matching rules add up.

Pure. Verdicts on SQL are remembered by text and by the facts that decide, and, where no literal decides, by the shape of the
text (constants replaced), so that inline literals do not defeat the cache.
"""

from __future__ import annotations

import bisect
import datetime
import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.model.flow import FlowFacts
from sidecar.model.operation import ConnectOperation, Operation, SqlOperation
from sidecar.model.record import ObjectPart
from sidecar.model.verdict import Action, ApproveTerms, SqlFacts, Verdict
from sidecar.policy import masks, sql
from sidecar.policy.document import PolicyDocument
from sidecar.policy.lineage import trace
from sidecar.policy.lineage_values import Work
from sidecar.policy.masks import EMPTY, NamedRelations, Plan
from sidecar.policy.reach import ANYTHING, CLEAN, FUNCTION, MASKED, Flows, together
from sidecar.policy.selectors import SQL_ONLY, Answer, Selector, Subject, all_of
from sidecar.policy.sql_facts import ANY_COLUMN, ARGUMENT, SECRET
from sidecar.policy.sql_names import RETURNS_NAMED
from sidecar.policy.sql_vocabulary import LOOK_AT_NO_ROW, MOVING, SINKS, TABLE_BY_NAME

CACHE_ENTRIES: Final = 4_096
CACHE_BYTES: Final = 8 * 1024 * 1024
"""Of statement text, in each of the two caches; full ones are emptied."""
CACHE_SCOPES: Final = 4_096
"""Flows whose deciding facts are remembered."""
CACHE_TEXT_BYTES: Final = 65_536
"""Longer texts are judged anew each time, so that the cache stays small."""


@dataclass(frozen=True, slots=True)
class CompiledException:
    name: str
    selectors: tuple[Selector, ...]
    until: datetime.datetime | None


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """`kind`: deny, hold, allow or mask (a rule may be mask beside one of the others: `plan`)."""

    name: str
    selectors: tuple[Selector, ...]
    on_connect: bool
    action: Action | None
    reason: str
    observe: bool
    plan: Plan
    terms: ApproveTerms | None
    exceptions: tuple[CompiledException, ...]
    until: datetime.datetime | None
    severity: str | None
    owner: str | None
    tags: tuple[str, ...]
    looks_at_text: bool

    def holds(self, subject: Subject) -> Answer:
        if isinstance(subject.operation, ConnectOperation) and not self.on_connect:
            return False
        if self.until is not None and subject.now >= self.until:
            return False
        subject.every = self.action is Action.ALLOW
        answer = all_of(selector.test(subject) for selector in self.selectors)
        # An exception covers all of a statement or none: `TRUNCATE staging.a, orders` is not exempt for the sake of the first.
        subject.every = True
        exempt = answer is not False and any(
            (exception.until is None or subject.now < exception.until)
            and all_of(selector.test(subject) for selector in exception.selectors) is True
            for exception in self.exceptions
        )
        subject.every = False
        return False if exempt else answer


_EPOCH: Final = datetime.datetime.fromtimestamp(0, datetime.UTC)


def _instant(now_ns: int) -> datetime.datetime:
    return _EPOCH + datetime.timedelta(microseconds=now_ns // 1000)


_STRICTNESS: Final = {Action.ALLOW: 0, Action.MASK: 0, Action.HOLD: 1, Action.DENY: 2, Action.INVALID: 3}


@dataclass(slots=True)
class _Outcome:
    """What the rules say of one statement."""

    decided: CompiledRule | None = None
    masking: list[CompiledRule] = field(default_factory=list)
    would: str | None = None
    needs: set[str] = field(default_factory=set)


_MAY_HOLD_LITERAL: Final = re.compile(r"['0-9]")


@dataclass(slots=True)
class Policy:
    """Implements model.verdict.Engine. Build with `sidecar.policy.load_policy`."""

    revision: str
    document: PolicyDocument
    rules: tuple[CompiledRule, ...]
    warnings: tuple[str, ...] = ()
    host_names: frozenset[str] = frozenset()
    named_hosts: tuple[str, ...] = ()
    """Host patterns of rules that may be about HTTP."""
    wants_request_json: bool = False
    by_principal: bool = False
    by_workload: bool = False
    now_ns: Callable[[], int] | None = None
    """The clock for `until`; without one a flow's opening time counts."""
    shape_safe: bool = field(init=False)
    """No rule looks at literals."""
    _untils: list[datetime.datetime] = field(init=False)
    _cache: dict[Any, Verdict] = field(default_factory=dict, repr=False)
    _shapes: dict[Any, Verdict] = field(default_factory=dict, repr=False)
    _cache_bytes: int = 0
    _shape_bytes: int = 0
    _scopes: dict[int, tuple[FlowFacts, int]] = field(default_factory=dict, repr=False)
    _scope_numbers: dict[Any, int] = field(default_factory=dict, repr=False)
    _next_scope: int = 0

    def __post_init__(self) -> None:
        self.shape_safe = not any(rule.looks_at_text for rule in self.rules)
        self._untils = sorted(
            {
                until
                for rule in self.rules
                for until in (rule.until, *(item.until for item in rule.exceptions))
                if until is not None
            }
        )

    def evaluate(self, operation: Operation, facts: FlowFacts) -> Verdict:
        if isinstance(operation, SqlOperation):
            return self._sql(operation, facts)
        return self._judge(self.subject(operation, facts))

    def names_host(self, names: tuple[str, ...]) -> bool:
        return any(
            fnmatch.fnmatchcase(name.lower(), pattern) for name in names for pattern in self.named_hosts
        )

    def subject(
        self, operation: Operation, facts: FlowFacts, analysis: sql.Analysis | None = None
    ) -> Subject:
        """What rules are asked about."""
        return Subject(operation, facts, analysis, now=self._now(facts))

    def moment(self, now_ns: int) -> int:
        """How many `until`s have passed."""
        return bisect.bisect_right(self._untils, _instant(now_ns))

    def _now(self, facts: FlowFacts) -> datetime.datetime:
        return _instant(self.now_ns() if self.now_ns is not None else facts.opened_ns)

    def column_masks(
        self, facts: FlowFacts, database: str | None, user: str | None, *, observing: bool
    ) -> Plan:
        """Masks of every rule that the flow's facts do not rule out; selectors of the statement are taken as unknown."""
        subject = self.subject(SqlOperation("query", "", database, user), facts, sql.Analysis())

        def may(selectors: tuple[Selector, ...]) -> Answer:
            return all_of(
                None if selector.name in (*SQL_ONLY, "cel") else selector.test(subject)
                for selector in selectors
            )

        return masks.merge(
            rule.plan
            for rule in self.rules
            if rule.plan.has_columns
            and (observing or not rule.observe)
            and may(rule.selectors) is not False
            and all(
                (exception.until is not None and subject.now >= exception.until)
                or may(exception.selectors) is not True
                for exception in rule.exceptions
            )
        )

    def run_tests(self) -> list[Any]:
        """The document's own cases (`policy.explain.TestResult`)."""
        from sidecar.policy.explain import run_tests

        return list(run_tests(self))

    # -- SQL

    def _scope(self, facts: FlowFacts) -> int:
        """A number for the flow's deciding facts: equal facts, equal number. Principal and workload only where a rule looks."""
        known = self._scopes.get(id(facts))
        if known is not None and known[0] is facts:
            return known[1]
        if len(self._scopes) >= CACHE_SCOPES or len(self._scope_numbers) >= CACHE_SCOPES:
            self._scopes.clear()
            self._scope_numbers.clear()
        deciding = (
            facts.target,
            (facts.principal, facts.identity_error) if self.by_principal else None,
            facts.workload if self.by_workload else None,
        )
        number = self._scope_numbers.get(deciding)
        if number is None:
            self._next_scope += 1
            number = self._scope_numbers[deciding] = self._next_scope
        self._scopes[id(facts)] = (facts, number)
        return number

    def _sql(self, operation: SqlOperation, facts: FlowFacts) -> Verdict:
        text = operation.text
        key = (
            text,
            self._scope(facts),
            operation.database,
            operation.user,
            operation.standard_conforming_strings,
            operation.bodies_known,
            bisect.bisect_right(self._untils, self._now(facts)) if self._untils else 0,
        )
        known = self._cache.get(key)
        if known is not None:
            return known
        if not operation.standard_conforming_strings and "\\" in text:
            # The server would end literals elsewhere than the grammar here does: `'\\'; DROP …`.
            analysis = sql.Analysis(unjudged="a backslash while standard_conforming_strings is off")
            return self._judge(self.subject(operation, facts, analysis))
        cacheable = len(text) <= CACHE_TEXT_BYTES
        shape = None
        if (
            cacheable
            and self.shape_safe
            and _MAY_HOLD_LITERAL.search(text) is not None
            and not sql.may_hold_secrets(text)
        ):
            shape = sql.normalise(text)
            if shape == text:
                shape = None  # no literal in it: the text itself is the key
            if shape is not None:
                known = self._shapes.get((shape, *key[1:]))
                if known is not None:
                    return known
        analysis = sql.analyse(text)
        verdict = self._judge(self.subject(operation, facts, analysis))
        if not cacheable:
            return verdict
        if shape is not None and self._shareable(analysis, verdict):
            self._shape_bytes += len(shape)
            if len(self._shapes) >= CACHE_ENTRIES or self._shape_bytes > CACHE_BYTES:
                self._shapes.clear()
                self._shape_bytes = len(shape)
            self._shapes[(shape, *key[1:])] = verdict
        else:
            self._cache_bytes += len(text)
            if len(self._cache) >= CACHE_ENTRIES or self._cache_bytes > CACHE_BYTES:
                self._cache.clear()
                self._cache_bytes = len(text)
            self._cache[key] = verdict
        return verdict

    @staticmethod
    def _shareable(analysis: sql.Analysis, verdict: Verdict) -> bool:
        facts = verdict.sql
        return (
            analysis.error is None
            and not analysis.constant_sensitive
            and not analysis.opaque
            and facts is not None
            and not facts.masked_literal_spans
            and not facts.masked_parameters
            and not facts.password_spans
        )

    # -- judging

    def _judge(self, subject: Subject) -> Verdict:
        operation = subject.operation
        analysis = subject.sql
        if analysis is not None and analysis.error is not None:
            return self._verdict(
                Action.INVALID,
                None,
                analysis.error.message,
                EMPTY,
                EMPTY,
                syntax=analysis.error,
                sql_facts=SqlFacts(),
            )
        parts = analysis.parts if analysis is not None and analysis.parts else [analysis]
        outcomes = [self._decide(self.subject(operation, subject.facts, part)) for part in parts]
        for outcome in outcomes:
            subject.needs |= outcome.needs
        fired = {rule.name for outcome in outcomes for rule in outcome.masking}
        masking = [rule for rule in self.rules if rule.name in fired]
        plan = masks.merge([rule.plan for rule in masking if not rule.observe])
        record_plan = masks.merge([rule.plan for rule in masking])
        facts = None
        if analysis is not None and isinstance(operation, SqlOperation):
            facts = self._facts(analysis, plan, record_plan, operation)
        # Every statement is judged; the strictest wins, the first of equals.
        ranked = [
            (*self._outcome(outcome.decided, operation, plan, facts, part), outcome)
            for outcome, part in zip(outcomes, parts, strict=True)
        ]
        action, rule_name, reason, enforced, chosen = max(
            ranked or [(Action.ALLOW, None, "", True, _Outcome())],
            key=lambda row: _STRICTNESS[row[0]] if row[3] else _STRICTNESS[Action.ALLOW],
        )
        decided = chosen.decided if chosen.decided is not None and chosen.decided.name == rule_name else None
        would = next((outcome.would for outcome in outcomes if outcome.would), None)
        not_enforced = next((row for row in ranked if not row[3]), None)
        if not_enforced is not None and enforced is not True:
            would = would or f"{action.value}:{rule_name or 'default'}"
            action = Action.MASK if plan else Action.ALLOW
        objects = self._objects(analysis) if analysis is not None else ()
        return Verdict(
            action=action,
            rule=rule_name,
            reason=reason,
            policy=self.revision,
            masks=plan,
            record_masks=record_plan,
            enforced=enforced,
            would=would,
            approve=decided.terms if decided is not None and action is Action.HOLD else None,
            severity=decided.severity if decided else None,
            owner=decided.owner if decided else None,
            tags=decided.tags if decided else (),
            statements=tuple(analysis.statements) if analysis else (),
            objects=objects,
            sql=facts,
        )

    def _decide(self, subject: Subject) -> _Outcome:
        """The rules in order, for one statement or request."""
        found = _Outcome(needs=subject.needs)
        for rule in self.rules:
            answer = rule.holds(subject)
            # `deny`, `approve` and `mask` fire on unknown too, `allow` only on what is known.
            if answer is False:
                continue
            if rule.plan:
                found.masking.append(rule)
            if rule.action is None or (rule.action is Action.ALLOW and answer is not True):
                continue
            if rule.observe:
                if found.would is None and rule.action is not Action.ALLOW:
                    found.would = f"{rule.action.value}:{rule.name}"
            elif found.decided is None:
                found.decided = rule
        return found

    def _outcome(
        self,
        decided: CompiledRule | None,
        operation: Operation,
        plan: Plan,
        facts: SqlFacts | None,
        analysis: sql.Analysis | None,
    ) -> tuple[Action, str | None, str, bool]:
        """(action, rule, reason, enforced)."""
        observing = self.document.mode == "observe"
        if decided is not None and decided.action is Action.DENY:
            return Action.DENY, decided.name, decided.reason, True
        if analysis is not None and (analysis.too_deep or analysis.unjudged):
            if self.document.on_unparsed == "deny" and (decided is None or decided.action is Action.ALLOW):
                why = analysis.unjudged or "it is nested too deeply"
                return Action.DENY, None, f"the statement cannot be understood: {why}", not observing
        elif facts is not None and facts.refusal is not None:
            # Before a hold or an allow: neither lifts a mask.
            return Action.DENY, plan.rules[0], facts.refusal, True
        if decided is not None and decided.action is Action.HOLD:
            return Action.HOLD, decided.name, decided.reason, True
        if decided is None and self.document.default == "deny":
            parsed_later = isinstance(operation, ConnectOperation) and operation.protocol in (
                "postgres",
                "http",
            )
            if not parsed_later:
                return Action.DENY, None, "nothing allows it", not observing
        if plan:
            return (
                Action.MASK,
                decided.name if decided else plan.rules[0],
                decided.reason if decided else "",
                True,
            )
        return Action.ALLOW, decided.name if decided else None, decided.reason if decided else "", True

    def _verdict(
        self,
        action: Action,
        rule: str | None,
        reason: str,
        plan: Plan,
        record_plan: Plan,
        *,
        syntax: Any = None,
        sql_facts: SqlFacts | None = None,
    ) -> Verdict:
        return Verdict(action, rule, reason, self.revision, plan, record_plan, syntax=syntax, sql=sql_facts)

    @staticmethod
    def _objects(analysis: sql.Analysis) -> tuple[ObjectPart, ...]:
        rows = [ObjectPart(str(table), "write") for table in sorted(analysis.writes, key=str)]
        rows += [ObjectPart(str(table), "read") for table in sorted(analysis.reads, key=str)]
        rows += [ObjectPart(name, "call") for name in sorted(analysis.functions) if "." not in name]
        return tuple(rows)

    # -- masks and what they reach

    def masks_reach(self, reach: int) -> bool:
        return bool(reach & (MASKED if self.document.on_opaque == "allow" else ANYTHING))

    def refuses_reach(self, *, moved: int, probed: int, derived: int, copies: bool) -> str | None:
        document = self.document
        if self.masks_reach(moved):
            what = "COPY would hand out" if copies else "the statement would move"
            whose = "a masked column" if moved & MASKED else "what a function may have read"
            return f"{what} {whose} to where it cannot be masked"
        if document.predicates == "deny" and probed & MASKED:
            return "its conditions look at a masked column"
        if document.on_derived == "deny" and derived & MASKED:
            return "a value would be made from a masked column"
        if document.on_opaque == "deny" and (moved | probed | derived) & FUNCTION:
            return "it calls a function that cannot be looked into"
        return None

    def _refusal(self, analysis: sql.Analysis, plan: Plan, *, functions: bool) -> str | None:
        """Why the statement is refused, as far as its text says: names of tables and columns stand for what they name."""
        if not plan.has_columns:
            return None
        opaque = self.document.on_opaque
        if opaque == "deny" and analysis.opaque:
            return "it cannot be looked into"
        named = opaque != "allow" and any(plan.may_name_masked(body) for body in analysis.do_bodies)
        touched = any(
            plan.may_mask_table(table.schema, table.name) for table in analysis.reads | analysis.writes
        )
        stored = any(touched if column == "*" else plan.may_mask_column(column) for column in analysis.stored)
        if any(plan.names_schema(schema) for schema in analysis.renamed_schemas):
            return "a mask names this schema, and would mask nothing under another name"
        flows = _flows(analysis, plan, functions=functions)
        return self.refuses_reach(
            moved=together(flow.moved for flow in flows) | (MASKED if stored or named else CLEAN),
            probed=together(flow.probed for flow in flows),
            derived=together(flow.derived for flow in flows),
            copies=analysis.copy_out,
        )

    def _may_move(self, analysis: sql.Analysis) -> bool:
        document = self.document
        strict = "deny" in (document.on_derived, document.on_opaque, document.predicates)
        return (
            strict
            or bool(analysis.do_bodies)
            or not MOVING.isdisjoint(analysis.statements)
            or not (SINKS | TABLE_BY_NAME).isdisjoint(analysis.functions | analysis.value_fields)
        )

    def _facts(
        self, analysis: sql.Analysis, plan: Plan, record_plan: Plan, operation: SqlOperation
    ) -> SqlFacts:
        """What the session needs. A name stands for what it names: whether it is a view of something else is the catalog's word,
        which the session has. For the record, a column's name counts whatever its relation is."""
        tables = analysis.reads | analysis.writes
        touched = any(record_plan.may_mask_table(table.schema, table.name) for table in tables)

        def bound(column: str) -> bool:
            if not record_plan.has_columns:
                return False
            if column == ARGUMENT:
                return True
            return touched if column == ANY_COLUMN else record_plan.may_mask_column(column)

        raw = operation.text.encode("utf-8", "surrogateescape")
        spans = [
            span
            for column, offset in analysis.bound_literals
            if bound(column) and (span := sql.literal_span(raw, offset))
        ]
        if any(record_plan.may_name_masked(body) for body in analysis.do_bodies):
            spans += sql.string_spans(operation.text)
        return SqlFacts(
            statements=tuple(analysis.statements),
            settings=tuple(sorted(analysis.settings)),
            may_change_catalog=analysis.ddl,
            transaction_control=analysis.transaction,
            is_copy="COPY" in analysis.statements,
            copy_unread=analysis.copy_unread,
            masked_reach=record_plan.has_columns
            and (
                any(use.act in RETURNS_NAMED for use in analysis.names)
                or self.masks_reach(together(flow.derived for flow in _flows(analysis, record_plan)))
            ),
            refusal=self._refusal(analysis, plan, functions=not operation.bodies_known),
            may_move=plan.has_columns and self._may_move(analysis),
            changes=analysis.changes,
            bodies=tuple(analysis.do_bodies) if self.document.on_opaque != "allow" else (),
            names=analysis.names,
            looks_at_no_row=all(
                part.tree is not None and part.tree.DESCRIPTOR.name in LOOK_AT_NO_ROW
                for part in analysis.parts or [analysis]
            ),
            fields=tuple(sorted(analysis.value_fields | analysis.row_fields)),
            password_spans=tuple(analysis.password_spans),
            masked_literal_spans=tuple(spans),
            masked_parameters=tuple(
                number
                for column, number in analysis.bound_parameters
                if SECRET.search(column) or bound(column)
            ),
        )


def _flows(analysis: sql.Analysis, plan: Plan, *, functions: bool = True) -> list[Flows]:
    relations, work = NamedRelations(plan, functions), Work(analysis.size)
    return [
        trace(part.tree, relations, work=work)
        for part in analysis.parts or [analysis]
        if part.tree is not None
    ]
