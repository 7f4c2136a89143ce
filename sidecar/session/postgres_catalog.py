"""What OIDs mean: tables, columns, view dependencies and inheritance of one database, and which columns a plan masks.

A snapshot, read in the client's own session through a named statement of ours (design, section 4). What is not in it is masked
while any column mask is in force: unmasked only what is proven clean.
"""

from __future__ import annotations

from sidecar.codecs.postgres.messages import Column
from sidecar.model.verdict import MaskPlan, ValueMask

FIRST_USER_OID = 16384
"""FirstNormalObjectId: lower ones are the system's own."""

STATISTICS = frozenset(
    {
        "most_common_vals",
        "histogram_bounds",
        "most_common_elems",
        "stavalues1",
        "stavalues2",
        "stavalues3",
        "stavalues4",
        "stavalues5",
        "most_common_base_freqs",
    }
)
"""Columns of the planner's statistics that show values of other tables."""

SNAPSHOT_QUERY = b"""
SELECT 'c', c.oid::pg_catalog.text, n.nspname::pg_catalog.text, c.relname::pg_catalog.text,
       a.attnum::pg_catalog.text, a.attname::pg_catalog.text
  FROM pg_catalog.pg_attribute a
  JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) a.attrelid
  JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
 WHERE a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped
   AND c.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
   AND c.relkind OPERATOR(pg_catalog.=) ANY (ARRAY['r','v','m','f','p','S','t']::pg_catalog."char"[])
UNION ALL
SELECT 'v', r.ev_class::pg_catalog.text, d.refobjid::pg_catalog.text,
       d.refobjsubid::pg_catalog.text, '', ''
  FROM pg_catalog.pg_depend d
  JOIN pg_catalog.pg_rewrite r ON r.oid OPERATOR(pg_catalog.=) d.objid
 WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_rewrite'::pg_catalog.regclass
   AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_class'::pg_catalog.regclass
   AND r.ev_class OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid
   AND r.ev_class OPERATOR(pg_catalog.<>) d.refobjid
UNION ALL
SELECT 'i', i.inhrelid::pg_catalog.text, i.inhparent::pg_catalog.text, '', '', '' FROM pg_catalog.pg_inherits i
"""


class Catalog:
    """One database's facts. `known` False: no snapshot could be taken, everything is judged by name and masked if unsure."""

    def __init__(self) -> None:
        self.known = False
        self.version = 0
        """Counts snapshots."""
        self._columns: dict[tuple[int, int], tuple[str, str, str]] = {}
        self._relations: set[int] = set()
        self._view_sources: dict[int, set[tuple[int, int]]] = {}
        self._parents: dict[int, set[int]] = {}
        self._plan: MaskPlan | None = None
        self._masks: dict[tuple[int, int], ValueMask | None] = {}

    def load(self, rows: list[list[bytes | None]]) -> None:
        """Replace all facts by a snapshot's rows."""
        version = self.version
        self.__init__()  # type: ignore[misc]
        self.known, self.version = True, version + 1
        for values in rows:
            kind, first, second, third, fourth, fifth = (
                (value or b"").decode("utf-8", "replace") for value in values
            )
            if kind == "c":
                self._columns[(int(first), int(fourth))] = (second, third, fifth)
                self._relations.add(int(first))
            elif kind == "v":
                self._view_sources.setdefault(int(first), set()).add((int(second), int(third)))
            else:
                self._parents.setdefault(int(first), set()).add(int(second))

    def is_known(self, oid: int) -> bool:
        return oid < FIRST_USER_OID or oid in self._relations

    def mask(
        self, plan: MaskPlan, column: Column, *, derived_reached: bool, trusted: bool = True
    ) -> ValueMask | None:
        """What to do with one result column. `trusted` False: definitions may have changed since the snapshot, so that a view,
        which keeps its OID when it is replaced, may show anything."""
        if column.table_oid == 0:
            by_label = plan.column(None, None, column.name)
            if by_label is not None:
                return by_label
            return plan.derived() if derived_reached else None
        if column.table_oid < FIRST_USER_OID:
            if column.name in STATISTICS or (
                column.attnum and derived_reached and column.name.startswith("stavalues")
            ):
                return plan.derived()
            return plan.column("pg_catalog", None, column.name)
        if self._plan is not plan:
            self._plan = plan
            self._masks = {}
        key = (column.table_oid, column.attnum)
        if key not in self._masks:
            if not self.is_known(column.table_oid) or key not in self._columns:
                return plan.column(None, None, column.name) or plan.derived()
            self._masks[key] = self._resolve(plan, key, frozenset())
        if not trusted and column.table_oid in self._view_sources:
            return self._masks[key] or plan.derived()
        return self._masks[key]

    def _resolve(self, plan: MaskPlan, key: tuple[int, int], seen: frozenset[int]) -> ValueMask | None:
        names = self._columns.get(key)
        oid = key[0]
        if names is None or oid in seen:
            return None if oid < FIRST_USER_OID else plan.derived() if names is None else None
        direct = plan.column(*names)
        if direct is not None:
            return direct
        seen = seen | {oid}
        for parent in self._parents.get(oid, ()):
            for (relation, attnum), (_, _, name) in self._columns.items():
                if relation == parent and name == names[2]:
                    found = self._resolve(plan, (relation, attnum), seen)
                    if found is not None:
                        return found
        for source, attnum in self._view_sources.get(oid, ()):
            if attnum > 0:
                if source >= FIRST_USER_OID and self._resolve(plan, (source, attnum), seen) is not None:
                    return plan.derived()
            elif source in self._relations and any(
                self._resolve(plan, other, seen) is not None for other in self._columns if other[0] == source
            ):
                return plan.derived()  # the view uses whole rows
        return None
