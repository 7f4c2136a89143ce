"""What masked columns reach in a statement, by its tree and by the catalog together: result columns, and what it would move.

A relation that the catalog does not know may hold anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sidecar.model.verdict import Engine, MaskPlan, SqlFacts
from sidecar.policy import sql
from sidecar.policy.builtin_functions import builtin_functions
from sidecar.policy.reach import ANYTHING, CLEAN, MASKED, described, together
from sidecar.policy.sql_names import RETURNS_NAMED
from sidecar.policy.sql_vocabulary import TABLE_BY_NAME
from sidecar.session.postgres_catalog import Catalog
from sidecar.session.postgres_exchange import Decision

_CHECKS_LATE: Final = frozenset({"COMMIT", "CONSTRAINTSSET", "PREPARE TRANSACTION"})
"""Check constraints, and run triggers, that were deferred."""
_UNSEEN: Final = frozenset({"DO", "CALL", "INSERT", "UPDATE", "DELETE", "MERGE", "TRUNCATE", "COPY", "LOAD"})
"""Code of their own, or triggers."""


@dataclass(frozen=True, slots=True)
class CatalogRelations:
    """Implements policy.reach.Relations."""

    catalog: Catalog
    plan: MaskPlan

    def columns(self, table: sql.Table) -> tuple[str, ...] | None:
        return self.catalog.columns(table.schema, table.name)

    def may_have(self, table: sql.Table, column: str) -> bool:
        return self.catalog.may_have(table.schema, table.name, column)

    def reach(self, table: sql.Table, column: str) -> int:
        return MASKED if self.catalog.may_mask(self.plan, table.schema, table.name, column) else CLEAN

    def is_own(self, function: str) -> bool:
        return function in self.catalog.own

    def may_read(self, function: str) -> bool:
        return self.catalog.may_read(self.plan, function)

    def casts_by_own(self, type_name: tuple[str, ...]) -> bool:
        return self.catalog.casts_by_own(self.plan, type_name[-1] if type_name else "")

    def may_call(self, field: str) -> bool:
        return self.catalog.has_function(field) and self.catalog.may_read(self.plan, field)


def masked_columns(
    engine: Engine, catalog: Catalog, plan: MaskPlan, decision: Decision, count: int
) -> list[bool]:
    """For each of a result's columns, whether its value may hold a masked one."""
    relations = CatalogRelations(catalog, plan)
    flows = [
        flow
        for part in (decision, *decision.stands_for)
        for flow in sql.flows(part.text, relations, executed=part.executed)
    ]
    reaches = described(flows, count)
    return [engine.masks_reach(reach) for reach in reaches]


def refusal(engine: Engine, catalog: Catalog, plan: MaskPlan, text: str, facts: SqlFacts) -> str | None:
    """Why the statement is refused for what it, or code in it, would do with masked columns."""
    named = plan.has_columns and any(catalog.code_names(plan, body) for body in facts.bodies)
    flows = sql.flows(text, CatalogRelations(catalog, plan))
    return engine.refuses_reach(
        moved=together(flow.moved for flow in flows) | (MASKED if named else CLEAN),
        probed=together(flow.probed for flow in flows),
        derived=together(flow.derived for flow in flows),
        copies=facts.is_copy,
    )


def touches_masked(catalog: Catalog, plan: MaskPlan, decision: Decision) -> bool:
    """Whether an error or a notice of the statement could quote a masked column: it names a table that has one, or calls what
    may read any."""
    facts = decision.verdict.sql
    if decision.reached or facts is None:
        return True
    if any(touches_masked(catalog, plan, part) for part in decision.stands_for):
        return True
    if not _CHECKS_LATE.isdisjoint(facts.statements):
        return True
    if facts.may_change_catalog and catalog.may_fire(plan, "", ""):
        return True  # an event trigger
    for part in decision.verdict.objects:
        schema, _, name = part.name.rpartition(".")
        if part.access == "call":
            own = name not in builtin_functions() or name in catalog.own
            if name in TABLE_BY_NAME or (own and catalog.may_read(plan, name)):
                return True
        elif not facts.looks_at_no_row and (
            catalog.may_mask(plan, schema, name, "*")
            or (part.access == "write" and catalog.may_fire(plan, schema, name))
        ):
            return True
    if any(
        name in TABLE_BY_NAME or (catalog.has_function(name) and catalog.may_read(plan, name))
        for name in facts.fields
    ):
        return True
    return "DO" in facts.statements and catalog.code_may_read(plan, decision.text)


def reads_made(catalog: Catalog, decision: Decision) -> bool:
    """Whether a relation stands in the statement that this session made since the snapshot."""
    return any(
        part.access != "call" and catalog.was_made(part.name.rpartition(".")[2])
        for found in (decision, *decision.stands_for)
        for part in found.verdict.objects
    )


def runs_unseen_code(catalog: Catalog, decision: Decision) -> bool:
    """Whether the statement may run code that gives names of its own to statements and cursors: functions, triggers."""
    facts = decision.verdict.sql
    if facts is None or not _UNSEEN.isdisjoint(facts.statements) or facts.may_change_catalog:
        return True
    for part in decision.verdict.objects:
        _, _, name = part.name.rpartition(".")
        if part.access == "call" and (name not in builtin_functions() or name in catalog.own):
            return True
        if part.access == "read" and catalog.may_call(name):
            return True
    if any(catalog.has_function(name) for name in facts.fields):
        return True
    if any(use.act in RETURNS_NAMED for use in facts.names) and decision.reached:
        return True
    return any(runs_unseen_code(catalog, part) for part in decision.stands_for)


__all__ = ["ANYTHING", "CatalogRelations", "masked_columns", "refusal", "runs_unseen_code", "touches_masked"]
