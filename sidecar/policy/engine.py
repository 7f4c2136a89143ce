"""The compiled policy: first of deny, approve, allow that matches decides; masks of all matching rules add up.

Pure. Verdicts on SQL are remembered by text and by the facts that decide, and, where no literal decides, by the shape of the
text (constants replaced), so that inline literals do not defeat the cache.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.model.flow import FlowFacts
from sidecar.model.operation import ConnectOperation, Operation, SqlOperation
from sidecar.model.record import ObjectPart
from sidecar.model.verdict import Action, ApproveTerms, SqlFacts, Verdict
from sidecar.policy import masks, sql
from sidecar.policy.document import PolicyDocument
from sidecar.policy.masks import EMPTY, Plan
from sidecar.policy.selectors import SQL_ONLY, Answer, Selector, Subject, all_of

CACHE_ENTRIES: Final = 10_000
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
        answer = all_of(selector.test(subject) for selector in self.selectors)
        if answer is False or not self.exceptions:
            return answer
        for exception in self.exceptions:
            if all_of(selector.test(subject) for selector in exception.selectors) is True:
                return False
        return answer


@dataclass(slots=True)
class Policy:
    """Implements model.verdict.Engine. Build with `sidecar.policy.load_policy`."""

    revision: str
    document: PolicyDocument
    rules: tuple[CompiledRule, ...]
    warnings: tuple[str, ...] = ()
    host_names: frozenset[str] = frozenset()
    wants_request_json: bool = False
    by_principal: bool = False
    by_workload: bool = False
    _cache: dict[Any, Verdict] = field(default_factory=dict)
    _shapes: dict[Any, Verdict] = field(default_factory=dict)

    @property
    def shape_safe(self) -> bool:
        """No rule looks at literals."""
        return not any(rule.looks_at_text for rule in self.rules)

    def evaluate(self, operation: Operation, facts: FlowFacts) -> Verdict:
        if isinstance(operation, SqlOperation):
            return self._sql(operation, facts)
        return self._judge(Subject(operation, facts))

    def column_masks(
        self, facts: FlowFacts, database: str | None, user: str | None, *, observing: bool
    ) -> Plan:
        """Masks of every rule that the flow's facts do not rule out; selectors of the statement are taken as unknown."""
        subject = Subject(SqlOperation("query", "", database, user), facts, sql.Analysis())

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
            and all(may(exception.selectors) is not True for exception in rule.exceptions)
        )

    def run_tests(self) -> list[Any]:
        """The document's own cases (`policy.explain.TestResult`)."""
        from sidecar.policy.explain import run_tests

        return list(run_tests(self))

    # -- SQL

    def _key(self, operation: SqlOperation, facts: FlowFacts) -> Any:
        target = facts.target
        return (
            operation.database,
            operation.user,
            operation.standard_conforming_strings,
            target.address,
            target.names,
            target.name,
            target.unresolved,
            (facts.principal.issuer, facts.principal.subject, facts.principal.jti)
            if self.by_principal and facts.principal
            else None,
            facts.workload if self.by_workload else None,
        )

    def _sql(self, operation: SqlOperation, facts: FlowFacts) -> Verdict:
        text = operation.text
        key = self._key(operation, facts)
        known = self._cache.get((text, key))
        if known is not None:
            return known
        cacheable = len(text) <= CACHE_TEXT_BYTES and not self._expiring()
        shape = None
        if cacheable and self.shape_safe and ("'" in text or any(char.isdigit() for char in text)):
            shape = sql.normalise(text)
            if shape is not None:
                known = self._shapes.get((shape, key))
                if known is not None:
                    return known
        analysis = sql.analyse(text)
        verdict = self._judge(Subject(operation, facts, analysis))
        if cacheable:
            store = self._cache
            if shape is not None and self._shareable(analysis, verdict):
                store, text = self._shapes, shape
            if len(store) >= CACHE_ENTRIES:
                store.clear()
            store[(text, key)] = verdict
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

    def _expiring(self) -> bool:
        return any(exception.until for rule in self.rules for exception in rule.exceptions)

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
        decided: CompiledRule | None = None
        would: str | None = None
        plans: list[Plan] = []
        record_plans: list[Plan] = []
        for rule in self.rules:
            answer = rule.holds(subject)
            if answer is False or (answer is None and rule.action is Action.ALLOW and not rule.plan):
                continue
            if rule.plan:
                record_plans.append(rule.plan)
                if not rule.observe:
                    plans.append(rule.plan)
            if rule.action is None or (rule.action is Action.ALLOW and answer is not True):
                continue
            if rule.observe:
                if would is None and rule.action is not Action.ALLOW:
                    would = f"{rule.action.value}:{rule.name}"
                continue
            if decided is None:
                decided = rule
        plan, record_plan = masks.merge(plans), masks.merge(record_plans)
        facts = None
        if analysis is not None and isinstance(operation, SqlOperation):
            facts = self._facts(analysis, record_plan, operation.text)
        if (
            analysis is not None
            and analysis.too_deep
            and self.document.on_unparsed == "deny"
            and decided is None
        ):
            return self._verdict(
                Action.DENY,
                None,
                "the statement is too deep to be understood",
                plan,
                record_plan,
                sql_facts=facts,
            )
        action, rule_name, reason, enforced = self._outcome(decided, operation, plan, facts)
        if not enforced:
            would = would or (f"{action.value}:{rule_name or 'default'}")
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

    def _outcome(
        self, decided: CompiledRule | None, operation: Operation, plan: Plan, facts: SqlFacts | None
    ) -> tuple[Action, str | None, str, bool]:
        """(action, rule, reason, enforced)."""
        observing = self.document.mode == "observe"
        if decided is not None and decided.action in (Action.DENY, Action.HOLD):
            return decided.action, decided.name, decided.reason, not observing
        if facts is not None and (facts.copies_masked or facts.writes_masked) and plan:
            what = "COPY would hand out" if facts.copies_masked else "the statement would store"
            return (
                Action.DENY,
                plan.rules[0],
                f"{what} a masked column where it cannot be masked",
                not observing,
            )
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

    @staticmethod
    def _facts(analysis: sql.Analysis, plan: Plan, text: str) -> SqlFacts:
        """What the session needs; what concerns masks is judged against the plan in force, towards masking."""
        touches = plan.has_columns and (
            any(plan.may_mask_table(t.schema, t.name) for t in analysis.reads | analysis.writes)
            or analysis.row_functions
        )

        def reached(columns: set[str]) -> bool:
            return touches and any(plan.may_mask_column(column) for column in columns)

        raw = text.encode("utf-8", "surrogateescape")
        spans = [
            span
            for column, offset in analysis.bound_literals
            if touches and plan.may_mask_column(column) and (span := sql.literal_span(raw, offset))
        ]
        return SqlFacts(
            statements=tuple(analysis.statements),
            settings=tuple(sorted(analysis.settings)),
            may_change_catalog=analysis.ddl,
            transaction_control=analysis.transaction,
            is_copy="COPY" in analysis.statements,
            masked_reach=reached(analysis.flowing) or (plan.has_columns and analysis.row_functions),
            copies_masked=analysis.copy_out and reached(analysis.copied),
            writes_masked=reached(analysis.stored),
            password_spans=tuple(analysis.password_spans),
            masked_literal_spans=tuple(spans),
            masked_parameters=tuple(
                number
                for column, number in analysis.bound_parameters
                if touches and plan.may_mask_column(column)
            ),
        )
